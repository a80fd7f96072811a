"""From conversations to batches: several packed into one row, or one per row, padded to the longest of its batch.

Notable: packed conversations cannot see each other (document numbers mask them) and each begins at position 0, so that
a packed row computes what its conversations would alone. Rows are made once, and every epoch takes them in an order of
its own: a batch is a pure function of (seed, step), as in `text/corpus.py`. All packed batches have one shape; all
padded ones have the same number of rows, and differ in length only.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model import IGNORE
from tasks.task import batch_starts
from text.chat import Message, Template
from text.order import drawn

# The length of a padded batch is a multiple of this, which suits the hardware. With fixed shapes, each of the
# block_size / 16 lengths would be compiled twice, and torch.compile gives up after 8 graphs: the length is symbolic.
MULTIPLE = 16


@dataclass
class Example:
    """A conversation as the model is trained on it: tokens, and which of them are the assistant's."""

    tokens: np.ndarray  # (n,)
    mask: np.ndarray  # (n,) booleans


@dataclass
class Examples:
    """The conversations of a split that can be trained on, and counts of what was cut off or left out."""

    examples: list[Example] = field(default_factory=list)
    response_bytes: int = 0  # of the assistants' text
    truncated: int = 0  # conversations cut off at block_size
    dropped: int = 0  # conversations left out, because no response token fits into block_size

    @property
    def tokens(self) -> int:
        """Number of tokens, the prompts' included."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        """Number of the assistants' tokens."""
        return sum(int(example.mask.sum()) for example in self.examples)

    def summary(self) -> str:
        """One line of counts, with the reason for whatever was cut off or left out."""
        lost = [f"{self.truncated:,} cut off at block_size"] if self.truncated else []
        lost += [f"{self.dropped:,} left out, for no word of the answer fits into block_size"] if self.dropped else []
        counts = f"{self.tokens:,} tokens, {self.response_tokens:,} of them in responses"
        return ", ".join([f"{len(self.examples):,} conversations", counts, *lost])


def make_examples(conversations: list[list[Message]], template: Template, block_size: int) -> Examples:
    """Render the conversations; cut off what does not fit, and leave out those of which no response token remains.

    A row has block_size targets, so block_size + 1 tokens of a conversation fit.
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
    """Pack items into rows with room for a total length of `room`: best fit, the longest items first.

    Each item goes to the row with the least room left in which it still fits, or begins a new row. Returns the rows, as
    lists of indices into lengths:  pack([3, 5, 2, 4], 8) → [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left → rows with that much room
    rooms: list[int] = []  # the keys of by_room, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at < len(rooms):
            left = rooms[at]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[at]
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        left -= lengths[i]
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return rows


class Rows:
    """The training and validation batches of examples, packed or padded; a batch is keyword arguments of GPT.forward.

    rows: lists of indices into examples, of those that share a row; without packing, one each.
    train_on_prompt: count all tokens in the loss, not only the assistants'.
    """

    def __init__(self, examples: list[Example], block_size: int, packing: bool, train_on_prompt: bool = False):
        self.examples, self.block_size, self.packing = examples, block_size, packing
        self.train_on_prompt = train_on_prompt
        lengths = [len(example.tokens) - 1 for example in examples]  # the last token is a target only
        if packing:
            self.rows = pack(lengths, block_size)
        else:  # sorted, so that the rows of a batch have similar lengths
            self.rows = [[i] for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])]

    def batch(self, step: int, seed: int, batch_size: int, rows: slice) -> dict[str, Tensor]:
        """The slice `rows` of the step's batch of batch_size rows; a pure function of its arguments.

        Packed rows are drawn one by one. Padded rows are drawn as whole batches of neighbours, which have similar
        lengths, so that little is padding.
        """
        wanted = range(step * batch_size, (step + 1) * batch_size)[rows]
        if self.packing:
            return self.collate([self.rows[i] for i in drawn(seed, wanted, len(self.rows))[0]])
        count = -(-len(self.rows) // batch_size)
        start = int(drawn(seed, range(step, step + 1), count)[0][0]) * batch_size
        return self.collate([self.rows[(start + n - step * batch_size) % len(self.rows)] for n in wanted])

    def all_batches(self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int = 0) -> Iterator[dict]:
        """Every row once, for evaluation, or at most `limit` batches; each process gets every world_size-th batch.

        All batches have the same number of rows, so that a compiled model is compiled once for it: empty rows, in which
        no target is counted, fill up the last batch.
        """
        B = min(batch_size, len(self.rows))
        for start in batch_starts(len(self.rows), batch_size, rank, world_size, limit):
            rows = self.rows[start : start + B]
            yield self.collate(rows + [[]] * (B - len(rows)))

    def collate(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Make a batch of rows: idx and targets (B, T), and for packed rows positions and documents (B, T).

        Only tokens of the assistants are counted targets, unless train_on_prompt is set. An empty row has none.
        """
        longest = max(len(self.examples[i].tokens) - 1 for row in rows for i in row)
        T = self.block_size if self.packing else min(self.block_size, -(-longest // MULTIPLE) * MULTIPLE)
        shape = (len(rows), T)
        idx, targets, positions = np.zeros(shape, int), np.full(shape, IGNORE), np.zeros(shape, int)
        documents = np.full(shape, -1)  # the unused rest of a row is a document of its own
        for b, row in enumerate(rows):
            start = 0
            for number, i in enumerate(row):
                tokens, mask = self.examples[i].tokens, self.examples[i].mask
                part = slice(start, start + len(tokens) - 1)
                idx[b, part], positions[b, part], documents[b, part] = tokens[:-1], np.arange(len(tokens) - 1), number
                targets[b, part] = tokens[1:] if self.train_on_prompt else np.where(mask[1:], tokens[1:], IGNORE)
                start = part.stop
        arrays = {"idx": idx, "targets": targets}
        if self.packing:  # padded rows need no mask: a causal model's real tokens never see padding on the right
            arrays |= {"positions": positions, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
