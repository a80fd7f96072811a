"""Turn documents into tokens: cut them into pieces, group the pieces into tasks, and encode in worker processes."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from text.cut import blocks
from text.documents import Document, parts_of
from text.pool import parallel_map
from text.tokenizer import Tokenizer

PIECE = 1 << 18  # most characters in a piece: longer documents are cut, so that none is held in memory whole
TASK = 1 << 20  # characters per task of a worker: enough to outweigh the cost of sending them


class Piece(NamedTuple):
    """A document, or a part of one: 1 to PIECE characters of text."""

    split: str
    text: str
    ends: bool  # whether the document ends with this piece
    begins: bool  # whether it begins with this piece


class Encoded(NamedTuple):
    """The tokens of one split in one task."""

    tokens: np.ndarray
    bytes: int  # of the text as UTF-8
    documents: int  # number of documents that end in this task
    spelled: Counter  # how often the text spells out each special token, which stays ordinary text


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype, workers: int | None, skip: int = 0
) -> Iterator[dict[str, Encoded]]:
    """Yield {split: Encoded} of each task, in order; the first `skip` tasks are read, but not encoded.

    Each document begins with the tokenizer's bos_id and ends with its eot_id, where it has them.
    """
    return parallel_map(partial(encode, tokenizer, dtype), islice(tasks(pieces(documents)), skip, None), workers)


def pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """Cut the documents into pieces, and leave out empty documents."""
    for split, text in documents:
        last, begins = "", True
        for block in blocks(parts_of(text), PIECE):
            if last:
                yield Piece(split, last, False, begins)
                begins = False
            last = block
        if last:
            yield Piece(split, last, True, begins)


def tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group the pieces into tasks of about TASK characters."""
    task, size = [], 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text)
        if size >= TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def encode(tokenizer: Tokenizer, dtype: np.dtype, task: list[Piece]) -> dict[str, Encoded]:
    """Return the task's tokens by split. Raises ValueError if decoding the tokens does not reproduce the text."""
    result = {}
    for split in dict.fromkeys(piece.split for piece in task):
        arrays, size, documents, spelled = [], 0, 0, Counter()
        for _, text, ends, begins in (piece for piece in task if piece.split == split):
            # The space before a later piece, where the document was cut, is the one that the tokenizer adds itself.
            encoded = text.removeprefix(" ") if tokenizer.adds_space and not begins else text
            ids = tokenizer.encode(encoded)
            check_round_trip(encoded, tokenizer.decode(ids))
            if begins and tokenizer.bos_id not in (None, tokenizer.eot_id):
                ids.insert(0, tokenizer.bos_id)
            if ends and tokenizer.eot_id is not None:
                ids.append(tokenizer.eot_id)
            arrays.append(np.array(ids, dtype=dtype))
            size += len(text.encode())
            documents += ends
            spelled.update({name: text.count(name) for name in tokenizer.special_tokens if name in text})
        result[split] = Encoded(np.concatenate(arrays), size, documents, spelled)
    return result


def check_round_trip(text: str, decoded: str) -> None:
    """Raise ValueError unless decoded == text; the message shows the first difference.

    Some imported tokenizers compose letters and accents into one character (NFC), which by Unicode is the same text.
    """
    if decoded == text or decoded == unicodedata.normalize("NFC", text):
        return
    at = len(os.path.commonprefix([text, decoded]))
    before, after = max(0, at - 15), at + 15
    raise ValueError(
        f"this tokenizer does not give the text back: {text[before:after]!r} is encoded and decoded to "
        f"{decoded[before:after]!r}, so a corpus made with it would be damaged: use another tokenizer"
    )
