"""Conversation files: read the common forms, split them, write a prepared folder, and open it.

A prepared folder holds train.jsonl and val.jsonl, one conversation per line, {"messages": [{"role", "content"}, ...]},
and meta.json with each file's number of conversations and SHA-256. `write_conversations` writes all three under
temporary names, syncs them and then renames them. A crash between two renames leaves files with wrong checksums, which
`open_conversations` rejects. `read_conversations` reads the public forms of text/conversation_forms.py.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from os.path import expanduser
from pathlib import Path

from filelock import FileLock, Timeout

from common.files import explained, folder_name, is_of_another
from common.textfile import unique_fields
from text.chat import EMPTY_ANSWER, BadConversation, Message
from text.conversation_forms import messages_of
from text.corpus import META
from text.documents import split_of
from text.shards import SPLITS

FORMAT = {"format": "plaingpt-conversations", "version": 1}
UNREADABLE = (".csv", ".tsv", ".xlsx", ".arrow", ".zst", ".zip", ".bz2", ".xz", ".7z", ".tar")
LOCK_SECONDS = 60  # another prepare.py needs far less to write its files

Conversation = tuple[str, list[Message]]  # its split and its messages


@dataclass
class LeftOut:
    """What reading left out: conversations by reason, with the first one's place; and fields by name."""

    conversations: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    fields: Counter[str] = field(default_factory=Counter)  # name → number of conversations that have it

    def summary(self) -> str:
        """Return one line about conversations and one about fields; no line where nothing was left out."""
        lines = []
        if self.conversations:
            counts = [f"{why} ({n:,}, first in {self.first[why]})" for why, n in self.conversations.most_common()]
            lines.append(f"conversations left out ({self.conversations.total():,}): {'; '.join(counts)}")
        if self.fields:
            counts = [f"{name} ({n:,})" for name, n in self.fields.most_common()]
            lines.append(f"fields left out, because conversations do not use them: {', '.join(counts)}")
        return "\n".join(lines)


# --- reading -----------------------------------------------------------------------------------------------------


def read_conversations(
    path: str | Path, left_out: LeftOut | None = None, *, skip_bad: bool = False, skip_empty: bool = False
) -> Iterator[list[Message]]:
    """Yield the conversations of a file: JSON lines, a JSON list (both may be .gz) or .parquet.

    A bad conversation raises BadConversation with its file and line (item of a list, row of a .parquet file). With
    skip_bad, it is skipped and counted in `left_out`; with skip_empty, only if one of its answers is empty. Unknown
    fields are counted in `left_out` too. Raises ValueError if the file cannot be read.
    """
    left_out = LeftOut() if left_out is None else left_out
    empty = True
    for place, row in rows_of(Path(path)):
        empty = False
        try:
            if isinstance(row, BadConversation):
                raise row
            messages = messages_of(row, left_out.fields)
        except BadConversation as error:
            if not skip_bad and not (skip_empty and error.reason == EMPTY_ANSWER):
                raise BadConversation(error.reason, f"{path}, {place}: {error}") from None
            left_out.conversations[error.reason] += 1
            left_out.first.setdefault(error.reason, f"{path}, {place}")
            continue
        yield messages
    if empty:
        raise ValueError(f"{path} holds no conversation")


def rows_of(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, content) of each row; the content is a BadConversation, not raised, if the row is not JSON."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the files in it")
    if path.suffix.lower() in UNREADABLE:
        raise ValueError(f"{path}: convert it to JSON lines, a JSON list (both may be .gz) or .parquet first")
    try:
        yield from _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {error.encoding} text: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged, or not packed by gzip: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of JSON lines, or of one JSON document. The content decides which, not the file's name."""
    with _open_binary(path) as binary:
        encoding = "utf-16" if binary.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        # A byte that is not UTF-8 becomes a surrogate, and _parse reports it, so one bad line does not end the reading.
        file = io.TextIOWrapper(binary, encoding, errors="surrogateescape", newline="\n")
        start, line = 1, file.readline()
        while line and not line.strip():
            start, line = start + 1, file.readline()
        lines, alone = chain([line], file), _parse(line)
        if isinstance(alone, BadConversation | list):  # perhaps one document over several lines, or a list of rows
            text = line + file.read()
            document = _parse(text)
            if not isinstance(document, BadConversation):
                yield from _document_rows(document)
                return
            if line.lstrip().startswith("[") and not isinstance(alone, list):
                raise ValueError(f"{path} holds a JSON list that is damaged: {document}")
            lines = text.split("\n")
        for number, line in enumerate(lines, start):
            if line.strip():
                yield f"line {number}", _parse(line)


def _open_binary(path: Path) -> gzip.GzipFile | io.BufferedReader:
    if str(path) == "-":  # standard input
        return open(0, "rb", closefd=False)
    if path.suffix.lower() != ".gz":
        return open(path, "rb")
    with gzip.open(path, "rb") as file:
        while file.read(1 << 20):  # read up to the checksum at the end, so that damage is not taken for bad JSON
            pass
    return gzip.open(path, "rb")


def _document_rows(document: object) -> Iterator[tuple[str, object]]:
    """Yield the rows of a JSON document: those of a list, or one conversation alone."""
    match document:
        case [{"role": _} | {"from": _}, *_] | dict():
            yield "item 1", document
        case list():
            for number, row in enumerate(document, 1):
                yield f"item {number}", row
        case _:
            yield "line 1", document


def _parse(text: str) -> object:
    """Return the JSON value, or the BadConversation to raise."""
    text = text.rstrip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start].split("\n")
        where = _place(len(before), 1 + len(before[-1])) + f": byte 0x{ord(text[error.start]) & 0xFF:02x}"
        advice = "convert the file, for example by iconv -f GB18030 -t UTF-8 OLD > NEW"
        return BadConversation("text that is not UTF-8", f"not UTF-8 text ({where}); {advice}")
    try:
        return json.loads(text, object_pairs_hook=unique_fields)
    except json.JSONDecodeError as error:
        return BadConversation("broken JSON", f"not valid JSON ({error.msg}, {_place(error.lineno, error.colno)})")
    except (ValueError, RecursionError) as error:  # a field twice, thousands of digits, thousands of nested lists
        return BadConversation("broken JSON", f"not valid JSON ({error})")


def _place(line: int, column: int) -> str:
    """Describe a place in JSON text. For text of one line, only the column: the caller knows the line in the file."""
    return f"line {line}, column {column}" if line > 1 else f"column {column}"


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs the package pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        row = batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        row = BadConversation("text that is not UTF-8", f"not UTF-8 text ({error.reason})")
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}, after row {number}: not a readable .parquet file ({error})") from None


# --- splitting ---------------------------------------------------------------------------------------------------


def first_question(messages: list[Message]) -> str:
    """The user's first message."""
    return next(message["content"] for message in messages if message["role"] == "user")


def by_question(conversations: Iterable[list[Message]], val_fraction: float) -> Iterator[Conversation]:
    """Yield (split, messages): a hash of the first user message chooses the split, so no question is in both.

    If all conversations fall into one split, one question moves to the other; which one does not depend on their order.
    Raises ValueError if val_fraction is not between 0 and 1, or if there is only one question.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction={val_fraction}: give a share between 0 and 1, such as 0.05")
    waiting: list[Conversation] = []  # all conversations so far, until both splits have occurred
    splits: set[str] = set()
    for messages in conversations:
        split = split_of(first_question(messages), val_fraction)
        splits.add(split)
        waiting.append((split, messages))
        if len(splits) == 2:
            yield from waiting
            waiting.clear()
    questions = {first_question(messages) for _, messages in waiting}
    if len(questions) == 1:
        advice = "give conversations with other first questions, or validation files by --val"
        raise ValueError(f"all conversations begin with the same question, so one split would be empty: {advice}")
    if len(splits) == 1:
        moved = min(questions, key=lambda question: hashlib.sha256(question.encode()).digest())
        (other,) = set(SPLITS) - splits
        waiting = [(other if first_question(messages) == moved else split, messages) for split, messages in waiting]
    yield from waiting


# --- writing -----------------------------------------------------------------------------------------------------


def conversation_parser(
    description: str, *, output: Path | None, val_fraction: float, reads: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options of every conversation command; `reads` adds those of `prepare_conversations`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "; default: %(default)s" if output else ""
    text = f"folder to write train.jsonl and val.jsonl to{default}"
    parser.add_argument("--output", default=output, required=output is None, type=folder_name, metavar="DIR", help=text)
    either = parser.add_mutually_exclusive_group()
    text = "share kept for validation; default: %(default)s"
    either.add_argument("--val_fraction", default=val_fraction, type=float, metavar="F", help=text)
    if reads:
        text = "conversation files for validation; then all of --input is for training"
        either.add_argument("--val", nargs="+", type=expanduser, metavar="FILE", help=text)
        text = "leave out conversations that cannot be trained on, and count them by reason"
        parser.add_argument("--skip_bad", action="store_true", help=text)
    return parser


def prepare_conversations(args: argparse.Namespace, paths: Sequence[str | Path], skip_empty: bool = False) -> None:
    """Read the conversations in `paths` and write the data set that `args` (of `conversation_parser`) describes."""
    left_out = LeftOut()

    def read(paths: Sequence[str | Path]) -> Iterator[list[Message]]:
        for path in paths:
            try:
                yield from read_conversations(path, left_out, skip_bad=args.skip_bad, skip_empty=skip_empty)
            except BadConversation as error:
                raise ValueError(f"{error} (--skip_bad leaves such conversations out and counts them)") from None

    if args.val:
        splits = {"train": paths, "val": args.val}
        conversations = ((split, messages) for split, files in splits.items() for messages in read(files))
    else:
        conversations = by_question(read(paths), args.val_fraction)
    write_conversations(args.output, conversations, left_out, sources=[*paths, *(args.val or [])])


def write_conversations(
    folder: str | Path,
    conversations: Iterable[Conversation],
    left_out: LeftOut | None = None,
    sources: Sequence[str | Path] = (),
) -> None:
    """Write each split's conversations without duplicates, and print a report that includes what reading left out.

    The old data set in `folder` stays until the new one is complete. sources: the files that `conversations` come from.
    Raises ValueError if a split is empty, or if `folder` holds a run, a corpus or one of the sources.
    """
    folder, left_out = Path(folder), left_out or LeftOut()
    _check_output(folder, sources)
    lines: dict[str, dict[str, int]] = {split: {} for split in SPLITS}  # line → bytes of text in it
    questions: dict[str, set[str]] = {split: set() for split in SPLITS}
    repeated = 0
    for split, messages in conversations:
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        repeated += line in lines[split]
        lines[split][line] = _text_bytes(messages)
        questions[split].add(first_question(messages))
    summary = left_out.summary()
    for split in SPLITS:
        if not lines[split]:
            raise ValueError(f"no conversation is left for {split}: give more. {summary}")
    content = {split: ("\n".join(lines[split]) + "\n").encode() for split in SPLITS}
    described = {split: _describe(content[split], len(lines[split]), sum(lines[split].values())) for split in SPLITS}
    meta = json.dumps(FORMAT | {"splits": described}, indent=1) + "\n"
    # meta.json is renamed first: until the last rename, its checksums do not match the files.
    replace_together(folder, {META: meta.encode()} | {f"{split}.jsonl": content[split] for split in SPLITS})
    print(f"{os.path.relpath(folder)}:" + (f" {repeated:,} repeated conversations left out" if repeated else ""))
    for split in SPLITS:
        print(f"  {split:5} {len(lines[split]):>9,} conversations {sum(lines[split].values()):>13,} bytes of text")
    if shared := len(questions["train"] & questions["val"]):
        print(
            f"note: {shared:,} first questions are in both splits: on these, validation does not measure generalization"
        )
    if summary:
        print(summary)


def _check_output(folder: Path, sources: Sequence[str | Path]) -> None:
    """Raise ValueError if writing to the folder would destroy something other than a conversation data set."""
    check_sources(folder, sources)
    found = None
    if folder.exists() and not folder.is_dir():
        found = "is a file"
    elif (folder / "config.json").exists() or (folder / "checkpoints").exists():
        found = "holds a run"
    elif any((folder / name).exists() for name in ("train.bin", "val.bin", "tokenizer.json")):
        found = "holds a corpus of text"
    elif is_of_another(folder / META, str(FORMAT["format"])):
        found = f"holds the {META} of something else"
    elif not (folder / META).exists():
        if own := [f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").exists()]:
            found = f"holds a {own[0]} and no {META}, so it is not of this command"
    if found:
        raise ValueError(f"--output={folder} {found}: name a folder of its own")


def check_sources(folder: Path, sources: Sequence[str | Path]) -> None:
    """Raise ValueError if one of the files that are read is one of those that are to be written to the folder."""
    for source in map(Path, sources):
        for target in (folder / f"{split}.jsonl" for split in SPLITS):
            if source.exists() and target.exists() and source.samefile(target):
                raise ValueError(f"--output={folder} would replace {source}, which is read: name another folder")


def replace_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all files under temporary names, then rename them in this order, under a lock."""
    targets = {Path(os.path.realpath(folder / name)): content for name, content in contents.items()}  # follow links
    temporary = {path: path.with_name(path.name + ".tmp") for path in targets}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            try:
                for path, content in targets.items():
                    with open(temporary[path], "wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                for path in targets:
                    os.replace(temporary[path], path)
            finally:
                for path in temporary.values():
                    path.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(f"another prepare.py has been writing to {folder} for {LOCK_SECONDS} seconds") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {explained(error)}") from None


def _text_bytes(messages: list[Message]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def _describe(content: bytes, conversations: int, size: int) -> dict:
    """Return the entry of a split in meta.json; size: the bytes of text in its messages."""
    return {"conversations": conversations, "bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


# --- opening -----------------------------------------------------------------------------------------------------


def open_conversations(folder: str | Path) -> dict[str, list[list[Message]]]:
    """Return the conversations of a prepared folder by split, verified against its meta.json.

    Without meta.json (a folder made by hand or by an earlier version) nothing is verified. Raises ValueError if a file
    is damaged; the message names it and says what to do.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    if meta is None:
        return {split: _read_unverified(folder / f"{split}.jsonl") for split in SPLITS}
    found = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; {_how_to_prepare(folder)}") from None
        if hashlib.sha256(content).hexdigest() != meta["splits"][split]["sha256"]:
            advice = f"{_how_to_prepare(folder)}; if you have edited it, delete {folder / META}"
            raise ValueError(f"{path} is damaged or half replaced (its SHA-256 is not the one in {META}): {advice}")
        found[split] = [json.loads(line)["messages"] for line in content.split(b"\n") if line]
        size = sum(map(_text_bytes, found[split]))
        if meta["splits"][split] != _describe(content, len(found[split]), size):
            raise ValueError(
                f"{folder / META} is damaged (its counts are not those of {path}): {_how_to_prepare(folder)}"
            )
    return found


def _read_unverified(path: Path) -> list[list[Message]]:
    left_out = LeftOut()
    found = list(read_conversations(path, left_out))
    if summary := left_out.summary():
        print(f"{path}: {summary}", file=sys.stderr)
    return found


def _read_meta(folder: Path) -> dict | None:
    """Return the content of meta.json, None without one. Raises ValueError if it is damaged or of another version."""
    path = folder / META
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        meta = None
    match meta:
        case {"format": "plaingpt-corpus"}:  # a corpus of text in the same folder, which earlier versions allowed
            return None
        case {"format": "plaingpt-conversations", "version": int(version)} if version != FORMAT["version"]:
            raise ValueError(f"{path} has format version {version}, this code reads {FORMAT['version']}")
        case {
            "format": "plaingpt-conversations",
            "version": int(),
            "splits": {"train": {"sha256": str()}, "val": {"sha256": str()}},
        }:
            return meta
    raise ValueError(f"{path} is damaged, or not of this project: {_how_to_prepare(folder)}")


def _how_to_prepare(folder: Path) -> str:
    script = folder / "prepare.py"
    if script.is_file():
        return f"run python {script}"
    return f"prepare it again, as in python data/chat/prepare.py --input FILE --output {folder}"
