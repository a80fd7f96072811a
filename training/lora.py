"""LoRA: fine-tune a model by a correction of low rank to each of its matrices [Hu et al. 2021].

    y = W x + α/r · B A x        W: (out, in), frozen;  A: (r, in), B: (out, r), trained

B starts at 0, so training starts from the base model exactly; afterwards W + α/r · B A is one matrix again, and the
model is as fast as before. Frozen weights get neither gradients nor optimizer state.

A correction of low rank cannot give a new token an embedding of its own. The chat template's tokens, which a base
model has never seen, are therefore trained in full: a correction for each of their rows in `tok_emb` and `head`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused
from common.layers import replace_layers
from model import GPT, Head

TARGETS = ("qkv", "out", "up", "down")  # the linear layers inside the blocks


@dataclass(frozen=True)
class LoraConfig:
    """Which corrections a model gets. ValueError for a target that is not a known layer."""

    rank: int  # r
    alpha: float  # α
    targets: tuple[str, ...]  # the layers that are corrected, among TARGETS
    new_rows: tuple[int, ...] = ()  # token ids that the base model never saw, trained in full

    def __post_init__(self):
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"lora_targets: no layer is called {name!r}; choose among {','.join(TARGETS)}")


class LoRALinear(fused.Linear):
    """A linear layer with a frozen weight and a trained correction of rank r."""

    def __init__(self, linear: nn.Linear, lora: LoraConfig):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = lora.alpha / lora.rank
        bound = 1 / math.sqrt(linear.in_features)
        self.lora_A = nn.Parameter(torch.empty_like(linear.weight[:1].expand(lora.rank, -1)).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros_like(linear.weight[:, :1].expand(-1, lora.rank)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * fused.linear(fused.linear(x, self.lora_A), self.lora_B)

    def merge(self) -> nn.Linear:
        """The plain layer with the same output."""
        linear = fused.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.data + self.scale * self.lora_B.data @ self.lora_A.data)
        linear.bias = self.bias
        return linear


class EmbeddingWithNewRows(nn.Embedding):
    """A frozen embedding with a trained correction for each of n rows: lora_rows (n, C)."""

    def __init__(self, embedding: nn.Embedding, lora_rows: nn.Parameter, ids: Tensor):
        nn.Module.__init__(self)
        self.weight, self.lora_rows = embedding.weight, lora_rows
        self.sparse = False  # DistributedDataParallel asks every embedding
        self.row_of: Tensor
        row_of = torch.full((len(embedding.weight),), len(ids), device=ids.device)
        row_of[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("row_of", row_of, persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        corrections = F.pad(self.lora_rows, (0, 0, 0, 1))  # the last row, of zeros, is for all other tokens
        return F.embedding(idx, self.weight) + F.embedding(self.row_of[idx], corrections)


class HeadWithNewRows(Head):
    """A frozen output head with a trained correction for each of n rows: lora_rows (n, C)."""

    def __init__(self, head: Head, lora_rows: nn.Parameter, ids: Tensor):
        nn.Module.__init__(self)
        self.weight, self.bias, self.norm_rows, self.lora_rows = head.weight, None, head.norm_rows, lora_rows
        self.in_features, self.out_features = head.in_features, head.out_features
        self.ids: Tensor
        self.register_buffer("ids", ids, persistent=False)

    def rows(self) -> Tensor:
        """The weight with its corrections, (V, C): a copy of all of it."""
        rows = self.weight.index_add(0, self.ids, self.lora_rows)
        return F.normalize(rows, dim=-1) if self.norm_rows else rows

    def forward(self, x: Tensor) -> Tensor:
        """Logits, without a copy of the whole weight for one more token."""
        before = self.weight[self.ids]
        after = before + self.lora_rows
        if self.norm_rows:
            before, after = F.normalize(before, dim=-1), F.normalize(after, dim=-1)
        logits = fused.linear(x, super().rows())  # in autocast's precision, which need not be x's
        return logits.index_add_(-1, self.ids, fused.linear(x, after - before).type_as(logits))


def add_lora(model: GPT, lora: LoraConfig) -> None:
    """Freeze the model and add the corrections. Tied embeddings stay tied: they share the corrections of new rows."""

    def corrected(name: str, layer: nn.Module) -> nn.Module | None:
        if name not in lora.targets or not isinstance(layer, nn.Linear):
            return None
        if lora.rank > min(layer.weight.shape):
            raise ValueError(f"lora_rank={lora.rank} is above the {min(layer.weight.shape)} that {name} has: lower it")
        return LoRALinear(layer, lora)

    model.requires_grad_(False)
    replace_layers(model, corrected)
    if lora.new_rows:
        ids = torch.tensor(lora.new_rows, device=model.head.weight.device)
        rows = [nn.Parameter(torch.zeros_like(layer.weight[ids])) for layer in (model.tok_emb, model.head)]
        if model.config.tie_embeddings:
            rows[1] = rows[0]
        model.tok_emb = EmbeddingWithNewRows(model.tok_emb, rows[0], ids)
        model.head = HeadWithNewRows(model.head, rows[1], ids)


@torch.no_grad()
def merge_lora(model: GPT) -> None:
    """Make every corrected layer the plain layer with the same output, and let all weights train again."""
    replace_layers(model, lambda _, layer: layer.merge() if isinstance(layer, LoRALinear) else None)
    if isinstance(model.head, HeadWithNewRows):
        tok_emb, head, tied = model.tok_emb, model.head, model.config.tie_embeddings
        assert isinstance(tok_emb, EmbeddingWithNewRows)
        merged = nn.Parameter(tok_emb.weight.index_add(0, head.ids, tok_emb.lora_rows))
        model.tok_emb, model.head = nn.Embedding.from_pretrained(merged), Head(model.config)
        model.tok_emb.weight = merged
        model.head.weight = merged if tied else nn.Parameter(head.weight.index_add(0, head.ids, head.lora_rows))
    model.requires_grad_(True)
