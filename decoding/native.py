"""Compile decoding/native.cpp for this machine, and call it: the blocks of a GPT, and a linear layer, for few rows.

The structs hold addresses of numbers, so that their tensors are kept (`kept`), whatever becomes of the model's.
"""

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from common.compiler import cpp_compiler
from decoding.cache import KVCache
from decoding.text import note
from model import Block, GPTConfig

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O2", "-march=native", "-fopenmp", "-shared", "-fPIC")
PATIENCE = 30  # seconds that the compiler may take
WEIGHTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int8: "int8_t"}
MLPS = ("swiglu", "geglu", "gelu", "gelu_exact", "relu2")  # in the order of native.cpp: MLP
ROWS = 16  # most rows that the functions take
FEW = 8  # rows up to which they are faster than PyTorch's kernels in float32
ALONE = 1 << 16  # products of numbers, up to which one thread is faster than several
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


def struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A struct of native.cpp: (the names of fields, separated by blanks; their type), in order."""
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for names, kind in fields
                                                         for field in names.split()]})  # fmt: skip


Linear = struct("Linear", ("W s b", POINTER), ("out n stride", INTEGER))
Norm = struct("Norm", ("w b", POINTER))
Layer = struct("Layer", ("norm_attention q_norm k_norm norm_mlp", Norm), ("qkv out up down", Linear),
               ("rotates", INTEGER))  # fmt: skip
Config = struct("Config", ("n_embd n_head n_kv_head head_dim mlp_dim layernorm post_norm mlp", INTEGER),
                ("norm_eps", ctypes.c_float))  # fmt: skip
Step = struct("Step", ("B T S", INTEGER), ("cos sin bias", POINTER), ("bias_b bias_h bias_t", INTEGER),
              ("k v", POINTER), ("layer b head", INTEGER))  # fmt: skip
FUNCTIONS = {
    "run_linear": (POINTER, POINTER, POINTER, INTEGER, ctypes.c_int),
    "run_blocks": (POINTER, INTEGER, POINTER, POINTER, POINTER, POINTER, ctypes.c_int),
}


@lru_cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of native.cpp for weights of a type, or None where it cannot be compiled, which a note says.

    Compiling takes about 0.6 seconds, so each process does it anew: a library that is kept might meet another
    processor.
    """
    try:
        return compiled(WEIGHTS[dtype])
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"{error.cmd[0]} ended with status {error.returncode}"]
        why = next((line for line in lines if "error" in line), lines[0])
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        why = str(error)
    note_once(f"note: decoding is slower without decoding/native.cpp, which needs a C++ compiler with OpenMP: {why}")
    return None


note_once = lru_cache(note)  # for all types of weights


def compiled(weight: str) -> ctypes.CDLL:
    """Compile and load native.cpp. Raises OSError, ValueError, AttributeError or SubprocessError if that fails."""
    words = cpp_compiler()
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))  # its own options come last
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/native.so"
        command = [*words[:first], *FLAGS, f"-DWEIGHT={weight}", *words[first:], str(SOURCE), "-o", file]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                       timeout=PATIENCE)  # fmt: skip
        try:
            found = ctypes.CDLL(file)
        except OSError as error:
            raise OSError(str(error).replace(f"{folder}/", "")) from None
    for name, arguments in FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def address(x: Tensor | ctypes.Structure | ctypes.Array | None) -> int | None:
    """Where a tensor's or a struct's numbers begin; None for None, which is a null pointer."""
    if x is None:
        return None
    return x.data_ptr() if isinstance(x, Tensor) else ctypes.addressof(x)


def threads(products: int) -> int:
    """How many threads are worth it for so many products of a weight and a number."""
    return torch.get_num_threads() if products > ALONE else 1


def is_few(x: Tensor) -> bool:
    """Whether x (…, n) are rows that the functions below take: few, in float32, on the CPU."""
    return 0 < x.numel() <= ROWS * x.size(-1) and x.dtype == torch.float32 and x.is_cpu


class NativeLinear:
    """scale ⊙ (weight·x) + bias for few rows x (…, n), in float32, (…, out). No gradient flows.

    weight: (out, n or more), of a type in WEIGHTS, each row contiguous; only its first n numbers count. scale, bias:
    (out,) in float32, or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, n: int):
        if n > 1 and weight.stride(1) != 1:
            raise ValueError("the rows of a weight must be contiguous")
        self.out, self.n, self.dtype, self.kept = len(weight), n, weight.dtype, (weight, scale, bias)
        self.struct = Linear(address(weight), address(scale), address(bias), self.out, n, weight.stride(0))

    def __call__(self, x: Tensor) -> Tensor:
        if x.size(-1) != self.n:
            raise ValueError(f"the layer takes rows of {self.n} numbers, not of {x.size(-1)}")
        x, y = x.contiguous(), x.new_empty(x.shape[:-1] + (self.out,))
        rows = x.numel() // self.n
        count = threads(rows * self.out * self.n)
        library(self.dtype).run_linear(address(self.struct), address(x), address(y), rows, count)
        return y


def norm_struct(layer: nn.Module) -> ctypes.Structure:
    """The struct of a model's Norm, or of an Identity, which has no weight."""
    return Norm(address(getattr(layer, "weight", None)), address(getattr(layer, "bias", None)))


class NativeBlocks:
    """All blocks of a GPT for few tokens x (B, T, C), in float32, and without post_norm the norm after them, `last`.

    Each linear layer of the blocks has a NativeLinear as its attribute `native`. No gradient flows.
    """

    def __init__(self, blocks: list[Block], last: nn.Module, config: GPTConfig):
        layers = []
        for block in blocks:
            attention, mlp = block.attention, block.mlp
            norms = map(norm_struct, (block.norm_attention, attention.q_norm, attention.k_norm, block.norm_mlp))
            linears = [layer.native for layer in (attention.qkv, attention.out, mlp.up, mlp.down)]
            layers.append(Layer(*norms, *(layer.struct for layer in linears), attention.rotates))
        self.layers, self.last = (Layer * len(layers))(*layers), norm_struct(last)
        numbers = [getattr(config, name) for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "mlp_dim")]
        self.config = Config(*numbers, config.norm == "layernorm", config.post_norm, MLPS.index(config.mlp),
                             config.norm_eps)  # fmt: skip
        self.dtype, self.weights = linears[0].dtype, sum(layer.out * layer.n for layer in linears)  # of a block
        self.kept = [weight.detach() for layer in (*blocks, last) for weight in layer.parameters()]

    def can_fill(self, cache: KVCache, B: int) -> bool:
        """Whether the cache is one for B texts of this model, in float32."""
        shape = (len(self.layers), B, self.config.n_kv_head, cache.k.size(3), self.config.head_dim)
        return not cache.frozen and all(
            x.shape == shape and x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in (cache.k, cache.v)
        )

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None, cache: KVCache) -> Tensor:
        """Returns (B, T, C), and puts the tokens' keys and values where a cache that it `can_fill` has placed them.

        rope: (cos, sin), (B or 1, 1, T, D) each. bias: see `Mask`; numbers for the slots that are taken.
        """
        (B, T, _), S, H, D = x.shape, cache.used, self.config.n_head, self.config.head_dim
        x, strides = x.detach().clone(memory_format=torch.contiguous_format), (0, 0, 0)
        if bias is not None:
            bias = bias.expand(*bias.shape[:3], S).contiguous().expand(B, H, T, S)
            strides = bias.stride()[:3]
        cos, sin = (None, None) if rope is None else (table.expand(B, 1, T, D).contiguous() for table in rope)
        step = Step(B, T, S, address(cos), address(sin), address(bias), *strides, address(cache.k), address(cache.v),
                    *cache.k.stride()[:3])  # fmt: skip
        library(self.dtype).run_blocks(address(self.layers), len(self.layers), address(self.last), address(self.config),
                                       address(step), address(x), threads(B * T * self.weights))  # fmt: skip
        return x
