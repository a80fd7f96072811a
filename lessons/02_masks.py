"""Lesson 2: masks. One formula, softmax(QKᵀ/√D + M)·V, is an encoder, a decoder or a bridge between the two: M decides.

M is 0 where a query may look and −∞ where it may not, for e^(−∞) = 0: a hidden key gets no weight at all, not a little.
"""

import itertools

import torch
from lesson import GREY, claim, expect, figure, run, save, table
from torch import Tensor

from model import GPT, GPTConfig, Mask, attention, attention_mask

SOURCE = ["two", "cats", "sleep", "<pad>", "<pad>"]
TARGET = ["<s>", "deux", "chats", "dorment"]
PACKED = ["a", "b", "c", "A", "B"]  # two short documents in one row


def real(tokens: list[str]) -> Tensor:
    """Which tokens are real, (1, S): False for padding."""
    return torch.tensor([[token != "<pad>" for token in tokens]])


def weights(mask: Mask, T: int, S: int) -> Tensor:
    """What each query gives to each key, (T, S), when all scores are equal: attention with Q = K = 0 and V = 1."""
    return attention(torch.zeros(1, 1, T, S), torch.zeros(1, 1, S, S), torch.eye(S)[None, None], mask, kind="math")[
        0, 0
    ]


def masks() -> list[tuple[str, list[str], list[str], Tensor]]:
    """(name, queries, keys, weights) of the masks that a transformer needs."""
    source, documents = real(SOURCE), torch.tensor([[0, 0, 0, 1, 1]])
    cases = [
        ("encoder", SOURCE[:3], SOURCE[:3], attention_mask(3, 3, causal=False)),
        ("encoder, padded", SOURCE, SOURCE, attention_mask(5, 5, causal=False, padding=source)),
        ("decoder", TARGET, TARGET, attention_mask(4, 4)),
        ("decoder, padded", SOURCE, SOURCE, attention_mask(5, 5, padding=source)),
        ("cross", TARGET, SOURCE, attention_mask(4, 5, causal=False, padding=source)),
        ("decoder, packed", PACKED, PACKED, attention_mask(5, 5, documents=documents)),
    ]
    return [(name, queries, keys, weights(mask, len(queries), len(keys))) for name, queries, keys, mask in cases]


def changed(model: GPT, idx: Tensor, at: int, **options) -> Tensor:
    """Which outputs differ in any bit, (T,), when the token at this place becomes another one."""
    other = idx.clone()
    other[0, at] = (idx[0, at] + 1) % model.config.vocab_size
    return (model(idx, **options)[0] != model(other, **options)[0]).any(-1)[0]


def claims_on_models(kind: str, T: int) -> None:
    """Change one token at a time, and see which outputs of three layers notice."""
    shape = dict(block_size=T, vocab_size=50, n_layer=3, n_head=2, n_embd=32, attention=kind)
    decoder, encoder = GPT(GPTConfig(**shape)), GPT(GPTConfig(**shape, causal=False))
    idx, i, n = torch.randint(50, (1, T)), torch.arange(T), T - 3  # the last three tokens are padding, if we say so
    padding = i[None] < n
    claim(f"{kind}, decoder: a new token changes its own and every later output, and no bit of an earlier one",
          all(torch.equal(changed(decoder, idx, at), i >= at) for at in range(T)))  # fmt: skip
    claim(f"{kind}, encoder: a new token changes every output",
          all(changed(encoder, idx, at).all() for at in range(T)))  # fmt: skip
    claim(f"{kind}, encoder: a new token in the padding changes no bit of a real token's output",
          all(not changed(encoder, idx, at, padding=padding)[:n].any() for at in range(n, T)))  # fmt: skip
    claim(f"{kind}, encoder: padded and alone agree within rounding",
          torch.allclose(encoder(idx[:, :n])[0], encoder(idx, padding=padding)[0][:, :n], atol=1e-6))  # fmt: skip


def claims_on_cross_attention(kind: str) -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (len(TARGET), len(SOURCE), len(SOURCE)))
    mask = attention_mask(len(TARGET), len(SOURCE), causal=False, padding=real(SOURCE))
    before = attention(q, k, v, mask, kind=kind)
    k[:, :, 3:], v[:, :, 3:] = 100.0, 100.0
    claim(f"{kind}, cross: the source's padding changes no bit", (attention(q, k, v, mask, kind=kind) == before).all())
    nothing = attention_mask(len(TARGET), len(SOURCE), causal=False, padding=torch.zeros(1, len(SOURCE)).bool())
    y = attention(q, k, v, nothing, kind=kind)
    claim(f"{kind}, cross: a query with nothing to see gets zeros, not 0/0", (y == 0).all())


@torch.no_grad()
def main(small: bool):
    shown = masks()
    table(
        ["mask", "queries", "keys", "visible", "of", "weights of the last query"],
        [[name, len(q), len(k), int((w > 0).sum()), w.numel(), " ".join(f"{x:.2f}" for x in w[-1].tolist())]
         for name, q, k, w in shown],
    )  # fmt: skip
    claim("every query's weights sum to 1", all(torch.allclose(w.sum(-1), torch.ones(len(w))) for *_, w in shown))
    for kind in ("math", "flash"):
        claims_on_models(kind, T=8 if small else 32)
        claims_on_cross_attention(kind)
    return (shown,)


def draw(shown) -> None:
    fig, axes = figure(2, 3, height=5.4)
    for axis, (name, queries, keys, w) in zip(axes.flat, shown, strict=True):
        T, S = w.shape
        axis.pcolormesh((w > 0).float(), vmin=-0.05, vmax=1.3, edgecolors="white", linewidth=1.5)
        for i, j in itertools.product(range(T), range(S)):
            text, colour = ("0", "white") if w[i, j] > 0 else ("−∞", GREY)
            axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour)
        axis.set(xlim=(0, S), ylim=(T, 0), aspect="equal", title=name, xlabel="keys", ylabel="queries")
        axis.set_xticks([j + 0.5 for j in range(S)], keys, rotation=45 if max(map(len, keys)) > 1 else 0)
        axis.set_yticks([i + 0.5 for i in range(T)], queries)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    save(fig, "02_masks.svg")


def check(visible) -> None:
    """The exercise: visible(padding: list of bool, window: int) → (T, T) booleans of a decoder with a window."""
    for padding, window in (([True] * 4, 4), ([True] * 5, 2), ([False, False, True, True, True], 2), ([True], 1)):
        right = attention_mask(len(padding), len(padding), window=window, padding=torch.tensor([padding])).bias[0, 0]
        expect(f"visible({padding}, {window})", visible(list(padding), window), right)


if __name__ == "__main__":
    run(main, draw, check, asks="visible")
