"""The model as a whole: parts against formulas, transformers with the same weights, configs, counts, the start."""

import math
from dataclasses import replace

import pytest
import torch

from model import GPT, IGNORE, MLP, GPTConfig, Norm
from tests.helpers import LOSS_OPTIONS, POSITIONS, assert_close, label, random, tokens
from tests.twins import gpt2_twins, qwen3_twins
from training.device import flops_per_token
from training.optim import stacked_rows

# ---------------------------------------------------------------------------------------------------------------------
# Its parts, against their formulas


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norms_follow_their_formulas(eps):
    x, w, b = random(3, 5, 8) * 3 + 1, random(8, seed=2), random(8, seed=3)
    norms = [Norm(GPTConfig(norm=kind, bias=True, norm_eps=eps), 8).double() for kind in ("rmsnorm", "layernorm")]
    for norm in norms:
        norm.weight.data = w
    norms[1].bias.data = b
    rms = x / (x.square().sum(-1, keepdim=True) / 8 + eps).sqrt() * w
    mean = x.sum(-1, keepdim=True) / 8
    layer = (x - mean) / ((x - mean).square().sum(-1, keepdim=True) / 8 + eps).sqrt() * w + b
    assert_close(norms[0](x), rms)
    assert_close(norms[1](x), layer)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def gelu_by_tanh(x):
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))  # tanh(u) = 2·sigmoid(2u) - 1


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu", "gelu_exact", "relu2"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlps_follow_their_formulas(kind, bias):
    mlp, x = MLP(GPTConfig(n_head=1, n_embd=6, mlp_dim=10, mlp=kind, bias=bias)).double(), random(2, 3, 6)
    h = x @ mlp.up.weight.T + (mlp.up.bias if bias else 0)
    if kind == "swiglu":
        h = h[..., :10] * sigmoid(h[..., :10]) * h[..., 10:]
    elif kind == "geglu":
        h = gelu_by_tanh(h[..., :10]) * h[..., 10:]
    elif kind == "gelu":
        h = gelu_by_tanh(h)
    elif kind == "gelu_exact":
        h = h * (1 + (h / math.sqrt(2)).erf()) / 2
    else:
        h = torch.where(h > 0, h * h, 0)
    assert_close(mlp(x), h @ mlp.down.weight.T + (mlp.down.bias if bias else 0))


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=label)
def test_the_loss_is_the_written_out_mean_over_counted_targets(tiny_gpt, options):
    smoothing, weight = options.get("label_smoothing", 0.0), options.get("max_z_loss", 0.0)
    model, idx, targets = tiny_gpt(**options), tokens(2, 9), tokens(2, 9, seed=3)
    targets[0, :4] = targets[1, 7] = IGNORE
    for training in (True, False):
        logits, loss = model.train(training)(idx, targets)
        assert logits is None  # nobody has a use for them
        logits, terms = model(idx)[0], []
        for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
            if target != IGNORE:
                log_p = row - row.exp().sum().log()
                smooth = smoothing * training
                term = -(1 - smooth) * log_p[target] - smooth / 23 * log_p.sum()
                terms.append(term + training * weight * row.max() ** 2)
        assert len(terms) == 13
        assert_close(loss, sum(terms) / 13)
        assert_close(model(idx, targets, target_count=100)[1], sum(terms) / 100)


def test_a_batch_without_any_counted_target_has_loss_zero_and_zero_gradients(tiny_gpt):
    model = tiny_gpt(label_smoothing=0.1, max_z_loss=0.1).train()
    _, loss = model(tokens(2, 9), torch.full((2, 9), IGNORE))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("tie", [True, False])
def test_norm_head_multiplies_with_the_unit_vectors_of_the_head(tiny_gpt, tie):
    model, idx = tiny_gpt(norm_head=True, tie_embeddings=tie), tokens(2, 9)
    plain = tiny_gpt(tie_embeddings=False)
    plain.load_state_dict(model.state_dict())
    plain.head.weight.data = model.head.weight / model.head.weight.square().sum(-1, keepdim=True).sqrt()
    assert_close(model(idx)[0], plain(idx)[0])


def test_dropout_acts_in_training_only(tiny_gpt):
    model, idx = tiny_gpt(dropout=0.2), tokens(2, 9)
    assert torch.equal(model(idx)[0], model(idx)[0]) and torch.equal(model(idx)[0], tiny_gpt()(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The same weights in transformers


@pytest.mark.parametrize("kind", ["flash", "math"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_default_architecture_is_qwen3(tie, kind):
    assert_same_logits(*qwen3_twins(tie=tie, kind=kind))


@pytest.mark.parametrize("kind", ["flash", "math"])
def test_the_classic_architecture_is_gpt2(kind):
    assert_same_logits(*gpt2_twins(kind=kind))


@torch.no_grad()
def assert_same_logits(theirs, ours, tolerance=1e-4):
    idx = torch.randint(101, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx).logits
    assert expected.std() > 0.5
    assert_close(ours(idx)[0], expected, tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# The config, the counts, the beginning


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"position": "rotary"}, "position must be one of rope, learned, sinusoidal, alibi, none, not 'rotary'"),
        ({"norm": "batchnorm"}, "norm must be one of rmsnorm, layernorm"),
        ({"mlp": "relu"}, "mlp must be one of swiglu, geglu, gelu, gelu_exact, relu2"),
        ({"attention": "fast"}, "attention must be one of flash, math"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_head": 0}, "n_head must be at least 1"),
        ({"n_embd": -4}, "n_embd must be at least 1, not -4"),
        ({"vocab_size": -1}, "vocab_size must be at least 0"),
        ({"n_kv_head": -2}, "n_kv_head must be at least 0"),
        ({"head_dim": -2}, "head_dim must be at least 0"),
        ({"mlp_dim": -2}, "mlp_dim must be at least 0"),
        ({"max_z_loss": -0.1}, "max_z_loss must be at least 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"rope_scaling": "ntk"}, "rope_scaling must be one of none, linear, llama3, yarn"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor must be at least 1, not 0.5"),
        ({"rope_factor": 8.0}, "rope_factor is 8.0 and rope_scaling is none: choose linear, llama3 or yarn"),
        ({"rope_scaling": "llama3"}, "rope_scaling=llama3 needs rope_original, the context before scaling, in tokens"),
        ({"rope_scaling": "yarn"}, "rope_scaling=yarn needs rope_original"),
        ({"rope_scaling": "yarn", "rope_original": 64, "rope_theta": 1.0}, "needs a rope_theta above 1, not 1.0"),
        ({"rope_scaling": "linear", "position": "alibi"}, "rope_scaling and nope_every need position=rope, not alibi"),
        ({"nope_every": 4, "position": "none"}, "rope_scaling and nope_every need position=rope, not none"),
        ({"rope_low": 0.0}, "rope_low must be positive"),
        ({"rope_low": 4.0}, r"rope_high \(4.0\) must be above rope_low \(4.0\)"),
        ({"rope_original": -1}, "rope_original must be at least 0"),
        ({"nope_every": -1}, "nope_every must be at least 0"),
        ({"sliding_window": -1}, "sliding_window must be at least 0"),
        ({"sliding_window": 8, "causal": False}, "sliding_window needs causal=True"),
        ({"n_head": 6, "n_kv_head": 4}, r"n_head \(6\) must be a multiple of n_kv_head \(4\)"),
        ({"n_head": 2, "n_kv_head": 4}, r"n_head \(2\) must be a multiple of n_kv_head \(4\)"),
        ({"n_embd": 100, "n_head": 6}, r"n_embd \(100\) must be a multiple of n_head \(6\), or head_dim be set"),
        ({"head_dim": 15}, "head_dim must be even, not 15"),
        ({"position": "sinusoidal", "n_embd": 15, "n_head": 3}, "n_embd must be even, not 15"),
    ],
    ids=lambda x: label(x) if isinstance(x, dict) else "",
)
def test_an_impossible_config_is_refused_with_a_sentence_that_names_the_field(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        GPTConfig(**options)
    assert "\n" not in str(error.value)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be set"):
        GPT(GPTConfig())


def test_what_the_config_leaves_open_follows_from_the_rest():
    config = GPTConfig(n_embd=768, n_head=12)
    assert (config.n_kv_head, config.head_dim, config.mlp_dim) == (12, 64, 2048)
    assert GPTConfig(n_embd=768, n_head=12, mlp="geglu").mlp_dim == 2048
    assert GPTConfig(n_embd=768, n_head=12, mlp="gelu").mlp_dim == 3072
    assert GPTConfig(n_embd=100, n_head=6, head_dim=10).head_dim == 10
    assert GPTConfig(head_dim=15, position="alibi").head_dim == 15  # odd is odd only for rope


def test_weights_and_operations_are_counted_as_by_hand():
    modern = GPTConfig(
        block_size=32, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, head_dim=8, mlp_dim=40
    )
    matrices = 2 * (24 * (32 + 16 + 16) + 32 * 24 + 3 * 24 * 40)  # qkv, out, gate and up and down
    norms = 2 * (24 + 24 + 8 + 8) + 24
    attention_flops = 2 * 3 * 2 * 2 * 32  # layers × (forward and backward) × (QKᵀ and ·V) × a multiply and an add × HD
    model = GPT(modern)
    assert model.num_params() == 50 * 24 + matrices + norms
    assert flops_per_token(model) == 6 * (matrices + 50 * 24) + attention_flops * 32
    assert flops_per_token(model, 10) == 6 * (matrices + 50 * 24) + attention_flops * 10

    untied = GPT(replace(modern, tie_embeddings=False))
    assert untied.num_params() == model.num_params() + 50 * 24
    assert flops_per_token(untied) == flops_per_token(model)

    near = GPT(replace(modern, sliding_window=7, qkv_bias=True, mlp="geglu"))
    assert near.num_params() == model.num_params() + 2 * (32 + 16 + 16)
    assert flops_per_token(near) == flops_per_token(model, 7) and flops_per_token(near, 5) == flops_per_token(model, 5)

    gpt2 = GPTConfig(
        block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, position="learned", norm="layernorm",
        mlp="gelu", bias=True, qk_norm=False,
    )  # fmt: skip
    with torch.device("meta"):
        assert GPT(gpt2).num_params() == 124_439_808  # as published


def test_stacked_rows_names_the_weights_that_hold_several_matrices():
    options = {"vocab_size": 9, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 24, "head_dim": 8, "mlp_dim": 40}
    qkv = {f"blocks.{i}.attention.qkv.weight": [32, 16, 16] for i in range(2)}
    gates = {f"blocks.{i}.mlp.up.weight": [40, 40] for i in range(2)}
    model = GPT(GPTConfig(**options))
    assert stacked_rows(model) == stacked_rows(GPT(GPTConfig(**options, mlp="geglu", qkv_bias=True))) == qkv | gates
    assert all(
        weight.size(0) == sum(qkv.get(n) or gates.get(n, [weight.size(0)])) for n, weight in model.named_parameters()
    )
    assert stacked_rows(GPT(GPTConfig(**options, mlp="gelu"))) == qkv


@pytest.mark.parametrize("tie", [True, False])
def test_weights_start_as_the_table_says(tie):
    torch.manual_seed(0)
    options = {"vocab_size": 500, "n_layer": 8, "n_embd": 64, "n_head": 4, "bias": True, "norm": "layernorm"}
    model = GPT(GPTConfig(**options, position="learned", tie_embeddings=tie))
    special = {"out": 0.02 / math.sqrt(16), "down": 0.02 / math.sqrt(16), "tok_emb": 0.02 if tie else 0.1}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = special.get(name.split(".")[-2], 0.02)
            assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5, name
            assert abs(weight.std() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name
        else:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    _, loss = GPT(GPTConfig(vocab_size=500, n_embd=64, n_head=4))(tokens(4, 64), tokens(4, 64, seed=3))
    assert abs(loss - math.log(500)) < 0.1


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_one_tensor_and_untied_ones_two(tiny_gpt, tie):
    model = tiny_gpt(tie_embeddings=tie)
    assert (model.head.weight is model.tok_emb.weight) == tie
    assert ("head.weight" in dict(model.named_parameters())) != tie


def test_tables_are_not_saved(tiny_gpt):
    for position in POSITIONS:
        model = tiny_gpt(position=position)
        assert set(model.state_dict()) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
