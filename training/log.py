"""What a run says while it trains: log.jsonl, the terminal, and Weights & Biases if asked."""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm


class Log:
    """Where the run says what happens: log.jsonl, the terminal, and wandb if asked. Silent but on the first process."""

    def __init__(self, config, settings: dict, active: bool, step: int):
        self.config, self.active, self.wandb, self.shown = config, active, None, -1
        # On a terminal a moving bar; in a file, where a bar would be noise, a line now and then (disable=None).
        self.bar = tqdm(
            total=config.max_iters, initial=step, unit="step", dynamic_ncols=True, disable=None if self.active else True
        )
        if config.wandb_log and self.active:
            try:
                import wandb
            except ImportError:
                raise ValueError("wandb_log=True needs the package wandb: pip install wandb") from None

            name = config.wandb_run_name or Path(config.out_dir).name
            try:
                self.wandb = wandb.init(project=config.wandb_project, name=name, dir=config.out_dir, config=settings)
            except wandb.errors.Error as error:
                raise ValueError(f"wandb: {error}; run wandb login, or set WANDB_MODE=offline") from None

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def event(self, event: dict) -> None:
        """One line of log.jsonl, and the same to wandb."""
        if self.active:
            with open(Path(self.config.out_dir) / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            if self.wandb:
                self.wandb.log({key: value for key, value in event.items() if key != "step"}, step=event["step"])

    def training(self, **event) -> None:
        """Log a training step and show it: on the bar, or without one as a line for every fiftieth of the run."""
        self.event(event)
        mfu = f", mfu {event['mfu']:.0%}" if event["mfu"] else ""
        text = f"loss {event['train_loss']:.4f}, lr {event['lr']:.1e}, {event['tokens_per_second']:,.0f} tokens/s{mfu}"
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(event["step"] - self.bar.n)
        elif (now := event["step"] * 50 // self.config.max_iters) > self.shown:
            self.shown = now
            self.say(f"step {event['step']}/{self.config.max_iters}: {text}")

    def show_evaluation(self, event: dict) -> None:
        """Print an evaluation."""
        self.say(f"step {event['step']}/{self.config.max_iters}: val_loss {event['val_loss']:.4f}, "
                 f"val_bpb {event['val_bpb']:.4f}, {event['seconds']:.0f} s")  # fmt: skip

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def rewind_log(out_dir: str | Path, step: int) -> None:
    """Drop what a killed run logged after `step`, its last checkpoint: the resumed run will log it again.

    What is no event of a run goes too: a line cut short by the kill, or the zeros that a power loss leaves.
    """
    path = Path(out_dir) / "log.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(line for line in lines if step_of(line) <= step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinite if it is none."""
    try:
        event = json.loads(line)
        return event["step"] if type(event["step"]) is int and line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
