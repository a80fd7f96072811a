"""Lesson 10: positions. Attention sees a set of tokens; their order must be told to it, as a place or as a distance.

Learned vectors and sinusoids say "this is place 7"; RoPE and ALiBi let a score depend on "3 tokens back". Models of
each kind learn one task on short texts, and then read the same texts further back, and longer ones.
"""

import torch
from lesson import BLUE, COLOURS, GREY, ORANGE, claim, expect, figure, run, save, table
from torch import Tensor

from model import GPT, GPTConfig, rotate
from positions import alibi_bias, alibi_slopes, rope_table, sinusoidal_table

SCHEMES = ("learned", "sinusoidal", "rope", "alibi")
LENGTH = 128  # the longest text, in tokens


def latest(B: int, T: int) -> tuple[Tensor, Tensor]:
    """A task: at each place, name the latest letter (1 to 8). Seven places in ten hold a blank (0), never the first."""
    idx = torch.where(torch.rand(B, T) < 0.3, torch.randint(1, 9, (B, T)), 0)
    idx[:, 0] = torch.randint(1, 9, (B,))
    place = torch.where(idx > 0, torch.arange(T), 0).cummax(1).values
    return idx, idx.gather(1, place)


def gpt(scheme: str) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=LENGTH, vocab_size=9, n_layer=1, n_head=4, n_embd=64, mlp_dim=128, position=scheme))


def train(scheme: str, T: int, steps: int) -> GPT:
    model = gpt(scheme)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        loss = model(*latest(32, T))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: GPT, T: int, shift: int = 0) -> Tensor:
    """The share of right answers at each of T places, (T,), when the first token stands at place `shift`."""
    torch.manual_seed(1)
    idx, targets = latest(200, T)
    return (model(idx, positions=torch.arange(T) + shift)[0].argmax(-1) == targets).float().mean(0)


def claims_about_scores(D: int) -> None:
    """A score of RoPE, or ALiBi's share of one, knows the distance alone."""
    q, k = torch.randn(2, 1, 1, 1, D)
    cos, sin = rope_table(LENGTH, D, 10000.0)

    def score(i: int, j: int) -> float:
        return (rotate(q, cos[i : i + 1], sin[i : i + 1]) * rotate(k, cos[j : j + 1], sin[j : j + 1])).sum().item()

    pairs = [(i, j) for i in range(8) for j in range(8)]
    claim("RoPE: q·k at places i and j is q·k at i + 100 and j + 100",
          all(abs(score(i, j) - score(i + 100, j + 100)) < 1e-4 for i, j in pairs))  # fmt: skip
    i = torch.arange(8)
    claim("ALiBi: what is added to a score is the same 100 tokens later",
          torch.equal(alibi_bias(alibi_slopes(4), i, i), alibi_bias(alibi_slopes(4), i + 100, i + 100)))  # fmt: skip
    p = sinusoidal_table(LENGTH, D)
    dots = p @ p.T
    claim("sinusoids: p(i)·p(j) knows the distance alone, too",
          torch.allclose(dots[:8, :8], dots[100:108, 100:108], atol=1e-4))  # fmt: skip


@torch.no_grad()
def claims_about_models(T: int) -> None:
    """How far the logits move when a text stands 50 places later; the models are not trained, which makes it worse."""
    idx, _ = latest(4, T)
    moved = {}
    for scheme in SCHEMES:
        model = gpt(scheme)
        moved[scheme] = (model(idx)[0] - model(idx, positions=torch.arange(T) + 50)[0]).abs().max().item()
    print("Largest change of a logit: " + ", ".join(f"{name} {x:.1e}" for name, x in moved.items()))
    claim("RoPE and ALiBi: a text gives the same logits wherever it stands", max(moved["rope"], moved["alibi"]) < 1e-5)
    claim("learned and sinusoidal: it does not", min(moved["learned"], moved["sinusoidal"]) > 1e-3)


def main(small: bool):
    claims_about_scores(D=16)
    claims_about_models(T=16)
    T, schemes = (16, ("learned", "alibi")) if small else (32, SCHEMES)
    shifts, longer = [0, 4, 8, 16, 32, 64, 96], 48 if small else 96
    shifted, long, models = {}, {}, {scheme: train(scheme, T, 100 if small else 250) for scheme in schemes}
    for scheme, model in models.items():
        shifted[scheme] = [accuracy(model, T, shift).mean().item() for shift in shifts]
        long[scheme] = accuracy(model, longer)
    print(f"\nTrained on texts of {T} tokens, % right, first where the text stands further back:")
    table(["places later", *map(str, shifts)], [[s, *(round(100 * x, 1) for x in shifted[s])] for s in schemes])
    print("then in a longer text:")
    parts = [slice(i, i + 16) for i in range(0, longer, 16)]
    table(["places", *(f"{part.start}-{part.stop - 1}" for part in parts)],
          [[s, *(round(100 * long[s][part].mean().item(), 1) for part in parts)] for s in schemes])  # fmt: skip
    claim("every model answers well within the length it was trained on", min(x[0] for x in shifted.values()) > 0.9)
    claim("learned positions fail further back, where ALiBi loses nothing",
          shifted["learned"][4] < 0.8 and max(shifted["alibi"]) - min(shifted["alibi"]) < 0.002)  # fmt: skip
    claim("learned positions fail in a longer text, and ALiBi reads on",
          long["learned"][T + 8 :].mean() < 0.6 and long["alibi"][T + 8 :].mean() > 0.85)  # fmt: skip
    lengths = models["learned"].pos_emb.weight.detach().norm(dim=-1)
    claim("a place that no training text had keeps a vector that means nothing: short, as it was drawn",
          lengths[:T].mean() > 1.5 * lengths[T:].mean())  # fmt: skip
    return T, shifts, shifted, long, lengths


def draw(T, shifts, shifted, long, lengths) -> None:
    fig, ((sines, circles, distance), (moved, further, norms)) = figure(2, 3, height=5.4)
    image = sines.imshow(sinusoidal_table(LENGTH, 32).numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    sines.set(title="sinusoids", xlabel="channel", ylabel="place")
    fig.colorbar(image, ax=sines, ticks=[-1, 0, 1])
    cos, sin = rope_table(LENGTH, 16, 10000.0)
    for ring, (pair, colour) in enumerate(zip((0, 1, 2), COLOURS, strict=False)):
        radius = 3 - ring
        circles.plot(
            radius * cos[:8, pair], radius * sin[:8, pair + 8], "o-", color=colour, markersize=4, linewidth=0.8
        )
        for t in range(8 if ring < 2 else 0):  # the third turns too little for numbers
            circles.annotate(str(t), (radius * cos[t, pair], radius * sin[t, pair + 8]), fontsize=6.5, xytext=(3, 2),
                             textcoords="offset points")  # fmt: skip
    circles.set(title="RoPE: three pairs turn", aspect="equal", xticks=[], yticks=[])
    circles.spines[:].set_visible(False)
    p, d = sinusoidal_table(LENGTH, 32), torch.arange(65)
    distance.plot(d, (p[:65] @ p[0]) / 16, color=ORANGE, label="sinusoids, p·p")
    distance.plot(d, cos[:65].mean(-1), color=BLUE, label="RoPE, q = k")
    for slope, style in zip(alibi_slopes(4)[2:], ("--", ":"), strict=True):
        distance.plot(d, 1 - slope * d, color=GREY, linestyle=style, label=f"ALiBi, slope 1/{1 / slope:.0f}")
    distance.set(title="score by distance", xlabel="tokens apart", ylim=(-0.9, 1.1))
    distance.legend(fontsize=7.5, loc="lower right")
    for (scheme, values), colour in zip(shifted.items(), COLOURS, strict=False):
        moved.plot(shifts, [100 * x for x in values], marker="o", markersize=4, color=colour, label=scheme)
        smooth = long[scheme].unfold(0, 8, 1).mean(-1)
        further.plot(torch.arange(len(smooth)) + 4, 100 * smooth, color=colour, label=scheme)
    further.axvline(T, color=GREY, linestyle=":")
    norms.axvline(T, color=GREY, linestyle=":")
    moved.set(title="the text stands further back", xlabel="places later", ylabel="% right", ylim=(0, 105))
    moved.legend(fontsize=7.5)
    further.set(title=f"longer than the {T} of training", xlabel="place", ylim=(0, 105))
    norms.plot(lengths, color=BLUE)
    norms.set(title="learned vectors' length", xlabel="place", ylim=(0, None))
    save(fig, "10_positions.svg")


def check(rope) -> None:
    """The exercise: rope(x (D,), t, theta) → the rotated vector (D,) of the token at place t."""
    torch.manual_seed(1)
    for D, t, theta in ((2, 1, 10000.0), (4, 0, 10000.0), (4, 3, 10000.0), (8, 50, 100.0)):
        x, (cos, sin) = torch.randn(D), rope_table(t + 1, D, theta)
        expect(f"rope(x of {D} numbers, t={t}, theta={theta:.0f})", rope(x.clone(), t, theta),
               rotate(x.view(1, 1, 1, D), cos[t:], sin[t:]).flatten())  # fmt: skip


if __name__ == "__main__":
    run(main, draw, check, asks="rope")
