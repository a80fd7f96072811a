"""The curves of a run's log, and their pictures: the one of several runs that plot.py draws, and a run's own loss.svg.

Notable: the log counts steps. Tokens are summed over the steps as they were trained, so the sum stays right where a
resumed run has changed its batch size, and an evaluation gets its tokens from the training steps around it.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.cli import visible
from common.picture import picture
from training.log import TRAINING, read_log

X = Literal["steps", "tokens", "seconds"]
Columns = dict[str, np.ndarray]

PANELS = {
    "val_loss": "loss (nats per token)", "val_bpb": "bits per byte, validation", "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping", "tokens_per_second": "tokens per second",
}  # fmt: skip
COLORS = ("#2a6f97", "#c1432e", "#3f9142", "#8a5aa8", "#d98e04", "#1aa6a6", "#7a4b2a", "#e06fa8", "#6b6b6b", "#a3a72c",
          "#1d2f6f", "#e8a48c")  # fmt: skip
MOST = len(COLORS)  # runs in one picture
UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
STEEP = 0.05  # the share of a run at its beginning whose losses and gradients may lie outside the frame
FEW = 20  # logged steps; a run with fewer of them is shown whole
GRAY = "#444444"


@dataclass(frozen=True)
class Curves:
    """What a run has logged, in columns by name; numbers that are not finite are NaN.

    training: steps, tokens, seconds, train_loss, lr, grad_norm, tokens_per_second. evaluations: steps, tokens, seconds,
    val_loss, val_bpb. notes: what is wrong with the log.
    """

    name: str
    training: Columns
    evaluations: Columns
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.training["steps"]) + len(self.evaluations["steps"])

    def last(self, x: X) -> float:
        """Return the largest x of the run; 0 if it has logged nothing."""
        xs = np.concatenate((self.training[x], self.evaluations[x], [0.0]))
        return float(np.nanmax(xs))

    def steep_until(self, x: X) -> float:
        """Return the x up to which the curves may leave the frame."""
        return STEEP * self.last(x) if len(self.training["steps"]) >= FEW else 0.0


def read_curves(folder: str | Path, name: str) -> Curves:
    """Return the curves of the run in the folder, under a name for legends."""
    steps, evaluations, notes = read_log(folder)
    training = columns(steps, TRAINING)
    tested = columns(evaluations, ("val_loss", "val_bpb", "seconds"))
    per_step = training["tokens"] / training["steps"]
    training["tokens"] = np.cumsum(np.diff(training["steps"], prepend=0) * per_step)
    known = np.concatenate(([0], training["steps"])), np.concatenate(([0], training["tokens"]))
    beyond = np.maximum(tested["steps"] - known[0][-1], 0)  # evaluated after the last training step that was logged
    later = beyond * (per_step[-1] if len(per_step) else np.nan)
    tested["tokens"] = np.interp(tested["steps"], *known) + np.where(beyond > 0, later, 0)
    return Curves(visible(name), training, tested, tuple(notes))


def columns(events: list[dict], names: Sequence[str]) -> Columns:
    """Return the events' steps and those of their numbers, in columns; a number that an event lacks is NaN."""
    table = {name: np.array([event.get(name, np.nan) for event in events], dtype=float) for name in names}
    for column in table.values():
        column[~np.isfinite(column)] = np.nan
    return {"steps": np.array([event["step"] for event in events], dtype=float)} | table


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(runs: Sequence[Curves], path: str | Path, x: X = "steps") -> None:
    """Draw the runs' numbers against x: a panel for each, and a legend. At most MOST runs. Raises WriteError.

    The range of each panel leaves out the first 5% of a run, where losses fall steeply.
    """
    with picture(path, 13, 7) as figure:
        fill(figure, runs, x)


def fill(figure: Any, runs: Sequence[Curves], x: X) -> None:
    """Fill the figure with a panel for each number and one for the legend; see `draw`."""
    panels = figure.subplots(2, 3).flatten()
    for axes, (number, title) in zip(panels, PANELS.items(), strict=False):
        draw_panel(axes, runs, number, title, x)
    draw_legend(panels[-1], runs)


def draw_loss(curves: Curves, path: str | Path) -> None:
    """Draw one run's training and validation loss against its steps. Raises WriteError."""
    with picture(path, 7.5, 4) as figure:
        axes = figure.subplots()
        name = curves.name if len(curves.name) <= 40 else f"{curves.name[:19]}…{curves.name[-20:]}"
        draw_panel(axes, [curves], "val_loss", name, "steps")
        axes.set_ylabel(PANELS["val_loss"])
        losses = curves.evaluations["val_loss"]
        if np.isfinite(losses).any():
            best = np.nanargmin(losses)
            told = f"best validation loss {losses[best]:.4f}, at step {curves.evaluations['steps'][best]:,.0f}"
            axes.set_title(told, loc="right", fontsize=9, color=GRAY)
        handles = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=2)


def draw_panel(axes: Any, runs: Sequence[Curves], number: str, title: str, x: X) -> None:
    """Draw one number of every run; with the validation loss also the training loss, thin and pale."""
    unit, divisor = unit_of(x, max(run.last(x) for run in runs))
    values, late = [], []
    for run, color in zip(runs, COLORS, strict=False):
        lines = [(run.evaluations if number.startswith("val") else run.training, number)]
        if number == "val_loss":
            lines.insert(0, (run.training, "train_loss"))
        for table, name in lines:
            xs, ys = table[x], table[name]
            width = 1.5 if name in ("val_loss", "val_bpb", "lr") else 0.9
            style: dict[str, Any] = {"linewidth": width, "alpha": 0.45 if name == "train_loss" else 1.0}
            if name.startswith("val") and len(xs) <= 50 or len(xs) == 1:
                style |= {"marker": "o", "markersize": 3}
            label = {"val_loss": "validation", "train_loss": "training"}.get(name, "")
            axes.plot(xs / divisor, ys, color=color, **style, label=label or "_")
            values.append(ys)
            late.append(ys[xs >= run.steep_until(x)] if name != "lr" else ys)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(unit)
    set_range(axes, np.concatenate(values), np.concatenate(late), number)
    set_ticks(axes, x, number)


def unit_of(x: X, last: float) -> tuple[str, float]:
    """Return the label of the x axis, and what to divide by: times over 3 minutes are shown in minutes, and so on."""
    if x != "seconds":
        return x, 1.0
    return next((unit, size) for unit, size in UNITS if last > 3 * size or size == 1)


def set_range(axes: Any, values: np.ndarray, late: np.ndarray, number: str) -> None:
    """Show the values from the lowest to the highest of the late ones, with a margin.

    Speeds and learning rates begin at 0; speeds and gradients that differ more than 20 times have a logarithmic axis.
    """
    from matplotlib.ticker import LogLocator

    axes.set_xlim(left=0)
    values, late = values[np.isfinite(values)], late[np.isfinite(late)]
    if not len(late):
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=GRAY)
        axes.set_yticks([])
        return
    low, high = values.min(), late.max()
    if number in ("grad_norm", "tokens_per_second") and 0 < 20 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        if high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        return
    if number in ("lr", "tokens_per_second"):
        low = 0.0
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low if low == 0 else low - margin, high + margin)


def set_ticks(axes: Any, x: X, number: str) -> None:
    """Write large numbers as 20k and 1.5M, and small ones without an exponent above the axis."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    if x != "seconds":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if number == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_legend(axes: Any, runs: Sequence[Curves]) -> None:
    """Fill a panel with the names of the runs, and with what strong and pale lines mean."""
    from matplotlib.lines import Line2D

    axes.axis("off")
    rows = [
        (Line2D([], [], linewidth=2, color=color), textwrap.fill(run.name, 44, max_lines=2, placeholder="…"))
        for run, color in zip(runs, COLORS, strict=False)
    ]
    rows += [
        (Line2D([], [], color=GRAY, linewidth=1.5, marker="o", markersize=3), "validation loss"),
        (Line2D([], [], color=GRAY, linewidth=0.9, alpha=0.45), "training loss"),
    ]
    handles, labels = zip(*rows, strict=True)
    lines = sum(label.count("\n") + 1 for label in labels)
    size = {"fontsize": 9} if lines < 16 else {"fontsize": 7, "labelspacing": 0.3}
    legend = axes.legend(handles, labels, loc="upper left", frameon=False, **size)
    for text in legend.get_texts():
        text.set_parse_math(False)
