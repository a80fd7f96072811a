"""Lesson 11: flash attention by hand. Never hold the (T, T) scores: read keys in tiles, and keep a running softmax.

A chip's fast memory is small and its large memory slow, so attention waits for bytes, not for sums. The scores are
T² numbers; the inputs and the output only 4·T·D. Flash attention reads and writes the latter alone [Dao et al. 2022].
"""

import itertools
import math
from dataclasses import dataclass

import torch
from lesson import BLUE, GREY, ORANGE, RED, SKY, claim, expect, figure, run, save, table
from torch import Tensor

from model import Mask, attention

KIB = 2 / 1024  # a number of 16 bits
H100 = 228  # KiB of shared memory in one of its 132 multiprocessors


@dataclass
class Memory:
    """Slow memory that counts what is read from it and written to it, in numbers, and what fast memory must hold."""

    traffic: int = 0
    fast: int = 0  # the most numbers that were in fast memory at once

    def move(self, *tensors: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Read tensors from slow memory, or write them to it."""
        self.traffic += sum(x.numel() for x in tensors)
        return tensors if len(tensors) > 1 else tensors[0]

    def hold(self, *tensors: Tensor) -> None:
        self.fast = max(self.fast, sum(x.numel() for x in tensors))


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, memory: Memory) -> Tensor:
    """Three passes, as a program of separate steps does them; the (T, S) scores go through slow memory four times."""
    scores = memory.move(memory.move(q) @ memory.move(k).T / math.sqrt(q.size(-1)))
    scores = memory.move(scores)  # read again
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    weights = memory.move(scores.softmax(-1))
    return memory.move(memory.move(weights) @ memory.move(v))


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, rows: int, columns: int, memory: Memory) -> Tensor:
    """softmax(QKᵀ/√D + M)·V in tiles of rows x columns [Dao 2023, algorithm 1]. q: (T, D); k, v: (S, D).

    For each row: m, the largest score so far; l, the sum of e^(score - m); o, the sum of e^(score - m)·value. When a
    new tile raises m to m', what was summed before shrinks by e^(m - m'). At the end, o/l is the exact result.
    """
    T, S, out = len(q), len(k), torch.empty(len(q), v.size(-1), dtype=v.dtype)
    for i in range(0, T, rows):
        qi = memory.move(q[i : i + rows])
        m, l, o = qi.new_full((len(qi), 1), -math.inf), qi.new_zeros(len(qi), 1), qi.new_zeros(len(qi), v.size(-1))
        for j in range(
            0, min(S, i + rows) if causal else S, columns
        ):  # tiles that lie wholly in the future are skipped
            kj, vj = memory.move(k[j : j + columns], v[j : j + columns])
            s = qi @ kj.T / math.sqrt(q.size(-1))
            if causal:
                future = torch.arange(j, j + len(kj)) > torch.arange(i, i + len(qi))[:, None]
                s = s.masked_fill(future, -math.inf)
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            p, shrink = (s - new).exp(), (m - new).exp()
            l, o, m = shrink * l + p.sum(-1, keepdim=True), shrink * o + p @ vj, new
            memory.hold(qi, kj, vj, s, o, m, l)
        out[i : i + rows] = memory.move(o / l)
    return out


def example() -> None:
    """The online softmax of one row of four scores, read two at a time."""
    scores, values = torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    m, l, o, rows = -math.inf, 0.0, 0.0, []
    for s, v in zip(scores.split(2), values.split(2), strict=True):
        new = max(m, s.max().item())
        p, shrink = (s - new).exp(), math.exp(m - new)
        l, o, m = shrink * l + p.sum().item(), shrink * o + (p @ v).item(), new
        rows.append([str([int(x) for x in s]), shrink, m, l, o, o / l])
    table(["scores read", "what was summed shrinks by", "m", "l", "o", "o/l"], rows)
    claim("after the last tile o/l is softmax(scores)·values", abs(o / l - (scores.softmax(0) @ values).item()) < 1e-4)


def exactness(T: int, D: int) -> None:
    q, k, v = torch.randn(3, T, D, dtype=torch.float64)
    for causal in (False, True):
        right = attention(q[None, None], k[None, None], v[None, None], Mask(causal=causal), kind="math")[0, 0]
        ours = [flash(q, k, v, causal, *tile, Memory()) for tile in ((1, 1), (16, 16), (T, T), (48, 5))]
        claim(f"{'causal' if causal else 'full'}: whatever the tiles, the result is the softmax's to 1e-12",
              all(torch.allclose(y, right, rtol=0, atol=1e-12) for y in ours))  # fmt: skip
    claim("scores of thousands do not overflow, as m is subtracted first",
          flash(1000 * q, k, v, False, 16, 16, Memory()).isfinite().all())  # fmt: skip


def main(small: bool):
    example()
    exactness(T=40 if small else 64, D=8)
    T, D = (128, 16) if small else (1024, 64)
    q, k, v = torch.randn(3, T, D)
    print(f"\nBetween slow and fast memory, T = {T}, D = {D}, 16 bits per number:")
    rows, counts, tiles = [], [], [2**n for n in range(4, T.bit_length())]
    for tile in tiles:
        full, causal = Memory(), Memory()
        flash(q, k, v, False, tile, tile, full)
        flash(q, k, v, True, tile, tile, causal)
        counts.append((full.traffic, causal.traffic, full.fast))
        rows.append([f"tiles of {tile}", *(round(n * KIB) for n in counts[-1])])
    written_out = Memory()
    plain(q, k, v, False, written_out)
    table(["", "KiB moved", "KiB moved, causal", "KiB needed at once"], rows)
    print(f"  written out: {written_out.traffic * KIB:,.0f} KiB moved")
    traffic = [count[0] for count in counts]
    claim("flash moves 2·T·D numbers for queries and output, and 2·T·D for each row of tiles",
          traffic == [2 * T * D + 2 * T * D * T // tile for tile in tiles])  # fmt: skip
    claim("written out, the scores are moved four times: 4·T·D + 4·T² numbers",
          written_out.traffic == 4 * T * D + 4 * T * T)  # fmt: skip
    return T, D, tiles, counts, written_out.traffic


def draw(T, D, tiles, counts, written_out) -> None:
    fig, (grid, moved, needed) = figure(1, 3, height=2.9)
    n = 6
    for i, j in itertools.product(range(n), range(n)):
        future, diagonal = j > i, i == j
        colour = "#eeeeee" if future else SKY if diagonal else BLUE
        grid.fill([j, j + 0.94, j + 0.94, j], [i, i, i + 0.94, i + 0.94], color=colour)
        if not future:
            grid.text(j + 0.47, i + 0.49, str(i * (i + 1) // 2 + j + 1), ha="center", va="center", fontsize=8,
                      color="black" if diagonal else "white")  # fmt: skip
    grid.set(title="order of tiles, causal", xlabel="keys: tiles of columns", ylabel="queries: tiles of rows",
             xticks=[], yticks=[], ylim=(n, 0), aspect="equal")  # fmt: skip
    grid.spines[:].set_visible(False)
    full, causal, fast = ([n * KIB for n in column] for column in zip(*counts, strict=True))
    moved.axhline(written_out * KIB, color=RED, linestyle="--")
    moved.text(tiles[-1], written_out * KIB * 0.92, "written out", color=RED, va="top", ha="right", fontsize=8.5)
    moved.plot(tiles, full, marker="o", color=BLUE, label="flash")
    moved.plot(tiles, causal, marker="o", color=SKY, label="flash, causal")
    moved.axhline(4 * T * D * KIB, color=GREY, linestyle=":")
    moved.text(tiles[-1], 4 * T * D * KIB * 0.92, "inputs + output", color=GREY, va="top", ha="right", fontsize=8.5)
    moved.set(title="traffic, KiB", ylim=(4 * T * D * KIB / 2, max(written_out * KIB, *full) * 1.6))
    moved.legend()
    needed.plot(tiles, fast, marker="o", color=ORANGE)
    needed.axhline(H100, color=GREY, linestyle=":")
    needed.text(tiles[0], H100 * 1.1, "an H100 has 228", color=GREY, va="bottom", fontsize=8.5)
    needed.set_title("fast memory needed, KiB")
    for axis in (moved, needed):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(tiles[::2], [str(tile) for tile in tiles[::2]])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel(f"tile size (T = {T}, D = {D})")
    save(fig, "11_flash.svg")


def check(merge) -> None:
    """The exercise: merge(a, b) of two parts of one row, each (m, l, o), o being a tensor (D,) → (m, l, o) of both."""
    torch.manual_seed(1)
    scores, v = 3 * torch.randn(6), torch.randn(6, 4)

    def part(s: Tensor, x: Tensor) -> tuple[float, float, Tensor]:
        p = (s - s.max()).exp()
        return s.max().item(), p.sum().item(), p @ x

    for name, shift in (
        ("two parts of three scores", 0.0),
        ("scores near 1000", 1000.0),
        ("scores near -1000", -1000.0),
    ):
        s = scores + shift
        for order in ((slice(3), slice(3, 6)), (slice(3, 6), slice(3))):
            given, right = merge(*(part(s[i], v[i]) for i in order)), part(s, v)
            for letter, ours, theirs in zip("mlo", given, right, strict=True):
                expect(f"{name}: {letter} of merge(a, b)", ours, theirs)


if __name__ == "__main__":
    run(main, draw, check, asks="merge")
