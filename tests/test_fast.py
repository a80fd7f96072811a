"""What makes decoding faster, against the plain model."""

import copy
import shutil

import pytest
import torch

from common.compiler import CPP_COMPILERS
from decoding import native
from decoding.beam import beam_search
from decoding.cache import KVCache
from decoding.fast import FewRowsNorm, Int8Linear, OneRowLinear, PackedLinear, next_step, speed_up
from decoding.stream import generate
from model import GPT, GPTConfig, Head, Norm
from tests.fake_cuda import emulated
from tests.helpers import WINDOWS, assert_close, label, random, tokens

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, CPP_COMPILERS)), reason="needs a C++ compiler")
SHAPES = [{}, {"norm_head": True}, {"tie_embeddings": False, "bias": True, "norm": "layernorm"}, {"mlp": "gelu"},
          {"mlp": "geglu", "qkv_bias": True, "nope_every": 2, "sliding_window": 5}]  # fmt: skip


@pytest.fixture
def model(tiny_gpt):
    """A small model in float32, with dimensions that are no multiples of anything."""

    def build(**options):
        return tiny_gpt(n_embd=20, head_dim=6, mlp_dim=30, vocab_size=101, **options).float()

    return build


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 200])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 64), (257, 96)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [pytest.param(OneRowLinear, marks=needs_compiler), PackedLinear])
def test_a_faster_layer_equals_the_layer(kind, rows, shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(shape[1], shape[0], bias=bias), torch.randn(rows, 1, shape[1])
    with torch.inference_mode():
        assert_close(kind(layer.weight, layer.bias)(x), layer(x), 1e-5)
        assert_close(kind(layer.weight.T.contiguous().T, layer.bias)(x), layer(x), 1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 64), (257, 191), (1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_product_with_one_row_is_that_of_the_rounded_weights(dtype, shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = (random(*shape) * 40).to(dtype)
    x, scale, bias = (random(n, seed=n).float() for n in (shape[1], *shape[:1] * 2))
    x = torch.stack((x, x), 1)[:, 0]  # not contiguous
    for s, b in ((None, None), (scale, None), (None, bias), (scale, bias)):
        expected = weight.double() @ x.double() * (1 if s is None else s) + (0 if b is None else b)
        size = weight.double().abs() @ x.double().abs() * (1 if s is None else s.abs()) + 1
        assert ((native.linear(x, weight, s, b) - expected).abs() <= 1e-6 * size).all()


@needs_compiler
@pytest.mark.parametrize("shape", [(1,), (1, 1, 20), (2, 3, 64), (1, 1, 9, 191)], ids=str)
def test_the_norm_of_few_rows_equals_the_norm(shape):
    norm = Norm(GPTConfig(vocab_size=1, norm_eps=1e-3), shape[-1]).requires_grad_(False)
    norm.weight.copy_(random(shape[-1]))
    few, wide = FewRowsNorm(norm), random(*shape[:-1], 2 * shape[-1]).float()
    for x in (wide[..., ::2], 1e-3 * wide[..., 1::2], torch.zeros(shape), wide[..., ::2].bfloat16()):
        assert few(x).dtype == x.dtype
        assert_close(few(x), norm(x), 1e-5 if x.dtype == torch.float32 else 0.0)


@pytest.fixture(params=[pytest.param(True, marks=needs_compiler), False], ids=["compiled", "without a compiler"])
def compiler(request, monkeypatch):
    """Whether decoding/native.cpp can be compiled."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 200])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 64), (257, 96)], ids=str)
def test_a_layer_of_bytes_is_within_half_a_step_of_the_layer(rows, shape, compiler):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(shape[1], shape[0]), torch.randn(rows, 1, shape[1]).bfloat16().float()
    with torch.inference_mode():
        error = (Int8Linear(layer.weight, layer.bias)(x) - layer(x)).abs()
        step = layer.weight.abs().amax(1) / 127  # a weight is off by half of it at most, the sum by bfloat16's rounding
        bound = x.abs().sum(-1, keepdim=True) * step / 2
    assert (error <= bound + 0.01 * (layer(x) - layer.bias).abs() + 1e-5).all()


@pytest.mark.parametrize("rows, kind", [pytest.param(1, OneRowLinear, marks=needs_compiler), (4, PackedLinear)])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_sped_up_model_gives_the_same_logits_and_texts(model, options, rows, kind):
    plain = model(**options)
    fast, idx = speed_up(copy.deepcopy(plain), rows), tokens(3, 16)
    assert sum(isinstance(m, kind) for m in fast.modules()) == 4 * 2 + 1
    with torch.inference_mode():
        assert_close(fast(idx)[0], plain(idx)[0], 1e-4)
    for search in (lambda m, prompts: generate(m, prompts, 20, temperature=0),
                   lambda m, prompts: generate(m, prompts, 20, seed=1),
                   lambda m, prompts: [beams[0].tokens for beams in beam_search(m, prompts, 20)]):  # fmt: skip
        for prompts in [PROMPTS] if rows > 1 else [[prompt] for prompt in PROMPTS]:
            assert search(fast, prompts) == search(plain, prompts)


@needs_compiler
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_weights_in_bfloat16_give_the_texts_of_a_float32_model_of_the_same_numbers(model, options):
    half = model(**options | {"block_size": 32}).bfloat16()
    plain, fast = copy.deepcopy(half).float(), speed_up(half)
    assert sum(m.weight.dtype == torch.bfloat16 for m in fast.modules() if isinstance(m, OneRowLinear)) == 4 * 2 + 1
    for search in (lambda m: generate(m, [[4]], 20, temperature=0), lambda m: generate(m, [[4]], 20)):
        assert search(fast) == search(plain)
    with torch.inference_mode():  # many rows are rounded to bfloat16
        expected = plain(tokens(3, 16))[0]
        assert (fast(tokens(3, 16))[0] - expected).abs().mean() < 0.02 * expected.std()


@needs_compiler
def test_what_native_layers_cannot_take_goes_through_pytorch(model):
    fast = speed_up(model())
    assert speed_up(fast) is fast  # twice does no harm
    with torch.inference_mode():
        expected = fast(tokens(1, 1))[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert (fast(tokens(1, 1))[0] - expected).abs().mean() < 0.05 * expected.std()
        assert OneRowLinear(torch.ones(3, 8), None)(torch.ones(0, 8)).shape == (0, 3)
        with pytest.raises(RuntimeError, match="shapes|size|dimension"):
            OneRowLinear(torch.ones(3, 8), None)(torch.ones(1, 7))


@pytest.fixture
def compilers(monkeypatch):
    """compilers(CXX) makes that the compiler."""

    def use(name):
        monkeypatch.setenv("CXX", name)
        native.library.cache_clear()

    yield use
    native.library.cache_clear()


@pytest.mark.parametrize(
    "compiler, why",
    [("no-such-compiler", "No such file or directory: 'no-such-compiler'"), ("false", "false ended with status 1"),
     ('"', "No closing quotation"), ("true", "native.so")],
    ids=["missing", "failing", "quotation", "empty"],
)  # fmt: skip
def test_without_a_compiler_decoding_says_so_once_and_takes_pytorchs_kernels(model, compilers, compiler, why, capfd):
    plain, (one, *_) = model(), PROMPTS
    compilers(compiler)
    fast = speed_up(copy.deepcopy(plain))
    assert sum(isinstance(m, PackedLinear) for m in fast.modules()) == 4 * 2 + 1
    assert generate(fast, [one], 20, temperature=0) == generate(plain, [one], 20, temperature=0)
    speed_up(copy.deepcopy(plain), quantize="int8")
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("note: ") and "native.cpp" in said and why in said


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_model_in_bytes_is_close_to_the_model(model, options):
    plain = model(**options)
    fast, idx = speed_up(copy.deepcopy(plain), quantize="int8"), tokens(3, 1)
    assert sum(isinstance(m, Int8Linear) for m in fast.modules()) == 4 * 2 + 1
    with torch.inference_mode():
        expected = plain(idx)[0]
        error = (fast(idx)[0] - expected).abs().mean()
    assert 0 < error < 0.05 * expected.std()


def test_what_cannot_be_sped_up_is_left_alone(tiny_gpt):
    model = tiny_gpt()  # float64
    assert speed_up(model) is model and isinstance(model.head, Head)
    with pytest.raises(ValueError, match="--quantize=int8 is for a CPU in float32, not cpu in torch.float64"):
        speed_up(model, quantize="int8")


@pytest.mark.parametrize("options", [*({"position": p} for p in ("rope", "learned", "alibi")), *WINDOWS], ids=label)
@torch.no_grad()
def test_steps_of_fixed_shape_equal_plain_steps_compiled_as_one_graph_without_recompiling(tiny_gpt, options):
    model, idx = tiny_gpt(**options), tokens(3, 14)
    plain, fixed = (KVCache(model.config, 3, 16, dtype=torch.float64) for _ in range(2))
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    step = torch.compile(lambda idx: model(idx, cache=fixed)[0], backend=backend, fullgraph=True)
    for cache in (plain, fixed):
        model(idx[:, :6], cache=cache.expect(lengths=[3, 6, 1]))
    fixed.freeze()
    for t in range(6, 14):
        expected = next_step(model, plain)(idx[:, t : t + 1])
        assert_close(step(idx[:, t : t + 1]), expected)
        if t == 8:  # what was done to warm up can be undone
            step(idx[:, :1])
            fixed.forget_last()
    assert len(graphs) == 1


def test_all_recordings_on_a_device_share_one_stream(tiny_gpt):
    with emulated("cuda") as gpu, pytest.MonkeyPatch.context() as patch:
        made, stream = [], torch.cuda.Stream
        patch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or stream(device))
        generate(tiny_gpt(block_size=32).float().to("cuda"), [[1, 2, 3]], 80, temperature=0)
    assert len(gpu.graphs) > 2 and made == [torch.device("cuda", 0)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "alibi", "none"])
def test_on_a_gpu_steps_as_cuda_graphs_equal_the_cpus(position):
    torch.manual_seed(0)
    config = GPTConfig(block_size=24, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, position=position)
    model = GPT(config).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    for options in ({"temperature": 0}, {"seed": 3}, {"repetition_penalty": 1.3, "seed": 3}):
        expected = generate(model.cpu().double(), PROMPTS, 60, **options)
        assert generate(model.cuda(), PROMPTS, 60, **options) == expected
    expected = [beams[0].tokens for beams in beam_search(model.cpu(), PROMPTS, 60)]
    assert [beams[0].tokens for beams in beam_search(model.cuda(), PROMPTS, 60)] == expected
