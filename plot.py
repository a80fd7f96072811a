"""Compare runs: a table on the terminal, and their curves as a picture.

    python plot.py out/a out/b
    python plot.py out/a --x=seconds --output=a.png
    python plot.py out/a out/b --watch

Notable: it reads log.jsonl only, and neither weights nor data, so a run that is still going is not disturbed. Runs are
compared by bits per byte, which do not depend on the tokenizer. runs/curves.py reads the curves and draws them.
"""

from common import cli  # first: it makes Ctrl-C one line even while the modules below are imported

# isort: split

import math
import shutil
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.cli import visible
from common.config import UserPath, build, fields_of, help_text, read_arguments, split_arguments
from common.files import is_locked
from common.picture import FORMATS, can_draw
from runs.curves import MOST, Curves, X, draw, read_curves
from runs.run import IMPORT, Run
from training.config import TrainConfig

USAGE = f"""usage: python plot.py RUN [RUN ...] [--key=value ...]          (a RUN is a folder such as out/pydocs)

Prints a table of the runs and of the settings in which they differ, and draws loss, bits per byte, learning rate,
gradient norm and tokens per second. The first 5% of a run, where losses fall steeply, may lie above the frame. At most
{MOST} runs. The picture needs matplotlib: pip install matplotlib"""

PAUSE = 2.0  # seconds between two looks at the logs
NOT_COMPARED = ("out_dir", "wandb_log", "wandb_project", "wandb_run_name", "eval_only")
NONE = "–"
NO_MATPLOTLIB = "matplotlib is missing; pip install matplotlib"


@dataclass
class PlotConfig:
    """The options of plot.py."""

    x: X = "steps"  # what the curves are drawn against
    output: UserPath = "plot.svg"  # the picture: .svg, .png or .pdf
    watch: bool = False  # draw again as the logs grow, until no run is going any more, or Ctrl-C

    def __post_init__(self):
        if Path(self.output).suffix.lower() not in FORMATS:
            raise ValueError(f"output={self.output!r} must end in one of {', '.join(FORMATS)}")


def read_options(argv: list[str]) -> tuple[PlotConfig, list[str], bool]:
    """Return the options, the folders of the runs, and whether --output was given. Raises ValueError."""
    argv = ["--watch=True" if word == "--watch" else word for word in argv]  # the word after it is a run
    words = list(split_arguments(argv, fields_of((PlotConfig,))))
    given = read_arguments([f"--{key}={value}" for key, value in words if key], PlotConfig)
    (config,) = build(given, PlotConfig)
    return config, [str(word) for key, word in words if key is None], "output" in given


# ---------------------------------------------------------------------------------------------------------------------
# What to read


def open_runs(folders: list[str]) -> dict[str, Run]:
    """Return the runs by the names that tell them apart: that of the folder, or if two share it, the path as given."""
    if not folders:
        raise ValueError("name one run or more, as in: python plot.py out/pydocs")
    distinct: dict[Path, str] = {}
    for folder in folders:
        if Path(folder).resolve() in distinct:
            print(f"note: {folder} was given twice: it counts once")
        distinct.setdefault(Path(folder).resolve(), folder)
    if len(distinct) > MOST:
        raise ValueError(f"{len(distinct)} runs are too many to tell apart in one picture: give at most {MOST}")
    shared = Counter(path.name for path in distinct)
    names = [visible(path.name if shared[path.name] == 1 else given) for path, given in distinct.items()]
    runs = dict(zip(names, map(Run.open, distinct.values()), strict=True))
    for run in runs.values():
        if run.task == IMPORT:
            raise ValueError(f"{run.folder} was imported by convert.py, not trained: it has no log to plot")
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# The table


def best_of(runs: list[Curves]) -> tuple[str, float, list[tuple[int, int] | None]]:
    """Return the number that runs are compared by, the worst of their best values, and for each run two evaluations.

    The number is bits per byte, or the loss if a run has no bits per byte. The evaluations are the best one and the
    first one that was as good as the worst of the best; None for a run without evaluations.
    """
    evaluated = [run.evaluations for run in runs if np.isfinite(run.evaluations["val_loss"]).any()]
    number = "val_bpb" if all(np.isfinite(table["val_bpb"]).all() for table in evaluated) else "val_loss"
    goal = max((float(np.nanmin(table[number])) for table in evaluated), default=math.nan)
    found: list[tuple[int, int] | None] = []
    for run in runs:
        values = run.evaluations[number]
        some = np.isfinite(values).any()
        found.append((int(np.nanargmin(values)), int(np.argmax(values <= goal))) if some else None)
    return number, goal, found


def table_of(runs: dict[str, Run], curves: list[Curves], going: list[bool]) -> list[str]:
    """Return the lines of the table: of each run how far it is, its best evaluation, and when that was."""
    number, goal, best = best_of(curves)
    losses = ["best bits per byte", "val_loss"] if number == "val_bpb" else ["bits per byte", "best val_loss"]
    rows = [["run", "steps", *losses, "at step", "tokens", "time", f"time to {goal:.4f}"]]
    for run, curve, runs_on, pair in zip(runs.values(), curves, going, best, strict=True):
        steps = f"{curve.last('steps'):,.0f}/{run.settings['max_iters']:,}" + (" running" if runs_on else "")
        if pair is None:
            rows.append([curve.name, steps, "no evaluation yet", *[NONE] * 5])
            continue
        at = {name: column[pair[0]] for name, column in curve.evaluations.items()}
        bits = NONE if math.isnan(at["val_bpb"]) else f"{at['val_bpb']:.4f}"
        numbers = [bits, f"{at['val_loss']:.4f}", f"{at['steps']:,.0f}", f"{at['tokens']:,.0f}"]
        reached = curve.evaluations["seconds"][pair[1]]
        rows.append([curve.name, steps, *numbers, duration(at["seconds"]), duration(reached)])
    if sum(pair is not None for pair in best) < 2 or not comparable(runs):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Write a time as people do: 12.3 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def differences(runs: dict[str, Run], width: int) -> list[str]:
    """Return a line for each setting in which the runs differ: its values, each with the runs that have it."""
    settings = {name: settings_of(run) for name, run in runs.items()}
    differing = {}
    for key in dict.fromkeys(key for found in settings.values() for key in found):
        having: dict[str, list[str]] = {}
        for name, found in settings.items():
            having.setdefault(found.get(key, NONE), []).append(name)
        if len(having) > 1:
            differing[key] = "; ".join(f"{visible(value)}: {', '.join(having[value])}" for value in having)
    if not differing:
        return []
    indent = max(map(len, differing)) + 4
    lines = [
        textwrap.fill(values, width, initial_indent=f"  {key}".ljust(indent), subsequent_indent=" " * indent,
                      break_long_words=False, break_on_hyphens=False)
        for key, values in differing.items()
    ]  # fmt: skip
    return ["", "settings that differ", *lines]


def settings_of(run: Run) -> dict[str, str]:
    """Return all in which two runs may differ, as text by name."""
    settings = {"task": run.task} | asdict(TrainConfig()) | run.settings | asdict(run.model_config)
    if run.fine_tuned:
        settings |= {"chat_style": run.chat_style}
    return {name: str(value) or '""' for name, value in settings.items() if name not in NOT_COMPARED}


def comparable(runs: dict[str, Run]) -> bool:
    """Return whether the runs are evaluated alike, so that their losses can be compared."""
    settings = [settings_of(run) for run in runs.values()]
    return len({(found["task"], found["objective"], found["dataset"]) for found in settings}) == 1


def notes_on(runs: dict[str, Run], curves: list[Curves], x: X) -> list[str]:
    """Return what a reader of the table and of the picture must know."""
    notes = [note for curve in curves for note in curve.notes]
    if not comparable(runs):
        notes.append("these runs are evaluated on different data or tasks, so their losses do not compare")
    per_step = {round(curve.training["tokens"][-1] / curve.training["steps"][-1]) for curve in curves
                if len(curve.training["steps"])}  # fmt: skip
    if x == "steps" and len(per_step) > 1:
        notes.append("a step is not the same number of tokens in all runs: --x=tokens draws them against tokens")
    return [f"note: {note}" for note in notes]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def show(config: PlotConfig, runs: dict[str, Run], going: list[bool], asked: bool) -> None:
    """Print the table and draw the picture; without matplotlib, say how to get it. asked: --output was given.

    While a run is watched, the table takes the whole terminal; where there is no terminal, it comes at the end only.
    """
    curves = [read_curves(run.folder, name) for name, run in runs.items()]
    watching = config.watch and any(going)
    if not watching and not any(map(len, curves)):
        raise ValueError(f"{next(iter(runs.values())).folder} has logged nothing yet: there is nothing to plot")
    if config.watch and sys.stdout.isatty():
        print("\x1b[2J\x1b[H", end="")
    speaking = not watching or sys.stdout.isatty()
    if speaking:
        width = shutil.get_terminal_size().columns
        print(*table_of(runs, curves, going), *differences(runs, width), *notes_on(runs, curves, config.x), sep="\n")
    if can_draw():
        draw(curves, config.output, config.x)
    elif asked:
        raise ValueError(f"{config.output} was not drawn: {NO_MATPLOTLIB}")
    if speaking:
        drawn = f"{config.output}: drawn against {config.x}"
        print(drawn if can_draw() else f"no picture was drawn: {NO_MATPLOTLIB}", flush=True)


def stamp(run: Run) -> tuple[int, int]:
    """Return what changes as the run's log grows: its size in bytes and its time in nanoseconds."""
    path = run.folder / "log.jsonl"
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (0, 0)


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, PlotConfig))
        return
    config, folders, asked = read_options(sys.argv[1:])
    runs, seen = open_runs(folders), None
    while True:
        going = [is_locked(run.folder) for run in runs.values()]  # before reading: what ended has logged all
        now = [going, *map(stamp, runs.values())]
        if now != seen:
            show(config, runs, going, asked)
            seen = now
        if not (config.watch and any(going)):
            return
        time.sleep(PAUSE)


if __name__ == "__main__":
    cli.run_command(main)
