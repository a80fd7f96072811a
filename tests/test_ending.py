"""How a command ends: mistakes, lack of memory, Ctrl-C, readers that leave, and torchrun's processes."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from common import cli
from common.cli import visible

ROOT = Path(__file__).parent.parent


@pytest.fixture
def end(capsys):
    """A function that runs `main` as a command in this process: its exit status, its output and its errors."""

    def command(main, **options) -> tuple[int, str, str]:
        handler, code = signal.getsignal(signal.SIGINT), 0
        try:
            cli.run_command(main, **options)
        except SystemExit as stopped:
            code = stopped.code
        finally:
            signal.signal(signal.SIGINT, handler)
        return code, *capsys.readouterr()

    return command


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("n_layer must be\nat least 1"), "n_layer must be at least 1"), (ValueError(), "ValueError"),
     (FileNotFoundError(2, "No such file", "x"), "x: No such file"),
     (OSError(36, "File name too long", "x"), "x: File name too long; choose a shorter one"),
     (OSError(28, "No space left on device"), "No space left on device: free some space on the disk, and run the"
      " command again")],
)  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_status_1(end, error, line):
    assert end(failing(error)) == (1, "", f"error: {line}\n")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("shapes differ"), AssertionError()])
def test_a_bug_of_ours_keeps_its_traceback(end, error):
    with pytest.raises(type(error)):
        end(failing(error))


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 58, dtype=torch.uint8), lambda: torch.empty(1 << 61, 8), lambda: bytearray(1 << 62),
     lambda: np.empty((1 << 62, 9), np.int64), lambda: np.empty(1 << 56, np.uint8)],
)  # fmt: skip
def test_out_of_memory_names_the_keys_to_change(end, allocate):
    code, _, line = end(allocate, if_out_of_memory="lower batch_size")
    assert code == 1 and line.startswith("error: out of memory: lower batch_size (") and line.count("\n") == 1
    assert all(key in train.OUT_OF_MEMORY for key in ("batch_size", "block_size", "n_embd", "dtype"))
    assert all(key in sample.OUT_OF_MEMORY for key in ("num_samples", "num_beams", "max_new_tokens", "dtype"))


@pytest.mark.parametrize(
    "overflow",
    [lambda: torch.empty(1 << 63), lambda: torch.zeros(3).view(1 << 64), lambda: float(10**400)],
)  # fmt: skip
def test_a_number_that_does_not_fit_is_one_line(end, overflow):
    code, _, line = end(overflow)
    assert code == 1 and line.startswith("error: a number is too large") and line.count("\n") == 1


@pytest.mark.parametrize("option", ["mlp_dim", "head_dim", "block_size", "n_embd", "vocab_size"])
def test_an_integer_beyond_all_memory_is_one_line(end, monkeypatch, corpus_folder, tmp_path, option):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "out_dir": tmp_path / "r"}
    sizes |= {"dataset": corpus_folder, option: 2**63 - 2}
    options = [f"--{key}={value}" for key, value in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    code, _, line = end(train.main)
    assert code == 1 and line.startswith("error: ") and line.count("\n") == 1


# --- torchrun --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "prefix"), [("0", "error: "), ("3", "error in process 3: ")])
def test_under_torchrun_an_error_of_one_process_alone_says_whose_it_is(end, monkeypatch, rank, prefix):
    monkeypatch.setattr(cli, "PATIENCE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", rank)
    assert end(failing(ValueError("no such GPU"))) == (1, "", f"{prefix}no such GPU\n")
    assert end(failing(KeyboardInterrupt())) == (130, "", "interrupted\n" if rank == "0" else "")


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_status_130(end):
    assert end(failing(KeyboardInterrupt())) == (130, "", "interrupted\n")


@pytest.mark.parametrize("script", ["train.py", "sample.py", "finetune.py"])
def test_ctrl_c_while_pytorch_is_imported_is_one_line_too(tmp_path, script):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "interrupted\n") and process.returncode == 130


def test_programs_that_import_this_project_keep_their_own_ctrl_c():
    assert not cli.is_command() and signal.getsignal(signal.SIGINT) is not cli.end_at_once


# --- readers that leave ----------------------------------------------------------------------------------------------


@pytest.fixture
def closed_pipe(monkeypatch):
    """Make sys.stdout or sys.stderr a pipe whose reader has left."""
    opened = []

    def close(name: str) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        opened.append(open(writer, "w", buffering=1))
        monkeypatch.setattr(sys, name, opened[-1])

    yield close
    for stream in opened:
        stream.close()  # nothing is left to be written that could fail


def test_training_goes_on_when_nobody_reads_what_it_says(end, closed_pipe, monkeypatch, corpus_folder, tmp_path):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "max_iters": 4, "log_interval": 1}
    (tmp_path / "c.py").write_text("".join(f"{key} = {value}\n" for key, value in sizes.items()))
    options = [f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'r'}", "--sample_interval=1", "--eval_interval=2"]
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "c.py"), *options])
    closed_pipe("stdout")
    closed_pipe("stderr")
    assert end(train.main) == (0, "", "")
    assert (tmp_path / "r" / "checkpoints" / "step_00000004").is_dir()
    assert len((tmp_path / "r" / "log.jsonl").read_text().splitlines()) == 4 + 3


def test_what_must_stop_stops_with_its_status_though_nobody_reads(end, closed_pipe):
    closed_pipe("stderr")
    assert end(failing(ValueError("loss nan"))) == (1, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to a device that is always full")
@pytest.mark.parametrize("option", ["--plan", "--help", "--eval_only=True"])
def test_what_only_prints_fails_where_its_output_cannot_be_written(option, corpus_folder):
    command = [sys.executable, "train.py", f"--dataset={corpus_folder}", "--n_layer=1", "--eval_iters=1", option]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (
        1, "error: No space left on device: free some space on the disk, and run the command again\n"
    )  # fmt: skip


def test_other_commands_end_without_a_word_when_their_reader_leaves(end, closed_pipe):
    said = []

    def main() -> None:
        while True:
            print("text", flush=True)
            said.append("text")

    closed_pipe("stdout")
    assert end(main) == (1, "", "") and said == []


def test_streams_come_back_as_they_were(end):
    def main() -> None:
        with cli.lasting("stdout"):
            print("said")

    streams = sys.stdout, sys.stderr
    assert end(main) == (0, "said\n", "")
    assert (sys.stdout, sys.stderr) == streams


def test_control_characters_become_visible():
    assert visible("a\tb\nc é 中 👩‍🚀") == "a\tb\nc é 中 👩‍🚀"
    assert visible("\x1b[31m\r\x00\x9b\u202e\u2028\ud800") == r"\x1b[31m\r\x00\x9b\u202e\u2028\ud800"
