"""What the data/*/prepare.py commands share: documents from files or from the network, the command line.

Everything streams. A document of a .jsonl or .parquet file goes to train or val by a hash of its text, so that the
split depends neither on the order of documents nor on how they are spread over files, and a document that is there
twice never sits on both sides. A .txt file is one document, the end of which is val.
"""

import argparse
import codecs
import hashlib
import itertools
import json
import os
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

import bpe
from common.chat import Message
from common.dataset import SPLITS, Document, parts_of, pieces, write_corpus
from common.tokenizer import BPETokenizer, tokenizer_from_name

BLOCK = 1 << 20  # bytes of a .txt file read at once

SHAKESPEARE = Path(__file__).resolve().parents[1] / "data" / "shakespeare_char" / "input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# --- the command -------------------------------------------------------------------------------------------------


def corpus_parser(
    description: str, *, output: Path | None, tokenizer: str | int, val_fraction: float
) -> argparse.ArgumentParser:
    """A parser with the common options and these defaults; without `output`, --output must be given.

    tokenizer: a name as for --tokenizer, or a number as for --vocab_size.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "default: %(default)s"
    parser.add_argument(
        "--output",
        default=output,
        required=output is None,
        metavar="DIR",
        help="folder to write the corpus to" + (f"; {default}" if output else ""),
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--tokenizer",
        metavar="T",
        help="char (a token per character), a tiktoken encoding's name (gpt2, cl100k_base, o200k_base, ...), or the "
        "path of a saved tokenizer or of a vocabulary of bpe.py"
        + (f"; default: {tokenizer}" if isinstance(tokenizer, str) else ""),
    )
    add_vocab_size(either, None, tokenizer if isinstance(tokenizer, int) else None)
    parser.set_defaults(default_tokenizer=tokenizer)
    parser.add_argument(
        "--val_fraction", default=val_fraction, type=float, metavar="F", help=f"share kept for validation; {default}"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise; default: one per CPU")
    return parser


def add_vocab_size(parser, default: int | None, shown: int | None = None) -> None:
    """The option of `learned_tokenizer`."""
    text = "learn a vocabulary of N tokens from the training split (see bpe.py), end-of-text and chat tokens included"
    suffix = f"; default: {default or shown}" if default or shown else ""
    parser.add_argument("--vocab_size", type=int, metavar="N", default=default, help=text + suffix)


def learned_tokenizer(documents: Iterable[Document], vocab_size: int, workers: int | None = None) -> BPETokenizer:
    """A vocabulary that bpe.py learns from those of the documents that are for training."""
    texts = (text for split, text, _ in pieces(documents) if split == "train")
    return BPETokenizer(bpe.train(texts, vocab_size, workers=workers, progress=True))


def prepare(
    documents: Callable[[], Iterable[Document]], args: argparse.Namespace, total_bytes: int | None = None
) -> None:
    """Write the corpus that `args` (of `corpus_parser`) asks for, and report it.

    `documents()` starts the stream anew: characters and vocabularies are collected in a first reading.
    """
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val_fraction={args.val_fraction}: give a share between 0 and 1, such as 0.01")
    chosen = args.tokenizer if args.vocab_size is None else args.vocab_size
    chosen = args.default_tokenizer if chosen is None else chosen
    if isinstance(chosen, int):
        tokenizer = learned_tokenizer(documents(), chosen, args.workers)
    else:
        tokenizer = tokenizer_from_name(chosen, (part for _, text in documents() for part in parts_of(text)))
    meta = write_corpus(args.output, documents(), tokenizer, workers=args.workers, total_bytes=total_bytes)
    report(args.output, meta)


def shakespeare_parser(description: str, output: Path) -> argparse.ArgumentParser:
    """A parser with the options of both commands for tiny Shakespeare."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="FILE", help="read the text from FILE instead of downloading it")
    parser.add_argument("--output", default=output, metavar="DIR", help="corpus folder; default: %(default)s")
    return parser


def prepare_from_hub(description: str, output: Path, name: str, subset: str | None) -> None:
    """The whole command for the Hub's data set `name`: see `hub_documents`."""
    parser = corpus_parser(description, output=output, tokenizer="gpt2", val_fraction=0.0005)
    parser.add_argument("--input", nargs="+", metavar="FILE", help="read these .parquet or .jsonl files, not the Hub")
    parser.add_argument(
        "--max_documents", type=int, metavar="N", help="take the first N documents (10000 to try it out); default: all"
    )
    args = parser.parse_args()
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"--max_documents={args.max_documents}: give 1 or more, or leave it out for all")

    def documents() -> Iterator[Document]:
        if args.input:
            found = read_documents(args.input, args.val_fraction)
        else:
            found = hub_documents(name, subset, args.val_fraction)
        return itertools.islice(found, args.max_documents)

    prepare(documents, args)


def report(folder: str | Path, meta: dict) -> None:
    """Print what a corpus holds."""
    print(f"{os.path.relpath(folder)}: vocabulary of {meta['vocab_size']:,}, {meta['dtype']} tokens")
    for split in SPLITS:
        tokens, size, documents = (meta["splits"][split][key] for key in ("tokens", "bytes", "documents"))
        print(f"  {split:5} {documents:>13,} documents {size:>16,} bytes of text {tokens:>16,} tokens")


# --- conversations -----------------------------------------------------------------------------------------------


def conversation_parser(description: str, *, output: Path | None, val_fraction: float) -> argparse.ArgumentParser:
    """A parser with the options that all commands for conversations have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "; default: %(default)s" if output else ""
    text = f"folder to write train.jsonl and val.jsonl to{default}"
    parser.add_argument("--output", default=output, required=output is None, metavar="DIR", help=text)
    text = "share kept for validation; default: %(default)s"
    parser.add_argument("--val_fraction", default=val_fraction, type=float, metavar="F", help=text)
    return parser


def by_question(conversations: Iterable[list[Message]], val_fraction: float) -> Iterator[tuple[str, list[Message]]]:
    """(split, messages): a hash of the first user message decides, so that no question is in both splits."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction={val_fraction}: give a share between 0 and 1, such as 0.05")
    for messages in conversations:
        question = next(message["content"] for message in messages if message["role"] == "user")
        yield split_of(question, val_fraction), messages


def write_conversations(folder: str | Path, conversations: Iterable[tuple[str, list[Message]]]) -> None:
    """Write each split's different conversations as JSON lines, and report them. ValueError for an empty split.

    An old data set in `folder` stays until the new one is complete.
    """
    folder, lines = Path(folder), {split: {} for split in SPLITS}
    if folder.is_file() or (folder / "config.json").exists():
        raise ValueError(f"--output={folder} is a {'file' if folder.is_file() else 'run'}: name a folder of its own")
    repeated = 0
    for split, messages in conversations:
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        repeated += line in lines[split]
        lines[split][line] = sum(len(message["content"].encode()) for message in messages)
    for split in SPLITS:
        if not lines[split]:
            raise ValueError(f"the {split} split is empty: give more conversations, or another --val_fraction")
    folder.mkdir(parents=True, exist_ok=True)
    for split in reversed(SPLITS):  # train.jsonl comes last: it is what tells that both are there
        bpe.write_whole(folder / f"{split}.jsonl", "\n".join(lines[split]))
    print(f"{os.path.relpath(folder)}:" + (f" {repeated:,} repeated conversations left out" if repeated else ""))
    for split in SPLITS:
        print(f"  {split:5} {len(lines[split]):>9,} conversations {sum(lines[split].values()):>13,} bytes of text")


# --- documents ---------------------------------------------------------------------------------------------------


def split_of(text: str, val_fraction: float) -> str:
    """'val' for about `val_fraction` of all texts, 'train' for the others; always the same for the same text."""
    return "val" if zlib.crc32(text.encode()) < val_fraction * 2**32 else "train"


def tiny_shakespeare(path: str | None) -> list[Document]:
    """Tiny Shakespeare as nanoGPT splits it: nine tenths are train, the rest val.

    Read from `path`, else from the kept copy, else downloaded once, 1.1 MB, and kept.
    """
    source = Path(path or SHAKESPEARE)
    if not path and not source.exists():
        source.write_bytes(_download_shakespeare())
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        print(f"note: {source} is not the usual tiny Shakespeare (its SHA-256 differs)", file=sys.stderr)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text (byte {error.start}: {error.reason})") from None
    n = int(len(text) * 0.9)
    return [("train", text[:n]), ("val", text[n:])]


def _download_shakespeare() -> bytes:
    """The file from the network; ValueError when it does not come, or is not the one we know."""
    content = download(SHAKESPEARE_URL)
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(
            f"what {SHAKESPEARE_URL} sent is not tiny Shakespeare (its SHA-256 differs): pass a copy with --input FILE"
        )
    return content


def download(url: str) -> bytes:
    """What the address sends; ValueError when it does not come."""
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            content = b""
            with tqdm(total=size, unit="B", unit_scale=True, desc="download", disable=None) as bar:
                while block := response.read(1 << 16):
                    content += block
                    bar.update(len(block))
    except OSError as error:
        raise ValueError(f"no download ({error}): get the file from {url} and pass it with --input FILE") from None
    if size is not None and len(content) != size:
        raise ValueError(f"the download of {url} broke off after {len(content)} of {size} bytes: try again")
    return content


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
