"""LoRA: fine-tune a model by a small correction of low rank to each of its matrices [Hu et al. 2021].

    y = W x + α/r · B A x        W: (out, in), frozen;  A: (r, in), B: (out, r), trained

B starts at 0, so that training starts from the base model exactly; afterwards W + α/r · B A is one matrix again, and
the model as fast as before. Frozen weights get neither gradients nor optimizer state.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT

TARGETS = ("qkv", "out", "up", "down")  # the linear layers inside the blocks


class LoRALinear(nn.Linear):
    """A linear layer with its weight frozen and a correction of rank r; `merge` makes it the plain layer it equals."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        bound = 1 / math.sqrt(linear.in_features)
        self.lora_A = nn.Parameter(torch.empty_like(linear.weight[:1].expand(rank, -1)).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros_like(linear.weight[:, :1].expand(-1, rank)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merge(self) -> nn.Linear:
        """The plain layer that gives the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.data + self.scale * self.lora_B.data @ self.lora_A.data)
        linear.bias = self.bias
        return linear


def add_lora(model: GPT, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze the model, and give every layer named in targets a correction. ValueError for a name that is none."""
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"lora_targets: no layer is called {name!r}; choose among {','.join(TARGETS)}")
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, rank, alpha))


def merge_lora(model: GPT) -> None:
    """Make every corrected layer a plain one again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merge())
    model.requires_grad_(True)
