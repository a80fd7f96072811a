"""Prepare the embedded labelled texts: is a docstring of Python's library a module's, a class's or a function's?

A text is the docstring alone, without the name and the signature, which would tell; the label is module, class or
function. No text occurs twice. A hash of the document in data/pydocs decides between training and validation, so with
--val_fraction=0.05 no text of the validation split was in that corpus's training split.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from data.pydocs.prepare import pydocs
from text.conversations import conversation_parser
from text.documents import split_of
from text.labelled import Labelled, write_labelled

HERE = Path(__file__).resolve().parent
MIN_WORDS = 3  # shorter docstrings say too little
TITLES = {"module": r"module [\w.]+", "class": r"class [\w.]+(\(.*\))?", "function": r"[\w.]+\(.*\)"}


def kinds(documents: list[str], val_fraction: float) -> Iterator[tuple[str, Labelled]]:
    """Yield (split, labelled text) of each docstring among the documents of data/pydocs."""
    for document in documents:
        title, _, text = document.partition("\n\n")
        for label, pattern in TITLES.items():
            if re.fullmatch(pattern, title):
                yield split_of(document, val_fraction), Labelled(text.strip(), label)


def main() -> None:
    args = conversation_parser(__doc__, output=HERE, val_fraction=0.1).parse_args()
    found = list(kinds(pydocs(MIN_WORDS), args.val_fraction))
    if len(found) < 1000:
        raise ValueError(f"this Python carries no source of its standard library: only {len(found)} docstrings found")
    write_labelled(Path(args.output), found)


if __name__ == "__main__":
    run_command(main)
