"""Small runs to sample from, and sample.py's command in this process: fixtures for the tests of sample.py."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import finetune
import sample as sample_module
import train
from common import cli
from tests.helpers import SIZES, make_run
from text.corpus import write_corpus
from text.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def trained(corpus_folder, tmp_path_factory):
    """A base model."""
    folder = tmp_path_factory.mktemp("trained")
    return make_run(train.main, "train.py", folder, f"--dataset={corpus_folder}", *SIZES, "--max_iters=40")


@pytest.fixture(scope="session")
def talker(trained, tmp_path_factory):
    """A model fine-tuned on short answers, for a moment."""
    folder = tmp_path_factory.mktemp("talker")
    words = "the quick brown fox jumps over a lazy dog and sleeps".split()
    rows = [{"instruction": f"{a} {b}", "output": f"{b} {a} the"} for a in words for b in words]
    for split, part in {"train": rows[:-11], "val": rows[-11:]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    options = ["--max_iters=60", "--eval_interval=60", "--batch_size=8", "--optimizer=muon", "--learning_rate=0.02"]
    return make_run(finetune.main, "finetune.py", folder, f"--dataset={folder}", f"--init_from={trained}", *options)


@pytest.fixture(scope="session")
def wild(tmp_path_factory):
    """A base model whose every other character is one that a terminal obeys."""
    folder, rng = tmp_path_factory.mktemp("wild"), np.random.default_rng(0)
    letters = "\x1b\n\té[/"
    documents = [("train", "".join(rng.choice(list(letters), 200))) for _ in range(20)]
    write_corpus(folder, [*documents, ("val", letters * 40)], CharTokenizer(letters, eot=False), workers=1)
    return make_run(train.main, "train.py", folder, f"--dataset={folder}", *SIZES, "--max_iters=1")


@pytest.fixture
def sample(trained, capsys, monkeypatch):
    """sample.py's command in this process, as its last lines run it (a new process each would take a minute)."""

    def command(*options: object, run: Path = trained, typed: list[str] | None = None) -> subprocess.CompletedProcess:
        generates = not any(option.startswith(("--score", "--fill", "--classify")) for option in options)
        length = ("--max_new_tokens=40",) if generates else ()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={run}", *length, *options])
        if typed is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
        capsys.readouterr()
        code = 0
        try:
            cli.run_command(sample_module.main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return command
