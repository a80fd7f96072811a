"""convert.py export: what transformers loads computes and says what the run does, and imported again it is the run."""

import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import finetune
import formats.export
import sample
from bpe import train as learn
from decoding.stream import prompt_tokens
from formats.tokenizers import ADVERSARIAL
from formats.weights import write_shards
from model import GPTConfig
from runs.run import Run
from tests.bpe_helpers import PROSE
from tests.foreign_folders import command, halve, publish, run_export, run_import, run_of, write_talks
from tests.helpers import error_of, json_lines
from text.tokenizer import BPETokenizer

pytest_plugins = ("tests.sample_runs",)

TALK = [{"role": "user", "content": "the fox"}]
PLAIN = {"qk_norm": False}
CLASSIC = PLAIN | {"position": "learned", "norm": "layernorm", "norm_eps": 1e-5}


def weights_of(folder):
    """All tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.rglob("model*.safetensors")) for name, tensor in
            load_file(path).items()}  # fmt: skip


def assert_same(a, b):
    """The same tensors, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def published(request, tmp_path_factory):
    """A published folder, and the run that import made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    publish(request.param, folder / "theirs")
    return folder / "theirs", run_import(folder / "theirs", folder / "run")


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_import_and_export_and_import_is_the_identity(shards, published, tmp_path, monkeypatch):
    theirs, run = published
    if shards:
        monkeypatch.setattr(formats.export, "write_shards", partial(write_shards, limit=20_000))
    folder = run_export(run.folder, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 3 if shards else (folder / "model.safetensors").is_file()
    assert_same(weights_of(theirs), weights_of(folder))
    again = run_import(folder, tmp_path / "again")
    assert_same(weights_of(run.folder), weights_of(again.folder))
    for name in ("model_config", "fine_tuned", "chat_style", "default_system"):
        assert getattr(again, name) == getattr(run, name)
    first, second = run.tokenizer, again.tokenizer
    for name in ("special_tokens", "vocab_size", "eot_id", "bos_id"):
        assert getattr(first, name) == getattr(second, name)
    assert all(first.encode(text) == second.encode(text) for text in [*ADVERSARIAL, PROSE])


def test_bfloat16_stays_bfloat16(published, tmp_path):
    theirs, _ = published
    half = halve(theirs, tmp_path / "half")
    run = run_import(half, tmp_path / "run")
    assert {tensor.dtype for tensor in weights_of(run.folder).values()} == {torch.bfloat16}
    folder = run_export(run.folder, tmp_path / "out", "--dtype=bfloat16")
    assert_same(weights_of(half), weights_of(folder))
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    whole = run_export(run.folder, tmp_path / "whole")
    assert_same({name: tensor.float() for name, tensor in weights_of(half).items()}, weights_of(whole))


# ---------------------------------------------------------------------------------------------------------------------
# Every class


CONFIGS = {
    "our default": ("Qwen3", {}),
    "few key/value heads": ("Qwen3", {"n_kv_head": 2, "head_dim": 6, "rope_theta": 500.0}),
    "llama": ("Llama", PLAIN | {"head_dim": 10}),
    "qwen2": ("Qwen2", PLAIN | {"qkv_bias": True, "n_kv_head": 2}),
    "mistral": ("Mistral", PLAIN | {"sliding_window": 5}),
    "smollm3": ("SmolLM3", PLAIN | {"nope_every": 2, "n_layer": 4}),
    "gpt2": ("GPT2", CLASSIC | {"bias": True, "mlp": "gelu"}),
    "gpt2, exact, no biases": ("GPT2", CLASSIC | {"mlp": "gelu_exact", "mlp_dim": 40}),
    "gpt2, biases on q, k, v": ("GPT2", CLASSIC | {"mlp": "gelu", "qkv_bias": True, "tie_embeddings": False}),
    "norm head": ("Llama", PLAIN | {"norm_head": True, "tie_embeddings": False}),
    "linear": ("Qwen3", {"rope_scaling": "linear", "rope_factor": 2.0}),
    "llama3": ("Llama", PLAIN | {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original": 16}),
    "yarn": ("Qwen3", {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 16, "rope_high": 32.0}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer(learn([PROSE[:20_000]], 320))


def config_of(options):
    sizes = {"block_size": 64, "vocab_size": 330, "n_layer": 2, "n_head": 4, "n_embd": 32, "mlp_dim": 48}
    return GPTConfig(**sizes | options)


def assert_loads(run, folder):
    """Transformers loads the folder, and computes what the run does."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    idx = torch.arange(45)[None] * 7 % run.tokenizer.vocab_size
    with torch.no_grad():
        expected = run.load_model()(idx)[0]
        torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=1e-4)
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_a_model_of_ours(name, tokenizer, tmp_path):
    kind, options = CONFIGS[name]
    run = run_of(config_of(options), tmp_path / "run", tokenizer)
    folder = run_export(run.folder, tmp_path / "out")
    assert f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}" == type(assert_loads(run, folder)).__name__
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode(PROSE, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(PROSE)
    assert "auto_map" not in (folder / "config.json").read_text() and "imported" in (folder / "README.md").read_text()
    if not options.get("norm_head"):  # it comes back as it was, but for missing biases, which are zeros now
        again = run_import(folder, tmp_path / "again").model_config
        assert again == config_of(options | ({"bias": True, "qkv_bias": False} if kind == "GPT2" else {}))


@pytest.mark.parametrize(("options", "complaint"), [
    ({"position": "alibi"}, "position=alibi"), (PLAIN | {"position": "none"}, "position=none"),
    (PLAIN | {"position": "sinusoidal"}, "position=sinusoidal"), ({"mlp": "relu2"}, "mlp=relu2"),
    ({"norm": "layernorm"}, "norm=layernorm"), ({"causal": False}, "causal=False"),
    ({"sliding_window": 5}, "qk_norm with sliding_window"), ({"qkv_bias": True}, "qk_norm with qkv_bias"),
    ({"bias": True}, "bias=True"), ({"norm_head": True}, "norm_head=True with tie_embeddings=True"),
    (PLAIN | {"qkv_bias": True, "head_dim": 10}, "head_dim=10"), ({"mlp": "geglu"}, "mlp=geglu"),
    (CLASSIC | {"mlp": "gelu", "n_kv_head": 2}, "n_kv_head=2"),
    (CLASSIC | {"mlp": "gelu", "sliding_window": 5}, "sliding_window=5"), ({"n_encoder_layer": 1}, "n_encoder_layer=1"),
    ({"post_norm": True}, "post_norm=True"), (CLASSIC | {"mlp": "gelu", "post_norm": True}, "post_norm=True"),
    (CLASSIC | {"mlp": "gelu", "norm_head": True, "tie_embeddings": False}, "norm_head=True"),
], ids=str)  # fmt: skip
def test_a_config_that_equals_no_class_is_refused_by_name(options, complaint, tokenizer, tmp_path):
    run = run_of(config_of(options), tmp_path / "run", tokenizer)
    message = error_of(command(convert.main, "export", f"--out_dir={run.folder}", f"--to={tmp_path / 'out'}"))
    assert "equals no class of transformers" in message and complaint in message
    assert os.listdir(tmp_path) == ["run"]


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuned runs


def test_an_exported_chat_model_speaks_in_our_template_and_ends_its_answers(talker, tmp_path):
    run = Run.open(talker)
    folder = run_export(talker, tmp_path / "out")
    theirs, tokenizer = assert_loads(run, folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ids == run.template().render(TALK, reply=True)[0]
    options = [f"--out_dir={talker}", f"--prompt={TALK[0]['content']}", "--temperature=0", "--json", "--device=cpu"]
    (line,) = json_lines(command(sample.main, *options))
    idx = torch.tensor([ids])
    found = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert line["finish"] == "eos" and found[0, len(ids) :].tolist() == line["tokens"]
    assert line["tokens"][-1] == run.template().end_id != run.tokenizer.eot_id
    card = (folder / "README.md").read_text()
    assert "fine-tuned on conversations" in card and "validation loss" in card


def test_a_run_with_lora_is_exported_merged(published, tmp_path):
    _, source = published
    (tmp_path / "empty.py").write_text("")
    done = command(
        finetune.main, tmp_path / "empty.py", f"--dataset={write_talks(tmp_path)}", f"--init_from={source.folder}",
        f"--out_dir={tmp_path / 'lora'}", "--lora_rank=2", "--max_iters=4", "--eval_interval=4", "--batch_size=2",
        "--eval_tokens=4", "--device=cpu", "--learning_rate=0.05",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "lora")
    name = "blocks.0.attention.qkv.weight"
    assert not torch.allclose(run.load_model().state_dict()[name], source.load_model().state_dict()[name], atol=1e-2)
    folder = run_export(run.folder, tmp_path / "out")
    assert_loads(run, folder)
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, return_dict=False, add_generation_prompt=True)
    assert ids == run.template().render(TALK, reply=True)[0]
    check_adapter(run, source, folder, tmp_path / "adapter")


def check_adapter(run, source, merged, folder):
    """An adapter holds, matrix by matrix, what the merged export adds to the base model, and peft applies it."""
    done = command(convert.main, "export", f"--out_dir={run.folder}", f"--to={folder}", "--adapter")
    if run.lora.new_rows:
        assert "new tokens, which an adapter of low rank cannot hold" in error_of(done) and not folder.exists()
        return
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, source.origin.source)
    adapter, scale = load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]
    before, after = load_file(Path(source.origin.source) / "model.safetensors"), weights_of(merged)
    corrected = {name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name}
    assert {name.rpartition(".")[2] for name in corrected} == set(config["target_modules"]) and len(corrected) > 6
    for name in corrected:
        A, B = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
        weight = name.removeprefix("base_model.model.") + ".weight"
        torch.testing.assert_close(before[weight] + scale * B @ A, after[weight])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source.origin.source), folder).eval()
    idx = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, run.load_model()(idx)[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
@pytest.mark.parametrize("options", [{}, PLAIN, PLAIN | {"qkv_bias": True}], ids=["qwen3", "llama", "qwen2"])
def test_a_gguf_file_holds_the_rounded_model_and_its_tokenizer(options, dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    vocabulary = BPETokenizer(learn([PROSE], 384))
    config = GPTConfig(vocab_size=390, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, **options)
    run = run_of(config, tmp_path / "run", vocabulary)
    file = run_export(run.folder, tmp_path / "model.gguf", f"--dtype={dtype}")
    again = run_import(file, tmp_path / "again")
    assert again.model_config == run.model_config
    texts = [text for text in ADVERSARIAL if not re.search(r"[\r\n][^\S\r\n]+$", text)]
    assert [again.tokenizer.encode(text) for text in texts] == [vocabulary.encode(text) for text in texts]
    assert again.tokenizer.special_tokens.items() >= vocabulary.special_tokens.items()
    assert prompt_tokens(again.tokenizer, "a") == prompt_tokens(vocabulary, "a")
    q8 = gguf.GGMLQuantizationType.Q8_0
    before, after = run.load_model().state_dict(), again.load_model().state_dict()
    for name, weight in before.items():
        rounded = weight.half().float() if weight.dim() > 1 else weight
        if dtype == "q8_0" and weight.dim() > 1 and weight.size(1) % 32 == 0:
            rounded = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q8), q8))
        torch.testing.assert_close(after[name], rounded, rtol=0, atol=0)


def test_what_a_gguf_file_cannot_hold_is_refused(tmp_path):
    small = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32}
    digits = BPETokenizer(learn([PROSE], 300, pattern="digits"))
    for name, config, tokenizer, complaint in [
        ("gpt2", CLASSIC | {"mlp": "gelu", "bias": True}, BPETokenizer(learn([PROSE], 300)), "not of this gpt2"),
        ("digits", {}, digits, "pattern"),
    ]:
        run = run_of(GPTConfig(vocab_size=300, **small, **config), tmp_path / name, tokenizer)
        done = command(convert.main, "export", f"--out_dir={run.folder}", f"--to={tmp_path / 'x.gguf'}")
        assert complaint in error_of(done) and sorted(os.listdir(tmp_path)) == sorted({"gpt2", name})


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_taken(published, tmp_path):
    _, run = published
    (tmp_path / "mine").write_text("")
    done = command(convert.main, "export", f"--out_dir={run.folder}", f"--to={tmp_path}")
    assert f"{tmp_path} exists already" in error_of(done) and os.listdir(tmp_path) == ["mine"]
    (tmp_path / "empty").mkdir()
    assert (run_export(run.folder, tmp_path / "empty", "--checkpoint=step_00000000") / "config.json").is_file()
    missing = command(convert.main, "export", f"--out_dir={tmp_path / 'nothing'}", f"--to={tmp_path / 'out'}")
    assert "no run in" in error_of(missing) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_what_breaks_off_in_the_middle_leaves_nothing(error, published, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a command that ends ignores further Ctrl-C
    calls = []

    def shards(folder, entries, step):
        def counted(size):
            calls.append(os.listdir(tmp_path))
            if len(calls) == 4:
                raise error

        write_shards(folder, entries, counted)

    monkeypatch.setattr(formats.export, "write_shards", shards)
    done = command(convert.main, "export", f"--out_dir={published[1].folder}", f"--to={tmp_path / 'out'}")
    assert [name.endswith(".tmp") for name in calls[-1]] == [True]  # it was in the middle
    assert os.listdir(tmp_path) == []
    assert (done.returncode, done.stderr) == (130, "interrupted\n") if error is KeyboardInterrupt else error_of(done)


def test_a_damaged_checkpoint_is_not_exported(published, tokenizer, tmp_path):
    run = run_of(config_of({}), tmp_path / "run", tokenizer)
    (path,) = run.folder.rglob("model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = command(convert.main, "export", f"--out_dir={run.folder}", f"--to={tmp_path / 'out'}")
    assert "damaged" in error_of(done) and os.listdir(tmp_path) == ["run"]
