"""Prepare the embedded corpus: English text that comes with every Python, so that no network is needed.

It has one document per section of the language reference (pydoc_data.topics), and one per public module, class and
function of the standard library: a line with name and signature, an empty line, the docstring. The modules are parsed,
not imported, so the same version of Python always gives the same corpus. Typographic quotes, dashes and the like become
ASCII. Paragraphs with other characters than printable ASCII, very short documents and duplicates are left out. A hash
of its text puts one document in twenty into validation. A BPE vocabulary of 1,024 tokens is learned from the training
documents; with --tokenizer char, every character is a token instead.
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


def pydocs(min_words: int = MIN_WORDS) -> list[str]:
    """Return all documents with that many words, without duplicates: a title, an empty line, the text."""
    documents = {}
    for source in (topics(), docstrings()):
        for title, text in source:
            paragraphs = inspect.cleandoc(text.translate(ASCII)).split("\n\n")
            text = "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if PLAIN.fullmatch(paragraph))
            title = title.translate(ASCII)
            if len(text.split()) >= min_words and PLAIN.fullmatch(title):
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
