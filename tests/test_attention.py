"""Attention, its masks, packing, padding and the cache: each fast path equals the plain one."""

from itertools import product

import pytest
import torch

from decoding.cache import KVCache
from model import (
    GPT,
    GPTConfig,
    Mask,
    attention,
    attention_mask,
    prepare_mask,
)
from tests.helpers import LOSS_OPTIONS, POSITIONS, WINDOWS, assert_close, label, random, tokens

OPTIONS = [
    *({"position": position} for position in POSITIONS),
    *({"position": position, "n_kv_head": 2} for position in ("rope", "alibi")),
    {"n_kv_head": 1, "head_dim": 6},
    {"norm": "layernorm"},
    {"norm": "layernorm", "bias": True, "position": "learned", "mlp": "gelu", "qk_norm": False},
    {"bias": True},
    {"qkv_bias": True},
    *({"mlp": mlp} for mlp in ("geglu", "gelu", "gelu_exact", "relu2")),
    {"nope_every": 2},
    {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 16},
    {"qk_norm": False},
    {"tie_embeddings": False},
    {"norm_head": True},
    {"norm_head": True, "tie_embeddings": False},
]
# Each with causal or without it, but a window needs it
CAUSAL_OR_NOT = [*product(OPTIONS, (True, False)), *((options, True) for options in WINDOWS)]
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 4 + [2] * 2, [0] * 5 + [7] + [3] * 3])
RIGHT_PADDED = torch.arange(9) < torch.tensor([[9], [6]])
LEFT_PADDED = RIGHT_PADDED.flip(1)  # with a causal mask, the first queries of row 1 see nothing


def gradients(y, weights, probe=None):
    """Of a random projection of y, with respect to each weight."""
    projected = (y * (random(*y.shape) if probe is None else probe)).sum()
    return torch.autograd.grad(projected, weights, materialize_grads=True)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def written_out_attention(q, k, v, M):
    """softmax(QKᵀ/√D + M)V in float64, one query of one head at a time, over the visible keys alone."""
    B, H, T, D = q.shape
    M, group, y = M.expand(B, H, T, k.size(2)), H // k.size(1), q * 0
    for b, h, t in product(range(B), range(H), range(T)):
        seen = [s for s in range(k.size(2)) if M[b, h, t, s] > -torch.inf]
        if seen:
            scores = torch.stack([q[b, h, t].dot(k[b, h // group, s]) / D**0.5 + M[b, h, t, s] for s in seen])
            weights = (scores - scores.max().detach()).exp()
            y[b, h, t] = weights / weights.sum() @ v[b, h // group, seen]
    return y


def numbers(visible):
    """Booleans as the M that is added."""
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)


def as_mask(given):
    """What `attention` is given: a mask, nothing, "causal", or a tensor where a query may have nothing to attend to."""
    if isinstance(given, Mask):
        return given
    if isinstance(given, torch.Tensor):
        return Mask(given, may_have_empty_rows=True)
    return Mask(causal=True) if given == "causal" else None


TRIL = torch.ones(9, 9, dtype=torch.bool).tril()
BAND = TRIL & torch.ones(9, 9, dtype=torch.bool).triu(-3)  # a window of 4
SAME = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])[:, None]
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0]).double()
LOWERED = -SLOPES[:, None, None] * (torch.arange(9)[:, None] - torch.arange(9)).abs()
SOME = random(2, 1, 9, 5) > -0.5
SOME[0, 0, 3] = SOME[1, 0, 8] = False  # these two see nothing
# name: (queries T, keys S, what `attention` is given, the M that it means)
MASKS = {
    "none": (9, 9, None, torch.zeros(9, 9)),
    "cross": (9, 5, None, torch.zeros(9, 5)),
    "one query": (1, 5, None, torch.zeros(1, 5)),
    "causal": (9, 9, "causal", numbers(TRIL)),
    "causal as booleans": (9, 9, TRIL, numbers(TRIL)),
    "causal chunk": (4, 9, TRIL[5:], numbers(TRIL[5:])),
    "padding": (9, 9, RIGHT_PADDED[:, None, None], numbers(RIGHT_PADDED[:, None, None])),
    "causal and left padding": (9, 9, m := TRIL & LEFT_PADDED[:, None, None], numbers(m)),
    "documents": (9, 9, m := (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])[:, None], numbers(m)),
    "all": (9, 9, m := m & TRIL & RIGHT_PADDED[:, None, None], numbers(m)),
    "cross, some see nothing": (9, 5, SOME, numbers(SOME)),
    "numbers": (9, 9, m := random(2, 4, 9, 9), m),
    "numbers for cross": (9, 5, m := random(1, 4, 9, 5), m),
    "numbers and minus infinity": (9, 5, m := m + numbers(SOME), m),
    "window": (9, 9, Mask(causal=True, window=4), numbers(BAND)),
    "window of 1": (9, 9, Mask(causal=True, window=1), numbers(torch.eye(9, dtype=torch.bool))),
    "window and documents": (9, 9, Mask(causal=True, window=4, documents=DOCUMENTS), numbers(BAND & SAME)),
    "window and alibi": (9, 9, Mask(causal=True, window=4, slopes=SLOPES), numbers(BAND) + LOWERED),
    "nothing": (9, 9, m := torch.zeros(9, 9, dtype=torch.bool), numbers(m)),
    "nothing in numbers": (9, 9, numbers(m), numbers(m)),
}


@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_both_kinds_of_attention_and_their_gradients_equal_the_written_out_softmax(name, K):
    T, S, mask, M = MASKS[name]
    qkv = [x.requires_grad_() for x in (random(2, 4, T, 6), random(2, K, S, 6, seed=3), random(2, K, S, 6, seed=4))]
    expected = written_out_attention(*qkv, M)
    slopes = gradients(expected, qkv)
    for kind in ("math", "flash"):
        y = attention(*qkv, as_mask(mask), kind=kind)
        assert_close(y, expected)
        for mine, theirs in zip(gradients(y, qkv), slopes, strict=True):
            assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["math", "flash"])
@pytest.mark.parametrize("numeric", [False, True])
def test_queries_that_may_look_at_nothing_get_zeros_and_finite_gradients(kind, numeric, dtype):
    q, k, v = (random(2, 4, T, 8, seed=T).to(dtype).requires_grad_() for T in (9, 5, 5))
    v.data[1, :, 4] = 1e4  # large values must leave no trace either
    mask = numbers(SOME).to(dtype) if numeric else SOME
    y = attention(q, k, v, as_mask(mask), kind=kind)
    dead = ~SOME.any(-1).expand(2, 4, 9)
    assert dead.sum() == 8 and (y[dead] == 0).all() and (y[~dead] != 0).all()
    slopes = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(slope.isfinite().all() for slope in slopes) and (slopes[0][dead] == 0).all()


@pytest.mark.parametrize("kind", ["math", "flash"])
def test_attention_dropout_drops_that_share_of_the_weights_and_scales_up_the_rest(kind):
    torch.manual_seed(0)
    q, k, identity = random(4, 4, 32, 32), random(4, 4, 32, 32, seed=2), torch.eye(32).double().expand(4, 4, 32, 32)
    weights, dropped = (attention(q, k, identity, kind=kind, dropout=p) for p in (0.0, 0.3))
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.7) < 0.02
    assert_close(dropped[kept], weights[kept] / 0.7, 1e-6)


PLACES = torch.tensor([[2, 3], [0, 1], [5, 6]])
PACKED = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3] * 7, [0, 1, 0, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    "T, positions, documents",
    [(7, None, None), (7, None, PACKED), (3, None, None), (1, None, None), (2, PLACES, None), (1, PLACES[:, :1], None)],
    ids=["all", "packed", "chunk", "one", "ragged chunk", "ragged one"],
)
@pytest.mark.parametrize("padding", [None, torch.arange(7) < torch.tensor([[7], [3], [5]])], ids=["", "padded"])
@pytest.mark.parametrize("causal, window", [(True, 0), (True, 3), (True, 1), (False, 0)])
def test_the_mask_shows_exactly_who_may_look_at_whom(causal, window, padding, T, positions, documents):
    hiding = {"causal": causal, "window": window, "padding": padding, "documents": documents}
    mask = attention_mask(T, 7, positions=positions, **hiding)
    if mask.documents is not None or mask.window:
        mask = prepare_mask(mask, random(1), T, kind="math")
        shown = mask.bias == 0
    elif mask.bias is None:
        assert not mask.causal or T == 7
        shown = torch.ones(1, 1, T, 7, dtype=torch.bool)
        shown = shown.tril() if mask.causal else shown
    else:
        shown = mask.bias
    shown = shown.expand(3, 1, T, 7)
    # No batch without padding pays for rows that it cannot have; on the left, or with all of its document cut off, a
    # query of a padded one may see nothing.
    assert mask.may_have_empty_rows == (padding is not None)
    assert mask.may_have_empty_rows or shown.any(-1).all()
    for b, t, j in product(range(3), range(T), range(7)):
        i = 7 - T + t if positions is None else positions[b, t]
        visible = not causal or j <= i and (not window or i - j < window)
        visible &= padding is None or bool(padding[b, j])
        visible &= documents is None or bool(documents[b, i] == documents[b, j])
        assert shown[b, 0, t, j] == visible


def test_the_kernel_is_given_no_mask_where_none_is_needed():
    assert attention_mask(7, 7) == Mask(causal=True)
    assert attention_mask(7, 7, window=7) == Mask(causal=True)
    assert attention_mask(1, 7) == attention_mask(1, 7, window=7) == attention_mask(7, 7, causal=False) == Mask()


# ---------------------------------------------------------------------------------------------------------------------
# Flash = math, in the whole model

INPUTS = {
    "causal": {},
    "right padding": {"padding": RIGHT_PADDED},
    "left padding": {"padding": LEFT_PADDED},
    "documents": {"documents": DOCUMENTS},
    "documents and padding": {"documents": DOCUMENTS, "padding": LEFT_PADDED},
    "positions": {"positions": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 0, 1, 2]])},
}


@pytest.mark.parametrize(
    "options, causal", CAUSAL_OR_NOT, ids=lambda x: label(x) if isinstance(x, dict) else f"causal={x}"
)
def test_flash_equals_math_for_every_option_and_input(tiny_gpt, options, causal):
    model = tiny_gpt(**options, causal=causal)
    for name, inputs in INPUTS.items():
        results = []
        for model.config.attention in ("flash", "math"):
            logits, _ = model(tokens(2, 9), **inputs)
            results.append([logits, *gradients(logits, list(model.parameters()))])
        assert logits.isfinite().all(), name
        for flash, math_ in zip(*results, strict=True):
            assert_close(flash, math_)


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=label)
def test_flash_equals_math_in_training_with_every_loss_option(tiny_gpt, options):
    model = tiny_gpt(**options).train()
    results = []
    for model.config.attention in ("flash", "math"):
        _, loss = model(tokens(2, 9), tokens(2, 9, seed=3))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for flash, math_ in zip(*results, strict=True):
        assert_close(flash, math_.to(flash.dtype), 1e-6)  # the loss is taken in float32


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 1, 4], [7, 1, 1, 1], [3, 7], [10]], ids=str)
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("options", [*({"position": p} for p in POSITIONS), *WINDOWS, {"nope_every": 2}], ids=label)
def test_cached_decoding_equals_recomputing_everything(tiny_gpt, options, n_kv_head, chunks):
    model, idx = tiny_gpt(**options, n_kv_head=n_kv_head), tokens(3, 10)
    cache = KVCache(model.config, 3, 10, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(piece, cache=cache)[0] for piece in idx.split(chunks, dim=1)]
        assert_close(torch.cat(pieces, dim=1), model(idx)[0])


@pytest.mark.parametrize("kind", ["flash", "math"])
@pytest.mark.parametrize("options", [*({"position": p} for p in POSITIONS), {"n_kv_head": 2}, *WINDOWS], ids=label)
@torch.no_grad()
def test_each_row_of_a_ragged_batch_is_what_it_is_alone(tiny_gpt, options, kind):
    model = tiny_gpt(**options, attention=kind)
    rows: list[list[int]] = [[], [], [], []]
    cache = KVCache(model.config, 4, 16, dtype=torch.float64)
    # A prompt each, two single tokens, a chunk for all, and chunks of different lengths once more.
    for step, lengths in enumerate([[3, 7, 1, 5], [1] * 4, [1] * 4, [2] * 4, [2, 1, 3, 3]]):
        idx = tokens(4, max(lengths), seed=step)  # what lies beyond a row's length is anything
        logits, _ = model(idx, cache=cache.expect(lengths=lengths))
        for row, new, n, mine in zip(rows, idx.tolist(), lengths, logits, strict=True):
            row += new[:n]
            assert_close(mine[:n], model(torch.tensor([row]))[0][0, -n:])
    assert cache.lengths.tolist() == [len(row) for row in rows] and cache.longest == 12


@torch.no_grad()
def test_last_only_gives_the_logits_of_each_rows_last_real_token(tiny_gpt):
    model, idx = tiny_gpt(), tokens(3, 8)
    everywhere, _ = model(idx)
    assert_close(model(idx, last_only=True)[0], everywhere[:, -1:])
    cache = KVCache(model.config, 3, 8, dtype=torch.float64)
    last, _ = model(idx, cache=cache.expect(lengths=[2, 8, 5]), last_only=True)
    assert_close(last, everywhere[[0, 1, 2], [1, 7, 4]].unsqueeze(1))


def test_more_tokens_than_the_cache_or_the_context_can_hold_are_refused(tiny_gpt):
    model = tiny_gpt(block_size=8)
    with pytest.raises(ValueError, match="9 tokens do not fit into block_size=8"):
        model(tokens(2, 9))
    small, large = (KVCache(model.config, 2, size, dtype=torch.float64) for size in (4, 12))
    model(tokens(2, 3), cache=small)
    with pytest.raises(ValueError, match="the cache holds 4 tokens: 3 are in, 2 more do not fit"):
        model(tokens(2, 2), cache=small)
    model(tokens(2, 6), cache=large.expect(lengths=[2, 6]))
    with pytest.raises(ValueError, match="9 tokens do not fit into block_size=8"):
        model(tokens(2, 3), cache=large)
    assert small.lengths.tolist() == [3, 3] and large.lengths.tolist() == [2, 6]


@pytest.mark.parametrize("name", ["positions", "padding", "documents"])
def test_a_cache_together_with_a_mask_that_it_would_not_heed_is_refused(tiny_gpt, name):
    model = tiny_gpt()
    cache = KVCache(model.config, 2, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="and no positions, padding or documents: see KVCache.expect"):
        model(tokens(2, 9), cache=cache, **{name: DOCUMENTS})
    assert cache.used == 0


@torch.no_grad()
def test_what_was_expected_of_a_refused_call_is_not_expected_of_the_next_one(tiny_gpt):
    model, idx = tiny_gpt(), tokens(2, 4)
    cache = KVCache(model.config, 2, 8, dtype=torch.float64)
    model(idx, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 8 tokens"):
        model(tokens(2, 5), cache=cache.expect(lengths=[1, 5]))
    assert_close(model(idx, cache=cache)[0], model(torch.cat((idx, idx), dim=1))[0][:, 4:])
    assert cache.lengths.tolist() == [8, 8] and not cache.padded


def test_what_a_cache_cannot_expect_is_refused(tiny_gpt):
    cache, positions, visible = KVCache(tiny_gpt().config, 1, 8), torch.zeros(1, 1), torch.ones(1, 1, 1)
    for wrong in ({"positions": positions}, {"visible": visible},
                  {"lengths": [1], "positions": positions, "visible": visible}):  # fmt: skip
        with pytest.raises(ValueError, match="give lengths, or positions and visible together"):
            cache.expect(**wrong)


def test_a_cache_for_a_model_that_looks_ahead_is_refused(tiny_gpt):
    model = tiny_gpt(causal=False)
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        model(tokens(2, 9), cache=KVCache(model.config, 2, 9, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Packing and padding


PACKED_OPTIONS = [*({"position": p} for p in POSITIONS), {"n_kv_head": 2}]


@pytest.mark.parametrize(
    "options, causal", [*product(PACKED_OPTIONS, (True, False)), *((options, True) for options in WINDOWS)],
    ids=lambda x: label(x) if isinstance(x, dict) else f"causal={x}",
)  # fmt: skip
@pytest.mark.parametrize("kind", ["flash", "math"])
def test_packed_documents_are_read_as_if_each_were_alone(tiny_gpt, options, kind, causal):
    model, lengths, idx = tiny_gpt(**options, attention=kind, causal=causal), [3, 5, 1, 4], tokens(1, 13)
    weights, probe = list(model.parameters()), random(1, 13, 23, seed=8)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed, _ = model(idx, positions=positions, documents=documents)
    alone = torch.cat([model(document)[0] for document in idx.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone)
    for mine, theirs in zip(gradients(packed, weights, probe), gradients(alone, weights, probe), strict=True):
        assert_close(mine, theirs)

    changed = idx.clone()
    changed[:, 3:8] = (changed[:, 3:8] + 1) % 23
    after, _ = model(changed, positions=positions, documents=documents)
    same = (packed == after).all(-1)[0]
    assert same.tolist() == [True] * 3 + [False] * 5 + [True] * 5  # to the last bit


@pytest.mark.parametrize(
    "options", [{"position": p, "causal": c} for p, c in product(POSITIONS, (True, False))] + WINDOWS, ids=label
)
@pytest.mark.parametrize("kind", ["flash", "math"])
def test_a_padded_row_is_read_as_if_it_were_alone(tiny_gpt, options, kind):
    model, idx, lengths = tiny_gpt(**options, attention=kind), tokens(3, 9), [9, 4, 1]
    logits, _ = model(idx, padding=torch.arange(9) < torch.tensor(lengths)[:, None])
    for row, mine, n in zip(idx, logits, lengths, strict=True):
        assert_close(mine[:n], model(row[None, :n])[0][0])


@torch.no_grad()
def test_a_causal_model_sees_only_the_past_and_a_bidirectional_one_everything(tiny_gpt):
    idx = tokens(1, 9)
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 23
    for kind, position in product(("flash", "math"), POSITIONS):
        for causal in (True, False):
            model = tiny_gpt(position=position, attention=kind, causal=causal)
            same = (model(idx)[0] == model(changed)[0]).all(-1)[0].tolist()
            assert same == ([True] * 4 + [False] * 5 if causal else [False] * 9)
        model = tiny_gpt(position=position, attention=kind, sliding_window=3, n_layer=1)
        same = (model(idx)[0] == model(changed)[0]).all(-1)[0].tolist()
        assert same == [True] * 4 + [False] * 3 + [True] * 2


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str)
def test_on_a_gpu_flash_equals_math_compiled_equals_eager_and_cached_equals_recomputed(position, dtype, tolerance):
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=128, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=128, head_dim=64, position=position
    )
    model = GPT(config).cuda().eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    idx, targets = (torch.randint(101, (4, 128), device="cuda") for _ in range(2))
    documents = (torch.arange(128, device="cuda") // 50).expand(4, -1)
    padding = torch.arange(128, device="cuda") < torch.tensor([[128], [90], [1], [64]], device="cuda")

    def run(network, kind, **inputs):
        config.attention = kind
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits, loss = network(idx, targets, **inputs)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        return [logits.float(), loss, *(slope / slope.abs().max() for slope in slopes)]

    for inputs in ({}, {"documents": documents}, {"padding": padding}):
        for flash, math_ in zip(run(model, "flash", **inputs), run(model, "math", **inputs), strict=True):
            assert_close(flash, math_, tolerance)
    if position == "rope":  # compiling takes seconds; tests/test_cuda.py compiles packed rows and ALiBi
        torch._dynamo.reset()  # the cases before this one count towards the limit of recompilations
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            compiled = run(torch.compile(model), "flash")
        for mine, eager in zip(compiled, run(model, "flash"), strict=True):
            assert_close(mine, eager, tolerance)
    if dtype == torch.float32:
        cache = KVCache(config, 4, 128, device="cuda")
        with torch.no_grad():
            pieces = [model(piece, cache=cache)[0] for piece in idx.split([100, 20, *[1] * 8], dim=1)]
            assert_close(torch.cat(pieces, dim=1), model(idx)[0], tolerance)
