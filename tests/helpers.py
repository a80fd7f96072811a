"""What several test files share: options to try, inputs from a seed, a strict comparison, what a command printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")
WINDOWS = [{"position": position, "sliding_window": 3} for position in ("rope", "alibi")]
SIZES = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=48", "--device=cpu"]  # of small runs
LOSS_OPTIONS = [{}, {"label_smoothing": 0.1}, {"max_z_loss": 0.01}, {"label_smoothing": 0.2, "max_z_loss": 0.1}]


def label(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(B, T, seed=2):
    return torch.randint(23, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def make_run(main, name: str, folder: Path, *options: object) -> Path:
    """The folder of a small run, made by the real command in this process."""
    (folder / "empty.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [name, folder / "empty.py", f"--out_dir={folder / 'run'}", *options]
        patch.setattr(sys, "argv", list(map(str, arguments)))
        main()
    return folder / "run"


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake must end with."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def json_lines(done: subprocess.CompletedProcess) -> list[dict]:
    """What a command printed, a JSON object per line."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
