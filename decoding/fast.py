"""Faster decoding of the same model: few rows in C++, weights laid out anew, int8 weights, and steps as CUDA graphs.

`speed_up` changes a model for decoding only: afterwards it can neither be trained, copied nor saved, nor its weights be
changed.
tests/test_fast.py proves that each of these equals the plain model in float32, except int8, which rounds the weights:
`sample.py --score=FILE --quantize=int8` measures how much that costs.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.layers import replace_layers
from decoding import native
from decoding.cache import KVCache
from decoding.kernels import read_tokens
from fused import linear
from model import GPT, Block, GPTConfig, Head, Mask

WORTH_RECORDING = 8  # fewest steps in which a CUDA graph saves more time than its recording takes
PACKED_ROWS = 16  # number of rows that packed weights are laid out for; the layout serves any other number too


class FewRowsLinear(nn.Module):
    """A linear layer with weights in float32 or bfloat16 that computes in float32, few rows by decoding/native.cpp."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight.detach().contiguous(), None if bias is None else bias.detach().float()
        self.native = native.NativeLinear(self.weight, None, self.bias, self.weight.size(1))

    def forward(self, x: Tensor) -> Tensor:
        if native.is_few(x):
            return self.native(x)
        y = linear(x.float(), self.weight.float())
        return y if self.bias is None else y + self.bias


class FewRowsBlocks(nn.Module):
    """All blocks of a GPT, and the norm after them, which decoding/native.cpp computes for few tokens, in float32.

    blocks: with linear layers that have `native`. last: the norm, or an Identity. What is no step of decoding goes
    through these one by one: prompts, many tokens, and calls without a cache.
    """

    def __init__(self, blocks: nn.ModuleList, last: nn.Module, config: GPTConfig):
        super().__init__()
        self.blocks, self.last, self.native = blocks, last, native.NativeBlocks(list(blocks), last, config)

    def forward(self, x: Tensor, rope, mask: Mask, cache: KVCache | None) -> Tensor:
        is_step = not mask.causal and mask.kernel is None and mask.empty_rows is None  # what bias says is all
        if is_step and native.is_few(x) and cache is not None and self.native.can_fill(cache, len(x)):
            return self.native(x, rope, mask.bias, cache)
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        return self.last(x)


class PackedLinear(nn.Module):
    """A linear layer for few rows: oneDNN lays the weight out once in the order in which its kernels read it.

    The usual kernels read the weight several times over for 2 to 30 rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer with weights as bytes: W ≈ diag(s)·Q, |Q| ≤ 127, one scale s per row (absmax quantisation)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        # The only copy of the layer; the rest is done in its place
        W = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.scale = torch.linalg.vector_norm(W, torch.inf, dim=1).clamp(min=1e-12) / 127
        self.columns = -W.size(1) % 16  # of zeros, which are added: PyTorch's kernel reads 16 columns at once
        self.q = F.pad(W.div_(self.scale[:, None]).round_().to(torch.int8), (0, self.columns))
        self.bias = None if bias is None else bias.detach().float()
        self.ones = torch.ones_like(self.scale, dtype=torch.bfloat16)
        self.native = None
        if native.library(torch.int8):
            self.native = native.NativeLinear(self.q, self.scale, self.bias, weight.size(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.native and native.is_few(x):
            return self.native(x)
        rows = F.pad(x.flatten(0, -2), (0, self.columns))
        if len(rows) <= native.ROWS:  # PyTorch's kernel takes activations in bfloat16
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.q, self.ones).float() * self.scale
        else:  # many rows are faster with the weights unpacked to float32 once
            y = linear(rows, self.q.float()) * self.scale
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def speed_up(model: GPT, rows: int = 1, quantize: str = "none") -> GPT:
    """Replace the model's blocks and linear layers by faster ones if it is on a CPU; returns the model.

    rows: how many texts or beams are decoded at once, for which the layers are chosen; they serve any number.
    quantize: "none" or "int8", which rounds weights of up to 32 bits, layer by layer. Weights in bfloat16 stay so, but
    for the token embedding, and are only sped up for few rows. What is sped up computes in float32; a model in another
    precision is left as it is. Raises ValueError for int8 and a model elsewhere.
    """
    weight = model.tok_emb.weight
    if quantize == "int8":
        check_int8(weight.device, torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)
        kind = Int8Linear
    elif weight.device.type != "cpu":
        return model
    elif rows <= native.FEW and weight.dtype in (torch.float32, torch.bfloat16) and native.library(weight.dtype):
        kind = FewRowsLinear
    elif weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        kind = PackedLinear
    else:
        return model

    def faster(_: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, nn.Linear):
            return None
        return kind(layer.rows() if isinstance(layer, Head) else layer.weight, layer.bias)

    replace_layers(model, faster)
    model.float()
    if getattr(model.head, "native", None) and all(type(block) is Block for block in model.blocks):
        last: nn.Module = nn.Identity()
        if not model.config.post_norm:
            last, model.norm = model.norm, last
        model.blocks = nn.ModuleList([FewRowsBlocks(model.blocks, last, model.config)])
    return model


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless int8 weights can be used: on a CPU, where they are multiplied with float32 numbers."""
    if device.type != "cpu" or dtype != torch.float32:
        raise ValueError(f"--quantize=int8 is for a CPU in float32, not {device.type} in {dtype}")


def next_step(model: GPT, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one token per row, (B, 1), adds it to the cache, and returns logits (B, 1, V)."""
    room = cache.k.size(3) - cache.used
    hooked = bool(model._forward_pre_hooks)  # such as gather a sharded model's weights: no graph can record them
    if cache.k.device.type == "cuda" and not hooked and room >= WORTH_RECORDING:
        return GraphedStep(model, cache)
    return lambda idx: read_tokens(model, idx, cache=cache)


@lru_cache
def recording_stream(device: torch.device):
    """The stream on which all graphs of a device are recorded; each further one would get its own cuBLAS workspace."""
    return torch.cuda.Stream(device)


class GraphedStep:
    """A step recorded once as a CUDA graph, and replayed from then on.

    The GPU computes a small model's step in less time than Python takes to launch its kernels one by one.
    """

    def __init__(self, model: GPT, cache: KVCache):
        # The graph reads and writes fixed addresses, so the model and the cache must live as long as it does.
        self.model, self.cache, self.device = model, cache, cache.k.device
        cache.freeze()
        self.idx = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=self.device)
        with torch.cuda.device(self.device):
            side = recording_stream(self.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # the first calls choose kernels and workspaces, and cannot be recorded
                for _ in range(2):
                    read_tokens(model, self.idx, cache=cache)
                    cache.forget_last()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.logits = read_tokens(model, self.idx, cache=cache)

    def __call__(self, idx: Tensor) -> Tensor:
        with torch.cuda.device(self.device):
            self.idx.copy_(idx)
            self.graph.replay()
        return self.logits
