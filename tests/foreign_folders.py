"""Small foreign models as their owners publish them, with weights and a tokenizer; and commands run in this process."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import convert
from common import cli
from formats.source import Foreign
from formats.weights import InMemory, Renaming, Weight
from model import GPT, GPTConfig
from runs.importing import import_run
from runs.run import Run
from tests.bpe_helpers import PROSE
from tests.test_templates import LLAMA3, QWEN2_5
from text.styles import STYLES

EOT = "<|endoftext|>"
LLAMA3_TOKENS = [*STYLES["llama3"].special, "<|end_of_text|>"]
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
# name → (transformers' class, its options, special tokens, the first and the last token of a text, the chat template)
KINDS = {
    "llama": ("LlamaForCausalLM", SIZES, LLAMA3_TOKENS, LLAMA3_TOKENS[0], "<|eot_id|>", LLAMA3),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 16, "tie_word_embeddings": True},
              [EOT, "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", QWEN2_5),
    "gemma": ("GemmaForCausalLM", SIZES | {"head_dim": 12, "pad_token_id": None},
              ["<bos>", "<eos>"], "<bos>", "<eos>", None),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, [EOT], None, EOT, None),
}  # fmt: skip


def command(main, *arguments: object) -> subprocess.CompletedProcess:
    """What a command prints and how it ends, run in this process: a new process each would take a minute."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
        try:
            cli.run_command(main)
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_import(source: object, out_dir: Path, *options: object) -> Run:
    """The run that `convert.py import` makes."""
    done = command(convert.main, "import", source, f"--out_dir={out_dir}", *options)
    assert done.returncode == 0, done.stderr
    return Run.open(out_dir)


def run_export(out_dir: Path, to: Path, *options: object) -> Path:
    """The folder that `convert.py export` writes."""
    done = command(convert.main, "export", f"--out_dir={out_dir}", f"--to={to}", *options)
    assert done.returncode == 0, done.stderr
    return to


def byte_level(special: list[str], begins: str | None = None) -> Tokenizer:
    """A byte-level tokenizer of the package, trained on prose; a text begins with the token `begins`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(PROSE.splitlines(), trainer)
    if begins:
        pair = [(begins, tokenizer.token_to_id(begins))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begins} $A", special_tokens=pair)
    return tokenizer


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Norms away from 1, biases away from 0, all from a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model.eval()


def publish(kind: str, folder: Path, **options: object) -> torch.nn.Module:
    """Write a random model of transformers with its tokenizer, as its owner would; returns the model."""
    name, sizes, special, begins, ends, chat_template = KINDS[kind]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(special, begins), bos_token=begins, eos_token=ends, chat_template=chat_template
    )
    tokenizer.save_pretrained(folder)
    model = getattr(transformers, name)
    config = model.config_class(
        **sizes | options, vocab_size=320, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    found = randomise(model(config))
    found.save_pretrained(folder)
    return found


def halve(source: Path, folder: Path) -> Path:
    """Copy a published folder with its weights in bfloat16."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(source / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def run_of(config: GPTConfig, folder: Path, tokenizer, seed: int = 0) -> Run:
    """A run of ours with a random model of that config."""
    torch.manual_seed(seed)
    weights = {name: weight.detach() for name, weight in randomise(GPT(config), seed).named_parameters()}
    same = Renaming({name: Weight((name,), (len(weight),)) for name, weight in weights.items()})
    return import_run(Foreign("a test", config, InMemory("memory", weights), same, tokenizer), folder)


def write_talks(folder: Path) -> Path:
    """A data set of short conversations."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        rows = [{"instruction": f"one {i}", "output": "two"} for i in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def one_mark(text):
    """The text, with one U+FFFD in place of several side by side."""
    return re.sub("\ufffd+", "\ufffd", text)
