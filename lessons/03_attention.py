"""Lesson 3: attention maps. Each head is a table of weights: how much each query takes of each key's value.

A tiny model learns to write eight letters backwards, and its heads show how: the query that writes a letter looks at
that letter. With the demo's run in out/pydocs (make demo), its heads are drawn too, into that folder.
"""

import math
from unittest.mock import patch

import numpy as np
import torch
from lesson import ROOT, claim, expect, figure, run, save, table
from torch import Tensor

import model as network
from model import GPT, IGNORE, GPTConfig, Mask
from runs.run import Run

LETTERS, SEPARATOR = "abcdefghijklmnopqrstuvwxyz", 26
TEXT = "Return the index of the first item in the list."
original = network.attention


def backwards(letters: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the letters (B, n), a separator, and the letters backwards; targets, counted only after the separator."""
    n = letters.size(1)
    row = torch.cat((letters, torch.full_like(letters[:, :1], SEPARATOR), letters.flip(1)), dim=1)
    targets = row[:, 1:].clone()
    targets[:, :n] = IGNORE
    return row[:, :-1], targets


def train(n: int, steps: int) -> GPT:
    model = GPT(GPTConfig(block_size=2 * n, vocab_size=27, n_layer=2, n_head=2, n_embd=64, position="learned"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        loss = model(*backwards(torch.randint(26, (32, n))))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def weights_of(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """The weights (B, H, T, S): attention to V = 1, the identity, returns them, D columns at a time."""
    S, D = k.shape[-2:]
    blocks = torch.eye(S, math.ceil(S / D) * D).expand(*k.shape[:2], -1, -1).split(D, dim=-1)
    return torch.cat([original(q, k, block, mask, kind="math") for block in blocks], dim=-1)[..., :S]


@torch.no_grad()
def record(model: GPT, idx: Tensor) -> list[dict[str, Tensor]]:
    """The queries, keys, values, outputs and weights of every layer while the model reads idx."""
    layers = []

    def recording(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options) -> Tensor:
        y = original(q, k, v, mask, **options)
        layers.append({"q": q, "k": k, "v": v, "y": y, "weights": weights_of(q, k, mask)})
        return y

    with patch("model.attention", recording):
        model(idx)
    return layers


def by_hand(q: Tensor, k: Tensor) -> Tensor:
    """softmax(QKᵀ/√D + M) of a causal row: the formula, step by step."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    M = torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1)
    e = (scores + M).exp()
    return e / e.sum(-1, keepdim=True)


def claims(model: GPT, idx: Tensor) -> list[dict[str, Tensor]]:
    """What holds for every head of every model."""
    layers = record(model, idx)
    maps = torch.stack([layer["weights"] for layer in layers])  # (layers, B, H, T, T)
    claim("every row of every head sums to 1", torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1])))
    claim("no head gives the future any weight", (maps.triu(1) == 0).all())
    hand = torch.stack([by_hand(layer["q"], layer["k"]) for layer in layers])
    claim("the weights are the formula's, step by step", torch.allclose(maps, hand, atol=1e-6))
    claim("weights · V written out is what the fused kernel gives",
          all(torch.allclose(layer["weights"] @ layer["v"], layer["y"], atol=1e-5) for layer in layers))  # fmt: skip
    return layers


def focus(maps: Tensor) -> list[list[object]]:
    """What each head looks at, by the mean weight on some places; maps: (layers, H, T, T)."""
    rows = []
    for layer, heads in enumerate(maps):
        for head, w in enumerate(heads):
            distance = (torch.arange(len(w))[:, None] - torch.arange(len(w))) * w
            shares = (w.diagonal(), w.diagonal(-1), w[1:, 0], distance.sum(-1))
            rows.append([f"{layer + 1}.{head + 1}", *(x.mean().item() for x in shares)])
    return rows


def main(small: bool):
    n, steps = (4, 150) if small else (8, 600)
    model = train(n, steps)
    word = torch.tensor([[LETTERS.index(c) for c in "keyboard"[-n:]]])
    idx, targets = backwards(torch.cat((word, torch.randint(26, (199, n)))))
    with torch.no_grad():
        exact = (model(idx)[0].argmax(-1) == targets)[:, n:].all(-1).float().mean().item()
    print(f"A model of two layers with two heads writes {n} letters backwards: {exact:.1%} of 200 rows are right.")
    layers = claims(model, idx)
    copied = torch.stack([layer["weights"][:, :, n:].argmax(-1) for layer in layers]) == torch.arange(n - 1, -1, -1)
    best = copied.float().mean((1, 3)).max().item()
    print(f"The head that knows best where to look is right {best:.1%} of the time.")
    claim("one head finds the letter to copy at least 9 times in 10", exact > 0.9 and best > 0.9)
    names = [(LETTERS + "|")[token] for token in idx[0].tolist()]
    pictures = [("03_attention.svg", torch.stack([layer["weights"][0] for layer in layers]), names)]
    if not small and (ROOT / "out/pydocs/config.json").is_file():
        pictures.append(demo())
    return (pictures,)


def demo() -> tuple[str, Tensor, list[str]]:
    """The heads of the demo's model, on a line of its corpus."""
    pydocs = Run.open(ROOT / "out/pydocs")
    idx = torch.tensor([pydocs.tokenizer.encode(TEXT)])
    print(f"\nThe demo's model in out/pydocs reads {TEXT!r}")
    maps = torch.stack([layer["weights"][0] for layer in claims(pydocs.load_model().eval(), idx)])
    table(["layer.head", "on itself", "on the token before", "on the first token", "mean distance"], focus(maps))
    tokens = [pydocs.tokenizer.decode([token]) for token in idx[0].tolist()]
    return str(ROOT / "out/pydocs/attention.svg"), maps, tokens


def draw(pictures) -> None:
    for path, maps, tokens in pictures:
        layers, heads, T, _ = maps.shape
        fig, axes = figure(layers, heads, height=6.8 * layers / heads, sharex=True, sharey=True)
        for (layer, head), axis in np.ndenumerate(axes):
            image = axis.imshow(maps[layer, head].numpy(), vmin=0, vmax=1)
            axis.set_title(f"layer {layer + 1}, head {head + 1}")
        size = min(8, 400 / (T * heads))
        for axis in axes[-1]:
            axis.set_xticks(range(T), tokens, fontsize=size, rotation=0 if max(map(len, tokens)) == 1 else 90)
        for axis in axes[:, 0]:
            axis.set_yticks(range(T), tokens, fontsize=size)
        fig.supxlabel("keys: where a head looks", fontsize=9)
        fig.supylabel("queries: the token that looks", fontsize=9)
        fig.colorbar(image, ax=axes, shrink=0.5, label="weight")
        save(fig, path)


def check(answer) -> None:
    """The exercise: attend(q (T, D), k (S, D), v (S, D), visible (T, S) of booleans) → (T, D), for one head."""
    torch.manual_seed(1)
    for case, T, S, scale in (("small", 3, 3, 1), ("more keys than queries", 2, 5, 1), ("large scores", 4, 4, 100)):
        q, k, v = scale * torch.randn(T, 6), torch.randn(S, 6), torch.randn(S, 6)
        visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        right = original(q[None, None], k[None, None], v[None, None], Mask(visible[None, None]), kind="math")[0, 0]
        given = answer(q.clone(), k.clone(), v.clone(), visible.clone())
        expect(f"attend(q, k, v, visible), {case} (q {T} x 6, k {S} x 6),", given, right)


if __name__ == "__main__":
    run(main, draw, check, asks="attend")
