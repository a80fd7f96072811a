"""Files of conversations: every public form, whatever the file's name and packing, and damaged ones."""

import gzip
import json

import pytest

from tests.conversation_helpers import BAD, FORMS, HELLO, as_line, lines, talk
from text.chat import BadConversation
from text.conversations import LeftOut, read_conversations


@pytest.mark.parametrize("form", FORMS)
def test_every_public_form_is_read_and_what_has_no_place_is_counted(form, tmp_path):
    row, messages, fields = FORMS[form]
    (tmp_path / "a.jsonl").write_text(lines(row), encoding="utf-8")
    left_out = LeftOut()
    assert list(read_conversations(tmp_path / "a.jsonl", left_out)) == [messages]
    assert left_out.fields == fields and not left_out.conversations


ROWS = [row for row, _, _ in FORMS.values()]
READ = [messages for _, messages, _ in FORMS.values()]


def test_what_a_file_holds_decides_and_not_its_name(tmp_path):
    listed, indented = json.dumps(ROWS), json.dumps(ROWS, indent=2, ensure_ascii=False)
    contents = {
        "a.jsonl": lines(*ROWS), "lines.json": lines(*ROWS), "a": lines(*ROWS), "list.json": listed,
        "list.jsonl": indented, "windows.jsonl": "\ufeff\r\n" + lines(*ROWS).replace("\n", "\r\n\r\n"),
    }  # fmt: skip
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / f"utf16-{name}").write_bytes(text.removeprefix("\ufeff").encode("utf-16"))
        for path in (tmp_path / name, tmp_path / f"{name}.gz", tmp_path / f"utf16-{name}"):
            assert list(read_conversations(path)) == READ, path
    for number, row in enumerate(ROWS):  # one conversation alone, over several lines
        (tmp_path / "one.json").write_text(json.dumps(row, indent=2))
        assert list(read_conversations(tmp_path / "one.json")) == [READ[number]]
    (tmp_path / "separators.jsonl").write_text(
        lines({"messages": talk("u: a\u2028b\x85", "a: c\x0bd")}), encoding="utf-8"
    )
    assert list(read_conversations(tmp_path / "separators.jsonl")) == [talk("u: a\u2028b\x85", "a: c\x0bd")]


@pytest.mark.parametrize("form", ["OpenAI", "OpenHermes", "LLaMA-Factory's Alpaca", "Dolly", "UltraChat", "reasoning"])
def test_parquet_is_read(form, tmp_path):
    import pyarrow
    import pyarrow.parquet

    row, messages, fields = FORMS[form]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    left_out = LeftOut()
    assert list(read_conversations(tmp_path / "a.parquet", left_out)) == [messages] * 2
    assert left_out.fields == {name: 2 * count for name, count in fields.items()}
    bad = [
        {"instruction": "Hi", "output": "Ho"},
        {"instruction": "Hi", "output": None},
        {"instruction": 1, "output": "Ho"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bad[:2]), tmp_path / "a.parquet")
    with pytest.raises(BadConversation, match="a.parquet, row 2: message 2, the assistant's, is empty"):
        list(read_conversations(tmp_path / "a.parquet"))
    data = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", data[:-20], b"PAR1" + data):
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match="b.parquet"):
            list(read_conversations(tmp_path / "b.parquet"))


def test_parquet_text_that_is_not_utf8_is_told_by_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"Hi", b"\xff", b"Hu"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": raw, "completion": pyarrow.array(["Ho"] * 3)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 2: not UTF-8 text"):
        list(read_conversations(tmp_path / "a.parquet"))
    assert len(list(read_conversations(tmp_path / "a.parquet", skip_bad=True))) == 2


@pytest.mark.parametrize("bad, reason, sentence", BAD, ids=lambda value: str(value)[:40])
def test_a_bad_conversation_is_told_by_file_and_line_or_skipped_and_counted(tmp_path, bad, reason, sentence):
    good = lines({"messages": HELLO}).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + as_line(bad) + b"\n" + good)
    with pytest.raises(BadConversation, match=f"a.jsonl, line 3: .*{sentence}"):
        list(read_conversations(tmp_path / "a.jsonl"))
    left_out = LeftOut()
    assert list(read_conversations(tmp_path / "a.jsonl", left_out, skip_bad=True)) == [HELLO, HELLO]
    assert left_out.conversations == {reason: 1} and not left_out.fields
    assert left_out.summary() == f"conversations left out (1): {reason} (1, first in {tmp_path / 'a.jsonl'}, line 3)"


def test_a_bad_first_line_does_not_end_the_reading(tmp_path):
    for bad in (b"{", b"\xff\xfa", b"{}", b'"a"', b"3"):
        (tmp_path / "a.jsonl").write_bytes(b"\n" + bad + b"\n" + lines({"messages": HELLO}, ROWS[1]).encode())
        assert list(read_conversations(tmp_path / "a.jsonl", skip_bad=True)) == [HELLO, READ[1]]
        with pytest.raises(BadConversation, match="a.jsonl, line 2: "):
            list(read_conversations(tmp_path / "a.jsonl"))


def test_what_is_no_file_of_conversations_is_told(tmp_path):
    packed = gzip.compress(lines({"messages": HELLO}).encode())
    contents = {
        "empty.jsonl": (b"", "holds no conversation"), "blank.jsonl": (b"\n \n", "holds no conversation"),
        "list.json": (b"[]", "holds no conversation"), "cut.json": (b'[{"a": 1},\n {"b"', "damaged: .*line 2, column"),
        "wrong.json": (b"[\n3, \xff]", "damaged: not UTF-8 text .line 2, column 4: byte 0xff"),
        "cut.jsonl.gz": (packed[:-9], "is damaged, or not packed by gzip"), "no.gz": (b"{}", "not packed by gzip"),
        "flip.gz": (packed[:15] + bytes([packed[15] ^ 255]) + packed[16:], "is damaged, or not packed by gzip"),
        "a.zst": (b"", "convert it to JSON lines"), "a.csv": (b"a,b", "convert it to JSON lines"),
        "u.jsonl": (b"\xff\xfea", "is not utf-16"),
    }  # fmt: skip
    for name, (content, sentence) in contents.items():
        (tmp_path / name).write_bytes(content)
        for skip_bad in (False, True):
            with pytest.raises(ValueError, match=f"{name}.*{sentence}"):
                list(read_conversations(tmp_path / name, skip_bad=skip_bad))
    with pytest.raises(ValueError, match="cannot read .*none.jsonl: No such file"):
        list(read_conversations(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="is a folder: name the files in it"):
        list(read_conversations(tmp_path))
