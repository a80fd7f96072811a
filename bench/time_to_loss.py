"""Seconds to nanoGPT's loss on tiny Shakespeare: nanoGPT's own recipe, then ours, then both scored alike.

    python bench/time_to_loss.py --input tinyshakespeare.txt [--nanogpt PATH_TO_A_CLONE] [--gpu] [--short]

Each run is the whole command a user would type, timed from start to exit, one after the other on an idle machine. Both
final models are scored on the whole validation split, in the same consecutive windows. Without --gpu: nanoGPT's README
recipe for a CPU against config/shakespeare_char_cpu.py; with --gpu: its config/train_shakespeare_char.py against
config/shakespeare_char.py. Ours runs twice: with enough steps to pass nanoGPT's loss (--steps, and half as many again
until it does), and with as many as fit into nanoGPT's time; --short leaves out the second. Without a clone nanoGPT does
not run: the loss to pass is then the one that its README states. --plot X.svg draws the validation losses that both
print on the way, at the second at which they print them. On a CPU both estimate these from 20 batches, as nanoGPT's
recipe says; on a GPU nanoGPT takes 200, and ours the whole split.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.nanogpt import nanogpt_module  # noqa: E402
from model import GPT  # noqa: E402
from runs.run import Run  # noqa: E402
from text.corpus import Corpus  # noqa: E402

EVAL_ITERS = 20  # batches of an evaluation on a CPU
NANOGPT_CPU = (
    f"--device=cpu --compile=False --eval_iters={EVAL_ITERS} --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
README_LOSS = {"cpu": 1.88, "cuda": 1.4697}  # what nanoGPT's README states for its recipes
TRIES = 3  # runs of growing length, until one passes nanoGPT's loss
# A quick check on a CPU that all of it runs: the options of both projects, then nanoGPT's and ours
TINY = "--device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --dropout=0.0".split()
TINY_NANOGPT = [
    *TINY,
    *"--compile=False --eval_iters=1 --max_iters=2 --eval_interval=1 --always_save_checkpoint=True".split(),
]
TINY_OURS = [*TINY, "--eval_iters=1", "--log_interval=1"]

Curve = list[tuple[float, float]]  # (seconds since the command began, validation loss)


def timed(command: list[object], folder: Path) -> tuple[float, Curve]:
    """Run the command in that folder to its end; returns its seconds and the validation losses that it printed."""
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


def draw(path: Path, theirs: Curve, short: Curve, ours: Curve, machine: str) -> None:
    """Plot validation losses against seconds: nanoGPT, our run that ends when it passes, and the one of equal time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.8))
    axes.axhline(theirs[-1][1], color="#888888", linewidth=0.8, linestyle=":")
    runs = [
        ("nanoGPT", theirs, "#888888", "-", (7, -8)),
        ("plainGPT, stopped when it passes nanoGPT", short, "#2a6f97", "--", (-28, -22)),
        ("plainGPT, a longer run", ours, "#c1432e", "-", (7, -8)),
    ]
    for name, curve, color, line, place in runs:
        axes.plot(*zip(*curve, strict=True), line, marker=".", color=color, label=name)
        seconds, loss = curve[-1]
        axes.annotate(f"{loss:.2f}\n{seconds:.0f} s", (seconds, loss), xytext=place, textcoords="offset points",
                      color=color, fontsize=9)  # fmt: skip
    axes.set(xlabel=f"seconds since the command began ({machine})", ylabel="validation loss (nats per character)")
    axes.set_ylim(1.4, 4.3)
    axes.set_xlim(0, 1.1 * max(theirs[-1][0], ours[-1][0]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def run_nanogpt(clone: Path, text: Path, work: Path, options: list[str]) -> tuple[float, Curve, torch.nn.Module]:
    """Prepare the data and train in a copy of the clone; returns its seconds, curve, and the best model it saved."""
    copy = Path(shutil.copytree(clone, work / "nanogpt", ignore=shutil.ignore_patterns(".git", "assets")))
    shutil.copy(text, copy / "data/shakespeare_char/input.txt")
    timed(["data/shakespeare_char/prepare.py"], copy)
    seconds, curve = timed(["train.py", "config/train_shakespeare_char.py", *options], copy)
    saved = torch.load(copy / "out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
    nanogpt = nanogpt_module(copy)
    with redirect_stdout(sys.stderr):
        model = nanogpt.GPT(nanogpt.GPTConfig(**saved["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
    return seconds, curve, model.eval()


def run_ours(work: Path, config: str, name: str, *options: str) -> tuple[float, Curve, torch.nn.Module, float]:
    """Train with our config; returns its seconds, its curve, its best model and the seconds that a step took."""
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
        # nanoGPT gives all logits only if it gets targets, whichever; ours only if it gets none.
        logits = (model(idx) if isinstance(model, GPT) else model(idx, idx))[0]
        total += F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += (targets != -100).sum().item()
    return total / count


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--gpu", action="store_true", help="the baby GPT on a CUDA GPU")
    parser.add_argument("--short", action="store_true", help="only the run that is to pass nanoGPT's loss")
    parser.add_argument("--plot", type=Path, help="draw the runs' losses to this file (needs matplotlib)")
    parser.add_argument("--steps", type=int, help="steps of the short run; default 120, with --gpu 400")
    parser.add_argument("--ours", action="append", default=[], help="an option of our run, such as --ours=--n_layer=2")
    parser.add_argument("--tiny", action="store_true", help="tiny models for two steps: a check that all of it runs")
    arguments = parser.parse_args()
    if arguments.plot and (arguments.short or not arguments.nanogpt):
        parser.error("--plot draws nanoGPT's run and ours of equal time: give --nanogpt, and no --short")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the package matplotlib: pip install matplotlib")
    arguments.steps = arguments.steps or (2 if arguments.tiny else 400 if arguments.gpu else 120)
    return arguments


def main() -> None:
    arguments = parse()
    gpu, tiny = arguments.gpu, arguments.tiny
    config, block_size, device = ("shakespeare_char", 256, "cuda") if gpu else ("shakespeare_char_cpu", 64, "cpu")
    block_size = 32 if tiny else block_size
    machine = f"{os.cpu_count()} CPU cores"
    if gpu:
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    with tempfile.TemporaryDirectory() as folder:
        work, text = Path(folder), arguments.input.resolve()
        timed([ROOT / "data/shakespeare_char/prepare.py", f"--input={text}", f"--output={work / 'corpus'}"], work)
        corpus, goal, theirs = Corpus(work / "corpus"), README_LOSS[device], None
        ours_options = [*(TINY_OURS if tiny else [] if gpu else [f"--eval_iters={EVAL_ITERS}"]), *arguments.ours]
        print(f"{machine}, torch {torch.__version__}\n")
        print("| run | parameters | seconds | val loss | nanoGPT's time / this |\n|---|---|---|---|---|", flush=True)

        def row(name: str, model: torch.nn.Module, seconds: float) -> float:
            size, loss = sum(p.numel() for p in model.parameters()), score(model, corpus, block_size, device)
            ratio = f"{theirs / seconds:.2f}x" if theirs else ""
            print(f"| {name} | {size:,} | {seconds:.1f} | {loss:.4f} | {ratio} |", flush=True)
            return loss

        if arguments.nanogpt:
            options = TINY_NANOGPT if tiny else [] if gpu else NANOGPT_CPU
            theirs, their_curve, model = run_nanogpt(arguments.nanogpt.resolve(), text, work, options)
            goal = row("nanoGPT", model, theirs)
        else:
            print(f"| nanoGPT, as its README states | | | {goal} | left out: no --nanogpt |", flush=True)
        steps, loss, tries = arguments.steps, float("inf"), 0
        while loss > goal and tries < TRIES:
            steps, tries = steps if tries == 0 else steps * 3 // 2, tries + 1
            options = [*ours_options, f"--max_iters={steps}", f"--eval_interval={steps}"]
            seconds, short_curve, model, per_step = run_ours(work, config, f"short{tries}", *options)
            loss = row(f"plainGPT, {steps} steps", model, seconds)
        if loss > goal:
            print(f"\nNone of {tries} runs passed nanoGPT's loss: give more --steps.", flush=True)
        if arguments.short:
            return
        if not theirs:
            return
        steps += int(0.97 * (theirs - seconds) / per_step)  # the same start-up and evaluations, more steps
        # On a GPU the model overfits in that time: evaluate on the way and keep the best, as nanoGPT does.
        often = 100 if arguments.plot else steps
        options = [*ours_options, f"--max_iters={steps}", *([] if gpu else [f"--eval_interval={often}"])]
        seconds, curve, model, _ = run_ours(work, config, "same", *options)
        row(f"plainGPT, {steps} steps", model, seconds)
        if arguments.plot:
            draw(arguments.plot, their_curve, short_curve, curve, machine)


if __name__ == "__main__":
    main()
