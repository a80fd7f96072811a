"""Opening a corpus, and its batches."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.corpus_helpers import ONE_OF_EACH, numbers
from text.corpus import Corpus, write_corpus
from text.tokenizer import CharTokenizer

# --- opening -----------------------------------------------------------------------------------------------------


def test_opening_says_how_to_prepare_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no prepared corpus in .*nothing.*data/text/prepare.py --input FILES"):
        Corpus(tmp_path / "nothing")
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ValueError, match=f"run python {tmp_path}/prepare.py"):
        Corpus(tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_token_file_of_the_wrong_size_is_refused(tmp_path, name):
    numbers(tmp_path, range(10))
    path = tmp_path / name
    content = path.read_bytes()
    for wrong in (content[:-1], content[:-4], content + b"\0\0\0\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{name}' has {len(wrong)} bytes instead of {len(content)}"):
            Corpus(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}' has 0 bytes"):
        Corpus(tmp_path)


@pytest.mark.parametrize("value", [True, 0, -1, 1.5, "10", None, [10], {"a": 1}, 10**400])
def test_sizes_of_wrong_types_are_refused(tmp_path, value):
    numbers(tmp_path, range(10))
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"vocab_size": value}))
    with pytest.raises(ValueError, match="damaged, or not of this project"):
        Corpus(tmp_path)
    for split, key in (("train", "tokens"), ("val", "bytes"), ("val", "tokens")):
        damaged = json.loads(json.dumps(meta))
        damaged["splits"][split][key] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="damaged, or not of this project"):
            Corpus(tmp_path)


def test_a_vocabulary_beyond_the_width_of_tokens_is_refused(tmp_path):
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 65537}))
    with pytest.raises(ValueError, match="damaged"):
        Corpus(tmp_path)


def test_a_token_beyond_the_vocabulary_is_told_before_a_model_sees_it(tmp_path):
    write_corpus(tmp_path, [("train", "ab" * 50), ("val", "ab" * 50)], CharTokenizer("ab", eot=True))
    corpus = Corpus(tmp_path)
    corpus.batch("train", 0, seed=0, batch_size=4, block_size=10)
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / f"{split}.bin", "<u2")
        tokens[::5] = 3
        tokens.tofile(tmp_path / f"{split}.bin")
    corpus = Corpus(tmp_path)
    with pytest.raises(ValueError, match="train.bin holds token id 3, beyond its vocabulary of 3"):
        corpus.batch("train", 0, seed=0, batch_size=4, block_size=10)
    with pytest.raises(ValueError, match="val.bin holds token id 3, beyond its vocabulary of 3"):
        next(corpus.windows("val", 10, 4))


def test_a_tokenizer_of_the_same_size_but_other_letters_is_refused(tmp_path):
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    CharTokenizer("ac", eot=True).save(tmp_path)
    with pytest.raises(ValueError, match="is not the one its corpus was made with .its SHA-256 differs"):
        _ = Corpus(tmp_path).tokenizer


def test_a_corpus_of_the_first_version_opens(tmp_path):
    """Its meta.json had no hash of the tokenizer."""
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    meta = json.loads((tmp_path / "meta.json").read_text())
    old = {key: meta[key] for key in ("format", "version", "dtype", "tokenizer", "vocab_size", "splits")}
    (tmp_path / "meta.json").write_text(json.dumps(old))
    corpus = Corpus(tmp_path)
    corpus.verify()
    assert corpus.tokenizer.decode([0, 1]) == "ab"


@pytest.mark.parametrize("key", ["format", "version", "dtype", "vocab_size", "splits"])
def test_damaged_meta_is_refused(tmp_path, key):
    numbers(tmp_path, range(10))
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    for wrong in ({k: v for k, v in meta.items() if k != key}, meta | {key: None}, meta | {key: [1]}, [], None):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="damaged, or not of this project"):
            Corpus(tmp_path)
    for wrong in (b"", b"\xff\xfe", b"{", b"[" * 100_000):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="damaged, or not of this project"):
            Corpus(tmp_path)


def test_a_corpus_of_a_later_format_is_refused(tmp_path):
    numbers(tmp_path, range(10))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"version": 3}))
    with pytest.raises(ValueError, match="format version 3, this code reads 1 and 2"):
        Corpus(tmp_path)


def test_verify_finds_one_flipped_bit(tmp_path):
    corpus = numbers(tmp_path, range(1000))
    corpus.verify()
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[1234] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match="train.bin' is damaged"):
        Corpus(tmp_path).verify()


def test_the_tokenizer_comes_with_the_corpus_and_must_fit_it(tmp_path):
    write_corpus(tmp_path, [("train", "ab"), ("val", "ab")], CharTokenizer("ab", eot=True))
    corpus = Corpus(tmp_path)
    assert corpus.tokenizer.decode([0, 1]) == "ab" and corpus.vocab_size == 3
    assert (corpus.num_tokens("train"), corpus.num_bytes("train")) == (3, 2)
    CharTokenizer("abc", eot=True).save(tmp_path)
    with pytest.raises(ValueError, match="has 4 tokens, its corpus was made with 3"):
        _ = Corpus(tmp_path).tokenizer


def test_an_unknown_split_is_refused(tmp_path):
    corpus = numbers(tmp_path, range(10))
    with pytest.raises(ValueError, match="'test': a corpus has train and val"):
        corpus.batch("test", 0, seed=0, batch_size=1, block_size=2)


# --- batches -----------------------------------------------------------------------------------------------------

SHAPE = {"seed": 7, "batch_size": 6, "block_size": 8}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_targets_are_the_next_tokens(tmp_path):
    corpus = numbers(tmp_path, range(70_000, 71_000))
    idx, targets = corpus.batch("train", 3, **SHAPE)
    assert idx.shape == targets.shape == (6, 8) and idx.dtype == targets.dtype == torch.int64
    assert idx.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, idx + 1) and torch.equal(idx[:, 1:], idx[:, :-1] + 1)


def test_batch_of_step_t_is_independent_of_history(tmp_path):
    corpus = numbers(tmp_path, range(1000))
    forwards = [corpus.batch("train", step, **SHAPE) for step in range(5)]
    corpus.batch("val", 2, seed=0, batch_size=3, block_size=1)
    np.random.default_rng(0).random(10), torch.manual_seed(3)
    for step in (4, 1, 3, 0, 2):
        assert equal(Corpus(tmp_path).batch("train", step, **SHAPE), forwards[step])


def test_steps_and_seeds_give_different_batches(tmp_path):
    corpus = numbers(tmp_path, range(1000))
    batches = [corpus.batch("train", step, **SHAPE | {"seed": seed}) for seed in (1, 2) for step in (1, 2)]
    assert len({batch[0].numpy().tobytes() for batch in batches}) == 4


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_slices_of_all_processes_together_are_the_whole_batch(tmp_path, processes):
    corpus = numbers(tmp_path, range(1000))
    share = 6 // processes
    slices = [slice(rank * share, (rank + 1) * share) for rank in range(processes)]
    parts = [corpus.batch("train", 5, **SHAPE, rows=rows) for rows in slices]
    whole = corpus.batch("train", 5, **SHAPE)
    assert equal([torch.cat(column) for column in zip(*parts, strict=True)], whole)


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(tmp_path):
    corpus = numbers(tmp_path, range(8 * 31 + 1))  # 31 windows of 8 fit; one is left out for the offset
    shape = {"seed": 0, "batch_size": 6, "block_size": 8}
    epochs = [
        torch.cat([corpus.batch("train", step, **shape)[0] for step in steps]) for steps in (range(5), range(5, 10))
    ]
    for idx in epochs:
        starts = idx[:, 0].sort().values
        assert torch.equal(starts, starts[0] + 8 * torch.arange(30))
    assert not torch.equal(*epochs)


def test_every_position_can_start_a_window(tmp_path):
    corpus = numbers(tmp_path, range(12))
    idx, targets = corpus.batch("train", 0, seed=0, batch_size=500, block_size=8)
    assert set(idx[:, 0].tolist()) == {0, 1, 2, 3}
    assert targets.max() == 11


def test_a_split_of_just_one_window_is_enough_and_a_shorter_one_is_refused(tmp_path):
    corpus = numbers(tmp_path, range(9))
    idx, targets = corpus.batch("train", 0, **SHAPE)
    assert torch.equal(idx, torch.arange(8).expand(6, 8)) and torch.equal(targets, idx + 1)
    with pytest.raises(ValueError, match="has 9 tokens, and block_size=9 needs 10: choose a smaller"):
        corpus.batch("train", 0, seed=0, batch_size=1, block_size=9)
    with pytest.raises(ValueError, match="neither may be negative"):
        corpus.batch("train", 0, seed=-1, batch_size=1, block_size=2)


# --- whole-split evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8, 9, 10, 16, 17, 18, 33, 100, 161])
@pytest.mark.parametrize("world_size", [1, 3])
def test_windows_cover_each_prediction_exactly_once(tmp_path, size, world_size):
    corpus = numbers(tmp_path, range(size))
    seen, shapes = Counter(), set()
    for rank in range(world_size):
        for idx, targets in corpus.windows("train", 8, 5, rank=rank, world_size=world_size):
            assert idx.shape == targets.shape and idx.dtype == targets.dtype == torch.int64
            shapes.add(tuple(idx.shape))
            counted = targets != -100
            assert torch.equal(targets[counted], idx[counted] + 1)
            assert (idx[~counted] == 0).all()
            seen.update(targets[counted].tolist())
    assert seen == Counter(range(1, size))
    assert shapes == {(min(5, math.ceil((size - 1) / 8)), 8)}  # one shape, for the compiler's sake


def test_a_few_batches_are_spread_evenly_and_always_the_same(tmp_path):
    corpus = numbers(tmp_path, range(1001))  # 100 batches of 10 predictions

    def starts(**how):
        return [idx[0, 0].item() for idx, _ in corpus.windows("train", 5, 2, **how)]

    assert starts(max_batches=4) == starts(max_batches=4) == [0, 250, 500, 750]
    assert starts(max_batches=4, rank=0, world_size=2) == [0, 500]
    assert starts(max_batches=4, rank=1, world_size=2) == [250, 750]
    assert starts(max_batches=1000) == starts() == list(range(0, 1000, 10))
    assert starts(max_batches=2, rank=2, world_size=3) == []


def test_a_split_of_one_token_has_nothing_to_predict(tmp_path):
    with pytest.raises(ValueError, match="one token: nothing to predict"):
        next(numbers(tmp_path, [5]).windows("train", 8, 1))
