"""A corpus in shards gives what the same corpus in one file gives, and tells what is wrong with a shard."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.corpus_helpers import ONE_OF_EACH, CountingTokenizer, names_in, numbers
from text import shards
from text.corpus import Corpus, write_corpus
from text.tokenizer import CharTokenizer


def write(folder, train, val=(0, 1), shard_tokens=7):
    """A corpus of these numbers, in three training documents, whose borders are none of the shards'."""
    train = list(train)
    parts = [("train", train[: len(train) // 3]), ("val", val), ("train", train[len(train) // 3 : -5])]
    documents = [(split, " ".join(map(str, ids))) for split, ids in [*parts, ("train", train[-5:])]]
    write_corpus(folder, documents, CountingTokenizer(), workers=1, shard_tokens=shard_tokens)
    return Corpus(folder)


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 99, 101])
def test_batches_and_windows_are_those_of_one_file(tmp_path, shard_tokens):
    whole = numbers(tmp_path / "whole", range(1000, 1100), range(33))
    corpus = write(tmp_path / "shards", range(1000, 1100), range(33), shard_tokens)
    assert len(list((tmp_path / "shards").glob("train_*.bin"))) == (
        -(-100 // shard_tokens) if shard_tokens < 100 else 0
    )
    corpus.verify()
    for split in ("train", "val"):
        assert corpus.num_tokens(split) == whole.num_tokens(split) and corpus.num_bytes("val") == whole.num_bytes("val")
        for block_size in (1, 2, 7, 8, 31, 32):
            for step in range(4):
                shape = {"seed": step, "batch_size": 9, "block_size": block_size}
                for a, b in zip(corpus.batch(split, step, **shape), whole.batch(split, step, **shape), strict=True):
                    assert torch.equal(a, b)
            pairs = zip(corpus.windows(split, block_size, 2), whole.windows(split, block_size, 2), strict=True)
            assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_shards_have_a_fixed_number_of_tokens_and_are_listed(tmp_path):
    meta = write(tmp_path, range(24), (5, 6, 7)).meta
    assert names_in(tmp_path) == ["meta.json", "tokenizer.json", *(f"train_0000{i}.bin" for i in range(4)), "val.bin"]
    assert meta["version"] == 2 and set(meta["splits"]["val"]) == {"tokens", "bytes", "documents", "sha256"}
    listed = meta["splits"]["train"]["shards"]
    assert [(shard["file"], shard["tokens"]) for shard in listed] == [
        ("train_00000.bin", 7), ("train_00001.bin", 7), ("train_00002.bin", 7), ("train_00003.bin", 3)
    ]  # fmt: skip
    found = [np.fromfile(tmp_path / shard["file"], "<u4") for shard in listed]
    assert np.array_equal(np.concatenate(found), np.arange(24))


def test_a_corpus_replaces_all_files_of_the_one_before_it_and_no_others(tmp_path):
    (tmp_path / "train_notes.bin").write_text("mine")
    write(tmp_path, range(100), range(50))
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    assert names_in(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "train_notes.bin", "val.bin"]
    assert Corpus(tmp_path).meta["version"] == 1  # one that an earlier version of this code opens
    write(tmp_path, range(100), range(50))
    Corpus(tmp_path).verify()
    assert not (tmp_path / "train.bin").exists() and (tmp_path / "train_notes.bin").read_text() == "mine"


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, range(100))
    path = tmp_path / "train_00005.bin"
    content = path.read_bytes()
    path.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    with pytest.raises(ValueError, match="train_00005.bin' is damaged .its SHA-256 differs.: prepare it"):
        Corpus(tmp_path).verify()
    path.write_bytes(content + b"\0\0\0\0")
    with pytest.raises(ValueError, match="train_00005.bin' has 32 bytes instead of 28: prepare it"):
        Corpus(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="train_00005.bin' has 0 bytes instead of 28: prepare it"):
        Corpus(tmp_path)


def test_a_shard_with_a_token_beyond_the_vocabulary_is_named(tmp_path):
    corpus = write(tmp_path, range(100))
    np.full(7, 100_000, "<u4").tofile(tmp_path / "train_00005.bin")
    with pytest.raises(ValueError, match="train_00005.bin holds token id 100000, beyond its vocabulary of 100,000"):
        list(corpus.windows("train", 9, 1))


@pytest.mark.parametrize(
    "change",
    [
        *({"file": name} for name in ("../train.bin", "/etc/passwd", "train_1.bin", 3)),
        *({"tokens": count} for count in (0, "7", 8, True)),
        {"sha256": None},
    ],
    ids=str,
)
def test_an_impossible_list_of_shards_is_refused(tmp_path, change):
    meta = write(tmp_path, range(100)).meta
    shard = meta["splits"]["train"]["shards"][1]
    for wrong in (shard | change, {k: v for k, v in shard.items() if k not in change}, None):
        meta["splits"]["train"]["shards"][1] = wrong
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match="meta.json' is damaged"):
            Corpus(tmp_path)


@pytest.mark.parametrize("shard_tokens", [0, -1])
def test_shards_without_tokens_are_refused(tmp_path, shard_tokens):
    with pytest.raises(ValueError, match=f"--shard_tokens={shard_tokens}: give 1 or more"):
        write(tmp_path, range(100), shard_tokens=shard_tokens)


def test_more_shards_than_a_process_may_have_files_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAPS", 20)
    corpus = write(tmp_path, range(600), shard_tokens=2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        corpus = Corpus(tmp_path)
        for _ in range(2):
            idx = torch.cat([idx.flatten() for idx, _ in corpus.windows("train", 5, 3)])
            assert torch.equal(idx[:599], torch.arange(599))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of maps")
def test_the_system_knows_that_rows_are_read_at_random(tmp_path):
    """Without that, it reads megabytes around each row of a large corpus."""
    path = tmp_path / "train.bin"
    np.arange(5000, dtype=np.uint16).tofile(path)
    tokens = shards.map_tokens(path, np.dtype(np.uint16))
    assert np.array_equal(tokens, np.arange(5000)) and not tokens.flags.writeable
    entry = Path("/proc/self/smaps").read_text().partition(str(path))[2].partition("VmFlags:")[2]
    assert "rr" in entry.partition("\n")[0].split()
