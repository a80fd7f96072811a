"""Whole command lines: what a user types, what comes out, and how mistakes are told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sample as sample_module
from common import cli

ROOT = Path(__file__).parent.parent


def run(*command: object, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment, **options
    )


@pytest.fixture(scope="module")
def trained(corpus_folder, tmp_path_factory):
    """The folder of a small run, made by the real command."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.py").write_text("n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\nmax_iters = 30\n")
    done = run("train.py", folder / "small.py", f"--dataset={corpus_folder}", f"--out_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake must end with."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def sample(trained, capsys, monkeypatch):
    """sample.py's command in this process, as its last lines run it (a new process each would take a minute)."""

    def command(*options: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", "--max_new_tokens=40", *options])
        code = 0
        try:
            cli.run(sample_module.main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return command


def test_sampling_continues_the_prompt_and_repeats_itself_by_seed(sample):
    first, again, other = (sample("--prompt=the quick", f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick") and first.stdout == again.stdout != other.stdout


def test_several_samples_are_those_of_the_seeds_that_follow(sample):
    both = sample("--num_samples=2", "--seed=5").stdout.split("\n" + "-" * 20 + "\n")
    alone = [sample(f"--seed={seed}").stdout for seed in (5, 6)]
    assert [text.strip() for text in both] == [text.strip() for text in alone]


def test_the_command_prints_what_it_samples(trained, sample):
    options = ["--prompt=the", "--seed=3"]
    done = run("sample.py", f"--out_dir={trained}", "--max_new_tokens=40", *options)
    assert done.returncode == 0 and done.stdout == sample(*options).stdout
    assert "no run in" in error_of(run("sample.py", "--out_dir=nowhere"))


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


def test_greedy_needs_no_seed(sample):
    assert len({sample("--temperature=0", f"--seed={seed}").stdout for seed in (1, 2)}) == 1


def test_a_prompt_can_be_a_file(sample, tmp_path):
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    assert sample(f"--prompt=FILE:{tmp_path / 'prompt.txt'}").stdout.startswith("the lazy dog")


def test_text_may_be_longer_than_the_context(sample):
    done = sample("--prompt=" + "the quick brown fox " * 5, "--max_new_tokens=200")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--prompt=Zebra"], "'Z' (U+005A) at position 0"), (["--prompt=FILE:none"], "cannot read the prompt file none"),
     (["--temperature=-1"], "temperature must be at least 0"), (["--top_p=0"], "top_p must be above 0"),
     (["--max_new_tokens=0"], "max_new_tokens must be at least 1"), (["--checkpoint=x"], "choose best, latest or"),
     (["--tempreature=1"], "did you mean temperature?"), (["--seed=x"], "seed must be of type int"),
     (["--out_dir=nowhere"], "no run in nowhere"), (["--device=cuda:9"], "CUDA GPUs"), (["prompt"], "cannot read")],
)  # fmt: skip
def test_a_mistake_in_sampling_is_one_clear_line(sample, options, message):
    assert message in error_of(sample(*options))


def test_a_damaged_run_is_one_clear_line(trained, sample, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error_of(sample(f"--out_dir={copy}"))
    weights = next(copy.glob("checkpoints/*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors is damaged" in error_of(sample(f"--out_dir={copy}"))


def test_a_mistake_in_training_is_one_clear_line(corpus_folder, tmp_path):
    done = run("train.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'x'}", "--n_embd=130", "--n_head=4")
    assert "n_embd (130) must be a multiple of n_head (4)" in error_of(done)
    assert "did you mean learning_rate?" in error_of(run("train.py", "--lerning_rate=1"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_lists_the_keys(script):
    done = run(script, "--help")
    assert done.returncode == 0 and "--out_dir=out/pydocs" in done.stdout and "--seed=1337" in done.stdout


def test_a_run_moves_aside_for_a_new_one_of_its_name(trained, corpus_folder, tmp_path):
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
    assert run(*command, env=environment).returncode == 0
    assert "wandb_log=True needs the package wandb" in error_of(run(*command, "--wandb_log=True", env=environment))
