"""Shared parts of the data/*/prepare.py commands: options, learning a vocabulary, writing, reporting, downloading."""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import os
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from os.path import expanduser
from pathlib import Path

from tqdm import tqdm

import bpe
from common.files import checksum, folder_name, replacing
from text.corpus import hold_for_writing, write_held_corpus
from text.documents import Document, Documents, Reading, add_reading_options, hub_documents, parts_of
from text.parts import is_done, join, part_folder, part_of
from text.shards import SHARD_TOKENS, SPLITS
from text.tokenise import PIECE, TASK, pieces
from text.tokenizer import BPETokenizer, Tokenizer, load_tokenizer, tokenizer_from_name
from text.unfinished import Unfinished

# --- the command -------------------------------------------------------------------------------------------------


def corpus_parser(
    description: str, *, output: Path | None, tokenizer: str | int, val_fraction: float
) -> argparse.ArgumentParser:
    """Return a parser with the common options and these defaults; if `output` is None, --output is required.

    tokenizer: the default of --tokenizer (a name) or of --vocab_size (a number).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "default: %(default)s"
    parser.add_argument(
        "--output",
        default=output,
        required=output is None,
        type=folder_name,
        metavar="DIR",
        help="folder to write the corpus to" + (f"; {default}" if output else ""),
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--tokenizer",
        type=expanduser,
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
    text = f"tokens per file; a longer split becomes train_00000.bin, train_00001.bin, ...; {default}"
    parser.add_argument("--shard_tokens", type=int, metavar="N", default=SHARD_TOKENS, help=text)
    return parser


def add_vocab_size(parser, default: int | None, shown: int | None = None) -> None:
    """Add --vocab_size, the option of `learned_tokenizer`. shown: the default that --help names if default is None."""
    text = "learn a vocabulary of N tokens from the training split (see bpe.py), end-of-text and chat tokens included"
    suffix = f"; default: {default or shown}" if default or shown else ""
    parser.add_argument("--vocab_size", type=int, metavar="N", default=default, help=text + suffix)


def learned_tokenizer(documents: Iterable[Document], vocab_size: int, workers: int | None = None) -> BPETokenizer:
    """Learn a vocabulary from the training documents with bpe.py."""
    texts = (text for split, text, *_ in pieces(documents) if split == "train")
    return BPETokenizer(bpe.train(texts, vocab_size, workers=workers, progress=True))


def prepare(
    documents: Callable[[], Iterable[Document]],
    args: argparse.Namespace,
    total_bytes: int | None = None,
    inputs: Documents | None = None,
) -> None:
    """Write the corpus that `args` (of `corpus_parser`) describes, and print a report.

    documents: called for each pass over the documents; a first pass collects characters or learns a vocabulary.
    total_bytes: size of the text, if known, for the progress bar. inputs: what the documents come from, if they are
    files, so that they may be a part, and an interrupted preparation goes on where it was.
    """
    check_val_fraction(args.val_fraction)
    for name in ("workers", "shard_tokens"):  # before anything is written
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)}: at least 1 is needed")
    chosen = args.tokenizer if args.vocab_size is None else args.vocab_size
    chosen = args.default_tokenizer if chosen is None else chosen
    folder = part_folder(args.output, part_of(args.part)) if inputs and args.part is not None else Path(args.output)

    def make_tokenizer() -> Tokenizer:
        if isinstance(chosen, int):
            return learned_tokenizer(documents(), chosen, args.workers)
        return tokenizer_from_name(chosen, (part for _, text in documents() for part in parts_of(text)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_for_writing(folder))  # lock it now: learning a vocabulary may take long
        if inputs is None or inputs.identity() is None:
            unfinished, part, tokenizer = None, None, make_tokenizer()
        else:
            comes_from_text = chosen == "char" or isinstance(chosen, int)
            if comes_from_text and args.part:
                raise ValueError(
                    f"--part={args.part}: each part would make another vocabulary of its own text: give all parts the "
                    "same one, by --tokenizer with a saved tokenizer, a .bpe file or a tiktoken encoding's name"
                )
            tokenizer = None if comes_from_text else make_tokenizer()
            preparation, part = _identity(args, inputs, checksum(tokenizer.content()) if tokenizer else chosen)
            if part and is_done(folder, part):
                print(f"{os.path.relpath(folder)}: this part is there already; nothing to do")
                return
            unfinished = stack.enter_context(Unfinished(folder, preparation))
            tokenizer = tokenizer or unfinished.tokenizer(make_tokenizer)
        how = (args.workers, total_bytes, args.shard_tokens, unfinished, part)
        meta = write_held_corpus(folder, documents(), tokenizer, *how)
    report(folder, meta, tokenizer, args.val_fraction)


def _identity(args: argparse.Namespace, inputs: Documents, tokenizer: str | int) -> tuple[dict, dict | None]:
    """Return what identifies this preparation, for `Unfinished`, and what meta.json says of it if it is a part."""
    options = {
        "tokenizer": tokenizer, "--shard_tokens": args.shard_tokens, "code": [PIECE, TASK],
        "--max_documents": getattr(args, "max_documents", None),
    }  # fmt: skip
    preparation = options | (inputs.identity() or {}) | {"--part": args.part}
    shared = options | inputs.shared() | {"parts": inputs.part[1]}
    return preparation, {"part": checksum(shared), "preparation": checksum(preparation)} if args.part else None


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError for a share that leaves one of the splits empty."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction={val_fraction}: give a share between 0 and 1, such as 0.01")


def add_part_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that spread a corpus over machines: see parts.py."""
    text = "prepare part K of N of the input files, in a folder of its own in DIR; needs --tokenizer"
    parser.add_argument("--part", metavar="K/N", help=text)
    text = "make one corpus of the parts in DIR when all are done; their files stay where they are"
    parser.add_argument("--join", action="store_true", help=text)


def prepare_files(args: argparse.Namespace) -> None:
    """Write the corpus, or the part, of the files that --input names; with --join, join the parts."""
    if args.join:
        if args.input or args.part is not None:
            raise ValueError("--join reads nothing but the parts in --output: leave out --input and --part")
        meta = join(args.output)
        report(args.output, meta, load_tokenizer(args.output), None)
        return
    if not args.input:
        raise ValueError("--input is missing: name files or folders, or - for standard input")
    check_val_fraction(args.val_fraction)
    part = (1, 1) if args.part is None else part_of(args.part)
    documents = Documents(args.input, args.val_fraction, Reading.of(args), part)
    prepare(lambda: documents, args, documents.total_bytes, documents)


def prepare_from_hub(description: str, output: Path, name: str, subset: str | None) -> None:
    """Run the whole command for the Hub's data set `name`: see `hub_documents`."""
    parser = corpus_parser(description, output=output, tokenizer="gpt2", val_fraction=0.0005)
    text = "read these files or folders instead of the Hub"
    parser.add_argument("--input", nargs="+", type=expanduser, metavar="FILE", help=text)
    add_reading_options(parser)
    parser.add_argument(
        "--max_documents", type=int, metavar="N", help="use only the first N documents (for a trial 10000); default all"
    )
    add_part_options(parser)
    args = parser.parse_args()
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"--max_documents={args.max_documents}: give 1 or more, or leave it out for all")
    if args.part is not None and (args.max_documents or not args.input):
        raise ValueError(f"--part={args.part}: parts are parts of files: give --input, and no --max_documents")
    if args.join or args.input and not args.max_documents:
        prepare_files(args)
        return
    check_val_fraction(args.val_fraction)
    files = Documents(args.input, args.val_fraction, Reading.of(args)) if args.input else None

    def documents() -> Iterator[Document]:
        found = iter(files) if files else hub_documents(name, subset, args.val_fraction, args.text_field)
        return itertools.islice(found, args.max_documents)

    prepare(documents, args, inputs=files)  # without files: what the Hub sends may change, so nothing goes on


def report(folder: str | Path, meta: dict, tokenizer: Tokenizer, val_fraction: float | None) -> None:
    """Print the counts of a corpus, and on stderr notes about what its user may not expect.

    val_fraction: the share that was asked for; None for joined parts, which do not know it.
    """
    print(f"{os.path.relpath(folder)}: vocabulary of {meta['vocab_size']:,}, {meta['dtype']} tokens")
    for split in SPLITS:
        tokens, size, documents = (meta["splits"][split][key] for key in ("tokens", "bytes", "documents"))
        print(f"  {split:5} {documents:>13,} documents {size:>16,} bytes of text {tokens:>16,} tokens")
    for note in [] if "part" in meta else notes(meta, tokenizer, val_fraction):
        print(f"note: {note}", file=sys.stderr)


def notes(meta: dict, tokenizer: Tokenizer, val_fraction: float | None) -> Iterator[str]:
    """Yield notes about what the user of a corpus may not expect."""
    splits = meta["splits"].values()
    share = meta["splits"]["val"]["bytes"] / sum(split["bytes"] for split in splits)
    if val_fraction and not 2 / 3 < share / val_fraction < 3 / 2:
        yield (
            f"{share:.2%} of the text is for validation, not {val_fraction:.2%}: a document is never divided, and "
            "these documents are few or of very different sizes"
        )
    if tokenizer.eot_id is None and any(split["documents"] > 1 for split in splits):
        yield (
            f"the tokenizer {tokenizer.name!r} has no end-of-text token, so nothing separates the "
            "documents, and a model cannot learn where a text ends"
        )
    for name, count in meta["special_tokens_in_text"].items():
        yield (
            f"the text spells out {name!r} {count:,} time{'s' * (count > 1)}; it stays ordinary text "
            f"(where it separates documents: --document_separator '{name}')"
        )


# --- downloads ---------------------------------------------------------------------------------------------------


def download(url: str, path: str | Path | None = None, sha256: str | None = None) -> bytes:
    """Download a URL and return its content; also write it to `path`, whole or not at all.

    Raises ValueError if the download fails or breaks off, or if its SHA-256 is not `sha256`.
    """
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            content = bytearray()
            with tqdm(total=size, unit="B", unit_scale=True, desc="download", disable=None) as bar:
                while block := response.read(1 << 16):
                    content += block
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"the download failed ({error}): get the file from {url} and pass it with --input FILE"
        ) from None
    if size is not None and len(content) != size:
        raise ValueError(f"the download of {url} broke off after {len(content)} of {size} bytes: try again")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{url} sent another file than expected (its SHA-256 differs): pass a copy with --input FILE")
    if path is not None:
        with replacing(path, "wb") as file:
            file.write(content)
    return bytes(content)
