"""What makes decoding faster, against the plain model."""

import copy
import shutil

import pytest
import torch

from common.compiler import CPP_COMPILERS
from decoding import native
from decoding.beam import beam_search
from decoding.cache import KVCache
from decoding.fast import FewRowsBlocks, FewRowsLinear, Int8Linear, PackedLinear, next_step, speed_up
from decoding.stream import generate
from model import GPT, GPTConfig, Head
from tests.fake_cuda import emulated
from tests.helpers import WINDOWS, assert_close, label, random, tokens

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, CPP_COMPILERS)), reason="needs a C++ compiler")
SHAPES = [{}, {"norm_head": True}, {"tie_embeddings": False, "bias": True, "norm": "layernorm"}, {"mlp": "gelu"},
          {"mlp": "geglu", "qkv_bias": True, "nope_every": 2, "sliding_window": 5}]  # fmt: skip
BLOCKS = [*SHAPES, {"mlp": "gelu_exact", "position": "learned", "norm": "layernorm", "post_norm": True, "bias": True},
          {"mlp": "relu2", "position": "sinusoidal", "qk_norm": False}, {"n_kv_head": 1, "position": "none"},
          {"n_kv_head": 2, "position": "alibi", "post_norm": True}, {"position": "alibi", "sliding_window": 3},
          {"head_dim": 64, "n_embd": 130, "mlp_dim": 200, "norm": "layernorm"}]  # fmt: skip


@pytest.fixture
def model(tiny_gpt):
    """A small model in float32, with dimensions that are no multiples of anything."""

    def build(**options):
        return tiny_gpt(**{"n_embd": 20, "head_dim": 6, "mlp_dim": 30, "vocab_size": 101} | options).float()

    return build


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 200])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 64), (257, 96)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [pytest.param(FewRowsLinear, marks=needs_compiler), PackedLinear])
def test_a_faster_layer_equals_the_layer(kind, rows, shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(shape[1], shape[0], bias=bias), torch.randn(rows, 1, shape[1])
    with torch.inference_mode():
        assert_close(kind(layer.weight, layer.bias)(x), layer(x), 1e-5)
        assert_close(kind(layer.weight.T.contiguous().T, layer.bias)(x), layer(x), 1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 64), (257, 191), (1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_product_with_few_rows_is_that_of_the_rounded_weights(dtype, shape, rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (out, n), weight = shape, (random(*shape) * 40).to(dtype)
    scale, bias = random(out, seed=2).float(), random(out, seed=3).float()
    x = random(rows, 2, n, seed=4).float()[:, 0]  # not contiguous
    for s, b in ((None, None), (scale, None), (None, bias), (scale, bias)):
        expected = x.double() @ weight.double().T * (1 if s is None else s) + (0 if b is None else b)
        size = x.double().abs() @ weight.double().abs().T * (1 if s is None else s.abs()) + 1
        assert ((native.NativeLinear(weight, s, b, n)(x) - expected).abs() <= 1e-6 * size).all()
    wide = torch.cat((weight, torch.ones_like(weight)), 1)  # numbers beyond a row's are not read
    assert_close(native.NativeLinear(wide, None, None, n)(x), native.NativeLinear(weight, None, None, n)(x), 0.0)


@pytest.fixture(params=[pytest.param(True, marks=needs_compiler), False], ids=["compiled", "without a compiler"])
def compiler(request, monkeypatch):
    """Whether decoding/native.cpp can be compiled."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda dtype: None)
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


@pytest.mark.parametrize("rows, kind", [pytest.param(4, FewRowsLinear, marks=needs_compiler), (9, PackedLinear)])
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
        for prompts in (PROMPTS, PROMPTS[2:3]):
            assert search(fast, prompts) == search(plain, prompts)


@pytest.fixture
def counted(monkeypatch):
    """How often decoding/native.cpp computed all blocks, as a list of the rows of these calls."""
    calls, run = [], native.NativeBlocks.__call__
    monkeypatch.setattr(
        native.NativeBlocks, "__call__", lambda self, x, *rest: calls.append(len(x)) or run(self, x, *rest)
    )
    return calls


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", BLOCKS, ids=label)
@torch.inference_mode()
def test_blocks_in_cpp_equal_the_blocks(model, counted, options, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "ALONE", 0)
    plain, idx = model(**options).double(), tokens(3, 14)
    fast = speed_up(copy.deepcopy(plain).float())
    expected, found = (KVCache(plain.config, 3, 16, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for m, cache in ((plain, expected), (fast, found)):
        m(idx[:, :6], cache=cache.expect(lengths=[3, 6, 1]))
    own = torch.arange(14) < torch.tensor([9, 10, 12])[:, None]  # beams side by side: which slots each row's two see
    for start, end, special in ((6, 7, {}), (7, 8, {}), (8, 10, {"positions": torch.tensor([[5, 5], [8, 8], [3, 3]])})):
        if special:
            special["visible"] = torch.stack((own, own), 1)[:, :, :end].clone()
            special["visible"][:, 0, 9], special["visible"][:, 1, 8] = False, False
        y, z = (m(idx[:, start:end], cache=c.expect(**special))[0] for m, c in ((plain, expected), (fast, found)))
        assert_close(z.double(), y, 1e-4)
    for a, b in ((expected.k, found.k), (expected.v, found.v), (expected.positions, found.positions)):
        assert_close(b.double(), a.double(), 1e-4)
    assert counted == [3, 3, 3]


@needs_compiler
@pytest.mark.parametrize("options", BLOCKS, ids=label)
def test_weights_in_bfloat16_give_the_texts_of_a_float32_model_of_the_same_numbers(model, counted, options):
    half = model(**options | {"block_size": 32}).bfloat16()
    plain, fast = copy.deepcopy(half).float(), speed_up(half)
    assert sum(m.weight.dtype == torch.bfloat16 for m in fast.modules() if isinstance(m, FewRowsLinear)) == 4 * 2 + 1
    for search in (lambda m: generate(m, [[4], [9]], 20, temperature=0), lambda m: generate(m, [[4]], 20),
                   lambda m: [beams[0].tokens for beams in beam_search(m, [[4]], 20)]):  # fmt: skip
        assert search(fast) == search(plain)
    assert len(counted) == 3 * 20  # also the prompts, of one token each
    with torch.inference_mode():
        assert_close(fast(tokens(3, 16))[0], plain(tokens(3, 16))[0], 0.02 if plain.config.norm_head else 1e-4)


@needs_compiler
def test_what_native_layers_cannot_take_goes_through_pytorch(model, counted):
    fast = speed_up(model())
    assert speed_up(fast) is fast  # twice does no harm
    assert sum(isinstance(m, FewRowsBlocks) for m in fast.modules()) == 1
    with torch.inference_mode():
        expected = fast(tokens(1, 1))[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert (fast(tokens(1, 1))[0] - expected).abs().mean() < 0.05 * expected.std()
        assert FewRowsLinear(torch.ones(3, 8), None)(torch.ones(0, 8)).shape == (0, 3)
        with pytest.raises(ValueError, match="rows of 8 numbers, not of 7"):
            FewRowsLinear(torch.ones(3, 8), None)(torch.ones(1, 7))
    assert not counted


@needs_compiler
@torch.inference_mode()
def test_a_cache_of_another_model_or_batch_is_refused(model, counted):
    fast, idx = speed_up(model(n_kv_head=2)), tokens(3, 1)

    def cache(B=3, dtype=torch.float32, **other):
        return KVCache(model(**{"n_kv_head": 2} | other).config, B, 16, dtype=dtype)

    for wrong in (cache(B=1), cache(B=4), cache(n_layer=1), cache(n_kv_head=1), cache(head_dim=8),
                  cache(dtype=torch.bfloat16)):  # fmt: skip
        with pytest.raises((RuntimeError, IndexError)):
            fast(idx, cache=wrong)
    assert not counted and fast(idx, cache=cache())[0].isfinite().all() and counted == [3]


@needs_compiler
def test_a_network_that_is_broken_is_said_to_be_so(model):
    for mlp in ("swiglu", "geglu", "gelu", "gelu_exact", "relu2"):
        plain = model(mlp=mlp)
        plain.blocks[0].mlp.up.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="not a number"):
            generate(speed_up(plain), [[4]], 5)


def test_the_rows_of_a_weight_may_lie_anywhere(compiler):
    weight, x = random(64, 48).float().T, random(3, 64).float()
    assert_close(Int8Linear(weight, None)(x), Int8Linear(weight.contiguous(), None)(x), 0.0)


@needs_compiler
def test_a_sped_up_model_keeps_the_numbers_that_it_was_made_of(model):
    fast = speed_up(model(norm="layernorm", bias=True))
    expected = generate(fast, [[4]], 20, temperature=0)
    fast.blocks.bfloat16().float()  # other numbers for the norms, elsewhere in memory
    others = [torch.full((n,), torch.nan) for n in (6, 20) for _ in range(100)]
    assert generate(fast, [[4]], 20, temperature=0) == expected and others
    with pytest.raises(ValueError, match="pointers cannot be pickled"):
        copy.deepcopy(fast)


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
    assert not any(isinstance(m, FewRowsBlocks) for m in fast.modules())
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
