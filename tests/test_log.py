"""What a run reports while it trains, and the signals that ask it to stop."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_files import longest_file
from training.interrupt import interruptible
from training.log import Log, rewind_log

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    """What the log reads of a TrainConfig."""

    out_dir: str
    max_iters: int = 1000
    wandb_log: bool = False


def event(step: int, **changes) -> dict:
    numbers = {"train_loss": 2.5, "lr": 3e-3, "tokens_per_second": 123456.0, "mfu": 0.41}
    return {"step": step, **numbers, **changes}


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a real terminal of some width, and returns a function that reads its lines."""
    opened = []

    def make(columns: int):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        opened.append((master, open(slave, "w")))
        monkeypatch.setattr(sys, "stderr", opened[-1][1])

        def shown() -> list[str]:
            sys.stderr.flush()
            os.write(slave, b"\rEND\n")
            text = b""
            while b"END" not in text:
                text += os.read(master, 1 << 16)
            lines = re.split(r"[\r\n]+", text.decode().replace("\x1b[A", "").split("END")[0])
            return [line for line in lines if line.strip()]

        return shown

    yield make
    for master, stream in opened:
        stream.close()
        os.close(master)


# --- the bar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [(72, "loss 2.5000, 123,456 tokens/s"), (80, "loss 2.5000, 123,456 tokens/s"),
     (95, "loss 2.5000, 123,456 tokens/s, lr 3.0e-03"), (110, "loss 2.5000, 123,456 tokens/s, lr 3.0e-03, mfu 41%")],
)  # fmt: skip
def test_a_narrow_bar_leaves_mfu_and_then_the_learning_rate_out(tmp_path, terminal, columns, numbers):
    shown = terminal(columns)
    log = Log(Config(str(tmp_path), max_iters=600_000), {}, True, 0)
    log.training(**event(450_000))
    log.bar.refresh()
    line = next(line for line in shown() if "450000" in line)
    log.close()
    assert len(line) < columns
    assert re.search(rf" 450000/600000 \[\d\d:\d\d<\d\d:\d\d, {re.escape(numbers)}]$", line)


def test_an_evaluation_counts_its_batches_on_the_bar_and_gives_the_bar_back(tmp_path, terminal):
    shown = terminal(100)
    log = Log(Config(str(tmp_path)), {}, True, 0)
    log.training(**event(10))
    assert list(log.evaluating("abc", total=3)) == ["a", "b", "c"]
    lines = shown()
    assert any("10/1000" in line and line.endswith("evaluating: batch 1 of 3]") for line in lines)
    assert "loss 2.5000" in lines[-1]
    assert list(log.evaluating(iter("ab"))) == ["a", "b"]
    assert any(line.endswith("evaluating: batch 1]") for line in shown())
    log.close()


def test_without_a_terminal_a_line_tells_of_every_fiftieth_of_the_run(tmp_path, capsys):
    log = Log(Config(str(tmp_path), max_iters=200), {}, True, 0)
    for step in range(1, 201):
        log.training(**event(step, mfu=0))
    assert list(log.evaluating("ab")) == ["a", "b"]
    log.close()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 51 and err == ""
    assert lines[-1] == "step 200/200: loss 2.5000, 123,456 tokens/s, lr 3.0e-03"
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [*range(1, 201)]


def test_only_the_first_process_reports(tmp_path, capsys):
    log = Log(Config(str(tmp_path)), {}, False, 0)
    log.training(**event(10))
    log.show_preview("text", 10)
    log.say("text")
    log.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


# --- previews --------------------------------------------------------------------------------------------------------


def test_control_characters_of_a_preview_are_shown_as_escapes(tmp_path, capsys):
    log = Log(Config(str(tmp_path)), {}, True, 0)
    log.show_preview("a\x1b[2J\rb\x00\x7f\x9b\u2028\u202e\tc\n  d\u3000\u200dé\U0001f600", 250)
    log.close()
    assert capsys.readouterr().out == "a\\x1b[2J\\rb\\x00\\x7f\\x9b\\u2028\\u202e\tc\n  d\u3000\u200dé\U0001f600\n"


def test_the_preview_at_step_0_is_one_line_of_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    log = Log(Config(str(tmp_path)), {}, True, 0)
    log.show_preview("> a\n\n\x1b[31m" + "an answer " * 20 + "\n3 of 6 answers end", 0)
    log.show_preview("short\n", 0)
    log.close()
    long, short = capsys.readouterr().out.splitlines()
    assert long == "before training: > a \\x1b[31 … an answer 3 of 6 answers end" and len(long) == 59
    assert short == "before training: short"


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_log_and_what_to_do(tmp_path):
    log = Log(Config(str(tmp_path)), {}, True, 0)
    with longest_file(300), pytest.raises(OSError) as told:
        for step in range(1, 10):
            log.event(event(step))
    log.close()
    assert str(told.value).startswith(f"cannot write {tmp_path / 'log.jsonl'}: ") and "free some space" in str(
        told.value
    )
    rewind_log(tmp_path, 1)  # the line that was cut short goes
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1]


def test_a_rewound_log_ends_at_the_step_and_holds_events_only(tmp_path):
    lines = [json.dumps(event(step)) + "\n" for step in (1, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("".join([*lines[:2], "\0\0\n", "[3]\n", '{"step": true}\n', *lines[2:], "{"]))
    rewind_log(tmp_path, 3)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:3])
    rewind_log(tmp_path, -1)
    assert (tmp_path / "log.jsonl").read_text() == ""
    rewind_log(tmp_path / "none", 3)


def test_a_login_that_wandb_refuses_is_told_before_there_is_a_run(tmp_path):
    pytest.importorskip("wandb")
    code = """
import os
from types import SimpleNamespace
from training.log import check_wandb
config = SimpleNamespace(wandb_log=True)
for mode in ("offline", "disabled", "online"):
    os.environ["WANDB_MODE"] = mode
    print(mode, flush=True)
    check_wandb(config)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "WANDB" not in name} | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout.split() == ["offline", "disabled", "online"]
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ValueError: wandb: No API key configured") and "set WANDB_MODE=offline" in error


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_remembered_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with interruptible(alone=True) as caught:
        os.kill(os.getpid(), number)
        assert caught == [number]
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once_unless_several_processes_share_it():
    with interruptible(alone=False) as caught:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT] * 2
    with pytest.raises(KeyboardInterrupt), interruptible(alone=True) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGTERM, signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(alone=True) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_is_not_written_to_by_the_signal_that_tells_of_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # any write would fail
    with interruptible(alone=True) as caught:
        os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [signal.SIGHUP]
