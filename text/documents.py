"""Stream documents from files, standard input or the Hub, each with its split: (split, text).

Everything streams, so memory use does not grow with the files. The split is chosen as follows:
- For a file of many documents (.jsonl, .json, .parquet, text with a separator), a hash of each document's text decides,
  so the split depends neither on the order of documents nor on the files they are in.
- The end of a large text file is validation. Small text files, such as a folder of articles, go whole to train or val,
  in the order of a hash. See `validation_parts`.
In both cases a document that occurs twice is never in both splits.
"""

import argparse
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from common.files import checksum
from common.textfile import (
    PACKED_SUFFIXES,
    byte_blocks,
    check_text,
    json_values,
    split_text,
    text_parts,
    text_size,
    utf8_size,
)

# A document is (split, text). `text` is a string, or an iterable of its parts if it may not fit in memory.
Document = tuple[str, str | Iterable[str]]

PAGE = 4096  # bytes: a text file is not cut for a shorter validation part while whole files can be taken


def parts_of(text: str | Iterable[str]) -> Iterable[str]:
    """Return a document's text as an iterable of parts."""
    return [text] if isinstance(text, str) else text


def split_of(text: str, val_fraction: float) -> str:
    """Return 'val' for about `val_fraction` of all texts, else 'train'; equal texts get equal splits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


# --- which files -------------------------------------------------------------------------------------------------

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
KNOWN = f"""known are .parquet, and {", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES))}, alone or followed by {
    ", ".join(PACKED_SUFFIXES)
}; --text_suffix reads other files as plain text"""


@dataclass(frozen=True)
class Reading:
    """How to read files: the options of `add_reading_options`."""

    text_field: str = "text"  # the field, or column, that holds the text
    separator: str | None = None  # the string between two documents of a text file
    text_suffixes: tuple[str, ...] = ()  # further suffixes of plain text files

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Reading":
        """Make a Reading from the parsed options. In the separator, \\n and \\t are a line break and a tab.

        Raises ValueError if the separator is empty.
        """
        separator = args.document_separator
        if separator is not None:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
            if not separator:
                raise ValueError("--document_separator is empty: give the text that stands between two documents")
        suffixes = tuple(f".{suffix.removeprefix('.')}".lower() for suffix in args.text_suffix)
        return cls(args.text_field, separator, suffixes)


DEFAULT_READING = Reading()


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `Reading.of` reads."""
    parser.add_argument(
        "--text_field", default="text", metavar="NAME",
        help="field of .jsonl and .json, column of .parquet, that holds the text; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--document_separator",
        metavar="S",
        help="the string between two documents in a text file, such as '<|endoftext|>' or '\\n\\n\\n'",
    )
    parser.add_argument(
        "--text_suffix", nargs="+", default=[], metavar="S", help="suffixes of further text files, such as .py .log"
    )  # fmt: skip


class File(NamedTuple):
    """A file to read, and its kind."""

    path: Path
    name: str  # for messages
    kind: Literal["text", "json", "parquet", "pipe"]  # the first characters of a pipe tell whether it is JSON


def find_files(paths: Iterable[str | Path], reading: Reading) -> list[File]:
    """Return the files that the paths name: files, '-' for standard input, and all known files in folders.

    Raises ValueError if a file is missing, empty or of an unknown kind, or if a package to read it is not installed.
    """
    files = []
    for path in paths:
        if str(path) == "-":
            files.append(File(Path("-"), "standard input", "pipe"))
        elif os.path.isdir(path):
            files += _files_in(Path(path), reading)
        elif not os.path.exists(path):
            raise ValueError(f"cannot read {path}: no such file or folder")
        elif not os.path.isfile(path):
            files.append(File(Path(path), str(path), "pipe"))
        elif os.path.getsize(path) == 0:
            raise ValueError(f"{path}: is empty")
        elif kind := _kind_by_name(Path(path), reading):
            files.append(File(Path(path), str(path), kind))
        else:
            raise ValueError(f"{path}: unknown suffix; {KNOWN}")
    for file in files:
        package = {".zst": "zstandard", ".parquet": "pyarrow"}.get(file.path.suffix.lower())
        if package and not _installed(package):
            raise ValueError(f"{file.name}: reading it needs the package {package}: pip install {package}")
    return files


def _kind_by_name(path: Path, reading: Reading) -> Literal["text", "json", "parquet"] | None:
    """Return the kind of a file by its suffix, None if the suffix is unknown. A file without a suffix is text."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in PACKED_SUFFIXES:
        suffix = path.with_suffix("").suffix.lower()
    if suffix in JSON_SUFFIXES:
        return "json"
    return "text" if suffix in ("", *TEXT_SUFFIXES, *reading.text_suffixes) else None


def _files_in(folder: Path, reading: Reading) -> list[File]:
    """Return the known files in the folder and its subfolders, in the order of their names; count others on stderr.

    Hidden files, empty files and the files of a prepared corpus are skipped. Here a file without a suffix is unknown.
    """
    files, others = [], Counter()
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        corpus = ("meta.json", "tokenizer.json") if {"meta.json", "tokenizer.json"} <= {*names} else ()
        for name in sorted(names):
            path = Path(place, name)
            if (
                name.startswith(".")
                or name in corpus
                or (corpus and path.suffix == ".bin")
                or not path.is_file()
                or path.stat().st_size == 0
            ):
                continue
            kind = _kind_by_name(path, reading)
            if kind and path.suffix:
                files.append(File(path, str(path), kind))
            else:
                ending = path.suffixes[-2:] if path.suffix.lower() in PACKED_SUFFIXES else path.suffixes[-1:]
                others["".join(ending) or "without ending"] += 1
    found = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
    if not files:
        what = f" (there are {found}); {KNOWN}, and one without suffix is read if given by itself" if found else ""
        raise ValueError(f"{folder}: no file in this folder can be read{what}")
    if others:
        count = others.total()
        print(f"note: {folder}: {count} file{'s' * (count > 1)} of other kinds left out ({found})", file=sys.stderr)
    return files


def _raise(error: OSError) -> None:
    raise ValueError(f"cannot read {error.filename}: {error.strerror}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- from files to documents -------------------------------------------------------------------------------------


def read_documents(paths: Iterable[str | Path], reading: Reading = DEFAULT_READING) -> Iterator[str | Iterator[str]]:
    """Yield the texts of all documents in the files. Raises ValueError as `find_files` and `texts_of` do."""
    files = find_files(paths, reading)
    return itertools.chain.from_iterable(texts_of(file, reading) for file in files)


def texts_of(file: File, reading: Reading) -> Iterator[str | Iterator[str]]:
    """Yield the text of each document in the file. A text file without a separator is one document, in parts.

    Raises ValueError for a document that cannot be read; it names the line (.json list: item, .parquet: row).
    """
    if file.kind == "parquet":
        yield from _parquet_texts(file, reading.text_field)
        return
    parts = text_parts(file.path, file.name)
    if file.kind == "pipe":
        first = next(parts, "")
        file, parts = file._replace(kind=_kind_of(first, file.name)), itertools.chain([first], parts)
    if file.kind == "json":
        for place, row in json_values(parts, file.name):
            yield _text_of(row, reading.text_field, place)
    elif reading.separator is None:
        yield parts
    else:
        yield from (text.strip("\r\n") for text in split_text(parts, reading.separator, file.name))


def _kind_of(start: str, name: str) -> Literal["text", "json"]:
    """Tell by its first characters whether a text is JSON: an object, or a list that begins with an object."""
    if re.match(r'\s*(\[\s*)?\{\s*"', start):
        print(f"note: {name} is read as JSON, because it begins like it", file=sys.stderr)
        return "json"
    return "text"


def _parquet_texts(file: File, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise ValueError(f'{file.name}: has no column "{field}", only {_fields(columns)}')
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield _checked(value.as_py(), f'"{field}"', f"{file.name}, row {row}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}, row {row}: not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file.name}, after row {row}: not a readable .parquet file ({error})") from None


def _text_of(row: object, field: str, place: str) -> str:
    """Return the text of a JSON value: the value itself if it is a string, or the object's `field`."""
    if isinstance(row, str):
        return _checked(row, "the text", place)
    if isinstance(row, dict) and field in row:
        return _checked(row[field], f'"{field}"', place)
    found = _fields(row) if isinstance(row, dict) else f"a {type(row).__name__}"
    raise ValueError(f'{place}: must be a string or an object with the field "{field}", not {found}')


def _fields(row: Iterable[str]) -> str:
    return f"the fields {', '.join(map(str, row))[:200]} (--text_field chooses one)"


def _checked(text: object, what: str, place: str) -> str:
    """Return the text. Raises ValueError if it is not a string, or if it holds half a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{place}: {what} must be a string, not {type(text).__name__}")
    try:
        return check_text(text)  # JSON can spell half a surrogate pair
    except ValueError:
        raise ValueError(f"{place}: {what} holds half a surrogate pair, which is no character") from None


# --- from documents to splits ------------------------------------------------------------------------------------


class Documents:
    """The documents of files, each with its split. Every iteration starts from the beginning."""

    def __init__(
        self,
        paths: Iterable[str | Path],
        val_fraction: float,
        reading: Reading = DEFAULT_READING,
        part: tuple[int, int] = (1, 1),
    ):
        """Copy pipes, which can be read only once, to temporary files. Raises ValueError as `find_files` does.

        part: (3, 64) gives the documents of the third of 64 runs of consecutive files, each in the split that it has
        among all files. Raises ValueError if there are fewer files than parts, or if a pipe is to be divided.
        """
        self.val_fraction, self.reading, self.part = val_fraction, reading, part
        self._copies: list = []  # temporary files, which are deleted with this object
        files = find_files(paths, reading)
        self.files = [self._copied(file) if file.kind == "pipe" else file for file in files]
        number, of = part
        if of > 1 and self._copies:
            raise ValueError(f"--part={number}/{of}: standard input and pipes cannot be divided: write them to files")
        if of > len(files):
            raise ValueError(
                f"--part={number}/{of}: there are only {len(files)} input files, and a part needs one: choose fewer "
                "parts, or cut a file of lines into more, as in split -n l/64 --additional-suffix=.jsonl FILE"
            )
        self._own = slice(len(files) * (number - 1) // of, len(files) * number // of)

    @property
    def total_bytes(self) -> int | None:
        """Bytes to read; None if a file is compressed, as its size then says little about its text."""
        packed = any(file.path.suffix.lower() in (*PACKED_SUFFIXES, ".parquet") for file in self.files[self._own])
        return None if packed else sum(file.path.stat().st_size for file in self.files[self._own])

    def identity(self) -> dict | None:
        """Return all that the documents depend on, as JSON for `Unfinished`; None if they come through a pipe."""
        if self._copies:
            return None
        stats = [(str(file.path.resolve()), file.path.stat()) for file in self.files]
        return {"input files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]} | self.shared()

    def shared(self) -> dict:
        """Return what all parts of a corpus must agree on, on whatever machine and disk they find the files."""
        return {
            "names and sizes": checksum([[file.path.name, file.path.stat().st_size] for file in self.files]),
            "--val_fraction": self.val_fraction,
            "reading options": [self.reading.text_field, self.reading.separator, *self.reading.text_suffixes],
        }

    def __iter__(self) -> Iterator[Document]:
        for file, (size, val_size) in zip(self.files[self._own], self._sizes[self._own], strict=True):
            if not self._is_one_text(file):
                for text in texts_of(file, self.reading):
                    yield split_of(text, self.val_fraction), text
            elif val_size in (0, size):
                yield "val" if val_size else "train", text_parts(file.path, file.name)
            else:
                train, val = divide(text_parts(file.path, file.name), size, val_size)
                yield "train", train
                yield "val", val

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """For each file that is one text, (bytes, bytes of them for validation); (0, 0) for other files."""
        texts = [i for i, file in enumerate(self.files) if self._is_one_text(file)]
        sizes = [text_size(self.files[i].path, self.files[i].name) for i in texts]
        parts = validation_parts(sizes, lambda i: self._digest(self.files[texts[i]]), self.val_fraction)
        found = dict(zip(texts, zip(sizes, parts, strict=True), strict=True))
        return [found.get(i, (0, 0)) for i in range(len(self.files))]

    def _digest(self, file: File) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for part in text_parts(file.path, file.name):
            digest.update(part.encode())
        return digest.digest()

    def _is_one_text(self, file: File) -> bool:
        return file.kind == "text" and self.reading.separator is None

    def _copied(self, file: File) -> File:
        """Copy a pipe to a temporary file, which can be read again."""
        copy = tempfile.NamedTemporaryFile(prefix="plaingpt-")
        self._copies.append(copy)
        try:
            for block in byte_blocks(file.path, file.name):
                copy.write(block)
            copy.flush()
        except OSError as error:
            raise ValueError(
                f"cannot copy {file.name} to {copy.name}: {error.strerror}; TMPDIR chooses another folder"
            ) from None
        first = next(text_parts(copy.name, file.name), "")
        return file._replace(path=Path(copy.name), kind=_kind_of(first, file.name))


def validation_parts(sizes: list[int], digest: Callable[[int], bytes], val_fraction: float) -> list[int]:
    """Return how many bytes at the end of each text file are for validation; sizes: of the files, in bytes.

    A large file (its share is at least PAGE bytes, and it is over a tenth of all text) gives its own end. The other
    files go whole to validation, in the order of `digest(i)`, a hash of their text, until they have given their share.
    The last of them is cut if all of it would change that share by more than a tenth. Equal texts are treated alike.

    Example: one file of 100,000 bytes and val_fraction 0.1 → [10000]. Ten files of 500 bytes each → one of them gives
    its 500 bytes, and the others 0.
    """
    total = val_fraction * sum(sizes)
    large = [val_fraction * size >= PAGE and size > total / 10 for size in sizes]
    parts = [round(val_fraction * size) if is_large else 0 for size, is_large in zip(sizes, large, strict=True)]
    small = [i for i, is_large in enumerate(large) if not is_large]
    digests = {i: digest(i) for i in small} if len(small) > 1 else dict.fromkeys(small, b"")
    wanted = missing = val_fraction * sum(sizes[i] for i in small)
    for _, equal in itertools.groupby(sorted(small, key=digests.get), key=digests.get):
        members = list(equal)
        size = sizes[members[0]]
        if missing <= wanted / 10:
            break
        is_whole = size * len(members) <= missing + wanted / 10 and len(sizes) > 1
        part = size if is_whole else max(1, round(missing / len(members)))
        for i in members:
            parts[i] = part
        missing -= part * len(members)
    return parts


def divide(parts: Iterable[str], size: int, val_size: int) -> tuple[Iterator[str], Iterator[str]]:
    """Cut a text of `size` bytes of UTF-8 in two, with about `val_size` bytes in the second; read the first one first.

    The cut is at the line break nearest to `size - val_size`, or else at the nearest space, within 5% of `val_size` (or
    within 100 bytes if that is more, but at most half of `val_size`); or else between two characters.
    """
    target = size - val_size
    tolerance = min(max(val_size // 20, min(val_size // 2, 100)), 1 << 20)
    parts, rest = iter(parts), []

    def before() -> Iterator[str]:
        given, window = 0, ""  # bytes yielded so far; text that may contain the cut
        for part in parts:
            window += part
            if given + utf8_size(window) >= target + tolerance:
                break
            sure = max(0, len(window) - 2 * tolerance)
            yield window[:sure]
            given, window = given + utf8_size(window[:sure]), window[sure:]
        content = window.encode()
        places = (target - given - tolerance, target - given, target - given + tolerance)
        cut = nearest_break(window, *(len(content[: max(0, place)].decode(errors="ignore")) for place in places))
        rest.append(window[cut:])
        yield window[:cut]

    first = before()

    def after() -> Iterator[str]:
        for _ in first:  # skip what the caller has not read of the first part
            pass
        yield from rest
        yield from parts

    return first, after()


def nearest_break(text: str, low: int, target: int, high: int) -> int:
    """Return the index nearest to `target`, from `low` to `high`, after a line break, or else after a space.

    The start and the end of the text do not count. Returns `target` if there is no such index.
    """
    low, high = max(low, 1), min(high, len(text) - 1)
    for mark in "\n", " ":
        places = [text.rfind(mark, low - 1, target) + 1, text.find(mark, target, high) + 1]
        found = [place for place in places if place]
        if found:
            return min(found, key=lambda place: abs(place - target))
    return target


# --- from the Hub ------------------------------------------------------------------------------------------------


def hub_documents(name: str, subset: str | None, val_fraction: float, field: str = "text") -> Iterator[Document]:
    """Yield the documents of a data set's train split on the Hugging Face Hub, downloaded as needed."""
    for number, row in enumerate(_hub_rows(name, subset), 1):
        text = _text_of(row, field, f"{name}, row {number}")
        yield split_of(text, val_fraction), text


def _hub_rows(name: str, subset: str | None) -> Iterator[dict]:
    advice = f"or download its .parquet files from https://huggingface.co/datasets/{name} and pass them with --input"
    try:
        import datasets
    except ImportError:
        raise ValueError(f"streaming {name} needs the package datasets: pip install datasets, {advice}") from None
    try:
        yield from datasets.load_dataset(name, subset, split="train", streaming=True)
    except Exception as error:  # a failed download raises many classes, which depend on the HTTP library of the client
        raise ValueError(f"downloading {name} failed ({type(error).__name__}: {error}): try again, {advice}") from error
