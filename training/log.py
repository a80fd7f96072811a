"""What a run reports while it trains: log.jsonl, the terminal, and Weights & Biases if asked.

On a terminal there is a moving bar; elsewhere, where a bar would be noise, a line now and then. `read_log` reads
log.jsonl again, also while the run goes on writing it.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from common.cli import visible
from common.files import errors_name, replacing

T = TypeVar("T")

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
NARROWEST = 10  # columns; lr and mfu are left out before {bar} becomes narrower
TRAINING = ("train_loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second")  # in every training step's line
EVALUATION = ("val_loss", "seconds")  # in every evaluation's line
WANDB_REMEDY = "run wandb login, set WANDB_MODE=offline, or leave wandb_log out"


def check_wandb(config) -> None:
    """Raise ValueError if wandb_log=True and Weights & Biases is not installed or does not accept the login.

    To be called before the run's folder is made, so that a failed login leaves no empty run behind.
    """
    if not config.wandb_log:
        return
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True needs the package wandb: pip install wandb") from None
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    try:
        wandb.login(verify=True)
    except (wandb.errors.Error, OSError) as error:
        raise ValueError(f"wandb: {error}; {WANDB_REMEDY}") from None


class Log:
    """Where a run reports to. Silent on every process but the first (active=False).

    config: a TrainConfig. settings: what wandb is told of the run. step: the step from which it goes on.
    """

    def __init__(self, config, settings: dict, active: bool, step: int):
        self.config, self.active, self.wandb = config, active, None
        self.shown = -1  # without a bar: the last fiftieth of the run that was told
        self.numbers = ""  # on the bar: those of the last training step
        if config.wandb_log and active:
            import wandb

            name = config.wandb_run_name or Path(config.out_dir).name
            try:
                self.wandb = wandb.init(project=config.wandb_project, name=name, dir=config.out_dir, config=settings)
            except wandb.errors.Error as error:
                raise ValueError(f"wandb: {error}; {WANDB_REMEDY}") from None
        self.bar = tqdm(
            total=config.max_iters, initial=step, bar_format=BAR, dynamic_ncols=True, disable=None if active else True
        )

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def event(self, event: dict) -> None:
        """Append an event to log.jsonl, and send it to wandb. Raises OSError if the disk is full."""
        if not self.active:
            return
        path = Path(self.config.out_dir) / "log.jsonl"
        with errors_name(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        if self.wandb:
            self.wandb.log({key: value for key, value in event.items() if key != "step"}, step=event["step"])

    def training(self, **event) -> None:
        """Log a training step and show it: on the bar, or without one as a line for every fiftieth of the run."""
        self.event(event)
        numbers = [
            f"loss {event['train_loss']:.4f}", f"{event['tokens_per_second']:,.0f} tokens/s", f"lr {event['lr']:.1e}"
        ]  # fmt: skip
        if event["mfu"]:
            numbers.append(f"mfu {event['mfu']:.0%}")
        if not self.bar.disable:
            self.numbers = what_fits(self.bar, event["step"], numbers)
            self.bar.set_postfix_str(self.numbers, refresh=False)
            self.bar.update(event["step"] - self.bar.n)
        elif (now := event["step"] * 50 // self.config.max_iters) > self.shown:
            self.shown = now
            self.say(f"step {event['step']}/{self.config.max_iters}: {', '.join(numbers)}")

    def evaluating(self, batches: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Yield the batches of an evaluation, and count them on the bar. total: how many there are, if it is known."""
        of, drawn = f" of {total}" if total else "", 0.0
        for number, batch in enumerate(batches, start=1):
            if not self.bar.disable and time.monotonic() - drawn > 0.1:
                self.bar.set_postfix_str(f"evaluating: batch {number}{of}")
                drawn = time.monotonic()
            yield batch
        if not self.bar.disable:
            self.bar.set_postfix_str(self.numbers)

    def skipped(self, step: int, grad_norm: float, count: int) -> None:
        """Log and print a step that was skipped; count: how many there were by now."""
        self.event({"step": step, "skipped": count})
        self.say(f"step {step}/{self.config.max_iters}: skipped, as its gradient norm is {grad_norm}; {count} in all")

    def show_evaluation(self, event: dict, more: str = "") -> None:
        """Print an evaluation, and `more` at the end of its line."""
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in event.items() if name.startswith("val_"))
        self.say(f"step {event['step']}/{self.config.max_iters}: {metrics}, {event['seconds']:.0f} s{more}")

    def show_preview(self, text: str, step: int) -> None:
        """Print a text that the model made, with control characters as escapes.

        At step 0, where there is little to see, it is one line: its beginning and its end, as the terminal has room.
        """
        text = visible(text)
        if step == 0:
            width = shutil.get_terminal_size().columns - 1
            text = "before training: " + " ".join(text.split())
            if len(text) > width:
                text = f"{text[: (width - 3) // 2]} … {text[-(width - 3) // 2 :]}"
        self.say(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def what_fits(bar: tqdm, step: int, numbers: list[str]) -> str:
    """As many of the numbers, the most important first, as fit on the bar's line at that step; the first two always."""
    meter = bar.format_dict | {"n": step}
    for count in range(len(numbers), 2, -1):
        text = ", ".join(numbers[:count])
        shape = {"postfix": text, "bar_format": BAR.replace("{bar}", "#" * NARROWEST), "ncols": None}
        if meter["ncols"] is None or len(bar.format_meter(**(meter | shape))) <= meter["ncols"]:
            return text
    return ", ".join(numbers[:2])


def seal_log(out_dir: str | Path) -> dict:
    """Return the size and the SHA-256 of log.jsonl as it is now, and wait until that much is on the disk."""
    with open(Path(out_dir) / "log.jsonl", "ab+") as file:
        os.fsync(file.fileno())
        file.seek(0)
        content = file.read()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_log(out_dir: str | Path, seal: dict | None) -> None:
    """Raise ValueError if log.jsonl does not begin with what `seal_log` saw; earlier versions saved no seal (None)."""
    path = Path(out_dir) / "log.jsonl"
    content = path.read_bytes() if path.exists() else b""
    if seal and hashlib.sha256(content[: seal["bytes"]]).hexdigest() != seal["sha256"]:
        raise ValueError(f"{path} is damaged, or was changed: its checksum differs")


def rewind_log(out_dir: str | Path, step: int, evaluation_due: bool = False) -> None:
    """Drop from log.jsonl what a killed run logged after `step`, its last checkpoint: resuming will log it again.

    Lines that are no events are dropped too: one that the kill cut short, or the zeros that a power loss leaves.
    evaluation_due: whether the evaluation of that step is to be done again.
    """
    path = Path(out_dir) / "log.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        with replacing(path) as file:
            for line in lines:
                if step_of(line) < step or step_of(line) == step and not (evaluation_due and '"val_loss"' in line):
                    file.write(line)


def read_log(out_dir: str | Path) -> tuple[list[dict], list[dict], list[str]]:
    """Return the training steps and the evaluations of log.jsonl, by step, and notes on what is wrong with it.

    Lines that are neither are left out: one that is being written, one that a kill cut short, or damage. Where a line
    goes back to an earlier step, it replaces what was logged from that step on, as in a log that was not rewound before
    its run was resumed. A run without a log has no steps.
    """
    path = Path(out_dir) / "log.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    training: dict[float, dict] = {}
    evaluations: dict[float, dict] = {}
    damaged, notes, latest = [], [], 0.0
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        event = event_of(line)
        if event is None:
            damaged.append(number)
            continue
        step = event["step"]
        if step < latest:
            notes.append(f"{path}, line {number}: it goes back from step {latest:.0f} to step {step:.0f}, and replaces "
                         "what was logged from there on")  # fmt: skip
            training, evaluations = ({s: e for s, e in kind.items() if s < step} for kind in (training, evaluations))
        latest = step
        (evaluations if "val_loss" in event else training)[step] = event
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        cut = "; the last one is cut short" if not text.endswith("\n") and text.count("\n") + 1 == damaged[-1] else ""
        notes.append(f"{path}, line {shown}: no event of a run, left out{cut}")
    return list(training.values()), list(evaluations.values()), notes


def event_of(line: str) -> dict[str, float] | None:
    """Return the numbers of a line of log.jsonl by name; None if it is neither a training step nor an evaluation."""
    try:
        event = json.loads(line)
        counts = type(event["step"]) is int
        numbers = {name: float(value) for name, value in event.items() if type(value) in (int, float)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    evaluation = "val_loss" in numbers
    whole = numbers.keys() >= set(EVALUATION if evaluation else TRAINING)
    return numbers if counts and whole and numbers["step"] >= (0 if evaluation else 1) else None


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinity if the line is no event."""
    try:
        event = json.loads(line)
        return event["step"] if type(event["step"]) is int and line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
