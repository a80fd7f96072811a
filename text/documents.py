"""Documents from files or from the Hub, one after the other, each with its split: (split, text).

Everything streams. A document of a .jsonl or .parquet file goes to train or val by a hash of its text, so that the
split depends neither on the order of documents nor on how they are spread over files, and a document that is there
twice never sits on both sides. A .txt file is one document, the end of which is val.
"""

import codecs
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from text.corpus import Document

BLOCK = 1 << 20  # bytes of a .txt file read at once


def split_of(text: str, val_fraction: float) -> str:
    """'val' for about `val_fraction` of all texts, 'train' for the others; always the same for the same text."""
    return "val" if zlib.crc32(text.encode()) < val_fraction * 2**32 else "train"


def read_documents(paths: Iterable[str | Path], val_fraction: float) -> Iterator[Document]:
    """The documents of .txt, .jsonl (field "text") and .parquet (column "text") files, as (split, text).

    A missing, empty or unknown file is refused before anything is read. What cannot be read is a ValueError with file
    and line (.parquet: row).
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    chosen = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: {'is a folder, name the files in it' if path.is_dir() else 'no such file'}")
        if path.suffix.lower() not in readers:
            raise ValueError(f"{path}: its name should end in one of {', '.join(readers)}, to tell how to read it")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: is empty")
        chosen.append((readers[path.suffix.lower()], path))
    return (document for reader, path in chosen for document in reader(path, val_fraction))


def hub_documents(name: str, subset: str | None, val_fraction: float) -> Iterator[Document]:
    """The documents (field "text" of the train split) of a data set on the Hugging Face Hub, downloaded as needed."""
    advice = f"or download its .parquet files from https://huggingface.co/datasets/{name} and pass them with --input"
    try:
        import datasets
    except ImportError:
        raise ValueError(f"streaming {name} needs the package datasets: pip install datasets, {advice}") from None
    try:
        for row in datasets.load_dataset(name, subset, split="train", streaming=True):
            yield split_of(row["text"], val_fraction), row["text"]
    except Exception as error:  # what stops a download has many classes, of whichever HTTP library the client uses now
        raise ValueError(f"{name} did not arrive ({type(error).__name__}: {error}): try again, {advice}") from error


def _read_txt(path: Path, val_fraction: float) -> Iterator[Document]:
    size = path.stat().st_size
    cut = _txt_cut(path, int(size * (1 - val_fraction)))
    yield "train", _txt_parts(path, 0, cut)
    yield "val", _txt_parts(path, cut, size)


def _txt_cut(path: Path, target: int) -> int:
    """The byte offset at or before `target` that follows a line break, or else a space, or else starts a character."""
    with open(path, "rb") as file:
        start = max(0, target - BLOCK)
        file.seek(start)
        before, after = file.read(target - start), file.read(1)
    for mark in b"\n", b" ":
        if mark in before:
            return start + before.rindex(mark) + 1
    while before and after and after[0] & 0xC0 == 0x80:  # inside a character: back to its first byte
        before, after = before[:-1], before[-1:]
    return start + len(before)


def _txt_parts(path: Path, start: int, end: int) -> Iterator[str]:
    """The text between two byte offsets, in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(min(BLOCK, end - file.tell())):
            try:
                text = decoder.decode(block, final=file.tell() == end)
            except UnicodeDecodeError as error:
                offset = file.tell() - len(error.object) + error.start
                raise ValueError(f"{path}, line {_line_at(path, offset)}: not UTF-8 ({error.reason})") from None
            yield text.removeprefix("\ufeff") if file.tell() == len(block) else text  # a byte order mark is no text


def _line_at(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        newlines = 0
        while file.tell() < offset:
            newlines += file.read(min(BLOCK, offset - file.tell())).count(b"\n")
    return newlines + 1


def _read_jsonl(path: Path, val_fraction: float) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: not valid JSON ({reason})") from None
            if not isinstance(row, dict) or "text" not in row:
                found = f"the fields {', '.join(row)[:200]}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ValueError(f'{path}, line {number}: an object with the field "text" is needed, not {found}')
            text = _checked(row["text"], f"{path}, line {number}")
            yield split_of(text, val_fraction), text


def _read_parquet(path: Path, val_fraction: float) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs the package pyarrow: pip install pyarrow") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f'{path}: has no column "text", only {", ".join(file.schema_arrow.names)[:200]}')
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    text = _checked(value.as_py(), f"{path}, row {row}")
                    yield split_of(text, val_fraction), text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {row}: not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {row}: not a readable .parquet file ({error})") from None


def _checked(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" must be a string, not {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(f'{where}: "text" holds {text[error.start]!r}, which is no character') from None
    return text
