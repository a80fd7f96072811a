"""Writing a corpus: what the files hold, and that no mishap leaves half of one."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout

from tests.corpus_helpers import ONE_OF_EACH, CountingTokenizer, LowerCaseTokenizer, bytes_of, names_in, temporary
from text import tokenise
from text.corpus import Corpus, hold_for_writing, write_corpus, write_held_corpus
from text.tokenizer import CharTokenizer, TiktokenTokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the quick brown fox jumps over a lazy dog, while in 1984 nobody's watching!".split(" ")


def prose(size, seed=0):
    """`size` characters of words, with some line breaks and runs of spaces."""
    rng = np.random.default_rng(seed)
    ends = np.array([" ", " ", " ", " ", "\n", "  ", ". ", "!\n\n"])
    words = zip(rng.choice(WORDS, size // 4), rng.choice(ends, size // 4), strict=True)
    return "".join(word + end for word, end in words)[:size]


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
    monkeypatch.setattr(tokenise, "PIECE", 200)
    tokenizer = TiktokenTokenizer(tiny_encoding)
    text = prose(20_000)
    write_corpus(tmp_path, [("train", text), ("val", iter(text))], tokenizer)
    for split in ("train", "val"):  # one given whole, one character by character
        assert np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() == [*tokenizer.encode(text), tokenizer.eot_id]


@pytest.mark.parametrize("text", ["x" * 500, " " * 500, "\n" * 500, "a\n" * 250, " a" + " " * 300, "世" * 500])
def test_text_without_a_good_place_to_cut_is_cut_all_the_same(text, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE", 64)
    pieces = list(tokenise.pieces([("train", text), ("val", ""), ("val", iter(["", "b", ""]))]))
    assert "".join(piece for split, piece, *_ in pieces if split == "train") == text
    assert all(1 <= len(piece.text) <= 64 for piece in pieces)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 2) + [True]
    assert pieces[-1] == ("val", "b", True, True)


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


@pytest.mark.parametrize("calls", range(7))
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
    if calls < 3:  # the lock, and tokenizer.json and meta.json in the temporary folder
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


# --- folders that are taken, full disks --------------------------------------------------------------------------


def test_two_processes_never_write_into_one_folder(tmp_path):
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    before = bytes_of(tmp_path)
    with FileLock(tmp_path / ".lock"):  # as another process would hold it
        with pytest.raises(ValueError, match="is in use by .*: stop it, or choose another --output"):
            write_corpus(tmp_path, [("train", "c"), ("val", "c")], CharTokenizer("c", eot=True))
    assert bytes_of(tmp_path) == before
    write_corpus(tmp_path, [("train", "c"), ("val", "c")], CharTokenizer("c", eot=True))
    assert bytes_of(tmp_path) != before


def test_the_folder_is_held_from_the_first_document_to_the_last(tmp_path):
    def documents():
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".lock").acquire(timeout=0)
        yield from ONE_OF_EACH

    with hold_for_writing(tmp_path):
        write_held_corpus(tmp_path, documents(), CharTokenizer("ab", eot=True))
        with pytest.raises(Timeout):  # still held, whatever else is to come
            FileLock(tmp_path / ".lock").acquire(timeout=0)
    write_corpus(tmp_path, documents(), CharTokenizer("ab", eot=True))
    FileLock(tmp_path / ".lock").acquire(timeout=0).lock.release()


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".prepare-killed").mkdir()
    (tmp_path / ".prepare-killed" / "train.bin").write_bytes(b"half")
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    assert names_in(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("name", ["config.json", "checkpoints"])
def test_a_run_is_never_overwritten(tmp_path, name):
    CharTokenizer("xyz", eot=True).save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is a run, .*name a folder of its own"):
        write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    assert (tmp_path / "tokenizer.json").read_bytes() == before and len(os.listdir(tmp_path)) == 2
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        write_corpus(tmp_path / "file", ONE_OF_EACH, CharTokenizer("ab", eot=True))


@pytest.mark.parametrize(
    "name, content",
    [("tokenizer.json", b"{}"), ("train.bin", b"\1"), ("val_00001.bin", b"\1"), ("meta.json", b'{"mine": 1}'),
     ("meta.json", b"[1]"), ("meta.json", b"{")],
)  # fmt: skip
def test_somebody_elses_files_are_never_overwritten(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"holds a {name} that is not a corpus's: name a folder of its own"):
        write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_damaged_corpus_and_one_whose_files_were_being_moved_are_replaced(tmp_path):
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    whole = bytes_of(tmp_path)
    for harm in (lambda: (tmp_path / "meta.json").write_text("{"), lambda: (tmp_path / "meta.json").unlink()):
        harm()
        write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
        assert bytes_of(tmp_path) == whole


@pytest.mark.parametrize("room, name", [(1000, "train_00000.bin"), (20, "tokenizer.json"), (400, "meta.json")])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, room, name):
    write_corpus(tmp_path, ONE_OF_EACH, CharTokenizer("ab", eot=True))
    before = bytes_of(tmp_path)
    documents = [("train", "ab" * (1000 if name == "train_00000.bin" else 1)), ("val", "ab")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with hold_for_writing(tmp_path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # no file can grow beyond it, as on a full disk
        try:
            with pytest.raises(OSError, match=f"cannot write .*{name}: File too large; free some space there"):
                write_held_corpus(tmp_path, documents, CharTokenizer("ab", eot=True))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_of(tmp_path) == before
    Corpus(tmp_path).verify()


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, workers):
    loses = LowerCaseTokenizer("abcdefghijklmnopqrstuvwxyz ,!.:", eot=True)
    documents = [("train", "hello"), ("val", "world"), ("train", "the file says: Hello, world! and so on.")]
    complaint = r"does not give the text back: 'the file says: Hello.*' is encoded and decoded to 'the file says: hello"
    with pytest.raises(ValueError, match=complaint):
        write_corpus(tmp_path, [*documents, *[("train", "a" * tokenise.TASK)] * 4], loses, workers=workers)
    assert names_in(tmp_path) == []
    write_corpus(tmp_path, documents[:2], loses)


def test_special_tokens_spelled_out_in_the_text_are_counted(tmp_path, tiny_encoding):
    documents = [("train", "a<|endoftext|>b<|endoftext|>"), ("val", "c <|endoftext|>"), ("val", "<|end")]
    meta = write_corpus(tmp_path, documents, TiktokenTokenizer(tiny_encoding))
    assert meta["special_tokens_in_text"] == {"<|endoftext|>": 3}
    ids = np.fromfile(tmp_path / "train.bin", "<u2").tolist()
    assert ids.count(TiktokenTokenizer(tiny_encoding).eot_id) == 1  # the document's end


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
