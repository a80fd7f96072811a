"""The KV cache: keys and values of the tokens read so far, passed to the model from outside.

Notable: every row of the batch has its own length, and beams may share a row. Before a call, `expect` tells the cache
what is special about its tokens. The model then calls `place` before its first layer, `append` in each layer, `last`
if only the last tokens' logits are wanted, and `advance` after its last layer.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPTConfig, Mask, attention_mask, in_sight
from seq2seq import Memory

NOWHERE = 1 << 40  # position of an empty cache slot: larger than any query's, so the causal mask hides it


class Expected(NamedTuple):
    """The arguments of `KVCache.expect`: what is special about the tokens of a call."""

    lengths: list[int] | None = None
    positions: Tensor | None = None
    visible: Tensor | None = None


class KVCache:
    """Keys and values of all layers: two tensors (n_layer, B, K, max_length, D).

    A token takes the next slot, and `positions` (B, max_length) says where in its row's text it stands: a query sees
    the slots whose position is at most its own. Prompts of different lengths are read as one right-padded batch; the
    slots of their padding get the position NOWHERE, and no query sees them. `memory` is for an encoder–decoder: the
    keys and values of each row's source, which no step changes.
    """

    memory: Memory | None = None

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.block_size, self.window = config.block_size, config.sliding_window
        self.positions = torch.full((batch_size, max_length), NOWHERE, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # of each row's text
        self.longest = 0  # = lengths.max(), known without asking the device
        self.used = 0  # slots taken
        self.padded = False  # whether a slot that is taken holds padding
        self.slots: slice | Tensor = slice(0)  # slots of the tokens now being read
        self.frozen = False
        self.coming = Expected()  # what `expect` told about the next call
        self.reading = Expected()  # what `expect` told about the call in progress

    def expect(
        self, *, lengths: list[int] | None = None, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> "KVCache":
        """Tell what is special about the tokens (B, T) that the model reads next; returns the cache itself.

        lengths: how many tokens of each right-padded row are real; by default all.
        positions (B, T), below block_size, and visible (B, T, S) are for beams that share a row: the position of each
        token, and which of the S slots it sees, the T new ones included. The rows' lengths then do not change. By
        default a token continues its row and sees the whole row. Raises ValueError unless positions and visible come
        together, without lengths.

            model(idx, cache=cache.expect(lengths=[3, 5]))
        """
        if (positions is None) != (visible is None) or (lengths is not None and positions is not None):
            raise ValueError("give lengths, or positions and visible together, or nothing")
        self.coming = Expected(lengths, positions, visible)
        return self

    def freeze(self) -> None:
        """From now on read one token per row and call, always with the same shapes and addresses, as CUDA graphs need.

        Attention then covers all max_length slots, and the caller must make sure that there is room for the token.
        """
        self.frozen, self.slots = True, torch.tensor([self.used - 1], device=self.k.device)

    def forget_last(self) -> None:
        """Forget the last token of every row of a frozen cache: the next one takes its slot."""
        self.slots -= 1
        self.lengths -= 1

    def place(self, T: int) -> tuple[Tensor, Tensor, Mask]:
        """Take the next T slots (1, if frozen) for tokens (B, T).

        Returns their positions (B, T), those of all S slots taken so far (B, S), and the mask. Raises ValueError if the
        tokens do not fit into the context or into the cache.
        """
        self.reading, self.coming = self.coming, Expected()  # a call that is refused leaves nothing behind for the next
        _, positions, visible = self.reading
        if isinstance(self.slots, Tensor):  # frozen
            self.slots += 1
        else:
            if positions is None and self.longest + T > self.block_size:
                raise ValueError(f"{self.longest + T} tokens do not fit into block_size={self.block_size}; pass fewer")
            if self.used + T > (room := self.k.size(3)):
                raise ValueError(f"the cache holds {room} tokens: {self.used} are in, {T} more do not fit")
            self.slots = slice(self.used, self.used + T)
            self.used += T
        if positions is None:
            positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        self.positions[:, self.slots] = positions
        return positions, self.key_positions(), self.mask(positions, visible)

    def key_positions(self) -> Tensor:
        """Return the positions of all slots taken so far, (B, S)."""
        return self.positions if self.frozen else self.positions[:, : self.used]

    def mask(self, positions: Tensor, visible: Tensor | None = None) -> Mask:
        """Return the causal mask of the T tokens just placed: each sees the tokens of its row up to itself.

        visible (B, T, S): those that it sees if beams share the row. Of either, a sliding window shows only the last.
        """
        T, keys = positions.size(1), self.key_positions()
        if visible is not None:
            if self.window:
                visible = visible & in_sight(positions[:, :, None], keys[:, None], self.window)
            return Mask(visible.unsqueeze(1))
        # Without padding, one token per row sees all slots, and tokens that begin a cache are plainly causal.
        if not self.padded and not self.frozen and T in (1, self.used):
            return attention_mask(T, self.used, window=self.window, device=positions.device)
        return attention_mask(T, keys.size(1), window=self.window, positions=positions, key_positions=keys)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of one layer in the slots just taken; returns all of that layer, (B, K, S, D)."""
        keys, values = self.k[layer], self.v[layer]
        keys[:, :, self.slots], values[:, :, self.slots] = k.to(keys.dtype), v.to(values.dtype)
        return (keys, values) if self.frozen else (keys[:, :, : self.used], values[:, :, : self.used])

    def last(self, T: int) -> Tensor:
        """Return the index of each row's last real token among the T tokens now being read: (B,)."""
        lengths = self.reading.lengths
        return torch.full((len(self.lengths),), T - 1) if lengths is None else torch.tensor(lengths) - 1

    def advance(self, T: int) -> None:
        """Count the T tokens just placed as read, or in each right-padded row only the real ones."""
        lengths, positions, _ = self.reading
        if positions is None and lengths is None:
            self.lengths += T
            self.longest += 0 if self.frozen else T
        elif positions is None:
            real = torch.tensor(lengths, device=self.lengths.device)
            beyond = torch.arange(T, device=real.device) >= real[:, None]  # (B, T)
            self.positions[:, self.slots].masked_fill_(beyond, NOWHERE)
            self.padded |= min(lengths) < T
            self.lengths += real
            self.longest = int(self.lengths.max())

    def regroup(self, rows: Tensor, room: int) -> "KVCache":
        """Return a new cache whose row b holds the rows `rows[b]` of this one side by side, then `room` empty slots.

        rows: (B, n). Example: this cache has three rows of two tokens each, ab, cd and ef, and room is 1 (-).
        n = 1 repeats, reorders and drops rows:  [[0], [0], [2]] → ab-, ab-, ef-
        n = 2 puts two into one row, for beams:  [[0, 1]] → abcd-
        With n > 1 a row has no length of its own: `expect` must be given `positions` and `visible` before every call.
        """
        new = copy.copy(self)
        new.k, new.v = (
            F.pad(x[:, rows, :, : self.used].transpose(2, 3).flatten(3, 4), (0, 0, 0, room)) for x in (self.k, self.v)
        )
        new.memory = self.memory and self.memory.rows(rows[:, 0])  # beams side by side have one source
        new.positions = F.pad(self.positions[rows, : self.used].flatten(1), (0, room), value=NOWHERE)
        new.lengths, new.used = self.lengths[rows[:, 0]], self.used * rows.size(1)
        return new
