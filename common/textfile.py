"""Read text files, compressed or not, in any Unicode encoding, and JSON values in them, in parts of bounded size.

The suffix tells how to decompress a file (.gz, .bz2, .xz, .zst); the byte order mark tells its encoding, which is
UTF-8 without one. Every error is a ValueError that names the file and the line or item.
"""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 1 << 20  # bytes read at once
LONGEST = 1 << 27  # most characters of a line or JSON value, which is held in memory whole

# Byte order marks. The mark of UTF-32 begins with that of UTF-16, so it comes first.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


# --- from bytes to text ------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """Return the whole text of a file, or of standard input ('-')."""
    return "".join(text_parts(path))


def check_text(text: str, place: str = "") -> str:
    """Return the text. Raises ValueError, with its place, if it holds half a surrogate pair, which is no character."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        begin = f"{place}: " if place else ""
        raise ValueError(
            f"{begin}{text[error.start]!r} at position {error.start} is half a surrogate pair, no character"
        ) from None
    return text


def text_parts(path: str | Path, name: str | None = None) -> Iterator[str]:
    """Yield the text of a file, or of standard input ('-'), in parts; name: for messages, by default the path."""
    path = Path(path)
    name = name or ("standard input" if path == Path("-") else str(path))
    blocks = byte_blocks(path, name)
    head = b""
    while len(head) < 4 and (block := next(blocks, b"")):
        head += block
    encoding = _encoding_of(head)
    if encoding == "utf-8" and (order := _utf16_order(head[:1000])):
        raise ValueError(
            f"{name} looks like UTF-16 without a byte order mark: {_convert(path, name, f'utf-16{order}')}"
        )
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    for block in itertools.chain([head], blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise ValueError(
                f"{name}, line {line}: not {encoding.removesuffix('-sig').upper()} ({error.reason}); if the file has "
                f"another encoding, {_convert(path, name, 'ENCODING')}, with latin1, gb18030 or the like for ENCODING"
            ) from None
        if text:
            line += text.count("\n")
            yield text


def text_size(path: Path, name: str) -> int:
    """Return the size of a file's text in bytes of UTF-8; only compressed files and other encodings are read for it."""
    with open(path, "rb") as file:
        encoding = _encoding_of(file.read(4))
    if path.suffix.lower() in PACKED_SUFFIXES or not encoding.startswith("utf-8"):
        return sum(map(utf8_size, text_parts(path, name)))
    return path.stat().st_size - (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)


def utf8_size(text: str) -> int:
    """Return the text's size in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def byte_blocks(path: Path, name: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, or of standard input ('-'), in blocks of about BLOCK bytes or less."""
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = path.suffix.lower()
    try:
        if path == Path("-"):
            yield from iter(partial(sys.stdin.buffer.read, BLOCK), b"")
        elif suffix == ".zst":
            yield from _zstd_blocks(path, name)
        else:
            with openers.get(suffix, open)(path, "rb") as file:
                yield from iter(partial(file.read, BLOCK), b"")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is damaged or cut short, it cannot be unpacked: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or error}") from None


def _zstd_blocks(path: Path, name: str) -> Iterator[bytes]:
    """Yield the bytes of a .zst file, which may be several compressed frames one after the other.

    The library's own file reader does not notice that a file is cut short, so this function checks each frame's end.
    """
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{name}: reading .zst needs the package zstandard: pip install zstandard") from None
    unpacker, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
    try:
        with open(path, "rb") as file:
            while packed := file.read(1 << 13):  # small reads: the data may decompress to thousands of times their size
                while packed:
                    frame = frame or unpacker.decompressobj()
                    if block := frame.decompress(packed):
                        yield block
                    packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is damaged, it cannot be unpacked: {error}") from None
    if frame:
        raise EOFError("its last frame has no end")


def _encoding_of(head: bytes) -> str:
    """Return the encoding of a file by its byte order mark, which `head` begins with; UTF-8 without one."""
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")


def _utf16_order(head: bytes) -> str:
    """'le' or 'be' if every other byte is mostly zero, as in UTF-16 of Latin letters; else ''."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) <= len(head) / 4 or min(even, odd) > max(even, odd) / 10:
        return ""
    return "be" if even > odd else "le"


def _convert(path: Path, name: str, encoding: str) -> str:
    """Return the advice to convert a file; if its name differs from its path, the file is the copy of a pipe."""
    command = f"iconv -f {encoding} -t utf-8"
    if name != str(path):
        return f"send it through {command}"
    unpack = "unpack it, then " if path.suffix.lower() in PACKED_SUFFIXES else ""
    return f"{unpack}convert it: {command} {path} > converted.txt"


# --- from text to JSON values ------------------------------------------------------------------------------------


def split_text(parts: Iterable[str], separator: str, name: str) -> Iterator[str]:
    """Split a text that comes in parts. Raises ValueError if a piece is longer than LONGEST characters."""
    rest = ""
    for part in parts:
        *whole, rest = (rest + part).split(separator)
        yield from whole
        if len(rest) > LONGEST:
            raise ValueError(f"{name}: {LONGEST:,} characters without {separator!r}: is this what separates its texts?")
    yield rest


def json_values(parts: Iterable[str], name: str) -> Iterator[tuple[str, object]]:
    """Yield (place, value) of each line of JSON lines, or of each item of a JSON list; the first character tells which.

    place: for messages, the file's name and the number of the line or item.
    """
    parts = iter(parts)
    first = next(parts, "")
    parts = itertools.chain([first], parts)
    return _list_items(parts, name) if first.lstrip().startswith("[") else _line_values(parts, name)


def _line_values(parts: Iterable[str], name: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(split_text(parts, "\n", name), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=unique_fields)
        except (ValueError, RecursionError) as error:
            column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{place}: not valid JSON ({_reason(error)}{column})") from None
        yield place, value


def _list_items(parts: Iterable[str], name: str) -> Iterator[tuple[str, object]]:
    """Yield (place, value) of each item of a JSON list, as soon as the item is complete."""
    text, number, decoder = "", 0, json.JSONDecoder(object_pairs_hook=unique_fields)
    mark = re.compile(r"\s*([\[,\]])\s*")  # the mark before an item, or the end of the list
    expected = "["
    for part in itertools.chain(parts, [None]):
        text += part or ""
        at = 0
        while expected and (found := mark.match(text, at)):
            end = found.end()
            if found[1] == "]" and expected == ",":
                at, expected = end, ""
                break
            if found[1] != expected or end == len(text):  # not the expected mark, or the item after it is still to come
                break
            if expected == "[" and text[end] == "]":  # an empty list
                at, expected = end + 1, ""
                break
            try:
                value, at = decoder.raw_decode(text, end)
            except (ValueError, RecursionError) as error:
                if part is not None and _may_be_incomplete(error, text):
                    break
                raise ValueError(f"{name}, item {number + 1}: not valid JSON ({_reason(error)})") from None
            number, expected = number + 1, ","
            yield f"{name}, item {number}", value
        text = text[at:]
        if len(text) > LONGEST:
            raise ValueError(f"{name}, item {number + 1} is longer than {LONGEST:,} characters, or not valid JSON")
    if expected:
        raise ValueError(f"{name}: not valid JSON, the list does not go on or end after item {number}")
    if text.strip():
        raise ValueError(f"{name}: not valid JSON, {text.strip()[:20]!r} follows the end of the list")


def unique_fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's fields, as the object_pairs_hook of the module json.

    Raises ValueError for a name that occurs twice: only one of its values would be kept.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" occurs twice in an object')
    return fields


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _may_be_incomplete(error: Exception, text: str) -> bool:
    """Return whether more text could make the JSON value valid."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8
