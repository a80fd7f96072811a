"""Lesson 12: Baichuan 2, a real report beside our code [arXiv 2309.10305].

docs/baichuan2.md goes through it section by section, and other lessons show its parts: positions (10), RMSNorm (5),
attention in blocks (11), SFT (8). Here are the counts of both models, and what is the report's own: NormHead, which
gives every row of the output head the length 1, and max-z loss, which keeps the logits small.
"""

import math
import runpy
from dataclasses import fields

import numpy as np
import torch
from lesson import BLUE, GREEN, GREY, ORANGE, ROOT, claim, expect, figure, run, save, table
from torch import Tensor
from torch.nn import functional as F

import bpe
from bench.baichuan2 import train
from decoding.stream import penalize
from fused import linear_cross_entropy
from model import GPT, IGNORE, GPTConfig, Head
from positions import alibi_slopes

T = 32  # context of the small models
SHAPE = {"vocab_size": 512, "n_layer": 2, "n_head": 4, "n_embd": 64, "mlp_dim": 128, "block_size": T}
RUNS = {  # the small models, and their colours. The report's weight of max-z loss is 2e-4
    "neither": ({"norm_head": False, "max_z_loss": 0.0}, GREY),
    "max-z loss, 2e-2": ({"norm_head": False, "max_z_loss": 2e-2}, ORANGE),
    "NormHead": ({"norm_head": True, "max_z_loss": 0.0}, BLUE),
    "both": ({"norm_head": True, "max_z_loss": 2e-2}, GREEN),
}


def configured(size: str) -> GPTConfig:
    """The shape that config/baichuan2_<size>.py describes."""
    settings, names = runpy.run_path(str(ROOT / "config" / f"baichuan2_{size}.py")), {f.name for f in fields(GPTConfig)}
    return GPTConfig(**{name: value for name, value in settings.items() if name in names})


def sizes() -> None:
    """Sections 2.3 and 2.4: digits one by one, and the counts of weights."""
    vocabulary = bpe.train(["in 2023 and 2024, " * 9], 259, "digits", ())
    claim("digits are tokens one by one, whatever the text repeats",
          [vocabulary.decode([id]) for id in vocabulary.encode("2023")] == ["2", "0", "2", "3"])  # fmt: skip
    counts = {}
    for size in ("7b", "13b"):
        with torch.device("meta"):  # shapes without numbers
            counts[size] = GPT(configured(size)).num_params()
    print(f"weights: 7B {counts['7b']:,}, 13B {counts['13b']:,}")
    claim("the configs have the 7.5 and 13.9 billion weights of the published models",
          counts == {"7b": 7_505_973_248, "13b": 13_896_668_160})  # fmt: skip
    C, width = configured("7b").n_embd, configured("7b").mlp_dim
    claim("three matrices of SwiGLU have as many weights as two of the classic MLP, to 1%",
          abs(3 * C * width / (2 * C * 4 * C) - 1) < 0.01)  # fmt: skip


def head_and_loss() -> None:
    """Section 2.5: what NormHead and max-z loss are."""
    head, h = Head(GPTConfig(vocab_size=10, n_embd=6, n_head=1, norm_head=True)), torch.randn(4, 6)
    z = head(h)
    (gradient,) = torch.autograd.grad(z[:, 3].sum() + z.logsumexp(-1).sum(), head.weight)
    along = (gradient * F.normalize(head.weight, dim=-1)).sum(-1)
    claim("NormHead's gradient is orthogonal to each row: no token wins by growing", along.abs().max() < 1e-5)
    with torch.no_grad():
        head.weight[3] *= 100
        claim("and the length of a row changes no logit", torch.allclose(head(h), z, atol=1e-5))

    z, c, eye = torch.randn(1, 10, dtype=torch.float64, requires_grad=True), 2e-4, torch.eye(10, dtype=torch.float64)
    plain, with_max_z = (torch.autograd.grad(linear_cross_entropy(z, eye, torch.tensor([3]), IGNORE, 0.0, weight), z)[0]
                         for weight in (0.0, c))  # fmt: skip
    expected = torch.where(z == z.max(), 2 * c * z, 0.0)
    claim("max-z loss pulls at the largest logit alone, by 2c·z", torch.allclose(with_max_z - plain, expected))
    logits, seen = torch.tensor([[100.0, 99.0]]), torch.tensor([[True, False]])
    lost = logits[0, 0] - penalize(logits, seen, 1.1)[0, 0]
    print(f"a penalty of 1.1 makes a token with the logit 100 {math.exp(lost):,.0f} times less likely, "
          f"and one with the logit 10 {math.exp(10 - 10 / 1.1):.1f} times")  # fmt: skip
    same = torch.allclose(logits.softmax(-1), (logits - 90).softmax(-1))
    claim("the softmax does not see what all logits share", same)


def trained(steps: int) -> dict[str, dict]:
    """Train the four small models on our own source files, with the report's optimizer, and measure them."""
    text = "".join((ROOT / name).read_text() for name in ("model.py", "train.py", "bpe.py"))
    tokens = torch.tensor(bpe.train([text], SHAPE["vocab_size"], "digits", ()).encode(text))
    learned, held_out = tokens.split([n := len(tokens) * 9 // 10, len(tokens) - n])

    def rows(part: Tensor, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        found = part[torch.from_numpy(starts)[:, None] + torch.arange(T + 1)]
        return found[:, :-1], found[:, 1:]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return rows(learned, np.random.default_rng(step).integers(0, len(learned) - T, 16))

    idx, targets = rows(held_out, np.arange(0, len(held_out) - T, T))
    found = {}
    for name, (options, _) in RUNS.items():
        with torch.no_grad():
            z = torch.enable_grad()(train)(batch, steps, 0, **SHAPE, **options)(idx)[0]
        loss = F.cross_entropy(z.flatten(0, 1), targets.flatten()).item()
        found[name] = {"loss": loss, "largest": z.amax(-1).flatten()}
    return found


def main(small: bool):
    torch.set_num_threads(1)
    sizes()
    head_and_loss()
    found = trained(60 if small else 200)
    print("\nSmall models:")
    rows = [
        [name, one["loss"], one["largest"].mean().item(), one["largest"].max().item()] for name, one in found.items()
    ]
    table(["", "val loss", "mean largest logit", "largest of all"], rows)
    neither, max_z, norm, both = found.values()
    claim("NormHead lowers the validation loss", found["neither"]["loss"] - found["NormHead"]["loss"] > 0.05)
    means = [one["largest"].mean() for one in (neither, max_z, norm, both)]
    claim("max-z loss makes the largest logits smaller, without NormHead and with it",
          means[0] - means[1] > 0.5 and means[2] - means[3] > 0.5)  # fmt: skip
    return (found,)


def draw(found) -> None:
    fig, (bars, logits) = figure(1, 2, height=3.2, width_ratios=(1, 1.2))
    for i, (name, one) in enumerate(found.items()):
        colour = RUNS[name][1]
        bars.barh(-i, one["loss"], 0.6, color=colour)
        bars.text(one["loss"] - 0.02, -i, f"{one['loss']:.2f}", ha="right", va="center", color="white", fontsize=8.5)
        height, edges = np.histogram(one["largest"].numpy(), 50, (0, 10), density=True)
        logits.plot((edges[1:] + edges[:-1]) / 2, height, color=colour, label=name)
    bars.set(yticks=[-i for i in range(len(found))], yticklabels=list(found),
             xlabel="nats per token", title="Validation loss")  # fmt: skip
    logits.set(xlabel="largest logit of a prediction", ylabel="share of predictions per unit", xlim=(0, 10),
               title="How large the logits are")  # fmt: skip
    logits.legend()
    save(fig, "12_baichuan2.svg")


def check(slopes) -> None:
    """The exercise: slopes(H) → the slopes of ALiBi for H heads, those of the 13B for H = 40."""
    for H in (8, 32, 40, 12):
        expect(f"slopes({H})", torch.tensor([float(slope) for slope in slopes(H)]).double(), alibi_slopes(H).double())


if __name__ == "__main__":
    run(main, draw, check, asks="slopes")
