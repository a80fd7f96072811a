"""plot.py: what it reads in a log, what it says of runs, and that its pictures can be read."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import plot
import train
from common import cli
from common.files import is_locked, locked
from common.picture import picture
from model import GPTConfig
from runs.curves import PANELS, draw, draw_loss, fill, read_curves
from runs.run import Run
from tests.helpers import error_of
from training.config import TrainConfig
from training.log import read_log

ROOT = Path(__file__).parent.parent
MODEL = GPTConfig(vocab_size=32, block_size=8, n_layer=1, n_head=2, n_embd=16)


def step(n: int, loss: float = 3.0, **changes: float) -> dict:
    numbers = {"train_loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100 * n, "seconds": 2.0 * n}
    return {"step": n, **numbers, "tokens_per_second": 50.0, "mfu": None, **changes}


def evaluation(n: int, loss: float, **changes: float) -> dict:
    return {"step": n, "val_loss": loss, "val_bpb": 2 * loss, "seconds": 2.0 * n + 1, **changes}


def lines(*events: dict) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


LEARNS = [evaluation(0, 4), *[step(n) for n in range(1, 11)], evaluation(10, 3), *[step(n) for n in range(11, 21)],
          evaluation(20, 2)]  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A function that makes the folder of a run that has logged these events, without training it."""

    def run(name: str, events: list[dict] | str, task="pretrain", model=MODEL, **settings) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {} if task == "import" else asdict(TrainConfig(max_iters=20, **settings))
        Run(folder, model, settings, task, task == "sft").save()
        if events:
            (folder / "log.jsonl").write_text(events if isinstance(events, str) else lines(*events))
        return folder

    return run


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """plot.py's command in this process, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.run_command(plot.main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As where matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def texts(path: Path) -> list[str]:
    """The texts of an SVG picture."""
    return [text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip()]


# --- the log ---------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_left_out_and_named(tmp_path):
    whole = json.dumps(step(5))
    damaged = ["\0\0", "[3]", '{"step": true, "val_loss": 1, "seconds": 1}', '{"step": 2}',
               '{"step": 1, "val_loss": 2}',
               '{"step": 0' + whole[10:], "9" * 400, ""]  # fmt: skip
    text = lines(step(1), evaluation(1, 2.5)) + "\n".join([*damaged, whole, whole[:30]])
    (tmp_path / "log.jsonl").write_text(text)
    training, evaluations, notes = read_log(tmp_path)
    assert [event["step"] for event in training] == [1, 5] and [event["val_loss"] for event in evaluations] == [2.5]
    told = "line 3, 4, 5, 6, 7 and 4 more: no event of a run, left out; the last one is cut short"
    assert notes == [f"{tmp_path / 'log.jsonl'}, {told}"]


def test_a_log_that_goes_back_is_read_as_if_it_had_been_rewound(tmp_path):
    events = [step(1, 5), step(2, 4), evaluation(2, 4), step(3, 3), step(2, 4.5), evaluation(2, 4.4), step(3, 3.5)]
    (tmp_path / "log.jsonl").write_text(lines(*events))
    training, evaluations, notes = read_log(tmp_path)
    assert [event["train_loss"] for event in training] == [5, 4.5, 3.5]
    assert [event["val_loss"] for event in evaluations] == [4.4]
    assert len(notes) == 1 and "line 5: it goes back from step 3 to step 2" in notes[0]
    (tmp_path / "log.jsonl").write_text(lines(*LEARNS).removesuffix("\n"))  # whole, but for the line break
    assert [len(found) for found in read_log(tmp_path)] == [20, 3, 0]
    assert read_log(tmp_path / "none") == ([], [], [])


def test_evaluations_and_a_changed_batch_size_get_their_tokens(tmp_path):
    events = [evaluation(0, 4), step(2, tokens=200), step(4, tokens=400), evaluation(5, 3), step(6, tokens=1200)]
    (tmp_path / "log.jsonl").write_text(lines(*events, evaluation(7, 2)))  # from step 5 on, a step has 200 tokens
    curves = read_curves(tmp_path, "a\x1b")
    assert curves.training["tokens"].tolist() == [200, 400, 800]
    assert curves.evaluations["tokens"].tolist() == [0, 600, 1000]
    assert curves.name == "a\\x1b" and curves.last("tokens") == 1000 and len(curves) == 6
    (tmp_path / "log.jsonl").write_text(lines(evaluation(0, 4), evaluation(5, 3)))
    assert np.array_equal(read_curves(tmp_path, "a").evaluations["tokens"], [0, np.nan], equal_nan=True)


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_tells_the_best_and_the_time_to_the_worse_best(make, command, no_matplotlib):
    slow = [evaluation(0, 5), step(5), evaluation(5, 2.9), step(10), evaluation(10, 3.5)]
    done = command(make("fast", LEARNS), make("slow", slow, learning_rate=1e-4), make("none", [step(1)]))
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert rows[0] == "run steps best bits per byte val_loss at step tokens time time to 5.8000"
    assert rows[1] == "fast 20/20 4.0000 2.0000 20 2,000 41.0 s 41.0 s"  # at step 10, its loss of 3 is above 2.9
    assert rows[2] == "slow 10/20 5.8000 2.9000 5 500 11.0 s 11.0 s"
    assert rows[3] == "none 1/20 no evaluation yet – – – – –"
    assert rows[4:7] == ["", "settings that differ", "learning_rate 0.003: fast, none; 0.0001: slow"]
    assert rows[7:] == ["no picture was drawn: matplotlib is missing; pip install matplotlib"] and not done.stderr


def test_without_bits_per_byte_runs_are_compared_by_their_loss(make, command, no_matplotlib):
    without = [{k: v for k, v in event.items() if k != "val_bpb"} for event in LEARNS]
    done = command(make("a", LEARNS), make("b", without), "--x=tokens")
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert rows[0].startswith("run steps bits per byte best val_loss") and rows[0].endswith("time to 2.0000")
    assert rows[2].startswith("b 20/20 – 2.0000 20")


def test_what_does_not_compare_is_said(make, command, no_matplotlib):
    double = [event | {"tokens": 200 * event["step"]} if "tokens" in event else event for event in LEARNS]
    runs = make("a", LEARNS), make("b", double, "sft", dataset="talk")
    done = command(*runs, runs[0])
    assert f"note: {runs[0]} was given twice: it counts once\n" in done.stdout
    assert "note: these runs are evaluated on different data or tasks, so their losses do not compare" in done.stdout
    assert "note: a step is not the same number of tokens in all runs: --x=tokens" in done.stdout
    assert "time to" not in done.stdout.splitlines()[0]
    for line in ("task        pretrain: a; sft: b", "dataset     pydocs: a; talk: b", "chat_style  –: a; plaingpt: b"):
        assert f"  {line}\n" in done.stdout
    assert "--x=tokens" not in command(*runs, "--x=tokens").stdout
    assert "do not compare" in command(runs[0], make("masked", LEARNS, objective="masked")).stdout


def test_runs_of_one_name_are_told_apart_by_their_paths(make, command, no_matplotlib):
    make("x/same", LEARNS), make("y/same", LEARNS)
    assert [line.split()[0] for line in command("x/same", "y/same").stdout.splitlines()[1:3]] == ["x/same", "y/same"]


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_times_are_written_as_people_do(seconds, text):
    assert plot.duration(seconds) == text


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_each(make, command, monkeypatch):
    run, imported, empty = make("a", LEARNS), make("foreign", [], "import"), make("empty", [])
    assert "name one run or more" in error_of(command())
    assert f"no run in {run / 'x'}" in error_of(command(run, run / "x"))
    assert f"{imported} was imported by convert.py, not trained: it has no log to plot" in error_of(
        command(run, imported)
    )
    assert f"{empty} has logged nothing yet" in error_of(command(empty, "--watch"))
    assert "must end in one of .svg, .png, .pdf" in error_of(command(run, "--output=a.gif"))
    assert "x must be one of steps, tokens, seconds" in error_of(command(run, "--x=hours"))
    assert "cannot write no/a.png: No such file" in error_of(command(run, "--output=no/a.png"))
    assert "13 runs are too many" in error_of(command(*range(13)))
    assert command(run, empty).returncode == 0  # one that has just begun
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    (Path.cwd() / "plot.svg").unlink()
    done = command(run)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith(
        "matplotlib is missing; pip install matplotlib"
    )
    asked = command(run, "--output=a.png")
    assert (
        asked.returncode == 1 and asked.stdout.startswith("run ") and "a.png was not drawn: matplotlib" in asked.stderr
    )
    assert not list(Path.cwd().glob("*.svg")) and not list(Path.cwd().glob("*.png"))


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_names_its_numbers_its_units_and_its_runs(make, command):
    runs = [make(name, LEARNS) for name in ("_first", "a$b$c", "时间")]
    for x, unit in (("steps", "steps"), ("seconds", "seconds")):
        assert command(*runs, f"--x={x}").returncode == 0
        found = texts(Path("plot.svg"))
        assert {*PANELS.values(), "_first", "a$b$c", "时间", "validation loss", "training loss"} <= {*found}
        assert found.count(unit) == len(PANELS)
    once = Path("plot.svg").read_bytes()
    command(*runs, "--x=seconds")
    assert Path("plot.svg").read_bytes() == once


@pytest.mark.parametrize("n", [1, 12])
def test_nothing_in_a_picture_covers_anything_else(make, tmp_path, n):
    runs = [
        read_curves(make(f"r{i}", LEARNS), "a_name_that_is_rather_long_for_a_legend" * 4 + str(i)) for i in range(n)
    ]
    with picture(tmp_path / "a.png", 13, 7) as figure:
        fill(figure, runs, "seconds")
        figure.draw_without_rendering()
        panels = [axes.get_tightbbox() for axes in figure.axes]  # with titles, labels and legend
        width, height = figure.bbox.size
        for axes in figure.axes[:-1]:
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                ticks = [tick for tick in axis.get_major_ticks() if limits[0] <= tick.get_loc() <= limits[1]]
                labels = [tick.label1.get_window_extent() for tick in ticks]
                assert len(labels) > 1 and apart(labels)
        names = [text.get_window_extent() for text in figure.axes[-1].get_legend().get_texts()]
    assert apart(panels) and apart(names) and len(names) == n + 2
    edge = 1  # pixel
    assert all(-edge < box.x0 and box.x1 < width + edge and -edge < box.y0 and box.y1 < height + edge for box in panels)


def apart(boxes: list) -> bool:
    return not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_frame_shows_the_end_of_long_runs_and_all_of_short_ones(make):
    from matplotlib.figure import Figure

    def frame(name: str, n: int) -> tuple[float, float]:
        events = [step(i, 3 + 90 * (i == 1), grad_norm=100.0 if i == n else 0.5) for i in range(1, n + 1)]
        figure = Figure()
        fill(figure, [read_curves(make(name, [evaluation(0, 100), *events]), name)], "steps")
        assert figure.axes[3].get_yscale() == "log" and figure.axes[3].get_ylim()[1] > 100
        return figure.axes[0].get_ylim()

    assert frame("long", 40)[1] < 10 and frame("short", 10)[1] > 100


def test_numbers_that_are_not_finite_leave_a_gap(make, tmp_path):
    events = [step(1), step(2, grad_norm=float("inf")), step(3)]
    curves = read_curves(make("a", events), "a")
    assert np.isnan(curves.training["grad_norm"]).tolist() == [False, True, False]
    draw([curves], tmp_path / "a.svg")
    draw_loss(curves, tmp_path / "loss.svg")
    assert texts(tmp_path / "a.svg").count("nothing yet") == 1  # bits per byte, without an evaluation


# --- runs that go on -------------------------------------------------------------------------------------------------


def test_watching_draws_as_the_log_grows_until_the_run_ends(make, command, monkeypatch):
    run, seen = make("a", []), []
    lock = locked(run, "wait")
    lock.__enter__()

    def meanwhile(_seconds: float) -> None:
        seen.append(texts(Path("plot.svg")).count("nothing yet"))
        if len(seen) == 4:
            return lock.__exit__(None, None, None)
        with open(run / "log.jsonl", "a") as file:
            file.write([lines(evaluation(0, 4)), lines(step(1)) + '{"step"', ': 2, "val'][len(seen) - 1])

    monkeypatch.setattr(plot.time, "sleep", meanwhile)
    assert is_locked(run)
    done = command("--watch", run)
    assert seen == [5, 3, 0, 0] and not is_locked(run)
    assert done.returncode == 0 and done.stdout.startswith("run ") and done.stdout.count("run ") == 1
    assert "cut short" in done.stdout and "running" not in done.stdout


def test_a_killed_run_is_not_taken_for_one_that_goes_on(make):
    run = make("a", LEARNS)
    (run / ".lock.json").write_text("{}")
    assert not is_locked(run) and not is_locked(run / "none")


# --- loss.svg --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(corpus_folder, tmp_path, monkeypatch, capsys):
    """A function that trains for two steps in this process; returns the run's folder and what was printed."""
    (tmp_path / "empty.py").write_text("")
    options = (
        "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --device=cpu --max_iters=2 --log_interval=1 --eval_iters=1"
    )

    def run(name: str) -> tuple[Path, str]:
        arguments = [str(tmp_path / "empty.py"), f"--dataset={corpus_folder}", f"--out_dir={tmp_path / name}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *options.split()])
        train.main()
        return tmp_path / name, capsys.readouterr().out

    return run


def test_a_run_draws_its_losses_at_its_end(trained, monkeypatch):
    run, told = trained("a$b$")
    best = min(event["val_loss"] for event in read_log(run)[1])
    found = texts(run / "loss.svg")
    assert {"a$b$", "loss (nats per token)", "steps", "training", "validation"} <= {*found} and "loss.svg" not in told
    assert any(text.startswith(f"best validation loss {best:.4f}") for text in found)
    monkeypatch.setattr("runs.start.draw_loss", lambda *_: [][0])  # a matplotlib that does not work
    run, told = trained("broken")
    assert "note: there is no new loss.svg: list index out of range" in told and Run.open(run).checkpoint("latest")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run, told = trained("without")
    assert not (run / "loss.svg").exists() and "loss.svg" not in told


def test_no_command_imports_matplotlib_before_it_draws_nor_ever_a_window(make):
    run = make("a", LEARNS)
    code = f"""
import sys, train, finetune, plot
assert "matplotlib" not in sys.modules
sys.argv = ["plot.py", {str(run)!r}, "--output={run}/a.png"]
plot.main()
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    environment = os.environ | {"MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (run / "a.png").read_bytes().startswith(b"\x89PNG")
