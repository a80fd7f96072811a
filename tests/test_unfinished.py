"""A preparation that is killed goes on where it was, and ends with the files of one that was not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus_helpers import names_in

ROOT = Path(__file__).resolve().parents[1]
PREPARE = """if True:
    import sys
    from common import cli
    from text import documents, prepare, tokenise
    tokenise.TASK = prepare.TASK = 300
    def main():
        parser = prepare.corpus_parser("", output=None, tokenizer="char", val_fraction=0.3)
        parser.add_argument("--input", nargs="+")
        documents.add_reading_options(parser)
        prepare.add_part_options(parser)
        prepare.prepare_files(parser.parse_args())
"""
# Each child is killed at its n-th change of the disk; the parent forks the next, so that all imports are done once.
KILLING = """
    import os, shutil, signal
    def deadly(module, name, killed_at):
        original = getattr(module, name)
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == killed_at: os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        setattr(module, name, call)
    def child(output, options, killed_at=0):
        global calls
        if (pid := os.fork()) == 0:
            calls, sys.argv = 0, ["prepare.py", *options, "--output", output]
            for module, name in [(os, n) for n in ("fsync", "replace", "unlink", "ftruncate", "rmdir")]:
                deadly(module, name, killed_at)
            sys.stdout = open(os.devnull, "w")
            cli.run_command(main)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    def content(folder):
        return {f: open(os.path.join(folder, f), "rb").read() for f in os.listdir(folder) if f[0] != "."}
    def files(folder):
        "The full shards and their inodes and times: they are never written again, only renamed."
        try: state = __import__("json").load(open(folder + "/.unfinished/state.json"))
        except FileNotFoundError: return set()
        stats = set()
        for split in (state["splits"] or {}).values():
            for shard in split["shards"]:
                for place in (folder + "/.unfinished/", folder + "/"):
                    if shard["tokens"] == 100 and os.path.exists(place + shard["file"]):
                        found = os.stat(place + shard["file"])
                        stats.add((found.st_ino, found.st_mtime_ns))
        return stats
    def inodes(folder):
        return {(e.stat().st_ino, e.stat().st_mtime_ns) for e in os.scandir(folder) if e.name.endswith(".bin")}
    whole, folder, options = sys.argv[1], sys.argv[2], sys.argv[3:]
    assert child(whole, options) == 0
    n = kept = 0
    while True:  # killed once, at every place
        n += 1
        code = child(folder, options, n)
        full = files(folder)
        kept += bool(full)
        if code != 0:
            assert code == -9, code
            if os.path.exists(folder + "/meta.json"): assert content(folder) == content(whole)
            assert child(folder, options) == 0
        assert content(folder) == content(whole), n
        assert os.listdir(folder + "/.unfinished") == [] if os.path.exists(folder + "/.unfinished") else True
        assert full <= inodes(folder), n
        shutil.rmtree(folder)
        if code == 0: break
    times = 0
    while child(folder, options, 21) != 0:  # killed again and again
        times += 1
        assert times < 50
    assert content(folder) == content(whole)
    print(n, kept, times)
"""


@pytest.fixture
def inputs(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for path in paths:
        rows = [{"text": f"document {i} of {path.name} <|endoftext|> " + "word " * (i % 7)} for i in range(7)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.txt").write_text("a text of some length, in a file of its own\n" * 12)
    return [*paths, tmp_path / "c.txt"]


def prepare(*options, code=PREPARE + "    cli.run_command(main)", check=True):
    run = [sys.executable, "-c", code, *map(str, options)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_a_preparation_killed_anywhere_ends_with_the_same_files(tmp_path, inputs):
    options = ["--shard_tokens", "100", "--workers", "1", "--vocab_size", "300", "--input", *inputs]
    done = prepare(tmp_path / "whole", tmp_path / "killed", *options, code=PREPARE + KILLING)
    places, with_shards, times = map(int, done.stdout.split())
    assert places > 30 and with_shards > 15 and times > 0


def stop_after(tasks, signal="raise KeyboardInterrupt"):
    """The command, interrupted when so many tasks are encoded."""
    return (
        PREPARE
        + f"""
    from text import corpus
    encode = corpus.encode_documents
    def interrupted(*arguments):
        for number, result in enumerate(encode(*arguments)):
            if number == {tasks}: {signal}
            yield result
    corpus.encode_documents = interrupted
    cli.run_command(main)
"""
    )


def test_ctrl_c_and_a_vocabulary_that_is_not_learned_again(tmp_path, inputs):
    options = ["--shard_tokens", "64", "--workers", "1", "--vocab_size", "300", "--input", *inputs, "--output"]
    done = prepare(*options, tmp_path / "out", code=stop_after(3), check=False)
    assert done.returncode == 130 and done.stderr.endswith("interrupted\n")
    assert f"note: {tmp_path}/out/.unfinished keeps what is done: the same command goes on from there" in done.stderr
    forbidden = PREPARE + "    prepare.learned_tokenizer = None\n    cli.run_command(main)"
    done = prepare(*options, tmp_path / "out", code=forbidden)
    assert "note: an interrupted preparation goes on: " in done.stderr and " 0 tokens" not in done.stderr
    prepare(*options, tmp_path / "whole")
    for name in names_in(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out" / ".unfinished").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        (["--val_fraction", "0.4"], "with other --val_fraction: starting anew"),
        (["--shard_tokens", "65"], "with other --shard_tokens: starting anew"),
        (["--vocab_size", "300"], "with other tokenizer: starting anew"),
        (["--text_suffix", ".log"], "with other reading options: starting anew"),
        ("touched", "with other input files: starting anew"),
        ("state", "that cannot go on (.* is damaged: its checksum differs): starting anew"),
        ("shard", "is missing or too short to go on: delete .*.unfinished, and begin again"),
        ("flipped", "is damaged (its SHA-256 differs): delete .*.unfinished"),
    ],
    ids=str,
)
def test_only_the_same_preparation_goes_on(tmp_path, inputs, change, told):
    options = ["--shard_tokens", "64", "--workers", "1", "--input", *inputs, "--output", tmp_path / "out"]
    prepare(*options, code=stop_after(3, "sys.stdout.flush(), __import__('os')._exit(9)"), check=False)
    work = tmp_path / "out" / ".unfinished"
    state = (work / "state.json").read_text()
    split, counts = next((s, c) for s, c in json.loads(state)["splits"].items() if c["shards"][-1]["tokens"] < 64)
    last = work / counts["shards"][-1]["file"]
    match change:
        case "touched":
            os.utime(inputs[0])
        case "state":
            (work / "state.json").write_text(state.replace('"tasks": ', '"tasks": 1'))
        case "shard":
            os.truncate(last, 1)
        case "flipped":
            content = bytearray(last.read_bytes())
            content[0] ^= 1
            last.write_bytes(content)
        case [*more]:
            options += more
    done = prepare(*options, check=False)
    assert re.search(told.replace("(", r"\(").replace(")", r"\)"), done.stderr), done.stderr
    assert done.stderr.count("starting anew") + done.stderr.count("delete") == 1
    if "anew" in told:
        assert done.returncode == 0
        prepare(*options, "--output", tmp_path / "whole")
        for name in names_in(tmp_path / "whole"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    else:
        assert done.returncode == 1
