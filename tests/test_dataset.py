import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from text import tokenise
from text.corpus import Corpus, write_corpus
from text.tokenizer import CharTokenizer, TiktokenTokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the quick brown fox jumps over a lazy dog, while in 1984 nobody's watching!".split(" ")


class CountingTokenizer:
    """Tokens are the texts' own numbers, so that a corpus can be any sequence of ids."""

    name, eot_id, special_tokens = "counting", None, {}

    def __init__(self, vocab_size=100_000):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def save(self, folder):
        CharTokenizer("a", eot=False).save(folder)


def numbers(folder, train, val=(0, 1)):
    """A corpus of these tokens."""
    documents = [(split, " ".join(map(str, ids))) for split, ids in (("train", train), ("val", val))]
    write_corpus(folder, documents, CountingTokenizer(), workers=1)
    return Corpus(folder)


def prose(size, seed=0):
    """`size` characters of words, with some line breaks and runs of spaces."""
    rng = np.random.default_rng(seed)
    ends = np.array([" ", " ", " ", " ", "\n", "  ", ". ", "!\n\n"])
    words = zip(rng.choice(WORDS, size // 4), rng.choice(ends, size // 4), strict=True)
    return "".join(word + end for word, end in words)[:size]


def names_in(folder):
    """What a user sees in a folder: the lock is hidden."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) + temporary(folder)


def temporary(folder):
    return [path.name for path in Path(folder).glob(".prepare-*/")]


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


# --- writing -----------------------------------------------------------------------------------------------------


def test_files_hold_the_tokens_with_end_of_text_after_each_document(tmp_path):
    tokenizer = CharTokenizer("abé", eot=True)
    meta = write_corpus(tmp_path, [("train", "ab"), ("val", "é"), ("train", ""), ("train", "b")], tokenizer)
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [0, 1, 3, 1, 3]
    assert np.fromfile(tmp_path / "val.bin", "<u2").tolist() == [2, 3]
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 4
    train = (tmp_path / "train.bin").read_bytes()
    expected = {"tokens": 5, "bytes": 3, "documents": 2, "sha256": hashlib.sha256(train).hexdigest()}
    assert meta["splits"]["train"] == expected  # an empty document is none
    assert names_in(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_tokenizer_without_end_of_text_joins_documents(tmp_path):
    write_corpus(tmp_path, [("train", "ab"), ("train", "a"), ("val", "b")], CharTokenizer("ab", eot=False))
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [0, 1, 0]


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_the_vocabulary_chooses_the_width_of_tokens(tmp_path, vocab_size, dtype):
    documents = [("train", f"0 {vocab_size - 1}"), ("val", "1")]
    assert write_corpus(tmp_path, documents, CountingTokenizer(vocab_size))["dtype"] == dtype
    idx, targets = Corpus(tmp_path).batch("train", 0, seed=0, batch_size=1, block_size=1)
    assert (idx.item(), targets.item()) == (0, vocab_size - 1)


def test_the_files_do_not_depend_on_the_number_of_workers(tmp_path, tiny_encoding):
    tokenizer = TiktokenTokenizer(tiny_encoding)
    text = prose(1_000_000)

    def documents():
        for i in range(20):
            yield ("val" if i % 7 == 3 else "train"), text[i * 5 : i * 5 + 300_000]
        yield "train", (text[i : i + 999] for i in range(0, len(text), 999))  # one in parts

    for workers in (1, 2):
        write_corpus(tmp_path / str(workers), documents(), tokenizer, workers=workers)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_cutting_a_long_document_does_not_change_its_tokens(tmp_path, tiny_encoding, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE", 50)
    tokenizer = TiktokenTokenizer(tiny_encoding)
    text = prose(20_000)
    write_corpus(tmp_path, [("train", text), ("val", iter(text))], tokenizer)
    for split in ("train", "val"):  # one given whole, one character by character
        assert np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() == [*tokenizer.encode(text), tokenizer.eot_id]


@pytest.mark.parametrize("text", ["x" * 500, " " * 500, "\n" * 500, "a\n" * 250, " a" + " " * 300, "世" * 500])
def test_text_without_a_good_place_to_cut_is_cut_all_the_same(text, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE", 64)
    pieces = list(tokenise.pieces([("train", text), ("val", ""), ("val", iter(["", "b", ""]))]))
    assert "".join(piece for split, piece, _ in pieces if split == "train") == text
    assert all(1 <= len(piece) <= 64 for _, piece, _ in pieces)
    assert [ends for _, _, ends in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert pieces[-1] == ("val", "b", True)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_in_flight_are_bounded(workers, monkeypatch):
    monkeypatch.setattr(tokenise, "TASK", 1 << 16)
    drawn = 0

    def documents():
        nonlocal drawn
        for _ in range(60):
            drawn += 1
            yield "train", text

    text = "a" * tokenise.TASK  # each document makes one task
    most = 0
    encoded = tokenise.encode_documents(documents(), CharTokenizer("a", eot=True), np.dtype("<u2"), workers)
    for done, _ in enumerate(encoded, 1):
        most = max(most, drawn - done)
        if done == 20:
            break
    encoded.close()
    assert drawn < 30 and most <= 2 * workers + 4


def test_memory_stays_flat_on_a_corpus_sixteen_times_larger(tmp_path):
    code = """if True:
        import itertools, resource, sys
        from text.corpus import write_corpus
        from text.tokenizer import CharTokenizer
        megabytes = int(sys.argv[2])
        book = ("some text\\n" * 10_000 for _ in range(megabytes * 5))  # half of it in one document
        short = (("val", "some text\\n" * 1000) for _ in range(megabytes * 50))  # half in short ones
        documents = itertools.chain([("train", book)], short)
        write_corpus(sys.argv[1], documents, CharTokenizer("some text\\n", eot=True), workers=1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    peaks = []
    for size in (2, 32):
        run = [sys.executable, "-c", code, str(tmp_path), str(size)]
        peaks.append(int(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout) / 1024)
    assert peaks[1] < peaks[0] + 10, f"peak of {peaks[0]:.0f} MB for 2 MB of text, {peaks[1]:.0f} MB for 32 MB"


def interrupted(documents, error):
    yield from documents
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("line 3: not UTF-8"), OSError("disk full")])
def test_an_interrupted_prepare_leaves_nothing_that_opens(tmp_path, error):
    documents = interrupted([("train", "ab"), ("val", "ab")], error)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write_corpus(tmp_path, documents, CharTokenizer("ab", eot=True))
    assert names_in(tmp_path) == []
    with pytest.raises(ValueError, match="no prepared corpus"):
        Corpus(tmp_path)


def test_an_interrupted_prepare_over_an_old_corpus_leaves_the_old_one(tmp_path):
    write_corpus(tmp_path, [("train", "ab"), ("val", "ab")], CharTokenizer("ab", eot=True))
    before = bytes_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        documents = interrupted([("train", "cc"), ("val", "cc")], KeyboardInterrupt)
        write_corpus(tmp_path, documents, CharTokenizer("c", eot=True))
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("calls", range(6))
def test_an_interruption_between_the_renames_leaves_the_old_corpus_or_none(tmp_path, monkeypatch, calls):
    write_corpus(tmp_path, [("train", "ab"), ("val", "ab")], CharTokenizer("ab", eot=True))
    before = bytes_of(tmp_path)
    replace, left = os.replace, calls

    def stopping(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path, [("train", "cc"), ("val", "cc")], CharTokenizer("c", eot=True))
    assert not temporary(tmp_path)
    if calls < 2:  # tokenizer.json and meta.json are being written, to the temporary folder
        assert bytes_of(tmp_path) == before
    else:
        with pytest.raises(ValueError, match="no prepared corpus"):
            Corpus(tmp_path)


def test_a_killed_prepare_leaves_no_process_and_nothing_that_opens(tmp_path, tiny_encoding):
    code = """if True:
        import itertools, os, signal, sys
        from text.corpus import write_corpus
        from text.tokenizer import TiktokenTokenizer
        def documents():
            for i in itertools.count():
                if i == 40: os.kill(os.getpid(), signal.SIGKILL)
                yield ("val" if i % 2 else "train"), "some words " * 50_000
        if __name__ == "__main__":
            write_corpus(sys.argv[1], documents(), TiktokenTokenizer("tiny"), workers=2)
    """
    script = tmp_path / "prepare_forever.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    # The workers hold their parent's stderr: that this call returns shows that they are gone too.
    run = subprocess.run(
        [sys.executable, script, tmp_path / "c"], env=environment, stderr=subprocess.PIPE, timeout=20, check=False
    )
    assert run.returncode == -9
    assert temporary(tmp_path / "c")
    with pytest.raises(ValueError, match="no prepared corpus"):
        Corpus(tmp_path / "c")


@pytest.mark.parametrize("documents", [[], [("train", "a")], [("val", "a")], [("train", ""), ("val", "a")]])
def test_an_empty_split_is_refused(tmp_path, documents):
    with pytest.raises(ValueError, match="split is empty: give more text"):
        write_corpus(tmp_path, documents, CharTokenizer("a", eot=True))
    assert names_in(tmp_path) == []


def test_an_error_in_a_worker_arrives_as_it_is(tmp_path):
    documents = [("train", "a" * tokenise.TASK)] * 5 + [("train", "aaab")]
    with pytest.raises(ValueError, match=r"'b' \(U\+0062\) at position 3"):
        write_corpus(tmp_path, documents, CharTokenizer("a", eot=True), workers=2)
    assert names_in(tmp_path) == []


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
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"version": 2}))
    with pytest.raises(ValueError, match="format version 2, this code reads 1"):
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
