"""Documents: every form of file, every way to split."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import random
import sys
import threading

import numpy as np
import pytest

from common import textfile
from common.textfile import json_values, read_text
from text.documents import Documents, Reading, parts_of, read_documents, split_of, validation_parts


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in documents))
    return path


def texts(*paths, val_fraction=0.5):
    return [(split, "".join(parts_of(text))) for split, text in Documents(paths, val_fraction)]


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_text_file_is_cut_at_the_line_break_before_its_last_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("first\r\nzweite Zeile: ü\nthird line\nlast".encode())
    assert texts(path, val_fraction=0.3) == [("train", "first\r\nzweite Zeile: ü\n"), ("val", "third line\nlast")]


@pytest.mark.parametrize("block", [4, 5, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    "text", ["one\ntwo\nthree\nfour\n", "no breaks but spaces", "世界" * 20, "é", "\n\n\n\n", "🙂" * 9]
)
def test_a_text_file_loses_nothing_wherever_it_is_cut(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_text(text)
    for val_fraction in (0.01, 0.3, 0.5, 0.8, 0.99):
        found = texts(path, val_fraction=val_fraction)
        assert "".join(part for _, part in found) == text
        assert [split for split, part in found if part] in (["train", "val"], ["val"])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("ab\ncd\n", encoding="utf-8-sig")
    assert texts(tmp_path / "a.txt", val_fraction=0.3) == [("train", "ab\n"), ("val", "cd\n")]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert [text for _, text in texts(tmp_path / "a.jsonl")] == ["a"]


def test_jsonl_and_parquet_hold_the_same_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = ["one", "", "two\nlines", "드 é 🙂", "five" * 50]
    parquet.write_table(pyarrow.table({"id": range(5), "text": documents}), tmp_path / "a.parquet")
    found = texts(jsonl(tmp_path / "a.jsonl", documents))
    assert [text for _, text in found] == documents
    assert texts(tmp_path / "a.parquet") == found
    (tmp_path / "b.JSONL").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\n\n \r\n"))
    assert texts(tmp_path / "b.JSONL") == found


def test_the_split_depends_neither_on_order_nor_on_files(tmp_path):
    documents = [f"document {i}" for i in range(2000)]
    one = texts(jsonl(tmp_path / "all.jsonl", documents), val_fraction=0.1)
    two = texts(
        jsonl(tmp_path / "a.jsonl", documents[1200::-1]),
        jsonl(tmp_path / "b.jsonl", documents[1201:]),
        val_fraction=0.1,
    )
    assert sorted(one) == sorted(two)
    assert 150 < sum(split == "val" for split, _ in one) < 250
    assert split_of("document 0", 0.1) == split_of("document 0", 0.1)


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b"{bad", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "a"} trailing', "not valid JSON"),
        (b'{"text": "a", "text": "b"}', '"text" occurs twice'),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"txt": "a", "id": 1}', "not the fields txt, id"),
        (b'["text"]', "not a list"),
        (b"null", "not a NoneType"),
        (b'{"text": 5}', "must be a string, not int"),
        (b'{"text": null}', "must be a string, not NoneType"),
        (b'{"text": "\\ud800"}', "is no character"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: .*{complaint}"):
        texts(path)


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    "content, line", [(b"a\nb\n\xff\nc", 3), (b"\xff\xfea\0\n\0\0", 2), (b"a\n\n\n\nb \xe4\xb8", 5)]
)
def test_text_that_is_no_utf8_is_named_with_its_line(tmp_path, monkeypatch, content, line, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for val_fraction in (0.01, 0.99):
        with pytest.raises(ValueError, match=f"a.txt, line {line}: not UTF-(8|16) .*iconv -f ENCODING .*a.txt"):
            texts(path, val_fraction=val_fraction)


def test_bad_parquet_is_named_with_its_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    for column, complaint in [
        (["a", None], 'row 2: "text" must be a string, not NoneType'),
        ([1, 2], 'row 1: "text" must be a string, not int'),
        (pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string()), "row 2: not UTF-8"),
    ]:
        parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(ValueError, match=complaint):
            texts(path)
    parquet.write_table(pyarrow.table({"other": [1]}), path)
    with pytest.raises(ValueError, match='has no column "text", only the fields other \\(--text_field'):
        texts(path)
    for content in (b"junk", path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable .parquet file"):
            texts(path)


def test_wrong_files_are_refused_before_anything_is_read(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", ["a"])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.pdf").write_text("a")
    (tmp_path / "folder.txt").mkdir()
    for name, complaint in [
        ("none.txt", "no such file"),
        ("empty.txt", "is empty"),
        ("a.pdf", "known are .parquet, and .txt, .md, .*--text_suffix"),
        ("folder.txt", "no file in this folder can be read"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: .*{complaint}"):
            Documents([good, tmp_path / name], 0.1)


# --- the forms of files ------------------------------------------------------------------------------------------

DOCUMENTS = ["one", "two\nlines", "드 é 🙂 世界", 'quotes " and \\ \u2028', "five" * 50]


def read(path, **reading):
    return ["".join(parts_of(text)) for text in read_documents([path], Reading(**reading))]


@pytest.mark.parametrize("block", [1, 7, 1000, 1 << 20])
def test_lines_and_lists_of_objects_and_strings_hold_the_same_documents(tmp_path, monkeypatch, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    objects = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    for name, rows in itertools.product(("a.jsonl", "a.json", "a.ndjson"), (objects, DOCUMENTS)):
        for ascii_only in (True, False):
            lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
            for content in ("\n".join(lines), "\n\n".join(lines) + "\r\n", f" [\n{' , '.join(lines)}\n]\n",
                            json.dumps(rows, indent=2, ensure_ascii=ascii_only)):  # fmt: skip
                (tmp_path / name).write_text(content)
                assert read(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    "content, complaint",
    [
        ('["a" "b"]', "does not go on or end after item 1"),
        ('["a", "b"', "does not go on or end after item 2"),
        ('["a", "b', "item 2: not valid JSON .Unterminated string"),
        ('["a",]', "item 2: not valid JSON .Expecting value"),
        ('["a", {"text": "b", "n": {"a": 1, "a": 1}}]', 'item 2: not valid JSON ."a" occurs twice'),
        ('["a"] "b"', "'\"b\"' follows the end"),
        ('["a", {"text": 5}]', 'item 2: "text" must be a string, not int'),
        ('["a", ["b"]]', "item 2: must be a string or an object .* not a list"),
        ('["a", {"txt": "b"}]', "item 2: .* not the fields txt .--text_field"),
        ('["a", nul, "long enough to be sure"]', "item 2: not valid JSON"),
        ('["a", ' + "[" * 100_000, "item 2: not valid JSON"),
    ],
)
def test_a_bad_item_of_a_json_list_is_named(tmp_path, monkeypatch, content, complaint, block):
    if len(content) > 1000 and block < 1000:
        pytest.skip("quadratic, and the same")
    monkeypatch.setattr(textfile, "BLOCK", block)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json(, |: ).*{complaint}"):
        read(tmp_path / "a.json")


def test_a_json_list_is_read_as_it_arrives():
    arrived = 0

    def parts():
        nonlocal arrived
        for part in ['[{"text": "a"}', ', {"text"', ': "b"}, ', '"c"]']:
            arrived += 1
            yield part

    values = json_values(parts(), "a.json")
    assert (next(values), arrived) == (("a.json, item 1", {"text": "a"}), 1)
    assert (next(values), arrived) == (("a.json, item 2", {"text": "b"}), 3)
    assert list(values) == [("a.json, item 3", "c")] and list(json_values([" [ ] "], "a")) == []


def packed(suffix, content):
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as parallel compressors write them
        return b"".join(
            zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in (content[:half], content[half:])
        )
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_files_are_unpacked_and_never_read_in_part(tmp_path, suffix):
    text = "".join(random.Random(0).choices("abc d\n世", k=30_000))
    content = packed(suffix, text.encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    assert read(path) == [text] and read_text(path) == text
    (train, val) = texts(path, val_fraction=0.2)
    assert train[1] + val[1] == text and len(val[1].encode()) == pytest.approx(0.2 * len(text.encode()), rel=0.05)
    (tmp_path / f"b.jsonl{suffix}").write_bytes(packed(suffix, b'{"text": "a"}\n"b"\n'))
    assert read(tmp_path / f"b.jsonl{suffix}") == ["a", "b"]
    for damaged in (content[:-3], content[: len(content) // 2], content[:200] + b"junk" + content[204:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"a.txt{suffix}.*(damaged|Invalid data|not UTF-8)"):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    text = "one 世界\ntwo 🙂\r\n" * 30
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_text(text, newline="")
    assert read(tmp_path / "a.txt") == [text]
    assert texts(tmp_path / "a.txt", val_fraction=0.3) == texts(tmp_path / "b.txt", val_fraction=0.3)
    (tmp_path / "a.jsonl").write_bytes('{"text": "世"}\n"b"'.encode(encoding))
    assert read(tmp_path / "a.jsonl") == ["世", "b"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_refused_with_the_command_that_converts_it(tmp_path, encoding):
    name = encoding.replace("16-", "16")
    (tmp_path / "a.txt").write_bytes("Latin letters\n".encode(encoding) * 50)
    with pytest.raises(ValueError, match=f"a.txt looks like UTF-16 .*iconv -f {name} -t utf-8"):
        read(tmp_path / "a.txt")
    (tmp_path / "zeros.txt").write_bytes(b"ab\0\0\0\0")
    assert read(tmp_path / "zeros.txt") == ["ab\0\0\0\0"]


def test_a_folder_is_all_that_is_known_in_it(tmp_path, capsys):
    for name in ("b.txt", "a.md", "sub/c.rst", "sub/d.jsonl", ".hidden.txt", ".git/e.txt", "f.png", "README", "g.x.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"d"' if name.endswith("jsonl") else name)
    (tmp_path / "empty.txt").touch()
    assert read(tmp_path) == ["a.md", "b.txt", "sub/c.rst", "d"]
    assert "3 files of other kinds left out (1 without ending, 1 .png, 1 .x.gz)" in capsys.readouterr().err
    assert read(tmp_path, text_suffixes=(".png",)) == ["a.md", "b.txt", "f.png", "sub/c.rst", "d"]
    assert read(tmp_path / "README") == ["README"]  # named by itself, it needs no ending
    (tmp_path / ".git/e.txt").unlink()
    with pytest.raises(ValueError, match="no file in this folder can be read"):
        read(tmp_path / ".git")


def test_a_corpus_inside_the_folder_is_not_read_as_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "corpus").mkdir()
    for name in ("meta.json", "tokenizer.json", "train_00000.bin", "train_00001.bin", "val.bin"):
        (tmp_path / "corpus" / name).write_text("{}")
    assert read(tmp_path) == ["text"]
    assert "other kinds" not in capsys.readouterr().err


def test_another_field_is_chosen_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "a", "text": 5}\n"b"\n')
    assert read(path, text_field="content") == ["a", "b"]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["a", "b"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="content") == ["a", "b"]


@pytest.mark.parametrize("block", [1, 5, 16, 1 << 20])
def test_a_separator_makes_many_documents_of_a_text_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\n  two\n\nthree\r\n<|endoftext|>\n\n<|endoftext|>four <|endo\n")
    assert read(path, separator="<|endoftext|>") == ["one", "  two\n\nthree", "", "four <|endo"]
    found = list(Documents([path], 0.5, Reading(separator="<|endoftext|>")))
    assert found == [(split_of(text, 0.5), text) for text in read(path, separator="<|endoftext|>")]


def test_a_separator_that_never_comes_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "LONGEST", 1000)
    monkeypatch.setattr(textfile, "BLOCK", 100)
    (tmp_path / "a.txt").write_text("word " * 300)
    (tmp_path / "a.jsonl").write_text('"' + "word " * 300)
    (tmp_path / "a.json").write_text('["' + "word " * 300)
    with pytest.raises(ValueError, match="a.txt: 1,000 characters without '<>'"):
        read(tmp_path / "a.txt", separator="<>")
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(ValueError, match="1,000 characters"):
            read(tmp_path / name)


def standard_input(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_standard_input_is_read_and_can_be_read_again(monkeypatch, capsys):
    standard_input(monkeypatch, "first line\nsecond line\n")
    documents = Documents(["-"], 0.4)
    for _ in range(2):
        found = [(split, "".join(text)) for split, text in documents]
        assert found == [("train", "first line\n"), ("val", "second line\n")]
    assert not capsys.readouterr().err
    standard_input(monkeypatch, '{"text": "a"}\n{"text": "b"}\n')
    documents = Documents(["-"], 0.5)
    assert [text for _, text in documents] == [text for _, text in documents] == ["a", "b"]
    assert "read as JSON" in capsys.readouterr().err
    standard_input(monkeypatch, '[{"text": "a"}]')
    assert read("-") == ["a"]
    standard_input(monkeypatch, "a\n")
    assert read("-") == ["a\n"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff")))
    with pytest.raises(ValueError, match="standard input, line 2: not UTF-8 .* send it through iconv -f ENCODING"):
        list(Documents(["-"], 0.5))


def test_a_pipe_is_read_like_standard_input():
    reader, writer = os.pipe()
    threading.Thread(target=lambda: (os.write(writer, b"some text\nand more\n"), os.close(writer))).start()
    try:
        documents = Documents([f"/dev/fd/{reader}"], 0.4)
    finally:
        os.close(reader)
    for _ in range(2):
        assert "".join("".join(text) for _, text in documents) == "some text\nand more\n"


@pytest.mark.parametrize("name, package", [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_an_optional_package_that_is_missing_is_named_before_anything_is_read(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=f"{name}: reading it needs the package {package}: pip install {package}"):
        Documents([tmp_path / "a.txt", tmp_path / name], 0.5)


# --- splits ------------------------------------------------------------------------------------------------------


def shares(documents):
    """Bytes of each split, and all texts."""
    sizes, found = {"train": 0, "val": 0}, []
    for split, text in documents:
        text = "".join(parts_of(text))
        sizes[split] += len(text.encode())
        found.append((split, text))
    return sizes["val"] / sum(sizes.values()), found


@pytest.mark.parametrize("val_fraction", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(
    "text",
    [
        "A title\n" + "word " * 39_000,
        "A title\n" + "世界" * 30_000,
        "x" * 100_000,
        "line of some words\n" * 8000,
        "\n" * 50_000,
        "🙂" * 40_000 + "\n",
    ],
)
@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_one_text_is_cut_near_the_asked_share(tmp_path, monkeypatch, text, val_fraction, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    (tmp_path / "a.txt").write_text(text)
    share, found = shares(Documents([tmp_path / "a.txt"], val_fraction))
    assert share == pytest.approx(val_fraction, rel=0.1)
    assert [split for split, _ in found] == ["train", "val"] and found[0][1] + found[1][1] == text
    if "line " in text:
        assert found[0][1].endswith("\n")
    elif "word " in text:
        assert found[0][1].endswith(" ")


def articles(folder, count, seed=0, longest=3000):
    """`count` articles of very different lengths, each with a title, paragraphs, and a line break at its end."""
    rng = random.Random(seed)
    for i in range(count):
        paragraphs = [" ".join(["word"] * rng.randint(5, 120)) for _ in range(rng.randint(1, longest // 300))]
        (folder / f"{i}.txt").write_text(f"Article {i}\n\n" + "\n\n".join(paragraphs) + "\n")


@pytest.mark.parametrize("count, val_fraction", [(30, 0.01), (30, 0.1), (300, 0.01), (300, 0.1), (2000, 0.01)])
def test_a_folder_of_articles_goes_by_whole_articles_and_gives_the_asked_share(tmp_path, count, val_fraction):
    articles(tmp_path, count)
    share, found = shares(Documents([tmp_path], val_fraction))
    assert share == pytest.approx(val_fraction, rel=0.12)
    files = {path.read_text() for path in tmp_path.iterdir()}
    cut = [text for _, text in found if text not in files]
    assert len(found) == count + 1 and len(cut) == 2 or len(found) == count and not cut  # one at most is cut
    assert not cut or val_fraction * count < 20


def test_a_few_books_each_give_their_end(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Book {i}\n" + f"a line of book {i}\n" * 20_000)
    _, found = shares(Documents([tmp_path], 0.05))
    assert [split for split, _ in found] == ["train", "val"] * 3
    for (_, train), (_, val) in zip(found[::2], found[1::2], strict=True):
        assert len(val) / len(train + val) == pytest.approx(0.05, rel=0.05)


def test_a_book_among_articles_gives_its_end_and_articles_go_whole(tmp_path):
    articles(tmp_path, 400)
    (tmp_path / "book.txt").write_text("The book\n" + "a line of the book\n" * 40_000)
    share, found = shares(Documents([tmp_path], 0.1))
    assert share == pytest.approx(0.1, rel=0.1)
    book = [(split, text) for split, text in found if "of the book" in text]
    assert [split for split, _ in book] == ["train", "val"]
    assert len(book[1][1]) / sum(len(text) for _, text in book) == pytest.approx(0.1, rel=0.05)


def test_equal_articles_are_never_on_both_sides(tmp_path):
    articles(tmp_path, 100)
    for i in range(100):
        (tmp_path / f"copy {i}.txt").write_bytes((tmp_path / f"{i}.txt").read_bytes())
    _, found = shares(Documents([tmp_path], 0.2))
    whole = {split: {text for s, text in found if s == split} for split in ("train", "val")}
    assert not whole["train"] & whole["val"] and whole["val"]


def test_the_split_of_articles_depends_on_their_text_alone(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    articles(tmp_path / "a", 60)
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        (tmp_path / "b" / f"{99 - i}.md").write_bytes(path.read_bytes())
    assert sorted(shares(Documents([tmp_path / "a"], 0.2))[1]) == sorted(shares(Documents([tmp_path / "b"], 0.2))[1])


def test_any_sizes_give_the_asked_share():
    rng = np.random.default_rng(0)
    for trial in range(300):
        sizes = np.exp(rng.normal(8, rng.choice([0.1, 1, 3]), rng.integers(1, 200))).astype(int) + 50
        val_fraction = rng.choice([0.01, 0.05, 0.3])
        parts = validation_parts(sizes.tolist(), lambda i: bytes([i * 77 % 256]), val_fraction)
        assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
        assert sum(parts) == pytest.approx(val_fraction * sizes.sum(), rel=0.1, abs=len(sizes)), trial


def test_alike_texts_are_split_evenly():
    for pattern in ("document {}", "{}", "What does f{} do?", "{:08d}", "a" * 50 + "{}"):
        for val_fraction in (0.01, 0.3, 0.5):
            n = 4000
            count = sum(split_of(pattern.format(i), val_fraction) == "val" for i in range(n))
            assert abs(count - n * val_fraction) < 4 * (n * val_fraction * (1 - val_fraction)) ** 0.5


def test_memory_stays_flat_whatever_the_form(tmp_path):
    """No reader holds more of a file than a few blocks: measured as what Python has allocated at most."""
    import tracemalloc

    text = "a line of some words\n" * 1000
    for name, content in {
        "a.txt": text * 1000,
        "a.jsonl": (json.dumps({"text": text}) + "\n") * 1000,
        "a.json": "[" + ", ".join([json.dumps(text)] * 1000) + "]",
        "s.txt": (text + "<>\n") * 1000,
    }.items():
        path = tmp_path / (name + ".gz")
        path.write_bytes(gzip.compress(content.encode(), 1))
        documents = Documents([path], 0.1, Reading(separator="<>" if name == "s.txt" else None))
        tracemalloc.start()
        for _, document in documents:
            for _ in parts_of(document):
                pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 << 20, (name, peak)  # of 20 MB of text
