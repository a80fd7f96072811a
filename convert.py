"""Foreign models in, our models out.

    python convert.py import SmolLM2-135M-Instruct.gguf --out_dir=out/smol
    python convert.py import hf:Qwen/Qwen3-0.6B
    python convert.py export --out_dir=out/pydocs --to=pydocs-hf
    python convert.py export --out_dir=out/pydocs --to=pydocs.gguf
    python convert.py export --out_dir=out/mine --to=adapter --adapter

`import` reads a model folder in Hugging Face's layout, a GGUF file, nanoGPT's ckpt.pt or a name of the Hub. It writes a
run, which sample.py, finetune.py and train.py --init_from use like any other. `export` writes a folder that
transformers loads without code of ours, or a GGUF file for llama.cpp.
"""

from common import cli  # first: it makes Ctrl-C one line even while the modules below are imported

# isort: split

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from common.files import check_new, making
from formats.export import export_weights, target, write_folder
from formats.gguf import vocabulary, write_gguf
from formats.peft import export_adapter
from formats.source import HUB, open_source
from runs.checkpoint import FILES, read_state, verify
from runs.importing import default_folder, entries, import_run
from runs.run import IMPORT, Run
from training.device import DTYPES
from training.plan import count_weights


def read_options(argv: list[str]) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("import", help="make a run of a foreign model")
    sub.add_argument("source", help="a model's folder, a .gguf file, nanoGPT's ckpt.pt, or hf:NAME on the Hub")
    sub.add_argument("--out_dir", help="the run's folder, a new one; default: out/ and the source's name")
    sub.add_argument("--tokenizer", default="", help="a tokenizer, or nanoGPT's meta.pkl, in place of the model's own")
    sub.add_argument("--ignore", default="", metavar="FIELD,…", help="fields of config.json that you know are harmless")
    sub = commands.add_parser("export", help="write a folder that transformers loads")
    sub.add_argument("--out_dir", required=True, help="the run to export")
    sub.add_argument("--to", required=True, help="a new folder for transformers, or a new file x.gguf for llama.cpp")
    sub.add_argument("--checkpoint", default="best", help="best | latest | a name such as step_00001000")
    sub.add_argument("--dtype", choices=[*DTYPES, "q8_0"], help="of the weights; default: float32 in a folder, "
                     "float16 in a GGUF file (q8_0, numbers of 8 bits, is for GGUF files only)")  # fmt: skip
    sub.add_argument("--adapter", action="store_true", help="of a run with LoRA, write only the corrections, for peft")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Import


def import_source(options: argparse.Namespace) -> None:
    """Import the source, and say what came in and how to use it."""
    folder = Path(options.out_dir) if options.out_dir else default_folder(options.source)
    check_new(folder, "--out_dir")
    foreign = open_source(options.source, options.tokenizer, tuple(filter(None, options.ignore.split(","))))
    with progress("importing", sum(entry.size for entry in entries(foreign))) as step:
        run = import_run(foreign, folder, step)
    config = run.model_config
    if run.fine_tuned and run.chat_style in ("chatml", "llama3"):
        foreign.notes.append("of its chat template, tools, thoughts and dates are left out")
    if foreign.chat_template and not run.fine_tuned:
        foreign.notes.append("its chat template is of no style that is known here: it is a base model here, and "
                             "finetune.py teaches it our own style")  # fmt: skip
    for line in foreign.notes:
        print(f"note: {line}")
    print(
        f"{folder}: {count_weights(config):,} weights, {config.n_layer} layers, context {config.block_size:,}, "
        f"{run.tokenizer.vocab_size:,} tokens" + (f", chats in the style {run.chat_style}" if run.fine_tuned else "")
    )
    use = "--chat" if run.fine_tuned else "--prompt=..."
    print(f"try it: python sample.py --out_dir={shlex.quote(str(folder))} {use}")


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export_run(options: argparse.Namespace) -> None:
    """Export the run to a new folder or GGUF file, whole or not at all."""
    run, path = Run.open(options.out_dir), Path(options.to)
    check_new(path, "--to")
    gguf = path.suffix.lower() == ".gguf"
    default, allowed = ("float16", ("float16", "q8_0")) if gguf else ("float32", tuple(DTYPES))
    if options.adapter and (gguf or options.dtype):
        raise ValueError("--adapter writes a folder, in the precision of the corrections: leave --dtype and .gguf out")
    if options.dtype and options.dtype not in allowed:
        raise ValueError(f"{path} cannot be written in {options.dtype}; --dtype is one of {', '.join(allowed)}")
    checkpoint = run.checkpoint(options.checkpoint)
    with making(path) as temporary:
        if options.adapter:
            what = write_adapter(run, checkpoint, temporary)
        else:
            what = write_model(run, checkpoint, temporary, options.dtype or default, gguf)
    print(f"{path}: {what}")


def write_model(run: Run, checkpoint: Path, path: Path, dtype: str, gguf: bool) -> str:
    """Write the whole model, as a GGUF file or as a folder for transformers; returns what it is, in words."""
    with weights_of(run, checkpoint) as read:
        content, entries = export_weights(run.model_config, read, torch.float32 if gguf else DTYPES[dtype])
        with progress("exporting", sum(entry.size for entry in entries)) as step:
            if gguf:
                fields = vocabulary(run.tokenizer, run.model_config.vocab_size, **chat_of(run))
                write_gguf(path, content, entries, fields, {"float16": "F16", "q8_0": "Q8_0"}[dtype], step)
                return f"a {content['model_type']} in {dtype}, for llama.cpp and what is built on it"
            path.mkdir()
            card = model_card(run, checkpoint)
            write_folder(path, content, entries, run.tokenizer, card, step=step, **chat_of(run))
    return f"a {content['architectures'][0]} in {dtype}, which transformers' AutoModelForCausalLM loads"


def write_adapter(run: Run, checkpoint: Path, path: Path) -> str:
    """Write the corrections of a run with LoRA for peft; returns what they are, in words. ValueError for other runs."""
    if not run.lora:
        raise ValueError(f"{run.folder} has no LoRA corrections: leave --adapter out")
    if run.lora.new_rows:
        raise ValueError(f"{run.folder} has also trained {len(run.lora.new_rows)} new tokens, which an adapter of low "
                         "rank cannot hold: leave --adapter out, which merges all corrections")  # fmt: skip
    verify(checkpoint)
    path.mkdir()
    base = base_of_adapter(run)
    with safe_open(checkpoint / FILES[0], framework="pt") as file:
        export_adapter(path, run.model_config, run.lora.rank, run.lora.alpha, run.lora.targets, base, file.get_tensor)
    return f"an adapter of rank {run.lora.rank}, which peft applies to {base}"


def base_of_adapter(run: Run) -> str:
    """What peft can load the base model from. Raises ValueError where its tensors are not named as an adapter's."""
    base, kind = run.base, target(run.model_config)
    source, model_type = base.origin.source, base.settings.get("model_type")
    hub = source.startswith(HUB)
    if base.task != IMPORT or model_type != kind or not (hub or (Path(source) / "config.json").is_file()):
        raise ValueError(
            f"peft loads its base through transformers, as a {kind}, and the base of {run.folder} ({source}) is no "
            "such folder or model of the Hub: leave --adapter out, which merges the corrections"
        )
    return source.removeprefix(HUB)


@contextmanager
def weights_of(run: Run, checkpoint: Path) -> Iterator[Callable[[str], Tensor | None]]:
    """Yield a function that reads one weight of the checkpoint; of a run with LoRA, the corrected weight."""
    if run.lora:
        model = dict(run.load_model(checkpoint.name).named_parameters())
        yield lambda name: model[name].detach() if name in model else None
        return
    verify(checkpoint)
    with safe_open(checkpoint / FILES[0], framework="pt") as file:
        names = set(file.keys())
        yield lambda name: file.get_tensor(name) if name in names else None


def chat_of(run: Run) -> dict:
    """What an exported chat model needs: its template as Jinja, and the token that ends an answer."""
    if not run.fine_tuned:
        return {}
    template = run.template()
    return {"chat_template": template.jinja(), "end_of_answer": template.end_id}


def model_card(run: Run, checkpoint: Path) -> str:
    """A README for the exported model: what it is, what it was trained on, its losses."""
    config, settings, state = run.model_config, run.settings, read_state(checkpoint)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    kind = {"pretrain": "pretrained", "sft": "fine-tuned on conversations", "import": "imported"}[run.task]
    what = f"A GPT of {config.n_layer} layers and width {config.n_embd}, {kind} with plainGPT."
    facts = {
        "data": settings.get("dataset"), "began from": run.origin.source, "steps": state["step"] or None,
        "validation loss (nats per token)": state["val_loss"] and round(state["val_loss"], 4),
        "context (tokens)": config.block_size, "learning rate": settings.get("learning_rate"),
    }  # fmt: skip
    listed = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    return "\n".join([head, f"# {run.folder.name}\n", f"{what}\n", *listed])


@contextmanager
def progress(what: str, size: int) -> Iterator[Callable[[int], object]]:
    """Yield a function step(bytes) that moves a progress bar, which is shown in a terminal only."""
    with tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        yield bar.update


def main() -> None:
    for name in ("SIGTERM", "SIGHUP"):  # end as Ctrl-C does, without half-written files
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    options = read_options(sys.argv[1:])
    import_source(options) if options.command == "import" else export_run(options)


if __name__ == "__main__":
    cli.run_command(main)
