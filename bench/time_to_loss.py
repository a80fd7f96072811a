"""Seconds to nanoGPT's loss on tiny Shakespeare: train by nanoGPT's recipe and by ours, then score both models.

    python bench/time_to_loss.py --input tinyshakespeare.txt --nanogpt PATH_TO_A_CLONE [--gpu] [--plot FILE.svg]

Each run is the whole command a user would type, timed from start to exit, one after the other on an idle machine. Both
final models are scored on the whole validation split, in the same consecutive windows. Without --gpu: nanoGPT's README
recipe for a CPU against config/shakespeare_char_cpu.py; with --gpu: its config/train_shakespeare_char.py against
config/shakespeare_char.py. Our recipe runs three times: with just enough steps to beat nanoGPT's loss, with as many as
fit into nanoGPT's time, and as in the config. --plot draws the validation losses that both print during training
against time (nanoGPT estimates them from 20 batches, ours cover the whole split).
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runs.run import Run  # noqa: E402
from text.corpus import Corpus  # noqa: E402

NANOGPT_CPU = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()


Curve = list[tuple[float, float]]  # (seconds since the command began, validation loss)


def timed(command: list[object], folder: Path) -> tuple[float, Curve]:
    """Run the command in the folder; returns its seconds and the validation losses that it printed."""
    begin, lines, curve = time.perf_counter(), [], []
    process = subprocess.Popen(
        [sys.executable, "-u", *map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"val[ _]loss ([\d.]+)", line):
            curve.append((time.perf_counter() - begin, float(found[1])))
    if process.wait():
        sys.exit(f"{' '.join(map(str, command))} failed:\n{''.join(lines[-30:])}")
    return time.perf_counter() - begin, curve


def draw(path: Path, curves: dict[str, Curve]) -> None:
    """Plot validation losses against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for (name, curve), color in zip(curves.items(), ("#888888", "#c1432e"), strict=True):
        axes.plot(*zip(*curve, strict=True), marker=".", color=color, label=name)
        axes.annotate(f"{curve[-1][1]:.2f}", curve[-1], xytext=(6, -3), textcoords="offset points", color=color)
    axes.set(xlabel="seconds since the command began, 2 CPU cores", ylabel="validation loss (nats per character)")
    axes.set_ylim(1.45, 2.8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def run_nanogpt(clone: Path, text: Path, work: Path, gpu: bool) -> tuple[float, Curve, torch.nn.Module]:
    """Prepare the data and train in a copy of the clone; returns the seconds, the curve and the best saved model."""
    copy = Path(shutil.copytree(clone, work / "nanogpt", ignore=shutil.ignore_patterns(".git", "assets")))
    shutil.copy(text, copy / "data/shakespeare_char/input.txt")
    timed(["data/shakespeare_char/prepare.py"], copy)
    seconds, curve = timed(["train.py", "config/train_shakespeare_char.py", *([] if gpu else NANOGPT_CPU)], copy)
    saved = torch.load(copy / "out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
    sys.path.insert(0, str(copy))
    ours = sys.modules.pop("model")  # both projects call it that
    from model import GPT, GPTConfig

    sys.modules["model"] = ours
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
    return seconds, curve, model.eval()


def run_ours(work: Path, config: str, name: str, *options: str) -> tuple[float, Curve, torch.nn.Module, float]:
    """Train with our config; returns the seconds, the curve, the best model and the seconds per step."""
    out_dir = work / name
    command = ["train.py", f"config/{config}.py", f"--dataset={work / 'corpus'}", f"--out_dir={out_dir}", *options]
    seconds, curve = timed(command, ROOT)
    events = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    speed = statistics.median(event["tokens_per_second"] for event in events if "train_loss" in event)
    train = json.loads((out_dir / "config.json").read_text())["train"]
    model = Run.open(out_dir).load_model()
    return seconds, curve, model, train["batch_size"] * model.config.block_size / speed


@torch.no_grad()
def score(model: torch.nn.Module, corpus: Corpus, block_size: int, device: str) -> float:
    """Mean loss over the whole validation split, in consecutive windows of block_size."""
    model, total, count = model.to(device), 0.0, 0
    for idx, targets in corpus.windows("val", block_size, 128):
        idx, targets = idx.to(device), targets.to(device)
        logits = model(idx, idx)[0]  # nanoGPT returns all logits only if it gets targets, here any
        total += F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += (targets != -100).sum().item()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--gpu", action="store_true", help="the baby GPT on a CUDA GPU")
    parser.add_argument("--plot", type=Path, help="draw both runs' losses to this file (needs matplotlib)")
    parser.add_argument("--steps", type=int, help="steps of the short run; default 150, with --gpu 400")
    arguments = parser.parse_args()
    config, block_size, device = (
        ("shakespeare_char", 256, "cuda") if arguments.gpu else ("shakespeare_char_cpu", 64, "cpu")
    )
    steps = arguments.steps or (400 if arguments.gpu else 150)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text, clone = arguments.input.resolve(), arguments.nanogpt.resolve()
        timed([ROOT / "data/shakespeare_char/prepare.py", f"--input={text}", f"--output={work / 'corpus'}"], work)
        corpus = Corpus(work / "corpus")
        gpu = torch.cuda.get_device_name() if arguments.gpu else "no GPU"
        print(f"{os.cpu_count()} CPU cores, {gpu}, torch {torch.__version__}")
        print(f"{'run':34} {'parameters':>10} {'seconds':>8} {'val loss':>9} {'speed-up':>9}")
        theirs, their_curve, model = run_nanogpt(clone, text, work, arguments.gpu)

        def row(name: str, model: torch.nn.Module, seconds: float) -> None:
            size, loss = sum(p.numel() for p in model.parameters()), score(model, corpus, block_size, device)
            print(f"{name:34} {size:10,} {seconds:8.1f} {loss:9.4f} {theirs / seconds:8.2f}x", flush=True)

        row("nanoGPT", model, theirs)
        seconds, _, model, per_step = run_ours(
            work, config, "short", f"--max_iters={steps}", f"--eval_interval={steps}"
        )
        row(f"plainGPT, {steps} steps", model, seconds)
        steps += int(0.97 * (theirs - seconds) / per_step)  # the time for start-up and evaluations stays the same
        # On a GPU the model overfits in that time: evaluate on the way and keep the best, as nanoGPT does.
        options = [f"--max_iters={steps}", *([] if arguments.gpu else [f"--eval_interval={steps}"])]
        seconds, _, model, _ = run_ours(work, config, "same", *options)
        row(f"plainGPT, {steps} steps", model, seconds)
        seconds, curve, model, _ = run_ours(work, config, "whole", *(["--eval_interval=100"] if arguments.plot else []))
        row("plainGPT, the whole config", model, seconds)
        if arguments.plot:
            draw(arguments.plot, {"nanoGPT": their_curve, "plainGPT": curve})


if __name__ == "__main__":
    main()
