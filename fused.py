"""Fast forms of what model.py writes out: the same numbers without the large tensors. tests/test_fused.py proves it.

Notable:
- `Linear` multiplies by oneDNN on a CPU, which is twice as fast as PyTorch's own product on an AMD processor;
- `scaled_dot_product_attention` takes PyTorch's kernel in the precision that is fast on the device;
- `linear_cross_entropy` computes output head and loss a few rows at a time: the logits (B·T, V) never exist;
- `ByDocument` (on a CPU) and `Flex` (compiled, on CUDA) attend within the documents of packed rows, and `Flex` with
  ALiBi or a sliding window, without a mask of (T, T) numbers: their memory is linear in T.

Shapes: B batch, T time, C = n_embd, H heads, D = head_dim, V vocabulary; N = B·T rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}  # numbers; more on a GPU, which wants larger matrix products

# FlexAttention takes heads of at least 16 channels. Heads of more than 256 bytes (128 channels in bfloat16) get smaller
# blocks than its usual ones, which would not fit into the shared memory of most GPUs: an RTX 3090 or 4090 has 99 KB.
NARROWEST, WIDE = 16, 256
# With few queries they would go to another kernel, which is for decoding and knows other blocks.
SMALL_BLOCKS: Any = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "num_stages": 1, "FORCE_USE_FLEX_ATTENTION": True} | {
    f"bwd_BLOCK_{side}": 16 for side in ("M1", "N1", "M2", "N2")
}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of matrix products with x: autocast's if it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


def suits_onednn(x: Tensor, W: Tensor) -> bool:
    """Whether oneDNN computes x·Wᵀ, for x (…, n) and W (m, n): in float32 on a CPU, outside autocast, not compiled."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    fits = x.dim() > 1 and x.size(-1) == W.size(1) and x.numel() > 0 < W.numel()
    return fits and x.dtype == W.dtype == torch.float32 and x.device.type == W.device.type == "cpu"


def onednn(x: Tensor, W: Tensor) -> Tensor:
    """x·Wᵀ for x (…, n) and W (m, n) that suit oneDNN, outside autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")


def product(x: Tensor, W: Tensor) -> Tensor:
    """x·Wᵀ for x (…, n) and W (m, n), outside autograd.

    In float32 on a CPU oneDNN computes it. PyTorch would take MKL, which reaches half of an AMD processor's speed.
    """
    return onednn(x, W) if suits_onednn(x, W) else x @ W.T


class LinearByOneDNN(torch.autograd.Function):
    """y = x·Wᵀ + b and its gradients dy·W, dyᵀ·x and the sum of dy's rows, for x and W that suit oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        y = onednn(x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, dy):
        (x, weight), wanted, dx, dW = ctx.saved_tensors, ctx.needs_input_grad, None, None
        rows, x = dy.flatten(0, -2), x.flatten(0, -2)  # (N, m), (N, n)
        if wanted[0]:
            dx = onednn(dy, weight.T)
        if wanted[1]:  # with the narrower factor first, which takes up to half the time
            dW = onednn(x.T, rows.T).T if rows.size(1) > x.size(1) else onednn(rows.T, x.T)
        return dx, dW, rows.sum(0) if wanted[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x·Wᵀ + b for x (…, n), weight (m, n), bias (m,)."""
    if suits_onednn(x, weight):
        return LinearByOneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Output head and loss


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float = 0.0, max_z: float = 0.0
) -> Tensor:
    """Sum of the cross-entropies of the logits z = x·Wᵀ, over the rows whose target is not ignore_index.

    x: (N, C); weight: (V, C); targets: (N,). The loss of a row with target y is, in float32,

        log Σ exp z  -  (1-ε)·z_y  -  ε·mean(z)  +  c·(max z)²

    with ε = label_smoothing [Szegedy et al. 2016, section 7] and c = max_z [Baichuan 2, arXiv 2309.10305, section 2.5].
    The matrix products are in x's precision, or autocast's.
    """
    return LinearCrossEntropy.apply(x, weight, targets, compute_dtype(x), ignore_index, label_smoothing, max_z)


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while a chunk's logits are there: nothing is computed twice.

    The gradient with respect to a row's logits is softmax(z) - (1-ε)·onehot(y) - ε/V + 2c·(max z)·onehot(argmax z).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, ignore_index, smoothing, max_z):
        V, W = len(weight), weight.to(dtype)
        rows = max(256, LOGITS_AT_ONCE.get(x.device.type, 2**24) // V)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(dtype, torch.float32))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            xs, y = x[part].to(dtype), targets[part, None]
            z = product(xs, W).to(loss.dtype)
            counted = y != ignore_index
            y, one = y.where(counted, 0), counted.to(z.dtype)
            top = z.amax(-1, keepdim=True)
            losses = top - (1 - smoothing) * z.gather(1, y)
            if smoothing:
                losses = losses - smoothing * z.mean(-1, keepdim=True)
            if max_z:
                losses = losses + max_z * top.square()
            share = (z == top).to(z.dtype) if max_z else None  # equal largest ones share the gradient of max z
            dz = z.sub_(top).exp_()  # in z's place: exp z, up to a factor, then softmax(z), then the gradient
            total = dz.sum(-1, keepdim=True)
            loss = loss + (losses + total.log()).where(counted, 0).sum()
            if dx is None and dW is None:
                continue
            dz.mul_(one / total)  # zeros in rows that are not counted
            if smoothing:
                dz.sub_(one * (smoothing / V))
            dz.scatter_add_(1, y, one * (smoothing - 1))
            if share is not None:
                dz.addcmul_(share, one * (2 * max_z * top / share.sum(-1, keepdim=True)))
            dz = dz.to(dtype)
            if dx is not None:
                dx[part] = dz @ W
            if dW is not None:
                dW += dz.T @ xs
        ctx.save_for_backward(dx, dW)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return *(None if d is None else d * gradient.to(d.dtype) for d in ctx.saved_tensors), *[None] * 5


# ---------------------------------------------------------------------------------------------------------------------
# Attention without a (T, T) mask


def attention_dtype(q: Tensor) -> torch.dtype:
    """The precision of `scaled_dot_product_attention`: float32 under autocast on a CPU, else that of q.

    There the backward pass takes up to four times as long in bfloat16, even on CPUs that multiply faster in it.
    """
    return torch.float32 if q.device.type == "cpu" and torch.is_autocast_enabled("cpu") else q.dtype


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
    """F.scaled_dot_product_attention, with its options, in the precision of `attention_dtype`; gives q's."""
    dtype = attention_dtype(q)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    if dtype == q.dtype:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask, **options).type_as(q)


class ByDocument:
    """Attention of packed rows on a CPU: documents of similar lengths are cut out and attend side by side.

    documents: (B, T), the numbers of the documents that are packed into each row. Shorter documents of a group are
    padded on the right, where a causal mask hides the padding. window, with causal: how many keys a query sees, itself
    included (0 = all of its document); documents that are longer get a mask of their own (n, L, L) booleans.
    """

    def __init__(self, documents: Tensor, causal: bool, window: int = 0):
        self.causal, self.window = causal, window
        B, _ = documents.shape
        names = documents - documents.min()
        names = (names + torch.arange(B)[:, None] * (names.max() + 1)).flatten()  # a document's number in the batch
        order = names.argsort(stable=True)  # token numbers in the flattened batch, document after document
        lengths = names[order].unique_consecutive(return_counts=True)[1]
        tokens = order.split(lengths.tolist())
        # (n, L) token numbers, which of them are no padding, and which keys a query sees, if that needs a mask
        self.groups: list[tuple[Tensor, Tensor, Tensor | None]] = []
        by_length = sorted(tokens, key=len)
        while by_length:
            shortest = len(by_length[0])
            group = [t for t in by_length if len(t) <= shortest + shortest // 4 + 8]
            by_length = by_length[len(group) :]
            L = len(group[-1])
            index = torch.stack([F.pad(t, (0, L - len(t)), value=int(t[0])) for t in group])
            real = torch.arange(L) < torch.tensor([len(t) for t in group])[:, None]
            self.groups.append((index, real, self.visible(index, real)))

    def visible(self, index: Tensor, real: Tensor) -> Tensor | None:
        """Which keys each query of a group sees, (n, 1, L or 1, L), or None if "all" or "those before it" says it."""
        if not self.causal:
            return None if real.all() else real[:, None, None]
        if not self.window or (index.amax(1) - index.amin(1)).max() < self.window:
            return None
        distance = index[:, :, None] - index[:, None]  # in the row, where a document's tokens may lie apart
        return ((distance < self.window) & torch.ones(distance.shape[1:], dtype=torch.bool).tril())[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """q, k, v: (B, H, T, D) → (B, H, T, D)."""
        B, H, T, D = q.shape
        q, k, v = (x.transpose(1, 2).reshape(B * T, H, D) for x in (q, k, v))
        parts, places = [], []
        for index, real, visible in self.groups:
            n, L = index.shape
            cut = [x[index.flatten()].view(n, L, H, D).transpose(1, 2) for x in (q, k, v)]
            causal = self.causal and visible is None
            y = scaled_dot_product_attention(*cut, attn_mask=visible, is_causal=causal, dropout_p=dropout)
            parts.append(y.transpose(1, 2)[real])
            places.append(index[real])
        back = torch.cat(places).argsort()
        return torch.cat(parts)[back].view(B, T, H, D).transpose(1, 2)


class Flex:
    """Attention of packed rows, ALiBi and windows on CUDA, one fused kernel that the compiler makes [Dong et al. 2024].

    documents: (B, T) or None. slopes: ALiBi's, (H,) or None. window, with causal: how many keys a query sees (0 = all).
    It must be called within a compiled network, and knows no dropout.
    """

    def __init__(
        self, T: int, causal: bool, documents: Tensor | None, slopes: Tensor | None, device: torch.device,
        window: int = 0,
    ):  # fmt: skip
        def visible(b, h, i, j):
            seen = i >= j if causal else i == i
            seen = seen & (i - j < window) if window else seen
            return seen if documents is None else seen & (documents[b, i] == documents[b, j])

        def score(score, b, h, i, j):
            return score - slopes[h] * (i - j).abs()

        self.score = None if slopes is None else score
        self.mask = create_block_mask(visible, None if documents is None else len(documents), None, T, T, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """q, k, v: (B, H, T, D) → (B, H, T, D)."""
        D = q.size(-1)
        if D < NARROWEST:
            q, k, v = (F.pad(x, (0, NARROWEST - D)) for x in (q, k, v))
        options = SMALL_BLOCKS if D * q.element_size() > WIDE else None
        y = flex_attention(q, k, v, self.score, self.mask, scale=D**-0.5, kernel_options=options)
        return y[..., :D]
