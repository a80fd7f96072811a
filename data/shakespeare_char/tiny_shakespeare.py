"""Tiny Shakespeare (1.1 MB): read from a file, or downloaded once and kept."""

import argparse
import hashlib
import sys
from os.path import expanduser
from pathlib import Path

from common.files import folder_name
from common.textfile import read_text
from text.documents import Document
from text.prepare import download

SHAKESPEARE = Path(__file__).resolve().parent / "input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VAL_FRACTION = 0.1
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def shakespeare_parser(description: str, output: Path) -> argparse.ArgumentParser:
    """Return a parser with the options that both commands for tiny Shakespeare share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "read the text from FILE instead of downloading it"
    parser.add_argument("--input", type=expanduser, metavar="FILE", help=text)
    text = "corpus folder; default: %(default)s"
    parser.add_argument("--output", default=output, type=folder_name, metavar="DIR", help=text)
    return parser


def tiny_shakespeare(path: str | None) -> list[Document]:
    """Tiny Shakespeare as nanoGPT splits it: nine tenths of the characters are train, the rest val.

    The text comes from `path`, else from the kept copy, else from a download, which is kept. A note on stderr says if
    `path` holds another text. Raises ValueError if the kept copy does, for instance because it is incomplete.
    """
    source = Path(path or SHAKESPEARE)
    if not path and not source.exists():
        download(SHAKESPEARE_URL, source, SHAKESPEARE_SHA256)
    text = read_text(source)
    if hashlib.sha256(text.encode()).hexdigest() != SHAKESPEARE_SHA256:
        if not path:
            raise ValueError(
                f"{source} is not the whole of tiny Shakespeare (its SHA-256 differs): delete it, and it is downloaded "
                f"again; or, if it is meant to be another text, pass it with --input {source}"
            )
        print(f"note: {source} is not the usual tiny Shakespeare (its SHA-256 differs)", file=sys.stderr)
    n = int(len(text) * (1 - VAL_FRACTION))
    return [("train", text[:n]), ("val", text[n:])]
