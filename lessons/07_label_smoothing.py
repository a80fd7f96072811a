"""Lesson 7: label smoothing. Do not ask for certainty, and the logits stay finite.

A one-hot target says: this token with probability 1. A softmax reaches 1 only with infinite logits, so training pushes
them apart for ever. Label smoothing gives a share ε of the target to the whole vocabulary [Szegedy et al. 2016].
"""

import math

import torch
from lesson import BLUE, GREEN, GREY, ORANGE, claim, expect, figure, run, save, table
from torch import Tensor
from torch.nn import functional as F

from fused import linear_cross_entropy
from model import GPT, IGNORE, GPTConfig

SHARES = {0.0: BLUE, 0.1: ORANGE, 0.3: GREEN}  # ε, and its colour in the picture


def smoothed(target: int, V: int, share: float) -> Tensor:
    """The target distribution q (V,): 1 - ε + ε/V for the target, ε/V for all others."""
    q = torch.full((V,), share / V, dtype=torch.float64)
    q[target] += 1 - share
    return q


def loss_of(z: Tensor, target: int, share: float) -> Tensor:
    """The loss that model.py trains with, of one token's logits z (V,): the head's matrix is the identity here."""
    identity = torch.eye(len(z), dtype=z.dtype)
    return linear_cross_entropy(z[None], identity, torch.tensor([target]), IGNORE, share, 0.0)


def gaps(share: float, steps: list[int], V: int) -> list[float]:
    """Gradient descent on the logits of one token: by how much the target's exceeds the others, after these steps."""
    z, found = torch.zeros(V, dtype=torch.float64, requires_grad=True), []
    for step in range(1, steps[-1] + 1):
        (gradient,) = torch.autograd.grad(loss_of(z, 0, share), z)
        with torch.no_grad():
            z -= gradient
        if step in steps:
            found.append((z[0] - z[1]).item())
    return found


def chains(rows: Tensor, n: int, T: int) -> tuple[Tensor, Tensor]:
    """n texts of a chain with the next tokens' probabilities rows (V, V): inputs and targets (n, T)."""
    text = [torch.randint(len(rows), (n,))]
    for _ in range(T):
        text.append(torch.multinomial(rows[text[-1]], 1)[:, 0])
    text = torch.stack(text, 1)
    return text[:, :-1], text[:, 1:]


def train(share: float, few, many, steps: int, **shape) -> list[list[float]]:
    """Train on few texts: every tenth step (step, training loss, validation loss, mean largest p, accuracy).

    Both losses are plain cross-entropies, as model.py smooths in training only.
    """
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=12, n_head=2, n_embd=32, block_size=16, label_smoothing=share, **shape))
    optimizer, curve = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0), []
    for step in range(steps + 1):
        if step % 10 == 0:
            model.eval()
            with torch.no_grad():
                probs = model(many[0])[0].softmax(-1)
                losses = [model(*texts)[1].item() for texts in (few, many)]
            right = (probs.argmax(-1) == many[1]).float().mean().item()
            curve.append([step, *losses, probs.amax(-1).mean().item(), right])
            model.train()
        model(*few)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return curve


def main(small: bool):
    V, share = 10, 0.1
    z, q = torch.randn(V, dtype=torch.float64, requires_grad=True), smoothed(3, V, share)
    (gradient,) = torch.autograd.grad(loss_of(z, 3, share), z)
    claim("the loss of model.py has the gradient p - q", torch.allclose(gradient, z.softmax(-1) - q))
    best = q.log().requires_grad_()
    (gradient,) = torch.autograd.grad(loss := loss_of(best, 3, share), best)
    claim("at the smoothed target itself it is 0, and the loss is the target's entropy",
          gradient.abs().max() < 1e-12 and torch.isclose(loss, -(q * q.log()).sum()))  # fmt: skip

    steps = [10, 30, 100, 300, 1000] if small else [10, 30, 100, 300, 1000, 3000]
    found = {share: gaps(share, steps, V) for share in (0.0, 0.1)}
    limit = math.log((1 - share + share / V) / (share / V))
    print(f"\nHow far the target's logit rises above the others; with ε = {share} the limit is {limit:.3f}")
    rows = [[f"{n:,}", *pair] for n, *pair in zip(steps, *found.values(), strict=True)]
    table(["steps", "one-hot", f"ε = {share}"], rows)
    claim("with a one-hot target ten times as many steps add log 10 to the gap, without an end",
          abs(found[0.0][-1] - found[0.0][-3] - math.log(10)) < 0.05)  # fmt: skip
    claim("with a smoothed target it stops at the logarithm of q's ratio", abs(found[0.1][-1] - limit) < 1e-3)

    rows = torch.softmax(2 * torch.randn(12, 12), -1)
    few, many = chains(rows, 16 if small else 32, 16), chains(rows, 64 if small else 256, 16)
    curves = {share: train(share, few, many, 70 if small else 100, n_layer=1 if small else 2) for share in SHARES}
    ends = {share: curve[-1] for share, curve in curves.items()}
    print("\nA GPT that learns a few texts by heart:")
    lowest = {share: min(point[2] for point in curve) for share, curve in curves.items()}
    heads = ["ε", "training loss", "validation loss", "its lowest", "mean largest p", "accuracy"]
    table(heads, [[f"{share}", *end[1:3], lowest[share], *end[3:]] for share, end in ends.items()])
    claim("smoothing leaves the training loss higher and the validation loss lower",
          ends[0.0][1] < ends[0.1][1] < ends[0.3][1] and ends[0.0][2] > ends[0.1][2] > ends[0.3][2])  # fmt: skip
    claim("and the model is less sure of itself, while it is right as often",
          ends[0.0][3] > ends[0.1][3] > ends[0.3][3] and abs(ends[0.0][4] - ends[0.3][4]) < 0.05)  # fmt: skip
    return steps, found, limit, curves


def draw(steps, found, limit, curves) -> None:
    fig, (gap, losses, sure) = figure(1, 3, height=3.2, width_ratios=(1, 1.25, 0.9))
    for share, values in found.items():
        gap.plot(steps, values, "o-", color=SHARES[share], label=f"ε = {share:g}", markersize=3)
    gap.axhline(limit, color=GREY, linestyle=":", linewidth=1)
    gap.set(xscale="log", xlabel="steps", ylabel="nats", title="Target's logit above others")
    gap.legend()
    for share, curve in curves.items():
        x, training, validation, *_ = zip(*curve, strict=True)
        losses.plot(x, validation, color=SHARES[share], label=f"ε = {share:g}")
        losses.plot(x, training, color=SHARES[share], linestyle="--")
    losses.set(xlabel="steps", ylabel="nats per token", ylim=(0, None), title="Loss: validation —, training - -")
    losses.legend()
    for i, (share, curve) in enumerate(curves.items()):
        sure.bar(i - 0.2, curve[-1][3], 0.38, color=SHARES[share])
        sure.bar(i + 0.2, curve[-1][4], 0.38, color=SHARES[share], alpha=0.4)
    sure.set(xticks=range(len(curves)), xticklabels=[f"{share:g}" for share in curves], ylim=(0, 1), xlabel="ε",
             title="Sure (dark),\nright (light)")  # fmt: skip
    save(fig, "07_label_smoothing.svg")


def check(loss) -> None:
    """The exercise: loss(z (N, V), targets (N,), share) → the mean loss over the targets that are not IGNORE."""
    z, targets = torch.randn(5, 7, dtype=torch.float64), torch.tensor([3, 0, IGNORE, 6, 3])
    for share in (0.0, 0.1, 0.5):
        right = F.cross_entropy(z, targets, ignore_index=IGNORE, label_smoothing=share)
        expect(f"loss(z, {targets.tolist()}, {share})", loss(z.clone(), targets.clone(), share), right)
    wide = 1000 * z  # a softmax that is written out would overflow
    expect("loss of logits up to 2,000", loss(wide, targets, 0.1), F.cross_entropy(wide, targets, label_smoothing=0.1))


if __name__ == "__main__":
    run(main, draw, check, asks="loss")
