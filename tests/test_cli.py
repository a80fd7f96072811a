"""Whole command lines: what a user types, what comes out, and how mistakes are told."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from common.threads import SPINS

ROOT = Path(__file__).parent.parent


def run(*command: object, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment, **options
    )


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake must end with."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_vocabulary_goes_from_text_to_samples(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"the cat number {i} sat on the mat, naïvely\n" for i in range(500)))
    vocabulary, corpus, out = tmp_path / "a.bpe", tmp_path / "corpus", tmp_path / "run"
    sizes = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--max_iters=2"]
    for command in (
        ["bpe.py", "train", "--input", tmp_path / "a.txt", "--vocab_size", "300", "--output", vocabulary],
        ["data/text/prepare.py", "--input", tmp_path / "a.txt", "--output", corpus, "--tokenizer", vocabulary],
        ["train.py", f"--dataset={corpus}", f"--out_dir={out}", *sizes],
        ["sample.py", f"--out_dir={out}", "--prompt=the cat", "--max_new_tokens=20"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    assert (out / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes() == vocabulary.read_bytes()


def test_a_mistake_in_training_is_one_clear_line(corpus_folder, tmp_path):
    done = run("train.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'x'}", "--n_embd=130", "--n_head=4")
    assert "n_embd (130) must be a multiple of n_head (4)" in error_of(done)
    assert "did you mean learning_rate?" in error_of(run("train.py", "--lerning_rate=1"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_lists_the_keys(script):
    done = run(script, "--help")
    assert done.returncode == 0 and "--out_dir=out/pydocs" in done.stdout and "--seed=1337" in done.stdout


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="GNU's OpenMP on x86-64")
@pytest.mark.parametrize(("given", "spins"), [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                              ({"OMP_WAIT_POLICY": "passive"}, "0")])  # fmt: skip
def test_openmp_waits_briefly_unless_the_user_says_otherwise(given, spins):
    """OpenMP says at its start, on stderr, what it has found in the environment."""
    done = run("train.py", "--help", env=given | {"OMP_DISPLAY_ENV": "verbose"})
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_a_run_moves_aside_for_a_new_one_of_its_name(corpus_folder, tmp_path):
    (tmp_path / "c.py").write_text("n_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 8\nmax_iters = 1\n")
    command = ["train.py", tmp_path / "c.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'r'}"]
    assert run(*command).returncode == 0
    assert f"{tmp_path / 'r'} held a run already: it is now {tmp_path / 'r.1'}" in run(*command).stdout
    assert (tmp_path / "r.1" / "config.json").exists() and (tmp_path / "r" / "config.json").exists()


def test_training_needs_no_wandb(corpus_folder, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('not here')")
    (tmp_path / "c.py").write_text("n_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 8\nmax_iters = 1\n")
    command = ["train.py", tmp_path / "c.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'r'}"]
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    assert "wandb_log=True needs the package wandb" in error_of(run(*command, "--wandb_log", env=environment))
    assert not (tmp_path / "r").exists()  # what cannot begin leaves no empty run
    assert run(*command, env=environment).returncode == 0
