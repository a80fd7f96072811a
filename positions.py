"""How a network is told where tokens stand: RoPE's angles and their scaling, sinusoids, and ALiBi's slopes.

Notable:
- all tables follow from a few numbers of the config; none is learned or saved;
- angles are computed in float64, as those of late positions are large, and kept as float32.

Shapes: T time (queries), S time (keys), C = n_embd, H heads, D = head_dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# RoPE


class RopeScaling(NamedTuple):
    """How RoPE's frequencies are lowered, so that a trained model reads `factor` times as many tokens.

    original: the context before, in tokens. low, high: a frequency that turns fewer than `low` times within it is
    divided by factor, and one that turns more than `high` times is kept, for it tells nearby tokens apart.
    """

    kind: str = "none"  # none, linear, llama3 or yarn
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0

    @classmethod
    def of(cls, config) -> "RopeScaling":
        """That of a GPTConfig."""
        return cls(config.rope_scaling, config.rope_factor, config.rope_original, config.rope_low, config.rope_high)

    def check(self, theta: float) -> None:
        """Raise ValueError for what does not go together; the message names the fields of GPTConfig."""
        if self.kind == "none" and self.factor != 1:
            raise ValueError(f"rope_factor is {self.factor} and rope_scaling is none: choose linear, llama3 or yarn")
        if self.kind in ("llama3", "yarn") and self.original < 1:
            raise ValueError(f"rope_scaling={self.kind} needs rope_original, the context before scaling, in tokens")
        if self.high <= self.low:
            raise ValueError(f"rope_high ({self.high}) must be above rope_low ({self.low})")
        if self.kind == "yarn" and theta <= 1:
            raise ValueError(f"rope_scaling=yarn needs a rope_theta above 1, not {theta}")


def kept_shares(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """The share of each frequency that is kept, (D/2,); the rest of it is divided by the factor.

    linear: none is kept [position interpolation, Chen et al. 2023, arXiv 2306.15595].
    llama3: a line in the number of turns within the original context, from 0 at low to 1 at high [the released code of
    Llama 3.1; Grattafiori et al. 2024, arXiv 2407.21783].
    yarn: a line in the number of the pair, from 1 at the pair that turns `high` times to 0 at the one that turns `low`
    times, rounded to whole pairs [Peng et al. 2023, arXiv 2309.00071, section 3.2, as in the authors' code].
    """
    if scaling.kind == "linear":
        return torch.zeros_like(frequencies)
    if scaling.kind == "llama3":
        turns = scaling.original * frequencies / (2 * math.pi)
        return ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    D = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        """i, not rounded, with original · θ^(-2i/D) = 2π · times."""
        return D * math.log(scaling.original / (2 * math.pi * times)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.high)), 0)
    last = min(math.ceil(pair_that_turns(scaling.low)), D - 1)
    i = torch.arange(D // 2, dtype=frequencies.dtype)
    return 1 - ((i - first) / max(last - first, 0.001)).clamp(0, 1)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """The angle of each pair i per token, (D/2,): θ^(-2i/D) [Su et al. 2021, section 3.2.2], or less if scaled."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None or scaling.kind == "none":
        return frequencies
    kept = kept_shares(frequencies, theta, scaling)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def position_angles(length: int, frequencies: Tensor) -> Tensor:
    """Position times frequency, (length, number of frequencies), in float64."""
    return torch.outer(torch.arange(length, dtype=torch.float64), frequencies)


def rope_table(
    length: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cos and sin of the angle by which each channel is rotated at positions 0…length-1, each (length, D).

    Channels i and i+D/2 are a pair, with one angle; channel i of sin has a minus sign, as `model.rotate` needs it.
    YaRN lengthens both, and so queries and keys, by 0.1·ln(factor) + 1, which makes the attention of a longer context
    as sharp as before [Peng et al. 2023, section 3.4].
    """
    angles = position_angles(length, rope_frequencies(head_dim, theta, scaling))
    gain = 0.1 * math.log(scaling.factor) + 1 if scaling is not None and scaling.kind == "yarn" else 1.0
    cos, sin = (gain * angles.cos()).float(), (gain * angles.sin()).float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Sinusoids and ALiBi


def sinusoidal_table(length: int, n_embd: int) -> Tensor:
    """Sines in even channels, cosines in odd ones: (length, C) [Vaswani et al. 2017, section 3.5]."""
    angles = position_angles(length, rope_frequencies(n_embd, 10000.0))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def alibi_slopes(n_head: int) -> Tensor:
    """ALiBi's slope of each head, by which its attention scores fall per token of distance: (H,), 2^(-8h/H), h = 1…H.

    A number of heads that is no power of two takes the slopes of the power below it, and then every second one of
    the power above, as the authors' code does [Press et al. 2022, section 3].
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    return torch.tensor(slopes[:n_head])


def alibi_bias(slopes: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """What ALiBi adds to the scores, -slope·|i-j|: (B or 1, H, T, S), for positions i (B, T) or (T,), j like i."""
    distance = (i.view(-1, 1, i.size(-1), 1) - j.view(-1, 1, 1, j.size(-1))).abs()
    return -slopes.view(-1, 1, 1) * distance


# ---------------------------------------------------------------------------------------------------------------------
# All tables of a model


def position_tables(config) -> dict[str, Tensor]:
    """The tables by which a model of that config knows positions, by name; none for learned positions and for none.

    A model that is made on the meta device, which has no numbers, gets none of them.
    """
    if torch.get_default_device().type == "meta":
        return {}
    if config.position == "sinusoidal":
        return {"sinusoids": sinusoidal_table(config.block_size, config.n_embd)}
    if config.position == "alibi":
        return {"slopes": alibi_slopes(config.n_head)}
    if config.position == "rope":
        cos, sin = rope_table(config.block_size, config.head_dim, config.rope_theta, RopeScaling.of(config))
        return {"cos": cos, "sin": sin}
    return {}
