"""An encoder–decoder in the manner of "Attention Is All You Need": a source goes in, and a target comes out.

Notable:
- it is built from model.py's parts: the encoder's blocks are a GPT's with causal=False, and a decoder's block has one
  more part, cross-attention, whose queries come from the target and whose keys and values come from the source;
- each of the three attentions has its own mask: the encoder's hides padding, the decoder's hides the future as well,
  and that of cross-attention hides the source's padding from the target;
- one vocabulary and one table of embeddings serve both sides; the blocks follow the config (pre-norm by default,
  post_norm=True for the original order, any kind of positions);
- when decoding, the keys and values of a source are computed once, into `Memory`, and kept by the KV cache.

Shapes: as in model.py; here S is the length of the source, and T that of the target.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classifier import Classifier
from fused import Linear
from model import GPT, MLP, Attention, Block, GPTConfig, Mask, Norm, attention, attention_mask, prepare_mask


class Memory(NamedTuple):
    """The decoder's view of its sources: keys and values for cross-attention, and which of them are real tokens."""

    k: Tensor  # (n_layer, B, K, S, D)
    v: Tensor
    padding: Tensor | None = None  # (B, S), True at real tokens; None: all are real

    def rows(self, rows: Tensor) -> "Memory":
        """The memory whose row b is the row `rows[b]` of this one."""
        padding = None if self.padding is None else self.padding[rows]
        return Memory(self.k[:, rows], self.v[:, rows], padding)

    def mask(self) -> Mask:
        """Cross-attention's mask: every token of the target sees all real tokens of its source."""
        if self.padding is None:
            return Mask()
        return Mask(self.padding[:, None, None], may_have_empty_rows=True)


class CrossAttention(nn.Module):
    """Attention with queries from the decoder, and keys and values from the encoder [Vaswani et al. 2017, 3.2.3].

    It knows no positions: the two texts have none in common.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        biases = config.bias or config.qkv_bias
        self.queries = Linear(config.n_embd, H * D, bias=biases)
        self.keys_values = Linear(config.n_embd, 2 * K * D, bias=biases)
        self.out = Linear(H * D, config.n_embd, bias=config.bias)
        self.q_norm = Norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, D) if config.qk_norm else nn.Identity()

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, K, S, D) of the encoder's output (B, S, C)."""
        B, S, _ = source.shape
        k, v = self.keys_values(source).view(B, S, 2, self.config.n_kv_head, self.config.head_dim).unbind(2)
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """The queries (B, H, T, D) of the decoder's x (B, T, C)."""
        return self.q_norm(self.queries(x).view(*x.shape[:2], self.config.n_head, -1)).transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        dropout = self.config.dropout * self.training
        y = attention(self.query(x), k, v, mask, dropout=dropout, kind=self.config.attention)
        return self.out(y.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """A Block with cross-attention between its attention and its MLP; each part has a norm of its own."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.norm_attention, self.attention = Norm(config, config.n_embd), Attention(config, layer)
        self.norm_cross, self.cross = Norm(config, config.n_embd), CrossAttention(config)
        self.norm_mlp, self.mlp = Norm(config, config.n_embd), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope, mask: Mask, cache, k: Tensor, v: Tensor, cross_mask: Mask) -> Tensor:
        for norm, part, given in (
            (self.norm_attention, self.attention, (rope, mask, cache)),
            (self.norm_cross, self.cross, (k, v, cross_mask)),
            (self.norm_mlp, self.mlp, ()),
        ):
            if self.post_norm:
                x = norm(x + self.dropout(part(x, *given)))
            else:
                x = x + self.dropout(part(norm(x), *given))
        return x


class EncoderDecoder(GPT):
    """A GPT that also sees a source: (source, target so far) → logits of the target's next tokens.

    It has a GPT's embeddings, head and loss under the same names; only the blocks and what passes through them differ.
    """

    def __init__(self, config: GPTConfig):
        if not config.causal:
            raise ValueError("an encoder–decoder's decoder is causal: leave causal=True (its encoder is not)")
        super().__init__(config)
        both_ways = replace(config, causal=False, sliding_window=0)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.n_layer))
        self.encoder = nn.ModuleList(Block(both_ways, layer) for layer in range(config.n_encoder_layer))
        self.encoder_norm = Norm(config, config.n_embd)
        self.init_weights()

    def encode(
        self, source: Tensor, padding: Tensor | None = None, positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Read sources (B, S) in both directions: returns (B, S, C). The arguments are those of `forward`.

        Raises ValueError for more than block_size tokens.
        """
        S, config = source.size(1), self.config
        if S > config.block_size:
            raise ValueError(f"a source of {S} tokens does not fit into block_size={config.block_size}; shorten it")
        mask = attention_mask(S, S, causal=False, padding=padding, documents=documents, device=source.device)
        x, rope, mask = self.embed(source, positions, mask, None)
        mask = prepare_mask(mask, x, S, dropout=config.dropout * self.training, kind=config.attention)
        for block in self.encoder:
            x = block(x, rope, mask, None)
        return self.encoder_norm(x)

    def remember(self, source: Tensor, padding: Tensor | None = None) -> Memory:
        """The memory of sources (B, S), for a KV cache. padding: (B, S), True at real tokens."""
        encoded = self.encode(source, padding)
        k, v = zip(*(block.cross.read(encoded) for block in self.blocks), strict=True)
        return Memory(torch.stack(k), torch.stack(v), padding)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, source: Tensor | None = None,
        source_padding: Tensor | None = None, positions: Tensor | None = None, documents: Tensor | None = None,
        source_positions: Tensor | None = None, source_documents: Tensor | None = None, cache=None,
        last_only: bool = False, target_count: Tensor | int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """(logits (B, T, V), None), or with targets (B, T): (None, mean loss), as GPT.forward.

        idx (B, T): what the decoder reads, the target behind a token that begins it. source (B, S): what the encoder
        reads; with a cache, whose memory holds the sources already, None. source_padding (B, S), True at real tokens.
        For several pairs in a row: positions, documents, source_positions and source_documents, (B, T) and (B, S); a
        token then sees its own document only, on both sides. Raises ValueError for more than block_size tokens.
        """
        B, T = idx.shape
        config, key_positions = self.config, None
        if cache is None:
            if T > config.block_size:
                raise ValueError(f"{T} tokens do not fit into block_size={config.block_size}; pass fewer")
            encoded = self.encode(source, source_padding, source_positions, source_documents)
            mask = attention_mask(T, T, window=config.sliding_window, documents=documents, device=idx.device)
            memory, cross = None, cross_mask(documents, source_documents, source_padding)
        else:
            positions, key_positions, mask = cache.place(T)
            memory, cross = cache.memory, cache.memory.mask()
        x, rope, mask = self.embed(idx, positions, mask, key_positions)
        options = {"dropout": config.dropout * self.training, "kind": config.attention}
        mask, cross = prepare_mask(mask, x, T, **options), prepare_mask(cross, x, T, **options)
        for i, block in enumerate(self.blocks):
            k, v = block.cross.read(encoded) if memory is None else (memory.k[i], memory.v[i])
            x = block(x, rope, mask, cache, k, v, cross)
        if last_only:
            x = x[:, -1:] if cache is None else x[torch.arange(B), cache.last(T)].unsqueeze(1)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x)
        return (self.head(x), None) if targets is None else (None, self.loss(x, targets, target_count))


def cross_mask(documents: Tensor | None, source_documents: Tensor | None, source_padding: Tensor | None) -> Mask:
    """Cross-attention's mask in training: which tokens of the source (B, S) a token of the target (B, T) sees.

    All real ones, and of several sources in a row only that with its own document's number.
    """
    visible = None if source_padding is None else source_padding[:, None]  # (B, 1, S)
    if documents is not None:
        same = documents[:, :, None] == source_documents[:, None]  # (B, T, S)
        visible = same if visible is None else visible & same
    return Mask() if visible is None else Mask(visible.unsqueeze(1), may_have_empty_rows=True)


def model_of(config: GPTConfig) -> GPT:
    """The network that the config describes: a GPT, or an EncoderDecoder if it has an encoder, or a Classifier."""
    if config.classes:
        return Classifier(config)
    return EncoderDecoder(config) if config.n_encoder_layer else GPT(config)


@torch.no_grad()
def cross_attention_map(model: EncoderDecoder, source: Tensor, idx: Tensor, layer: int) -> Tensor:
    """The weights (H, T, S) with which a layer's cross-attention looks at a source (S,) for each of the tokens (T,).

    softmax(QKᵀ/√D), written out: the alignment of the two texts [Bahdanau et al. 2015, figure 3].
    """
    found: list[Tensor] = []

    def look(cross: CrossAttention, given: tuple, _: Tensor) -> None:
        q, k = cross.query(given[0]), given[1]
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        found.append((q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).softmax(-1)[0])

    hook = model.blocks[layer].cross.register_forward_hook(look)
    try:
        model(idx[None], source=source[None])
    finally:
        hook.remove()
    return found[0]
