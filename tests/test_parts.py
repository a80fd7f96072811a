"""A corpus that many machines prepare in parts is the one that a single machine prepares."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.test_prepare import command, jsonl, refused  # noqa: F401
from text.corpus import Corpus
from text.tokenizer import CharTokenizer


@pytest.fixture
def prepare(command, tmp_path):  # noqa: F811
    """data/text/prepare.py on seven files, one of them plain text, with a tokenizer of characters."""
    for i in range(5):
        jsonl(tmp_path / f"{i}.jsonl", [f"file {i} document {j}" + " and more" * (j % 5) for j in range(20 + 5 * i)])
    for name in "xy":
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n" * 50)
    (tmp_path / "tokenizer").mkdir()
    CharTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 \n", eot=True).save(tmp_path / "tokenizer")
    files = sorted([*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.txt")])

    def call(output, *options, tokenizer="tokenizer", inputs=files):
        always = ["--output", tmp_path / output, "--val_fraction", "0.2", "--workers", "1"]
        if "--join" not in options:
            always += ["--tokenizer", tmp_path / tokenizer, "--input", *inputs]
        return command("text", *always, *options)

    return call


def parts(prepare, of, output="parts", **how):
    for number in range(of, 0, -1):  # in any order
        result = prepare(output, "--part", f"{number}/{of}", "--shard_tokens", "300", **how)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_joined_parts_are_the_undivided_corpus(prepare, tmp_path, of):
    assert prepare("whole").returncode == 0
    parts(prepare, of)
    files = {path: path.stat().st_ino for path in tmp_path.glob("parts/*/*.bin")}
    result = prepare("parts", "--join")
    assert result.returncode == 0 and "tokens" in result.stdout
    assert files == {path: path.stat().st_ino for path in tmp_path.glob("parts/**/*.bin")}  # none is copied
    whole, joined = Corpus(tmp_path / "whole"), Corpus(tmp_path / "parts")
    joined.verify()
    assert joined.tokenizer.content() == whole.tokenizer.content()
    for split in ("train", "val"):
        counts, expected = joined.meta["splits"][split], whole.meta["splits"][split]
        assert all(counts[key] == expected[key] for key in ("tokens", "bytes", "documents"))
        found = [np.fromfile(tmp_path / "parts" / shard["file"], "<u2") for shard in counts["shards"]]
        assert np.array_equal(np.concatenate(found), np.fromfile(tmp_path / "whole" / f"{split}.bin", "<u2"))
        shape = {"seed": 1, "batch_size": 50, "block_size": 70}
        for a, b in zip(joined.batch(split, 2, **shape), whole.batch(split, 2, **shape), strict=True):
            assert torch.equal(a, b)


def test_a_part_that_is_done_is_not_done_again_unless_it_changed(prepare, tmp_path):
    parts(prepare, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.bin")}
    again = prepare("parts", "--part", "1/2", "--shard_tokens", "300")
    assert again.returncode == 0 and "part_00001_of_00002: this part is there already; nothing to do" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.bin")}
    assert "nothing to do" not in prepare("parts", "--part", "1/2", "--shard_tokens", "301").stdout


def test_a_damaged_part_is_prepared_again_by_its_own_command(prepare, tmp_path):
    parts(prepare, 2)
    path = tmp_path / "parts" / "part_00001_of_00002" / "train_00001.bin"
    content = path.read_bytes()
    for wrong in (content[:-2], content[:-1] + b"x", None):
        path.write_bytes(wrong) if wrong else path.with_name("meta.json").write_text("{")
        again = prepare("parts", "--part", "1/2", "--shard_tokens", "300")
        assert again.returncode == 0 and "nothing to do" not in again.stdout and path.read_bytes() == content
        assert ("train_00001.bin" in again.stderr and "this part is prepared again" in again.stderr) == bool(wrong)
    joined = prepare("parts", "--join")
    assert joined.returncode == 0 and "for validation, not" not in joined.stderr  # --join does not know --val_fraction


def test_a_part_of_a_joined_corpus_is_mended_but_not_replaced_by_another(prepare, tmp_path):
    parts(prepare, 2)
    assert prepare("parts", "--join").returncode == 0
    told = refused(prepare("parts", "--part", "1/2", "--shard_tokens", "301"))
    assert "parts/meta.json is a corpus joined from this part" in told and "delete" in told
    Corpus(tmp_path / "parts").verify()
    (tmp_path / "parts" / "part_00001_of_00002" / "train_00001.bin").write_bytes(b"")
    assert prepare("parts", "--part", "1/2", "--shard_tokens", "300").returncode == 0
    Corpus(tmp_path / "parts").verify()
    (tmp_path / "parts" / "meta.json").unlink()
    assert prepare("parts", "--part", "1/2", "--shard_tokens", "301").returncode == 0


def test_joining_names_what_is_wrong(prepare, tmp_path):
    assert "has no parts to join: make them with --part 1/N" in refused(prepare("parts", "--join"))
    parts(prepare, 3)
    folder = tmp_path / "parts"
    second = folder / "part_00002_of_00003"
    with pytest.raises(ValueError, match="part_00002_of_00003' is one part of a corpus: join the parts with --join"):
        Corpus(second)
    shutil.copytree(folder, tmp_path / "kept")

    def wrong():
        told = refused(prepare("parts", "--join"))
        assert not (folder / "meta.json").exists()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
        return told

    shutil.rmtree(second)
    assert "1 of 3 parts are missing or unfinished: part_00002_of_00003" in wrong()
    (folder / "part_00001_of_00004").mkdir()
    assert "has parts of 3 and of 4: delete those that you do not want" in wrong()
    prepare("parts", "--part", "2/3", "--shard_tokens", "299")
    assert "part_00002_of_00003 was prepared otherwise than" in wrong()
    (second / "train_00001.bin").unlink()
    told = wrong()
    assert "part_00002_of_00003/train_00001.bin' has 0 bytes instead of 600: prepare this part again" in told
    assert told.endswith("with --part 2/3\n")
    (second / "meta.json").write_text(json.dumps(json.loads((second / "meta.json").read_text()) | {"splits": []}))
    assert "part_00002_of_00003/meta.json is damaged" in wrong()
    assert prepare("parts", "--join").returncode == 0
    content = bytearray((second / "train_00001.bin").read_bytes())
    content[5] ^= 1
    (second / "train_00001.bin").write_bytes(content)
    with pytest.raises(ValueError, match="part_00002_of_00003/train_00001.bin' is damaged"):
        Corpus(folder).verify()


@pytest.mark.parametrize("part", ["0/3", "4/3", "x/y", "3", "1/0", "-1/3", "1/3/5", "1/100000", "1.0/3", ""])
def test_impossible_parts_are_refused(prepare, part):
    told = refused(prepare("parts", f"--part={part}"))
    assert f"--part={part}: give K/N with K from 1 to N" in told


def test_a_part_needs_a_vocabulary_files_and_as_many_of_them(prepare, command, tmp_path):  # noqa: F811
    options = ["--output", tmp_path / "o", "--input", tmp_path / "0.jsonl", tmp_path / "1.jsonl", "--part"]
    for how in ([], ["--tokenizer", "char"], ["--vocab_size", "300"]):
        assert "each part would make another vocabulary" in refused(command("text", *options, "2/2", *how))
    told = refused(command("text", *options, "2/3", "--tokenizer", tmp_path / "tokenizer"))
    assert "--part=2/3: there are only 2 input files, and a part needs one" in told
    assert "leave out --input and --part" in refused(command("text", *options, "1/2", "--join"))
    assert "--input is missing" in refused(command("text", "--output", tmp_path / "o"))
    assert "parts are parts of files" in refused(command("openwebtext", "--part", "1/2"))
