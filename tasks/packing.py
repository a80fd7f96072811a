"""From conversations to batches: several packed into one row, or one per row, padded to the longest of its batch.

Notable: packed conversations cannot see each other (document numbers mask them) and each begins at position 0, so that
a packed row computes what its conversations would alone. Batches are a pure function of (seed, step), as in
`dataset.py`: rows are made up once, and every epoch takes them in an order of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.spread import evenly
from text.chat import Message, Template
from text.corpus import IGNORED, epoch_order

MULTIPLE = 16  # padded batches have a length that is a multiple of this: fewer shapes to be compiled


@dataclass
class Example:
    """A conversation as the model is trained on it: tokens, and which of them are the assistant's."""

    tokens: np.ndarray  # (n,)
    mask: np.ndarray  # (n,) booleans


@dataclass
class Examples:
    """The conversations of a split that can be trained on, and what became of the others."""

    examples: list[Example] = field(default_factory=list)
    response_bytes: int = 0  # of the assistants' text
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        return sum(int(example.mask.sum()) for example in self.examples)

    def summary(self) -> str:
        """One line, with the reason for whatever is not there."""
        lost = [f"{self.truncated:,} cut off at block_size"] if self.truncated else []
        lost += [f"{self.dropped:,} left out, for no word of the answer fits into block_size"] if self.dropped else []
        counts = f"{self.tokens:,} tokens, {self.response_tokens:,} of them in responses"
        return ", ".join([f"{len(self.examples):,} conversations", counts, *lost])


def make_examples(conversations: list[list[Message]], template: Template, block_size: int) -> Examples:
    """Render the conversations; cut off what does not fit, and leave out those of which no response token remains.

    block_size targets fit, hence block_size + 1 tokens.
    """
    found = Examples()
    for messages in conversations:
        whole = template.render(messages)
        tokens, mask = (np.array(x[: block_size + 1]) for x in whole)
        if not mask.any():
            found.dropped += 1
            continue
        said = [token for token, on in zip(tokens.tolist(), mask, strict=True) if on and token != template.end_id]
        found.response_bytes += sum(len(template.tokenizer.bytes_of(token)) for token in said)
        found.truncated += len(whole[0]) > len(tokens)
        found.examples.append(Example(tokens, mask.astype(bool)))
    return found


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Rows of indices into lengths, each row's sum at most room: best fit, the longest first.

    Each goes to the row with the least room in which it still fits. Which rooms there are is kept as the bits of a
    number, so that finding the least one is a shift.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left → rows
    rooms = 0  # bit r is set where by_room[r] is not empty
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = rooms >> lengths[i]
        if fitting:
            left = lengths[i] + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                rooms ^= 1 << left
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        left -= lengths[i]
        by_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return rows


class Rows:
    """The training and validation batches of examples, packed or padded.

    rows: which examples share a row (packing), or one each. A batch is keyword arguments of GPT.forward.
    """

    def __init__(self, examples: list[Example], block_size: int, packing: bool, train_on_prompt: bool = False):
        self.examples, self.block_size, self.packing, self.all = examples, block_size, packing, train_on_prompt
        lengths = [len(example.tokens) - 1 for example in examples]  # the last token is a target only
        if packing:
            self.rows = pack(lengths, block_size)
        else:  # neighbours are of like length
            self.rows = [[i] for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])]

    def batch(self, step: int, seed: int, batch_size: int, rows: slice) -> dict[str, Tensor]:
        """The rows of the step's batch of batch_size; a pure function of its arguments.

        Packed rows are drawn one by one; of padded ones a whole batch of neighbours is, so that little is padding.
        """
        wanted = range(step * batch_size, (step + 1) * batch_size)[rows]
        if self.packing:
            count = len(self.rows)
            return self.collate([self.rows[epoch_order(seed, n // count, count)[1][n % count]] for n in wanted])
        count = -(-len(self.rows) // batch_size)
        start = int(epoch_order(seed, step // count, count)[1][step % count]) * batch_size
        return self.collate([self.rows[(start + n - step * batch_size) % len(self.rows)] for n in wanted])

    def all_batches(self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int = 0) -> Iterator[dict]:
        """Every row once, for evaluation, or at most `limit` batches; each process gets every world_size-th batch.

        All packed batches have one shape, so that a compiled model is compiled once: rows without any counted target
        fill up the last one.
        """
        starts = list(range(0, len(self.rows), batch_size))
        if limit:
            starts = [starts[i] for i in evenly(limit, len(starts))]
        B = min(batch_size, len(self.rows))
        for start in starts[rank::world_size]:
            rows = self.rows[start : start + batch_size]
            filling = [[]] * (B - len(rows)) if self.packing else []
            yield self.collate([*rows, *filling])

    def collate(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """idx and targets (B, T), counted where the assistant speaks; for packed rows positions and documents too."""
        longest = max(len(self.examples[i].tokens) - 1 for row in rows for i in row)
        T = self.block_size if self.packing else min(self.block_size, -(-longest // MULTIPLE) * MULTIPLE)
        shape = (len(rows), T)
        idx, targets, positions = np.zeros(shape, int), np.full(shape, IGNORED), np.zeros(shape, int)
        documents = np.full(shape, -1)  # the rest of a row is a document of its own
        for b, row in enumerate(rows):
            start = 0
            for number, i in enumerate(row):
                tokens, mask = self.examples[i].tokens, self.examples[i].mask
                part = slice(start, start + len(tokens) - 1)
                idx[b, part], positions[b, part], documents[b, part] = tokens[:-1], np.arange(len(tokens) - 1), number
                targets[b, part] = tokens[1:] if self.all else np.where(mask[1:], tokens[1:], IGNORED)
                start = part.stop
        arrays = {"idx": idx, "targets": targets}
        if self.packing:  # padding on the right needs no mask: what comes before never sees it
            arrays |= {"positions": positions, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
