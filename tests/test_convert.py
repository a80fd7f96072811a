"""convert.py import, end to end: what comes in is what its owner published, and every command works on it."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import convert
import finetune
import sample
import train
from bench import real_model
from runs.importing import imported
from runs.run import Run
from tests import baichuan2_reference
from tests.bpe_helpers import PROSE
from tests.foreign_folders import EOT, byte_level, command, halve, one_mark, publish, randomise, run_import, write_talks
from tests.foreign_models import save_baichuan2
from tests.helpers import error_of, json_lines
from tests.test_templates import BAICHUAN2, QWEN
from text.corpus import write_corpus
from text.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent
PROMPT, NEW = "the model of a house", 24
TALK = [{"role": "user", "content": "who are you?"}]
SHORT = ["--max_iters=2", "--eval_interval=2", "--batch_size=2", "--device=cpu"]


# ---------------------------------------------------------------------------------------------------------------------
# Published folders


def transformers_oracle(kind, folder):
    """What transformers itself does with the folder."""
    publish(kind, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def greedy(ids):
        idx = torch.tensor([ids])
        out = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW, do_sample=False,
                             pad_token_id=0)  # fmt: skip
        return out[0, len(ids) :].tolist()

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return SimpleNamespace(
        kind=kind, folder=folder, greedy=greedy, logits=logits, text=tokenizer.decode, chat=lambda talk:
        tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False),
        ids=tokenizer.encode,
    )  # fmt: skip


def baichuan2_oracle(folder):
    """Baichuan 2 by the equations of its report, and its tokenizer by sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    weights = save_baichuan2(folder, alibi=True, vocab_size=600, norm_head=True, model_max_length=64)
    save_file({name: torch.tensor(tensor).float() for name, tensor in weights.items()}, folder / "model.safetensors")
    written, special = io.BytesIO(), ["<reserved_106>", "<reserved_107>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()), model_writer=written, vocab_size=600, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=True,
        minloglevel=2, num_threads=1, control_symbols=special,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    settings = {"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>", "chat_template": BAICHUAN2}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    user, answer = map(processor.piece_to_id, special)

    def logits(ids):
        return torch.tensor(baichuan2_reference.logits(weights, np.array(ids), n_layer=2, n_head=3, alibi=True))

    def greedy(ids):
        new = []
        while len(new) < NEW and new[-1:] != [2]:
            new.append(int(logits([*ids, *new])[-1].argmax()))
        return new

    return SimpleNamespace(
        kind="baichuan2", folder=folder, greedy=greedy, logits=logits, text=processor.decode,
        ids=processor.encode,
        chat=lambda talk: [user, *processor.encode(talk[0]["content"]), answer],
    )  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "baichuan2"])
def model(request, tmp_path_factory):
    """A published folder, what its owner's code does with it, and the run that import made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    oracle = baichuan2_oracle(folder) if request.param == "baichuan2" else transformers_oracle(request.param, folder)
    oracle.run = run_import(folder, folder / "run")
    return oracle


STYLE = {"llama": "llama3", "qwen3": "chatml", "baichuan2": "baichuan2", "gpt2": "plaingpt"}


def sampled(run, *options):
    (line,) = json_lines(command(sample.main, f"--out_dir={run.folder}", "--json", "--device=cpu", *options))
    return line


def test_greedy_text_is_that_of_the_owner(model):
    run = model.run
    assert (run.fine_tuned, run.chat_style) == (model.kind != "gpt2", STYLE[model.kind])
    assert run.default_system == (QWEN if model.kind == "qwen3" else "")
    ids = model.chat(TALK) if run.fine_tuned else model.ids(TALK[0]["content"])
    expected = model.greedy(ids)
    found = sampled(run, f"--prompt={TALK[0]['content']}", "--temperature=0", f"--max_new_tokens={NEW}")
    assert found["tokens"] == expected and len(set(expected)) > 2
    ended = found["finish"] == "eos"
    assert ended == (len(expected) < NEW)
    # sentencepiece writes a U+FFFD for each byte that is no UTF-8, Python one for each broken character.
    assert one_mark(found["text"]) == one_mark(model.text(expected[:-1] if ended else expected))


def test_a_text_has_the_likelihood_that_the_owner_gives_it(model, tmp_path):
    (tmp_path / "text").write_text(PROMPT)
    ids = model.ids(PROMPT)
    expected = model.logits(ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum()
    options = f"--out_dir={model.run.folder}", f"--score={tmp_path / 'text'}", "--device=cpu"
    (found,) = json_lines(command(sample.main, *options, "--json"))
    assert found["tokens"] == len(ids) - 1
    assert found["log_likelihood"] == pytest.approx(expected.item(), rel=1e-4)
    first = f" (the first token, {len(PROMPT.encode()) - found['bytes']} bytes, is only read)"
    assert (first in command(sample.main, *options).stdout) == (found["bytes"] < len(PROMPT.encode()))


def trained(main, run, data, folder, *options):
    """The run that train.py or finetune.py makes of an imported one, in two steps."""
    (folder / "empty.py").write_text("")
    done = command(main, folder / "empty.py", f"--dataset={data}", f"--init_from={run.folder}",
                   f"--out_dir={folder / 'more'}", *SHORT, *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Run.open(folder / "more")


def test_pretraining_goes_on_from_it(model, tmp_path):
    write_corpus(tmp_path, [("train", PROSE), ("val", PROSE[:2000])], model.run.tokenizer, workers=1)
    run = trained(train.main, model.run, tmp_path, tmp_path, "--block_size=32", "--warmup_iters=0")
    assert (run.chat_style, run.origin.source) == (model.run.chat_style, str(model.run.folder))
    before, after = model.run.load_model().state_dict(), run.load_model("latest").state_dict()
    assert all(before[name].shape == after[name].shape for name in before if name != "pos_emb.weight")
    assert not torch.equal(before["tok_emb.weight"], after["tok_emb.weight"])
    assert torch.allclose(before["tok_emb.weight"], after["tok_emb.weight"], atol=0.1)  # it began there


@pytest.mark.parametrize("options", [[], ["--lora_rank=2"]], ids=str)
def test_it_is_fine_tuned_in_its_own_style(model, options, tmp_path):
    run = trained(finetune.main, model.run, write_talks(tmp_path), tmp_path, "--eval_tokens=4", *options)
    assert (run.fine_tuned, run.chat_style) == (True, STYLE[model.kind])
    assert run.model_config.vocab_size == model.run.model_config.vocab_size + 4 * (model.kind == "gpt2")
    if model.kind != "gpt2":
        assert run.template().render(TALK, reply=True)[0] == model.chat(TALK)
    assert sampled(run, "--prompt=one", "--temperature=0", "--max_new_tokens=3")["tokens"]


def test_what_is_computed_from_bfloat16_is_not_rounded_to_it(tmp_path):
    """Gemma's norms are 1 + w, and its embeddings are multiplied by √C."""
    publish("gemma", tmp_path / "theirs")
    half = halve(tmp_path / "theirs", tmp_path / "half")
    run = run_import(half, tmp_path / "run")
    theirs, idx = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(run.load_model()(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    (weights,) = run.folder.rglob("model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in load_file(weights).items()}
    assert kinds["norm.weight"] == torch.float32 and kinds["blocks.0.mlp.up.weight"] == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


def save_nanogpt(path, vocab_size, bias=True):
    """A checkpoint as nanoGPT's train.py writes it with torch.compile; returns GPT-2 with the same weights."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=4, activation_function="gelu",
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = randomise(GPT2LMHeadModel(config))
    for name, tensor in theirs.state_dict().items():
        if name.endswith(".bias") and not bias:
            tensor.zero_()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 holds these as (in, out)
    weights = {name: tensor.T.contiguous() if name.endswith(linear) else tensor
               for name, tensor in theirs.state_dict().items() if bias or not name.endswith(".bias")}  # fmt: skip
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "bias": bias, "vocab_size": vocab_size}
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "optimizer": {"state": {}},
        "model_args": args | {"dropout": 0.0}, "iter_num": 5, "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3},
    }  # fmt: skip
    torch.save(content, path)
    return theirs


CHARACTERS = sorted({*"\n !$&',-.3:;?", *map(chr, range(65, 91)), *map(chr, range(97, 123))})


def save_meta(path):
    ids = {character: i for i, character in enumerate(CHARACTERS)}
    path.write_bytes(pickle.dumps({"vocab_size": 65, "itos": {i: c for c, i in ids.items()}, "stoi": ids}))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_nanogpts_checkpoint_is_a_gpt2_with_the_exact_gelu(bias, tmp_path):
    theirs = save_nanogpt(tmp_path / "ckpt.pt", 65, bias)
    save_meta(tmp_path / "meta.pkl")
    run = run_import(tmp_path / "ckpt.pt", tmp_path / "run")
    assert run.model_config.bias == bias
    assert isinstance(run.tokenizer, CharTokenizer) and run.tokenizer.encode("\n aZ") == [0, 1, 39, 38]
    idx = torch.arange(30)[None] * 7 % 65
    with torch.no_grad():
        torch.testing.assert_close(run.load_model()(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_nanogpts_vocabulary_is_asked_for_and_may_be_given(tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", 65)
    done = command(convert.main, "import", tmp_path / "ckpt.pt", f"--out_dir={tmp_path / 'run'}")
    assert "--tokenizer=nanoGPT/data/shakespeare_char/meta.pkl" in error_of(done)
    save_meta(tmp_path / "other.pkl")
    run = run_import(tmp_path / "ckpt.pt", tmp_path / "run", f"--tokenizer={tmp_path / 'other.pkl'}")
    assert run.tokenizer.decode([39, 38]) == "aZ"
    save_nanogpt(tmp_path / "ckpt.pt", 60)
    done = command(convert.main, "import", tmp_path / "ckpt.pt", f"--tokenizer={tmp_path / 'other.pkl'}")
    assert "embeddings for 60 tokens, and its tokenizer has 65" in error_of(done)


class Runs:
    """Pickled, it is a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["ckpt.pt", "meta.pkl"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(where, tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", 65)
    save_meta(tmp_path / "meta.pkl")
    evil = Runs(tmp_path / "made")
    if where == "ckpt.pt":
        torch.save({"model": evil, "model_args": {}}, tmp_path / where)
    else:
        (tmp_path / where).write_bytes(pickle.dumps({"stoi": evil}))
    done = command(convert.main, "import", tmp_path / "ckpt.pt", f"--out_dir={tmp_path / 'run'}")
    assert "could run code" in error_of(done) and where in error_of(done)
    assert not (tmp_path / "made").exists() and not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "made").exists()  # it would have


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path):
    """A GGUF file of a small Llama as llama.cpp's converter writes it, in three types of numbers."""
    gguf = pytest.importorskip("gguf")
    C, H, K, M, L = 64, 4, 2, 96, 2
    content = json.loads(byte_level([EOT]).to_str())["model"]
    tokens = list(content["vocab"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(600)
    writer.add_embedding_length(C)
    writer.add_block_count(L)
    writer.add_feed_forward_length(M)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == EOT else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), C), "output": (len(tokens), C), "output_norm": (C,)}
    for i in range(L):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (C,), "attn_q": (C, C), "attn_k": (C // H * K, C), "attn_v": (C // H * K, C),
            "attn_output": (C, C), "ffn_norm": (C,), "ffn_gate": (M, C), "ffn_up": (M, C), "ffn_down": (C, M),
        }.items()}  # fmt: skip
    for name, shape in shapes.items():
        weight = rng.normal(1 if len(shape) == 1 else 0, 0.2, shape).astype(np.float32)
        if heads := {"attn_q": H, "attn_k": K}.get(name.split(".")[-1]):  # llama.cpp's order of channels
            weight = weight.reshape(heads, 2, -1, C).swapaxes(1, 2).reshape(shape)
        kind = "Q8_0" if "ffn" in name and len(shape) == 2 else "F16" if name.endswith(("_q", "_output")) else "F32"
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_transformers_reads_from_it(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    run = run_import(tmp_path / "tiny.gguf", tmp_path / "run")
    assert (run.model_config.rope_theta, run.model_config.norm_eps, run.tokenizer.eot_id) == (500.0, 1e-5, 0)
    assert run.tokenizer.encode(PROSE) == tokenizer.encode(PROSE, add_special_tokens=False, split_special_tokens=True)
    idx = torch.arange(60)[None] * 7 % 320
    with torch.no_grad():
        torch.testing.assert_close(run.load_model()(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    (weights,) = (run.folder / "checkpoints").glob("*/model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in load_file(weights).items()}
    assert kinds["blocks.0.attention.out.weight"] == torch.float16
    assert kinds["blocks.0.mlp.up.weight"] == kinds["blocks.0.attention.qkv.weight"] == torch.float32
    monkeypatch.setattr(sys, "argv", ["real_model.py", str(run.folder), str(tmp_path / "tiny.gguf"), "--new=3"])
    real_model.main()
    printed = capsys.readouterr().out
    assert printed.count("same ids |") == 6 and printed.count("15 of 15 texts the same") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    publish("qwen3", folder)
    return folder


def test_an_out_dir_that_holds_something_is_refused(published, tmp_path):
    (tmp_path / "mine").write_text("")
    done = command(convert.main, "import", published, f"--out_dir={tmp_path}")
    assert f"{tmp_path} exists already" in error_of(done) and os.listdir(tmp_path) == ["mine"]
    (tmp_path / "empty").mkdir()
    assert run_import(published, tmp_path / "empty").load_model()


def test_a_truncated_shard_leaves_nothing(published, tmp_path):
    whole = (published / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in published.glob("*.json"):
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(whole[:-100])
    done = command(convert.main, "import", broken, f"--out_dir={tmp_path / 'run'}")
    assert "not a whole safetensors file" in error_of(done) and os.listdir(tmp_path) == ["broken"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_what_breaks_off_in_the_middle_leaves_nothing(error, published, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a command that ends ignores further Ctrl-C
    calls = []

    def read(*arguments):
        calls.append(os.listdir(tmp_path))
        if len(calls) == 4:
            raise error
        return original(*arguments)

    original = convert.import_run.__globals__["read_weight"]
    monkeypatch.setitem(convert.import_run.__globals__, "read_weight", read)
    done = command(convert.main, "import", published, f"--out_dir={tmp_path / 'run'}")
    assert [name.endswith(".tmp") for name in calls[-1]] == [True]  # it was in the middle
    assert os.listdir(tmp_path) == []
    assert (done.returncode, done.stderr) == (130, "interrupted\n") if error is KeyboardInterrupt else error_of(done)


# Two imports in a process of their own: while files may have 50,000 bytes only, and without a limit, of how much memory
TWO_IMPORTS = """
import resource, sys
from contextlib import suppress
from common import cli
import convert
def memory(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))
small, large, folder = sys.argv[1:]
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
sys.argv[1:] = ["import", small, "--out_dir=" + folder + "/small"]
with suppress(SystemExit):
    cli.run_command(convert.main)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
before = memory("VmRSS")
sys.argv[1:] = ["import", large, "--out_dir=" + folder + "/large"]
convert.main()
print("KiB", memory("VmHWM") - before)
"""


def publish_large(folder):
    """A folder of 250 MB in few tensors; returns the size of the largest in bytes."""
    C, V, M = 1024, 24_000, 4096
    publish("llama", folder)
    content = json.loads((folder / "config.json").read_text())
    content |= {"hidden_size": C, "vocab_size": V, "num_hidden_layers": 1, "intermediate_size": M, "head_dim": 256}
    (folder / "config.json").write_text(json.dumps(content))
    layer = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (C // 2, C), "self_attn.v_proj": (C // 2, C),
             "self_attn.o_proj": (C, C), "mlp.gate_proj": (M, C), "mlp.up_proj": (M, C), "mlp.down_proj": (C, M),
             "input_layernorm": (C,), "post_attention_layernorm": (C,)}  # fmt: skip
    shapes = {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (V, C), "lm_head": (V, C), "model.norm": (C,)}
    save_file({f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return 4 * V * C


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory of a process there")
def test_a_full_disk_leaves_nothing_and_an_import_needs_the_memory_of_one_tensor(published, tmp_path):
    largest, out = publish_large(tmp_path / "published"), tmp_path / "out"
    arguments = [published, tmp_path / "published", out]
    done = subprocess.run(
        [sys.executable, "-c", TWO_IMPORTS, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1, done.stderr
    assert "model.safetensors: File too large; free some space there" in done.stderr
    assert os.listdir(out) == ["large"]
    used = 1024 * int(done.stdout.split("KiB")[1])
    assert 0.9 * largest < used < 1.3 * largest, f"{used / largest:.2f} times the largest tensor"


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def test_init_from_takes_a_name_of_the_hub_and_imports_it_once(tmp_path, monkeypatch):
    publish("gpt2", tmp_path / "published")
    asked = []

    def fetched(name, **patterns):
        asked.append(name)
        return str(tmp_path / "published")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    write_talks(Path("talks"))
    Path("empty.py").write_text("")
    for name in ("gpt2", "gpt2", "hf:gpt2", "hf:some/one"):
        done = command(finetune.main, "empty.py", f"--init_from={name}", "--dataset=talks", "--out_dir=out/tuned",
                       "--eval_tokens=4", *SHORT)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Run.open("out/tuned").origin.source == ("out/some_one" if "some" in name else "out/gpt2")
    assert asked == ["gpt2", "some/one"]
    assert Run.open("out/gpt2").origin.source == "hf:gpt2"
    write_corpus(Path("corpus"), [("train", PROSE), ("val", PROSE[:2000])], Run.open("out/gpt2").tokenizer, workers=1)
    done = command(train.main, "empty.py", "--init_from=gpt2", "--dataset=corpus", "--out_dir=out/b", *SHORT)
    assert done.returncode == 0, done.stderr


def test_of_two_processes_that_import_at_once_one_waits_for_no_one_and_both_get_the_run(tmp_path, monkeypatch):
    publish("gpt2", tmp_path / "published")
    asked = []

    def fetched(name, **patterns):
        asked.append(name)
        if len(asked) == 1:  # meanwhile another process imports it too, and ends first
            imported(f"hf:{name}")
        return str(tmp_path / "published")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    run, _ = imported("gpt2")
    assert len(asked) == 2 and os.listdir("out") == ["gpt2"] and run.load_model()


def test_without_the_network_or_the_package_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(name, **patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    for main, arguments in ((convert.main, ["import", "hf:a/b"]), (finetune.main, ["--init_from=hf:a/b"])):
        message = error_of(command(main, *arguments))
        assert "cannot fetch a/b from the Hugging Face Hub (ConnectionError: no route to host)" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error_of(command(train.main, "--init_from=gpt2"))
    assert not (tmp_path / "out").exists()
    assert "is written hf:a/b" in error_of(command(convert.main, "import", "a/b"))
