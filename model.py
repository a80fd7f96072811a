"""A GPT in one file: token ids in, logits and a loss out.

Notable:
- one modern default (RoPE, RMSNorm, QK-norm, SwiGLU, no biases: the Qwen3 shape), the classic parts one option away;
- attention twice behind one function: the textbook softmax written out, and fused kernels; they agree;
- one function makes the mask for causal, padded, packed and bidirectional rows;
- nothing here knows about files, devices, processes, tokenizers or compilers; a KV cache is handed in from outside.

Shapes: B batch, T time (queries), S time (keys), C = n_embd, H heads, K key/value heads, D = head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

import fused
from positions import RopeScaling, alibi_bias, position_tables

IGNORE = -100  # a target with this value is not counted in the loss
GATED = ("swiglu", "geglu")  # MLPs with a gate, whose matrix and up's are stacked in one weight


@dataclass
class GPTConfig:
    block_size: int = 256  # longest context, in tokens
    vocab_size: int = 0  # number of token ids; 0 = as many as the tokenizer of the corpus has
    n_layer: int = 6  # transformer blocks
    n_encoder_layer: int = 0  # blocks of the encoder before them, which reads a source (seq2seq.py); 0 = no encoder
    n_head: int = 6  # query heads
    n_kv_head: int = 0  # key/value heads shared by groups of query heads; 0 = n_head
    n_embd: int = 384  # width of the residual stream
    head_dim: int = 0  # width of one head; 0 = n_embd / n_head
    mlp_dim: int = 0  # hidden width of the MLP; 0 = 4 n_embd, with a gate 8/3 n_embd (the same number of weights)
    dropout: float = 0.0  # probability of dropping an activation in training
    bias: bool = False  # biases in linear layers and LayerNorms
    qkv_bias: bool = False  # biases on queries, keys and values, whatever bias says
    causal: bool = True  # each token sees only its past; False = both directions, as in BERT
    sliding_window: int = 0  # each query sees only the last so many keys, itself included; 0 = all
    position: Literal["rope", "learned", "sinusoidal", "alibi", "none"] = "rope"  # how tokens are told their positions
    rope_theta: float = 10000.0  # base of the RoPE wavelengths; larger for longer contexts
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"  # how RoPE is stretched for longer contexts
    rope_factor: float = 1.0  # scaled RoPE: how many times longer the context becomes
    rope_original: int = 0  # llama3, yarn: the context before scaling, in tokens
    rope_low: float = 1.0  # llama3, yarn: frequencies with fewer turns in that context are divided by rope_factor
    rope_high: float = 4.0  # llama3, yarn: frequencies with more turns in it are kept; yarn's authors use 32
    nope_every: int = 0  # every so-many-th layer has no RoPE, as in SmolLM3; 0 = all layers have it
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # normalisation before each attention, MLP and the head
    norm_eps: float = 1e-6  # added to the variance before its root is taken
    post_norm: bool = False  # normalise after each residual sum, as in BERT, not before each attention and MLP
    qk_norm: bool = True  # normalise queries and keys in each head, before the rotation
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu2"] = "swiglu"  # activation of the MLP
    tie_embeddings: bool = True  # the output head shares the token embedding's weights
    norm_head: bool = False  # unit-length rows in the output head (NormHead of Baichuan 2)
    attention: Literal["flash", "math"] = "flash"  # flash: the fused kernel; math: the softmax written out
    label_smoothing: float = 0.0  # training: share of the target probability spread over the whole vocabulary
    max_z_loss: float = 0.0  # training: weight of (largest logit)^2; Baichuan 2 used 2e-4
    classes: str = ""  # of a classifier, separated by commas (classifier.py); "" = no classifier; filled from its data
    pool: Literal["mean", "first"] = "mean"  # classifier: what it reads of the hidden states of all tokens

    def __post_init__(self):
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)  # of a Literal, else ()
            if allowed and value not in allowed:
                raise ValueError(f"{field.name} must be one of {', '.join(allowed)}, not {value!r}")
        for names, is_allowed, allowed in (
            ("block_size n_layer n_head n_embd rope_factor", lambda n: n >= 1, "at least 1"),
            ("vocab_size n_kv_head head_dim mlp_dim max_z_loss", lambda n: n >= 0, "at least 0"),
            ("rope_original nope_every sliding_window n_encoder_layer", lambda n: n >= 0, "at least 0"),
            ("dropout label_smoothing", lambda p: 0 <= p < 1, "at least 0 and below 1"),
            ("rope_theta rope_low norm_eps", lambda x: x > 0, "positive"),
        ):
            for name in names.split():
                if not is_allowed(getattr(self, name)):
                    raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)}")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head}): set both")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}), or head_dim be set")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        for position, name in (("rope", "head_dim"), ("sinusoidal", "n_embd")):
            if self.position == position and getattr(self, name) % 2:
                raise ValueError(f"{position} turns pairs of channels: {name} must be even, not {getattr(self, name)}")
        if self.position != "rope" and (self.rope_scaling != "none" or self.nope_every):
            raise ValueError(f"rope_scaling and nope_every need position=rope, not {self.position}")
        if self.sliding_window and not self.causal:
            raise ValueError("sliding_window needs causal=True: it shows each query the last keys up to its own")
        RopeScaling.of(self).check(self.rope_theta)
        # 8/3 n_embd to the nearest multiple of 64: with a gate, three matrices then have as many weights as two without
        gated_dim = max(1, round(self.n_embd * 8 / 3 / 64)) * 64
        self.mlp_dim = self.mlp_dim or (gated_dim if self.mlp in GATED else 4 * self.n_embd)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding: rotate each pair (x_i, x_{i+D/2}) by its position's angle.

    x: (B, H, T, D); cos, sin: (T, D) or (B, 1, T, D), from `rope_table`, the first half of sin with a minus sign:
    x_i becomes x_i·cos θ - x_{i+D/2}·sin θ, and x_{i+D/2} becomes x_{i+D/2}·cos θ + x_i·sin θ [Su et al. 2021, eq. 34].
    The dot product of two rotated vectors depends only on the distance between their positions.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


class Mask(NamedTuple):
    """Which keys each query may attend to: the M of softmax(QKᵀ/√D + M)·V. `Mask()` hides nothing.

    For T = S: causal, each query sees the keys up to its own place; documents (B, T), the number of each token's
    document, outside which it sees nothing; slopes (H,), by which scores fall per token of distance (ALiBi); window,
    with causal: each query sees only the last so many of these keys, itself included (0 = all).
    bias: broadcastable to (B, H, T, S), any other M: numbers to add to the scores, or booleans, True for a visible key.
    may_have_empty_rows: whether a query may have nothing to attend to; `prepare_mask` computes empty_rows, which ones,
    (B or 1, H or 1, T, 1), and kernel, a fast form of attention.
    """

    bias: Tensor | None = None
    causal: bool = False
    documents: Tensor | None = None
    slopes: Tensor | None = None
    window: int = 0
    may_have_empty_rows: bool = False
    empty_rows: Tensor | None = None
    kernel: fused.ByDocument | fused.Flex | None = None


def in_sight(i: Tensor, j: Tensor, window: int) -> Tensor:
    """Whether a query at position i sees a key at j: the last `window` keys up to its own, or all of these for 0."""
    return (j <= i) & (j > i - window) if window else j <= i


def attention_mask(
    T: int, S: int, *, causal: bool = True, window: int = 0, positions: Tensor | None = None,
    key_positions: Tensor | None = None, padding: Tensor | None = None, documents: Tensor | None = None,
    device: torch.device | None = None,
) -> Mask:  # fmt: skip
    """The mask of T queries and S keys.

    causal: a query sees only keys whose position is at most its own, and with a window only the last so many of these.
    positions (B, T), key_positions (B, S): by default the keys stand at 0…S-1, the queries at the last T of these.
    padding: (B, S), True where a key is a real token. documents: (B, T), the numbers of documents that are packed into
    a row (T = S); a token sees only its own document.
    Only padding (before a query, or a whole row of it) can leave a query with nothing to attend to.
    """
    window = window if window < S else 0  # no two keys are S or more positions apart
    if padding is None and (not causal or (positions is None and T == 1 and not window)):
        return Mask(documents=documents)
    if padding is None and positions is None and T == S:
        return Mask(causal=True, documents=documents, window=window)
    visible = None
    if causal:
        i = torch.arange(S - T, S, device=device) if positions is None else positions
        j = torch.arange(S, device=i.device) if key_positions is None else key_positions
        visible = in_sight(i.view(-1, T, 1), j.view(-1, 1, S), window)
    if padding is not None:
        visible = padding[:, None, :] if visible is None else visible & padding[:, None, :]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    return Mask(visible.unsqueeze(1), may_have_empty_rows=padding is not None)


def prepare_mask(mask: Mask, q: Tensor, T: int, dropout: float = 0.0, kind: str = "flash") -> Mask:
    """Choose how to compute the mask's M, once for all layers: a kernel of fused.py, or numbers without empty rows.

    q: any tensor of the queries' device and precision. Packed rows, ALiBi and a window need no (T, T) numbers where
    `fused.Flex` computes them (CUDA, compiled, no dropout), and packed rows, with a window or without, none where
    `fused.ByDocument` does (CPU, not compiled, no ALiBi).
    A query with nothing to attend to, whose softmax is 0/0, sees everything here; `attention` sets its result to 0.
    """
    bias, causal, documents, slopes, window, *_ = mask
    if documents is not None or slopes is not None or window:
        compiled = torch.compiler.is_compiling()
        if kind == "flash" and q.device.type == "cuda" and compiled and not dropout:
            return Mask(kernel=fused.Flex(T, causal, documents, slopes, q.device, window))
        if kind == "flash" and q.device.type == "cpu" and not compiled and documents is not None and slopes is None:
            return Mask(kernel=fused.ByDocument(documents, causal, window))
        i = torch.arange(T, device=q.device)
        bias = torch.zeros(1, 1, T, T, device=q.device) if slopes is None else alibi_bias(slopes, i, i)
        if documents is not None:
            bias = bias.masked_fill(documents[:, None, :, None] != documents[:, None, None], -torch.inf)
        if causal:
            bias = bias.masked_fill(~in_sight(i[:, None], i, window), -torch.inf)
    if bias is None or mask.empty_rows is not None:
        return mask
    bias = torch.where(bias, 0.0, -torch.inf) if bias.dtype == torch.bool else bias
    bias = bias.to(fused.attention_dtype(q) if kind == "flash" else q.dtype)
    if not mask.may_have_empty_rows:
        return Mask(bias)
    empty_rows = (bias == -torch.inf).all(-1, keepdim=True)
    return Mask(bias.masked_fill(empty_rows, 0), may_have_empty_rows=True, empty_rows=empty_rows)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, dropout: float = 0.0, kind: str = "flash"
) -> Tensor:
    """softmax(QKᵀ/√D + M)·V [Vaswani et al. 2017, eq. 1]; the same for self- and cross-attention.

    q: (B, H, T, D); k, v: (B, K, S, D), each key/value head serving H/K query heads. mask: None hides nothing.
    A query with nothing to attend to gets zeros. kind: "math" writes the formula out and keeps the (T, S) scores;
    "flash" is PyTorch's fused kernel, which never holds them. Returns (B, H, T, D).
    """
    B, H, T, D = q.shape
    mask = prepare_mask(mask or Mask(), q, T, dropout=dropout, kind=kind)
    M, G = mask.bias, H // k.size(1)  # grouped-query attention [Ainslie et al. 2023]
    if G > 1 and T == k.size(2):
        k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    elif G > 1:  # decoding: the G queries of a group become G·T queries of one head, so that no key is copied
        q = q.reshape(B, H // G, G * T, D)
        M = M if M is None else M.expand(B, H, T, k.size(2)).reshape(B, H // G, G * T, k.size(2))
    if mask.kernel is not None:
        y = mask.kernel(q, k, v, dropout)
    elif kind == "flash":
        y = fused.scaled_dot_product_attention(q, k, v, attn_mask=M, is_causal=mask.causal, dropout_p=dropout)
    else:
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
        if mask.causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~visible, -torch.inf)
        elif M is not None:
            scores = scores + M
        y = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout) @ v
    y = y.reshape(B, H, T, D)
    return y if mask.empty_rows is None else y.masked_fill(mask.empty_rows, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Norm(nn.Module):
    """RMSNorm x/√(mean(x²)+ε)·w [Zhang & Sennrich 2019, eq. 4], or LayerNorm (x-mean)/√(var+ε)·w+b [Ba et al. 2016]."""

    def __init__(self, config: GPTConfig, dim: int):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.bias and config.norm == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.type_as(self.weight)  # under autocast, x is in bfloat16 and the mean is taken in float32
        if self.kind == "layernorm":
            y = F.layer_norm(y, self.weight.shape, self.weight, self.bias, self.eps)
        else:
            y = F.rms_norm(y, self.weight.shape, self.weight, self.eps)
        return y.type_as(x)


class Attention(nn.Module):
    """Self-attention: project to queries, keys and values, apply positions, attend, project back."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.rotates = not config.nope_every or (layer + 1) % config.nope_every != 0  # where there is RoPE at all
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = fused.Linear(config.n_embd, (H + 2 * K) * D, bias=config.bias or config.qkv_bias)  # one for speed
        self.out = fused.Linear(H * D, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (Norm(config, D) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rope, mask: Mask, cache) -> Tensor:
        config, (B, T, _) = self.config, x.shape
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        q, k, v = self.qkv(x).view(B, T, H + 2 * K, D).split((H, K, K), dim=2)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if rope is not None and self.rotates:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attention(q, k, v, mask, dropout=config.dropout * self.training, kind=config.attention)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    """Two layers per token: W₂·gelu(W₁x), W₂·relu(W₁x)² [So et al. 2021], or W₂·(g(W₀x)⊙W₁x) [Shazeer 2020].

    g is silu for swiglu, gelu for geglu. gelu is taken by tanh, gelu_exact by erf [Hendrycks & Gimpel 2016, section 2].
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        stacked = 2 if config.mlp in GATED else 1  # gate and up
        self.up = fused.Linear(config.n_embd, stacked * config.mlp_dim, bias=config.bias)
        self.down = fused.Linear(config.mlp_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "relu2":
            return self.down(F.relu(x).square())
        if self.kind not in GATED:
            return self.down(F.gelu(x, approximate="none" if self.kind == "gelu_exact" else "tanh"))
        gate, up = x.chunk(2, dim=-1)
        return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post_norm, norm(x + attention(x)), norm(x + mlp(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.norm_attention, self.attention = Norm(config, config.n_embd), Attention(config, layer)
        self.norm_mlp, self.mlp = Norm(config, config.n_embd), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope, mask: Mask, cache) -> Tensor:
        if self.post_norm:
            x = self.norm_attention(x + self.dropout(self.attention(x, rope, mask, cache)))
            return self.norm_mlp(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.norm_attention(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Head(nn.Linear):
    """Logits over the vocabulary; norm_head scales each row to length 1 [Baichuan 2, arXiv 2309.10305, section 2.5]."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.vocab_size, bias=False)
        self.norm_rows = config.norm_head

    def rows(self) -> Tensor:
        """The rows of the output head's matrix (V, C), of length 1 if the config says so."""
        return F.normalize(self.weight, dim=-1) if self.norm_rows else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return fused.linear(x, self.rows())


class GPT(nn.Module):
    """Token ids (B, T) → logits (B, T, V), and a loss when targets are given."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size must be set to build a model: the number of token ids")
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config, config.n_embd)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.tok_emb.weight
        self.dropout = nn.Dropout(config.dropout)
        if config.position == "learned":
            self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        for name, table in position_tables(config).items():  # never saved: the config says all about them
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights from normal distributions with the standard deviations of the table below.

        Layers that write to the residual stream start smaller, so that its variance does not grow with depth [GPT-2
        report, section 2.3]. An untied token embedding starts larger, as what they add to it soon is. Biases start at
        0, norm weights at 1.
        """
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        std = {
            "tok_emb": 0.02 if self.config.tie_embeddings else 0.1, "pos_emb": 0.02, "head": 0.02,
            "qkv": 0.02, "out": residual, "up": 0.02, "down": residual, "queries": 0.02, "keys_values": 0.02,
        }  # fmt: skip
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not (name == "head" and self.config.tie_embeddings):
                nn.init.normal_(module.weight, std=std[name.rsplit(".")[-1]])
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, positions: Tensor | None = None,
        padding: Tensor | None = None, documents: Tensor | None = None, cache=None, last_only: bool = False,
        target_count: Tensor | int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """(logits (B, T, V), None) for idx (B, T), or with targets (B, T): (None, mean loss over those not IGNORE).

        The loss is computed a few rows at a time, so that the logits of a whole batch are never in memory.
        positions: (B, T) or (T,), if they are not 0, 1, 2… from each row's start (packing). padding, documents: see
        `attention_mask`. last_only: logits of each row's last real token only, (B, 1, V). target_count: divide the
        summed loss by this instead of by the number of counted targets; the losses of a step's micro-batches then add
        up to one mean.
        cache: holds keys and values of the tokens before idx, and keeps those of idx (decoding/cache.py). It has
        place(T) → positions (B, T) of idx and (B, S) of all keys, and the Mask; append(layer, k, v) → all keys and
        values of a layer; last(T) → (B,), the index of each row's last real token; advance(T), when idx has been read.
        Raises ValueError for more tokens than block_size, or than the cache can hold.
        """
        B, T = idx.shape
        config, key_positions = self.config, None
        if cache is None:
            if T > config.block_size:
                raise ValueError(f"{T} tokens do not fit into block_size={config.block_size}; pass fewer")
            mask = attention_mask(T, T, causal=config.causal, window=config.sliding_window, padding=padding,
                                  documents=documents, device=idx.device)  # fmt: skip
        elif not config.causal or any(x is not None for x in (positions, padding, documents)):
            raise ValueError("a cache needs causal=True, and no positions, padding or documents: see KVCache.expect")
        else:
            positions, key_positions, mask = cache.place(T)
        x, rope, mask = self.embed(idx, positions, mask, key_positions)
        mask = prepare_mask(mask, x, T, dropout=config.dropout * self.training, kind=config.attention)
        x = self.norm(x) if config.post_norm else x  # BERT normalises the embeddings
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if last_only:
            x = x[:, -1:] if cache is None else x[torch.arange(B), cache.last(T)].unsqueeze(1)
        if cache is not None:
            cache.advance(T)
        x = x if config.post_norm else self.norm(x)
        return (self.head(x), None) if targets is None else (None, self.loss(x, targets, target_count))

    def embed(self, idx: Tensor, positions: Tensor | None, mask: Mask, key_positions: Tensor | None):
        """Embed tokens and their positions: returns x (B, T, C), RoPE's (cos, sin) or None, and the mask with ALiBi."""
        T, kind = idx.size(1), self.config.position
        at = slice(T) if positions is None else positions
        x, rope = self.tok_emb(idx), None
        if kind == "learned":
            x = x + self.pos_emb.weight[at]
        elif kind == "sinusoidal":  # [Vaswani et al. 2017, section 3.4]
            x = x * math.sqrt(self.config.n_embd) + self.sinusoids[at].type_as(x)
        elif kind == "rope":
            rope = tuple(table[at] if positions is None or positions.dim() == 1 else table[at].unsqueeze(1)
                         for table in (self.cos, self.sin))  # fmt: skip
        elif kind == "alibi" and mask.bias is None and (mask.causal or key_positions is None):
            mask = mask._replace(slopes=self.slopes)
        elif kind == "alibi":
            j = torch.arange(T, device=idx.device) if key_positions is None else key_positions
            bias = alibi_bias(self.slopes, j if key_positions is None else positions, j)
            bias = bias if mask.bias is None else bias.masked_fill(~mask.bias, -torch.inf)
            mask = Mask(bias, may_have_empty_rows=mask.may_have_empty_rows)
        if fused.compute_dtype(x) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream: half the memory to move
        return self.dropout(x), rope, mask

    def loss(self, x: Tensor, targets: Tensor, target_count: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of the logits of x (B, T, C), averaged over the targets that are not IGNORE (0 if none is).

        In training only: label smoothing, and the max-z loss, which keeps logits from drifting upwards.
        """
        extra = (self.config.label_smoothing, self.config.max_z_loss) if self.training else (0.0, 0.0)
        loss = fused.linear_cross_entropy(x.flatten(0, 1), self.head.rows(), targets.flatten(), IGNORE, *extra)
        return loss / ((targets != IGNORE).sum().clamp(min=1) if target_count is None else target_count)

    def num_params(self) -> int:
        """Number of weights; tied ones count once."""
        return sum(p.numel() for p in self.parameters())
