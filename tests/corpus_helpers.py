"""What the tests of corpora share."""

import os
from pathlib import Path

from text.corpus import Corpus, write_corpus
from text.tokenizer import CharTokenizer

ONE_OF_EACH = [("train", "ab"), ("val", "ab")]


class CountingTokenizer:
    """Tokens are the texts' own numbers, so that a corpus can be any sequence of ids."""

    name, eot_id, bos_id, adds_space, special_tokens = "counting", None, None, False, {}

    def __init__(self, vocab_size=100_000):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def save(self, folder):
        CharTokenizer("a", eot=False).save(folder)


class LowerCaseTokenizer(CharTokenizer):
    """A tokenizer that loses what is upper case, as some of the published ones do."""

    def encode(self, text):
        return super().encode(text.lower())


def numbers(folder, train, val=(0, 1)):
    """A corpus of these tokens."""
    documents = [(split, " ".join(map(str, ids))) for split, ids in (("train", train), ("val", val))]
    write_corpus(folder, documents, CountingTokenizer(), workers=1)
    return Corpus(folder)


def names_in(folder):
    """What a user sees in a folder: the lock is hidden."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) + temporary(folder)


def temporary(folder):
    return [path.name for path in Path(folder).glob(".prepare-*/")]


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in names_in(folder)}
