"""Prepare the embedded corpus: English that every Python carries, so that no network is needed.

It is the language reference (pydoc_data.topics), a document per section, and the docstrings of the standard library's
public modules, classes and functions, read from the source without importing it, a document per object: a line with
its name and signature, an empty line, its docstring. The corpus is always the same for the same version of Python.
Typographic quotes, dashes and the like become ASCII, paragraphs with characters other than printable ASCII are left
out, and so are very short documents and repeated ones. One document in twenty, by a hash of its text, is validation.
A byte-pair vocabulary of 1,024 tokens is learned from the training documents; --tokenizer char makes every character a
token instead.
"""

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from data.pydocs.docstrings import ASCII, PLAIN, docstrings, topics
from text.documents import split_of
from text.prepare import corpus_parser, prepare

HERE = Path(__file__).resolve().parent
MIN_WORDS = 8


def pydocs() -> list[str]:
    """All documents, without repetition."""
    documents = {}
    for source in (topics(), docstrings()):
        for title, text in source:
            paragraphs = inspect.cleandoc(text.translate(ASCII)).split("\n\n")
            text = "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if PLAIN.fullmatch(paragraph))
            title = title.translate(ASCII)
            if len(text.split()) >= MIN_WORDS and PLAIN.fullmatch(title):
                documents.setdefault(text, f"{title}\n\n{text}\n")
    return list(documents.values())


def main() -> None:
    args = corpus_parser(__doc__, output=HERE, tokenizer=1024, val_fraction=0.05).parse_args()
    documents = pydocs()
    if len(documents) < 1000:
        raise ValueError(
            f"this Python carries no source of its standard library: only {len(documents)} documents found"
        )
    prepare(lambda: ((split_of(text, args.val_fraction), text) for text in documents), args)


if __name__ == "__main__":
    run_command(main)
