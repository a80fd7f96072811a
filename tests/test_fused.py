"""The fast forms in fused.py equal what they replace: loss without logits, attention without a (T, T) mask."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

import fused
from model import Mask, attention, prepare_mask
from tests.helpers import assert_close, random
from tests.test_attention import gradients
from training.device import autocast

CPU = torch.device("cpu")
N, C, V, IGNORED = 700, 24, 50, -100  # rows: three chunks of at least 256


def plain_loss(x, weight, targets, smoothing, max_z):
    """The same from whole logits, by PyTorch's cross-entropy."""
    z = x @ weight.T
    loss = F.cross_entropy(z, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    return loss + max_z * (z.amax(-1).square() * (targets != IGNORED)).sum()


@pytest.fixture
def rows(monkeypatch):
    """x (N, C), weight (V, C) and targets (N,), a fifth of which are ignored; computed in three chunks."""
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cpu", V)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[::5] = IGNORED
    return random(N, C).requires_grad_(), random(V, C, seed=2).requires_grad_(), targets


def fused_loss(rows, smoothing=0.0, max_z=0.0):
    return fused.linear_cross_entropy(*rows, ignore_index=IGNORED, label_smoothing=smoothing, max_z=max_z)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (2, 4, 64), (3, 1, 17)], ids=str)
@pytest.mark.parametrize("m", [1, 5, 96])
def test_a_linear_layer_by_onednn_equals_the_product_in_float64_with_its_gradients(m, shape, bias):
    x, W, b, dy = random(*shape), random(m, shape[-1], seed=2), random(m, seed=3), random(*shape[:-1], m, seed=4)
    found = []
    for dtype in (torch.float32, torch.float64):
        taken = [v.to(dtype).requires_grad_() for v in ((x, W, b) if bias else (x, W))]
        y = fused.linear(*taken)
        assert (y.grad_fn.name() == "LinearByOneDNNBackward") == (dtype == torch.float32)
        found.append([y, *torch.autograd.grad(y, taken, dy.to(dtype))])
    for one, expected in zip(*found, strict=True):
        assert_close(one.double(), expected, 1e-4)


def test_a_linear_layer_computes_no_gradient_that_nobody_wants_and_names_wrong_shapes_as_pytorch_does():
    x, W = random(4, 6).float(), random(5, 6).float()
    for wanted in ((True, False), (False, True)):
        taken = [v.clone().requires_grad_(one) for v, one in zip((x, W), wanted, strict=True)]
        fused.linear(*taken).sum().backward()
        assert [v.grad is not None for v in taken] == list(wanted)
    assert fused.linear(torch.zeros(0, 6), W).shape == (0, 5) and fused.linear(x[0], W).shape == (5,)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused.linear(x[:, :5], W)


@pytest.mark.parametrize("max_z", [0.0, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_in_chunks_and_its_gradients_equal_those_of_whole_logits(rows, smoothing, max_z):
    x, weight, targets = rows
    expected = plain_loss(*rows, smoothing, max_z)
    loss = fused_loss(rows, smoothing, max_z)
    assert_close(loss, expected)
    with torch.no_grad():
        assert_close(fused_loss(rows, smoothing, max_z), expected)
    slopes = torch.autograd.grad(expected / 7, (x, weight))
    for mine, theirs in zip(torch.autograd.grad(loss / 7, (x, weight), retain_graph=True), slopes, strict=True):
        assert_close(mine, theirs)
    (again,) = torch.autograd.grad(loss / 7, x)  # a second time: nothing was overwritten
    assert_close(again, slopes[0])


def test_equal_largest_logits_share_the_gradient_of_max_z(rows):
    x, weight, targets = rows
    weight.data[:] = weight.data[:1]
    slopes = torch.autograd.grad(plain_loss(*rows, 0.0, 0.1), (x, weight))
    for mine, theirs in zip(torch.autograd.grad(fused_loss(rows, 0.0, 0.1), (x, weight)), slopes, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(rows, frozen):
    rows[frozen].requires_grad_(False)
    loss = fused_loss(rows)
    (slope,) = torch.autograd.grad(loss, rows[1 - frozen])
    rows[frozen].requires_grad_(True)
    assert_close(slope, torch.autograd.grad(plain_loss(*rows, 0.0, 0.0), rows[1 - frozen])[0])


def test_the_loss_compiles_as_one_graph(rows):
    torch._dynamo.reset()
    x, weight, _ = rows
    loss = torch.compile(fused_loss, backend="aot_eager", fullgraph=True)(rows, 0.1, 0.1)
    expected = torch.autograd.grad(plain_loss(*rows, 0.1, 0.1), (x, weight))
    for mine, theirs in zip(torch.autograd.grad(loss, (x, weight)), expected, strict=True):
        assert_close(mine, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Attention without a (T, T) mask


DOCUMENTS = {
    "one": torch.zeros(2, 40, dtype=torch.long),
    "many": torch.tensor([[0] * 3 + [1] * 20 + [2] * 5 + [-1] * 12, [5] + [0] * 39]),
    "one token each": torch.arange(80).view(2, 40),
    "in turns": torch.arange(80).view(2, 40) % 3,  # not contiguous
}


CAUSAL_AND_WINDOW = pytest.mark.parametrize("causal, window", [(True, 0), (True, 4), (True, 1), (False, 0)])


@CAUSAL_AND_WINDOW
@pytest.mark.parametrize("name", DOCUMENTS)
def test_attention_by_documents_and_its_gradients_equal_the_written_out_softmax(name, causal, window):
    qkv = [random(2, 3, 40, 8, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    mask = Mask(causal=causal, documents=DOCUMENTS[name], window=window)
    assert isinstance(prepare_mask(mask, qkv[0], 40).kernel, fused.ByDocument)
    y, expected = (attention(*qkv, mask, kind=kind) for kind in ("flash", "math"))
    assert_close(y, expected)
    for mine, theirs in zip(gradients(y, qkv), gradients(expected, qkv), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, 0.1]).double()], ids=["", "alibi"])
@CAUSAL_AND_WINDOW
@pytest.mark.parametrize("name", [None, *DOCUMENTS])
def test_flex_attention_and_its_gradients_equal_the_written_out_softmax(monkeypatch, name, causal, window, slopes):
    """On a CPU FlexAttention runs its mask and its scores in Python, and refuses gradients: but it can compute them."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    documents = None if name is None else DOCUMENTS[name]
    qkv = [random(2, 3, 40, 8, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    y = fused.Flex(40, causal, documents, slopes, torch.device("cpu"), window)(*qkv)
    expected = attention(*qkv, Mask(causal=causal, documents=documents, slopes=slopes, window=window), kind="math")
    assert_close(y, expected)
    for mine, theirs in zip(gradients(y, qkv), gradients(expected, qkv), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    "head_dim, dtype, small",
    [(8, torch.bfloat16, False), (128, torch.bfloat16, False), (256, torch.bfloat16, True), (128, torch.float32, True)],
)
def test_flex_attention_gets_heads_that_its_kernel_takes(monkeypatch, head_dim, dtype, small):
    """What a GPU's kernels take was found by compiling them for several GPUs: see RESULTS.md."""
    given = []

    def kernel(q, k, v, *_, scale, kernel_options):
        given.append((q.size(-1), scale, kernel_options))
        return v

    monkeypatch.setattr(fused, "flex_attention", kernel)
    q = torch.zeros(1, 2, 5, head_dim, dtype=dtype)
    assert fused.Flex(5, True, None, None, CPU)(q, q, q).shape == q.shape
    assert given == [(max(16, head_dim), head_dim**-0.5, fused.SMALL_BLOCKS if small else None)]


# ---------------------------------------------------------------------------------------------------------------------
# Memory and precision of a training step


def test_in_bfloat16_the_residual_stream_is_bfloat16_and_the_loss_close_to_float32s(tiny_gpt):
    idx = torch.randint(23, (4, 16), generator=torch.Generator().manual_seed(0))
    model, streams = tiny_gpt().float(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: streams.append(output.dtype))
    losses, slopes = [], []
    for dtype in ("float32", "bfloat16"):
        with autocast(CPU, dtype):
            _, loss = model(idx, idx.roll(-1, 1))
        losses.append(loss.item())
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    layers = len(model.blocks)
    assert streams == [torch.float32] * layers + [torch.bfloat16] * layers
    assert abs(losses[0] - losses[1]) < 2e-3 * losses[0]
    assert (slopes[0] - slopes[1]).norm() < 0.03 * slopes[0].norm()


@pytest.mark.parametrize("masked", ["causal", "booleans", "numbers"])
def test_under_autocast_a_cpu_attends_in_float32(masked):
    q, k, v = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    numbers = torch.zeros(5, 5).masked_fill(~visible, -torch.inf)
    mask = {"causal": None, "booleans": visible, "numbers": numbers.bfloat16()}[masked]
    written_out = (q.double() @ k.double().mT / 8**0.5 + numbers).softmax(-1) @ v.double()
    with autocast(CPU, "bfloat16"):
        y = fused.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), written_out, rtol=2**-8, atol=1e-6)  # rounded to bfloat16 once, at the end


def test_under_autocast_alibis_numbers_stay_in_float32(monkeypatch):
    masks, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **more: masks.append(x[3]) or kernel(*x, **more))
    q = torch.randn(1, 2, 300, 8).bfloat16()
    with autocast(CPU, "bfloat16"):
        attention(q, q, q, Mask(causal=True, slopes=torch.tensor([1.0, 0.3])))
    assert masks[0].dtype == torch.float32
    assert masks[0][0, 0, -1].tolist() == [float(-299 + j) for j in range(300)]  # in bfloat16 many run together


STEP = """
import sys, torch
from torch.nn import functional as F
from model import GPT, GPTConfig
def peak():  # ru_maxrss would begin with that of the process that starts this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=512, vocab_size=50_304)).train()
idx = torch.zeros(2, 512, dtype=torch.long)
F.cross_entropy(model(idx[:1, :9])[0].flatten(0, 1), idx[0, :9]).backward()  # what PyTorch needs in any case
before = peak()
if sys.argv[1] == "plain":
    loss = F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())
else:
    loss = model(idx, idx)[1]
loss.backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_step_with_50_thousand_tokens_needs_a_fraction_of_the_memory_of_whole_logits():
    peaks = [int(subprocess.check_output([sys.executable, "-c", STEP, kind])) for kind in ("plain", "fused")]
    assert peaks[1] < 0.6 * peaks[0], peaks
