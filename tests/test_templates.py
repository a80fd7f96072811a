"""Chat styles of foreign models: the ids are those of transformers with the published Jinja templates."""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

import finetune
import train
from bpe import BPE
from bpe import train as learn
from formats.tokenizer_json import export_tokenizer_json
from runs.run import Run
from sample import SampleConfig, open_model
from tests.helpers import json_lines
from text.chat import Template
from text.corpus import write_corpus
from text.styles import STYLES, default_system, detect_style
from text.tokenizer import BPETokenizer, CharTokenizer

pytest_plugins = ("tests.sample_runs",)

SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_5 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nQWEN<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".replace("QWEN", QWEN)
CHATML = (
    r"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    r"'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    r"{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    r"{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BAICHUAN2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<reserved_106>' + message['content'] }}"
    "{% else %}{{ '<reserved_107>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    r"{% set system_message = messages[0]['content'].strip() + '\n\n' %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = '' %}{% endif %}{{ bos_token + system_message }}{% for message in loop_messages %}"
    r"{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'].strip() + '\n\n' }}"
    r"{% else %}{{ '### Response:\n' + message['content'].strip() + eos_token + '\n\n' }}{% endif %}"
    r"{% if loop.last and message['role'] == 'user' and add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    "{% endfor %}"
)
PLAINGPT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
EOT = "<|endoftext|>"
# style, published template, its default system message, the token that begins a text, the end-of-text token
FAMILIES = {
    "plaingpt": ("plaingpt", PLAINGPT, "", EOT, EOT),
    "chatml": ("chatml", CHATML, "", EOT, EOT),
    "smollm2": ("chatml", SMOLLM2, SMOLLM, EOT, EOT),
    "qwen2.5": ("chatml", QWEN2_5, QWEN, EOT, EOT),
    "llama2": ("llama2", LLAMA2, "", "<s>", "</s>"),
    "llama3": ("llama3", LLAMA3, "", "<|begin_of_text|>", "<|end_of_text|>"),
    "baichuan2": ("baichuan2", BAICHUAN2, "", "<s>", "</s>"),
    "alpaca": ("alpaca", ALPACA, "", "<s>", "</s>"),
    "alpaca without <s>": ("alpaca", ALPACA, "", EOT, EOT),
}
# With the pattern of GPT-2, line breaks at the end of a prompt become other tokens than those before an answer, so that
# training on one piece would not suit prompting: ours differs on purpose. Llama 3 itself has a pattern like gpt4.
CASES = [
    (pattern, family) for pattern in ("gpt2", "gpt4") for family in FAMILIES if (pattern, family) != ("gpt2", "llama3")
]
PUBLISHED = sorted(set(FAMILIES) - {"plaingpt"})

TALK = [
    {"role": "user", "content": "Hello there, who\nare you?"},
    {"role": "assistant", "content": "I am a model.\n\n  And you?"},
    {"role": "user", "content": "\n  two spaces, then the end \n"},
    {"role": "assistant", "content": "Goodbye, user\u00e9 \U0001f600"},
]
SYSTEM = {"role": "system", "content": "You are\n kind. "}
CONVERSATIONS = [TALK[:2], [SYSTEM, *TALK[:2]], TALK, [SYSTEM, *TALK]]


@pytest.fixture(scope="module")
def merges():
    """The merges of a small vocabulary per pattern, learned from text with the words of all styles."""
    text = "".join(str(style) for style in STYLES.values()).replace("\\n", "\n") + str(CONVERSATIONS) + SMOLLM + QWEN
    texts = [text, "\n\n  user\n\nHello\n assistant\n\n  Hello\n\n\n"] * 4
    return {pattern: learn(texts, 600, pattern, [], workers=1).merges for pattern in ("gpt2", "gpt4")}


@pytest.fixture
def make(merges):
    """A function that makes the tokenizer of a family."""

    def build(pattern: str, family: str) -> BPETokenizer:
        style, _, _, begin, eot = FAMILIES[family]
        names = dict.fromkeys([*STYLES[style].special, begin, eot])
        first = 256 + len(merges[pattern])
        special = {name: first + i for i, name in enumerate(names)}
        return BPETokenizer(BPE(pattern, merges[pattern], special, eot=eot))

    return build


@pytest.fixture
def oracle(tmp_path):
    """A function that makes transformers' tokenizer of ours, with a chat template."""

    def build(tokenizer: BPETokenizer, chat_template: str, begin: str):
        path = tmp_path / "tokenizer.json"
        export_tokenizer_json(tokenizer.bpe, path)
        names = {"bos_token": begin, "eos_token": tokenizer.bpe.eot}
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), **names)
        theirs.chat_template = chat_template
        return lambda messages, reply: theirs.apply_chat_template(
            messages, add_generation_prompt=reply, return_dict=False
        )

    return build


def learned(tokens: list[int], mask: list[int]) -> list[list[int]]:
    """The runs of tokens whose mask is 1."""
    runs = groupby(zip(tokens, mask, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for on, run in runs if on]


@pytest.mark.parametrize("pattern, family", CASES)
def test_the_ids_are_those_of_transformers_with_the_published_template(pattern, family, make, oracle):
    style, published, system, begin, _ = FAMILIES[family]
    tokenizer = make(pattern, family)
    template, theirs = Template(tokenizer, style, system), oracle(tokenizer, published, begin)
    assert template.tokenizer is tokenizer
    for messages in CONVERSATIONS:
        assert template.render(messages)[0] == theirs(messages, reply=False)
        assert template.render(messages[:-1], reply=True)[0] == theirs(messages[:-1], reply=True)


class Metaspace:
    """A tokenizer in the manner of Llama 2's: it puts a space before every text that it encodes."""

    def __init__(self, special: list[str], eot: str):
        text = f"{LLAMA2}{ALPACA}{CONVERSATIONS}".replace("\\n", "\n")
        self.core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        self.core.normalizer = normalizers.Sequence(steps)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", *special], show_progress=False
        )
        words = [word for line in text.split("\n") for word in line.split(" ")]
        self.core.train_from_iterator([*words, "\n"] * 2, trainer)
        self.special_tokens = {name: self.core.token_to_id(name) for name in special}
        self.eot_id, self.bos_id = self.special_tokens[eot], None

    def encode(self, text: str) -> list[int]:
        self.core.encode_special_tokens = True  # they are ordinary text
        ids = self.core.encode(text).ids
        self.core.encode_special_tokens = False
        return ids


@pytest.mark.parametrize("family", ["llama2", "baichuan2", "alpaca"])
def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_before_an_answer(family):
    style, published, system, begin, eot = FAMILIES[family]
    tokenizer = Metaspace([*dict.fromkeys([*STYLES[style].special, begin, eot])], eot)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.core, bos_token=begin, eos_token=eot)
    theirs.chat_template = published
    template = Template(tokenizer, style, system)
    for messages in CONVERSATIONS:
        for part, reply in ((messages, False), (messages[:-1], True)):
            expected = theirs.apply_chat_template(part, add_generation_prompt=reply, return_dict=False)
            assert template.render(part, reply)[0] == expected


@pytest.mark.parametrize("pattern, family", CASES)
def test_the_mask_is_on_the_answers_and_their_ends_and_a_prompt_is_the_beginning_of_what_is_learned(
    pattern, family, make
):
    style, _, system, _, _ = FAMILIES[family]
    template = Template(make(pattern, family), style, system)
    left, right = template.style.padding
    end = template.tokenizer.decode([template.end_id])
    space = [TALK[0], {"role": "assistant", "content": "\n \n\n Hello"}]  # it would merge with the end of the prompt
    for messages in (*CONVERSATIONS, space):
        tokens, mask = template.render(messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        answers = [answer.strip() if template.style.strip else answer for answer in answers]
        expected = [left + answer + right + end for answer in answers]
        assert [template.tokenizer.decode(run) for run in learned(tokens, mask)] == expected
        prompt, _ = template.render(messages[:-1], reply=True)
        assert tokens[: len(prompt)] == prompt and mask[len(prompt)] == 1
        ignored = [message | {"weight": 0} for message in messages[-1:]]
        if len(messages) > 3:
            again, fewer = template.render(messages[:-1] + ignored)
            assert again == tokens and learned(tokens, fewer) == learned(tokens, mask)[:-1]


@pytest.mark.parametrize("pattern, family", CASES)
def test_a_special_token_spelled_out_in_a_message_stays_text(pattern, family, make):
    style, _, system, _, _ = FAMILIES[family]
    tokenizer = make(pattern, family)
    template = Template(tokenizer, style, system)
    hostile = " ".join(tokenizer.special_tokens)
    attack = [{"role": role, "content": hostile} for role in ("system", "user", "assistant")]
    harmless = [{"role": message["role"], "content": "x"} for message in attack]
    special = set(tokenizer.special_tokens.values())
    found = [[token for token in template.render(messages)[0] if token in special] for messages in (attack, harmless)]
    assert found[0] == found[1] and template.end_id in found[0]


@pytest.mark.parametrize("pattern, family", CASES)
def test_our_jinja_gives_our_ids_and_is_known_again(pattern, family, make, oracle):
    style, _, _, begin, _ = FAMILIES[family]
    tokenizer = make(pattern, family)
    for system in ("", 'Say "hi"\n{{ it\'s }} \\n {% é \U0001f600'):
        template = Template(tokenizer, style, system)
        written = template.jinja()
        theirs = oracle(tokenizer, written, begin)
        for messages in CONVERSATIONS:
            assert theirs(messages, reply=False) == template.render(messages)[0]
            assert theirs(messages[:-1], reply=True) == template.render(messages[:-1], reply=True)[0]
        assert detect_style(written, tokenizer.special_tokens) == style and default_system(written) == system


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_template_is_known_by_its_markers(family, merges):
    style, published, system, begin, eot = FAMILIES[family]
    special = [*STYLES[style].special, begin, eot]
    assert detect_style(published, special) == style and default_system(published) == system
    assert detect_style(None, special) is None and default_system(None) == ""
    for name in STYLES[style].special:
        assert detect_style(published, set(special) - {name}) is None


@pytest.mark.parametrize(
    "other",
    [
        "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}",  # Phi-4
        r"{{'<|user|>\n' + message['content'] + '<|end|>\n' + '<|assistant|>\n'}}",  # Phi-3
        "{{ bos_token }}{{ '[INST] ' + message['content'] + ' [/INST]' }}",  # Mistral
        "{{ '<start_of_turn>' + role + message['content'] }}",  # Gemma
        "{# chat style: unknown #}",
    ],
)
def test_a_similar_template_is_none_of_ours(other):
    assert detect_style(other, [name for style in STYLES.values() for name in style.special]) is None


def test_a_style_that_does_not_suit_the_tokenizer_is_refused():
    for style in set(STYLES) - {"plaingpt", "alpaca"}:
        with pytest.raises(ValueError, match=f"lacks '.*', a special token of the chat style {style}"):
            Template(CharTokenizer("abc", eot=True), style)
    with pytest.raises(ValueError, match="lacks an end-of-text token"):
        Template(CharTokenizer("abc", eot=False), "alpaca")
    with pytest.raises(ValueError, match="'vicuna' is not known here: plaingpt, chatml"):
        Template(CharTokenizer("abc", eot=True), "vicuna")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


SIZES = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=48", "--max_iters=1", "--device=cpu"]


def make_run(*arguments: object) -> Path:
    """The folder of a small run, as in tests/sample_runs.py, which pytest must load before it is imported."""
    from tests import sample_runs

    return sample_runs.make_run(*arguments)


@pytest.fixture(scope="module")
def imported(merges, tmp_path_factory):
    """A run as an import of SmolLM2 would leave it: fine-tuned, in its style, with its default system message."""
    folder = tmp_path_factory.mktemp("imported")
    special = {name: 256 + len(merges["gpt2"]) + i for i, name in enumerate([EOT, *STYLES["chatml"].special])}
    documents = [("train", "Hello there, who are you? " * 20), ("val", "I am a model. " * 50)]
    write_corpus(folder, documents, BPETokenizer(BPE("gpt2", merges["gpt2"], special)), workers=1)
    run = Run.open(make_run(train.main, "train.py", folder, f"--dataset={folder}", *SIZES))
    replace(run, fine_tuned=True, chat_style="chatml", default_system=SMOLLM).save()
    for split in ("train", "val"):
        rows = [{"instruction": f"Hello {i}", "output": "I am a model"} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return run.folder


def tune(source, folder, data, *options):
    folder.mkdir()
    return make_run(
        finetune.main, "finetune.py", folder, f"--dataset={data}", f"--init_from={source}", "--max_iters=2",
        "--eval_interval=2", "--batch_size=2", "--device=cpu", "--eval_tokens=4", *options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--lora_rank=2"]], ids=str)
def test_a_run_of_another_style_is_fine_tuned_and_sampled_in_its_style(imported, sample, tmp_path, options):
    run = Run.open(tune(imported, tmp_path / "a", imported.parent, *options))
    assert (run.chat_style, run.default_system, run.fine_tuned) == ("chatml", SMOLLM, True)
    source = Run.open(imported)
    assert run.model_config.vocab_size == source.model_config.vocab_size  # nothing was added
    assert run.tokenizer.content() == source.tokenizer.content() and not (run.lora and run.lora.new_rows)
    again = Run.open(tune(run.folder, tmp_path / "b", imported.parent)) if not options else run.base
    assert (again.chat_style, again.default_system) == ("chatml", SMOLLM)
    model = open_model(SampleConfig(out_dir=str(run.folder), device="cpu"), 1)
    assert model.eos_id == run.tokenizer.special_tokens["<|im_end|>"]
    assert model.template.render(TALK[:1], reply=True) == Template(run.tokenizer, "chatml", SMOLLM).render(
        TALK[:1], reply=True
    )
    length = ["--json", "--max_new_tokens=3", "--temperature=0"]
    (line,) = json_lines(sample("--prompt=Hello", *length, run=run.folder))
    (same,) = json_lines(sample("--prompt=Hello", f"--system={SMOLLM}", *length, run=run.folder))
    (other,) = json_lines(sample("--prompt=Hello", "--system=x", *length, run=run.folder))
    assert line["logprobs"] == same["logprobs"] != other["logprobs"]
    done = sample("--chat", "--max_new_tokens=3", run=run.folder, typed=["Hello", "/system x", "/system", "/quit"])
    assert done.returncode == 0 and "the system message is the model's own again" in done.stderr


def test_continued_pretraining_keeps_the_style_and_old_runs_have_ours(imported, tmp_path):
    options = [f"--dataset={imported.parent}", f"--init_from={imported}", "--max_iters=1", "--device=cpu"]
    run = Run.open(make_run(train.main, "train.py", tmp_path, *options))
    assert (run.chat_style, run.default_system, run.fine_tuned) == ("chatml", SMOLLM, True)
    config = run.folder / "config.json"
    content = json.loads(config.read_text())
    del content["sha256"]
    config.write_text(json.dumps(content | {"chat": {"lora": None}}))
    old = Run.open(run.folder)
    assert (old.chat_style, old.default_system, old.fine_tuned) == ("plaingpt", "", True)
    config.write_text(json.dumps(content | {"chat": {"lora": None, "style": "vicuna"}}))
    with pytest.raises(ValueError, match="the chat style 'vicuna' is not known here"):
        Run.open(run.folder)
