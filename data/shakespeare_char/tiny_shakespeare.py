"""Tiny Shakespeare, 1.1 MB: read from a file, or downloaded once and kept."""

import argparse
import hashlib
import sys
from pathlib import Path

from text.corpus import Document
from text.prepare import download

SHAKESPEARE = Path(__file__).resolve().parent / "input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def shakespeare_parser(description: str, output: Path) -> argparse.ArgumentParser:
    """A parser with the options of both commands for tiny Shakespeare."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="FILE", help="read the text from FILE instead of downloading it")
    parser.add_argument("--output", default=output, metavar="DIR", help="corpus folder; default: %(default)s")
    return parser


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
