"""Lesson 5: LayerNorm and RMSNorm. Both bring every token's vector to one size; each is blind to something.

LayerNorm subtracts the mean and divides by the standard deviation: it sees neither a shift nor a scale. RMSNorm only
divides by the root mean square: it does not see a scale, but it sees a shift.
"""

import torch
from lesson import BLUE, ORANGE, RED, claim, expect, figure, run, save, table
from torch import Tensor

from model import GPTConfig, Norm

C = 8  # numbers in a token's vector
CHANGES = {"x": lambda x: x, "x + 5": lambda x: x + 5, "10 x": lambda x: 10 * x}


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean)/√(var + ε) of each row [Ba et al. 2016]; var divides by C, not by C - 1."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x/√(mean(x²) + ε) of each row [Zhang & Sennrich 2019, eq. 4]."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_of(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def norm(kind: str, dim: int = C) -> Norm:
    """The model's own, with weights 1 as at the start of training."""
    return Norm(GPTConfig(norm=kind, n_embd=dim, n_head=1, position="none"), dim)


def close(a: Tensor, b: Tensor | float) -> bool:
    return torch.allclose(a, torch.zeros_like(a) + b, atol=1e-4)


def claims_about_rows(x: Tensor, layer: Norm, rms: Norm) -> None:
    claim("the model's norms are the formulas", close(layer(x), layer_norm(x)) and close(rms(x), rms_norm(x)))
    other = torch.cat((x[:1], 100 * torch.randn_like(x[1:])))
    claim("each token is normalised alone: other tokens change no bit of it",
          torch.equal(layer(other)[0], layer(x)[0]) and torch.equal(rms(other)[0], rms(x)[0]))  # fmt: skip
    claim("after LayerNorm every row has mean 0 and RMS 1", close(layer(x).mean(-1), 0) and close(rms_of(layer(x)), 1))
    claim("after RMSNorm every row has RMS 1, whatever its mean", close(rms_of(rms(x)), 1))


def claims_about_blindness(x: Tensor, layer: Norm, rms: Norm) -> None:
    claim(
        "neither sees a scale: 10 x gives what x gives", close(layer(10 * x), layer(x)) and close(rms(10 * x), rms(x))
    )
    claim("both see the sign: -x gives the opposite", close(layer(-x), -layer(x)) and close(rms(-x), -rms(x)))
    claim("LayerNorm does not see a shift: x + 5 gives what x gives", close(layer(x + 5), layer(x)))
    claim("RMSNorm sees it", (rms(x + 5) - rms(x)).abs().max() > 0.5)
    claim("RMSNorm of centred rows is LayerNorm", close(rms(x - x.mean(-1, keepdim=True)), layer(x)))
    pairs = torch.randn(100, 2)
    pairs = pairs[(pairs[:, 0] - pairs[:, 1]).abs() > 0.5]  # for nearly equal numbers ε matters
    claim("of two numbers LayerNorm leaves nothing but which is larger",
          close(norm("layernorm", 2)(pairs), torch.sign(pairs - pairs.flip(-1))))  # fmt: skip


def claims_about_gradients(x: Tensor, layer: Norm, rms: Norm) -> None:
    """What a norm does not see, it sends no gradient along."""
    weight = torch.randn_like(x)  # any loss: a weighted sum of the outputs
    by_layer, by_rms = (torch.autograd.grad((f(y) * weight).sum(), y)[0] for f in (layer, rms)
                        for y in [x.clone().requires_grad_()])  # fmt: skip
    along_x, along_one = (by_rms * x).sum(-1), by_rms.sum(-1)
    claim("no gradient along x itself, in either", close(along_x, 0) and close((by_layer * x).sum(-1), 0))
    claim("LayerNorm's gradient sums to 0 over a row, RMSNorm's does not",
          close(by_layer.sum(-1), 0) and along_one.abs().max() > 0.01)  # fmt: skip


def main(small: bool):
    x = torch.randn(4 if small else 6, C) * torch.tensor([0.1, 1, 3, 10, 30, 100])[: 4 if small else 6, None] + 1
    layer, rms = norm("layernorm"), norm("rmsnorm")
    with torch.no_grad():
        rows = [
            [f"token {t}", *(round(float(f(y)), 3) + 0.0 for y in values for f in (torch.mean, rms_of))]
            for t, values in enumerate(zip(x, layer(x), rms(x), strict=True))
        ]
        table(["row", "mean", "RMS", "LayerNorm: mean", "RMS", "RMSNorm: mean", "RMS"], rows)
        claims_about_rows(x, layer, rms)
        x = torch.randn(20, C)
        claims_about_blindness(x, layer, rms)
    claims_about_gradients(x, layer, rms)
    return x[0], torch.randn(60, 2)


@torch.no_grad()
def draw(token: Tensor, pairs: Tensor) -> None:
    fig, axes = figure(2, 3, height=5)
    norms = (("before", lambda x: x), ("LayerNorm", layer_norm), ("RMSNorm", rms_norm))
    for axis, (name, f) in zip(axes[0], norms, strict=True):
        for (change, apply), colour, width in zip(CHANGES.items(), (BLUE, RED, ORANGE), (4, 1.6, 1.6), strict=True):
            style = "--" if change == "10 x" else "-"
            axis.plot(range(C), f(apply(token)), style, marker=".", color=colour, linewidth=width, label=change)
        axis.set(title=f"a token, {name}", xlabel="channel")
        axis.set_ylim((-15, 25) if name == "before" else (-2.6, 2.6))
    axes[0, 0].legend(loc="upper left", ncols=3, columnspacing=0.8, handlelength=1.2)
    axes[0, 0].set_ylabel("value")
    angle = torch.atan2(pairs[:, 1], pairs[:, 0])
    for axis, (name, f) in zip(axes[1], norms, strict=True):
        axis.axline((0, 0), slope=1, color="#bbbbbb", linewidth=0.8)
        axis.scatter(*f(pairs).T, c=angle, cmap="twilight", s=22, edgecolors="#555555", linewidths=0.4)
        axis.set(title=f"60 vectors, {name}", xlabel="channel 0",
                 xlim=(-3, 3), ylim=(-3, 3), aspect="equal")  # fmt: skip
    axes[1, 0].set_ylabel("channel 1")
    save(fig, "05_norms.svg")


def check(rms_norm_gradient) -> None:
    """The exercise: rms_norm_gradient(x (T, C), g (T, C), eps) → the gradient of a loss with respect to x."""
    torch.manual_seed(1)
    for T, dim, eps in ((1, 4, 1e-6), (3, 8, 1e-6), (2, 6, 0.5)):
        x, g = torch.randn(T, dim, requires_grad=True), torch.randn(T, dim)
        (right,) = torch.autograd.grad((rms_norm(x, eps) * g).sum(), x)
        given = rms_norm_gradient(x.detach().clone(), g.clone(), eps)
        expect(f"rms_norm_gradient(x, g, eps={eps}) for x of {T} x {dim}", given, right)


if __name__ == "__main__":
    run(main, draw, check, asks="rms_norm_gradient")
