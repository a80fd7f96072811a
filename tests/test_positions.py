"""How tokens are told their positions: RoPE and its scaling, sinusoids, learned positions, ALiBi, against formulas."""

import math
from itertools import product

import pytest
import torch

from model import Mask, prepare_mask, rotate
from positions import RopeScaling, alibi_slopes, rope_frequencies, rope_table, sinusoidal_table
from tests.helpers import POSITIONS, assert_close, random, tokens


def test_rope_is_multiplication_by_a_complex_number_of_the_positions_angle():
    x, theta = random(2, 3, 7, 10), 500.0
    t, i = torch.arange(7).double()[:, None], torch.arange(5).double()
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.exp(1j * t * theta ** (-2 * i / 10))
    assert_close(rotate(x, *rope_table(7, 10, theta)), torch.cat((turned.real, turned.imag), dim=-1), 1e-6)


def test_rope_angles_stay_exact_in_long_contexts():
    cos, sin = rope_table(100_001, 8, 10000.0)
    for i in range(4):
        angle = 100_000 * 10000.0 ** (-2 * i / 8)
        assert abs(cos[-1, i] - math.cos(angle)) < 1e-6 and abs(sin[-1, i + 4] - math.sin(angle)) < 1e-6


@pytest.mark.parametrize(
    "kind, D, theta, factor, original, low, high",
    [
        ("linear", 64, 10000.0, 2.5, 0, 1.0, 4.0),
        ("llama3", 128, 500000.0, 8.0, 8192, 1.0, 4.0),  # Llama 3.1
        ("llama3", 64, 500000.0, 32.0, 8192, 1.0, 4.0),  # Llama 3.2
        ("yarn", 128, 1000000.0, 4.0, 32768, 1.0, 32.0),  # Qwen 3
        ("yarn", 16, 10.0, 4.0, 8192, 1.0, 32.0),  # every pair turns often
        ("yarn", 8, 1e9, 4.0, 512, 1.0, 1.5),  # one pair only is between
    ],
)
def test_scaled_frequencies_are_those_of_transformers(kind, D, theta, factor, original, low, high):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor} | dict(zip(names, (low, high), strict=True))
    rope |= {"original_max_position_embeddings": original} if original else {}
    config = LlamaConfig(
        hidden_size=2 * D, num_attention_heads=2, max_position_embeddings=1 << 17, rope_parameters=rope
    )
    expected, gain = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    scaling = RopeScaling(kind, factor, original, low, high)
    frequencies = rope_frequencies(D, theta, scaling)
    torch.testing.assert_close(frequencies.float(), expected, rtol=1e-6, atol=0)
    cos, sin = rope_table(9, D, theta, scaling)
    angles = torch.arange(9).double()[:, None] * frequencies.repeat(2)
    assert_close(cos, (gain * angles.cos()).float(), 1e-6)
    assert_close(sin, (gain * angles.sin()).float() * torch.ones(D).index_fill(0, torch.arange(D // 2), -1), 1e-6)


def test_rope_scores_depend_only_on_the_distance(tiny_gpt):
    cos, sin = rope_table(64, 8, 10000.0)
    q, k = random(8), random(8, seed=2)
    q, k = (rotate(x.expand(1, 1, 64, 8), cos, sin)[0, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-63, 64):
        along = scores.diagonal(distance)
        assert_close(along, along[:1].expand_as(along), 1e-5)
    assert scores[0].std() > 0.1


@torch.no_grad()
def test_shifting_all_positions_changes_nothing_for_relative_schemes_only(tiny_gpt):
    idx = tokens(2, 9)
    for position in POSITIONS:
        model = tiny_gpt(position=position)
        change = (model(idx, positions=torch.arange(9) + 5)[0] - model(idx)[0]).abs().max()
        assert change > 1e-2 if position in ("learned", "sinusoidal") else change < 1e-5


def test_alibi_slopes_are_those_of_the_paper():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    sixteen = [2 ** (-h / 2) for h in range(1, 17)]
    assert alibi_slopes(8).tolist() == eight
    assert_close(alibi_slopes(16), torch.tensor(sixteen), 1e-7)
    assert_close(alibi_slopes(12), torch.tensor(eight + sixteen[:8:2]), 1e-7)
    assert alibi_slopes(1).tolist() == [2**-8]


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_lowers_scores_by_the_slope_per_token_of_distance(tiny_gpt, causal):
    model = tiny_gpt(position="alibi", causal=causal)
    x, rope, mask = model.embed(tokens(2, 5), None, Mask(causal=causal), None)
    mask = prepare_mask(mask, x, 5)
    assert rope is None and not mask.causal and not mask.may_have_empty_rows
    for h, i, j in product(range(4), range(5), range(5)):
        expected = -torch.inf if causal and j > i else -(2.0 ** (-2 * (h + 1))) * abs(i - j)
        assert mask.bias[0, h, i, j] == expected


def test_sinusoidal_positions_follow_the_formula(tiny_gpt):
    table = sinusoidal_table(50, 16)
    for t, i in product(range(50), range(8)):
        angle = t / 10000 ** (2 * i / 16)
        assert abs(table[t, 2 * i] - math.sin(angle)) < 1e-6 and abs(table[t, 2 * i + 1] - math.cos(angle)) < 1e-6
    model, idx = tiny_gpt(position="sinusoidal"), tokens(2, 9)
    x, _, _ = model.embed(idx, None, Mask(causal=True), None)
    assert_close(x, model.tok_emb(idx) * 4 + table[:9].double())


def test_learned_positions_are_a_lookup(tiny_gpt):
    model, idx, positions = tiny_gpt(position="learned"), tokens(2, 9), tokens(2, 9, seed=5) % 16
    x, _, _ = model.embed(idx, None, Mask(causal=True), None)
    assert_close(x, model.tok_emb.weight[idx] + model.pos_emb.weight[:9])
    x, _, _ = model.embed(idx, positions, Mask(causal=True), None)
    assert_close(x, model.tok_emb.weight[idx] + model.pos_emb.weight[positions])


@torch.no_grad()
def test_without_positions_and_causality_order_means_nothing_and_with_either_it_does(tiny_gpt):
    idx, order = tokens(2, 9), torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])
    for position, causal in product(POSITIONS, (True, False)):
        model = tiny_gpt(position=position, causal=causal)
        change = (model(idx[:, order])[0] - model(idx)[0][:, order]).abs().max()
        assert change < 1e-10 if position == "none" and not causal else change > 1e-2
