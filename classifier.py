"""A classifier: a GPT reads a text in its own way, its hidden states become one vector, and a linear layer tells the
class.

Notable: nothing in the network knows of it, so that any model that was pretrained can begin one; what is pooled are
hidden states, because the head is left out, and tokens that pad a text do not count.

Shapes: as in model.py; n is the number of classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, IGNORE, GPTConfig


def class_names(config: GPTConfig) -> list[str]:
    """The names of the classes, in the order of the logits; none if the config is no classifier's."""
    return config.classes.split(",") if config.classes else []


class Classifier(GPT):
    """Token ids (B, T) → logits of the classes (B, n), and a loss when targets (B,), numbers of classes, are given."""

    def __init__(self, config: GPTConfig):
        if config.pool == "first" and config.causal:
            raise ValueError("pool=first needs causal=False: a causal model's first token sees nothing else of a text")
        super().__init__(config)
        self.head = nn.Identity()
        self.classes = nn.Linear(config.n_embd, len(class_names(config)))
        nn.init.zeros_(self.classes.weight)  # all classes are equally likely at first
        nn.init.zeros_(self.classes.bias)

    def features(self, idx: Tensor, padding: Tensor | None = None) -> Tensor:
        """A vector for each text (B, C): the mean of its tokens' hidden states, or that of the first [Devlin 2019, 3].

        padding: (B, T), True at real tokens; None: all are real.
        """
        x, _ = super().forward(idx, padding=padding)
        if self.config.pool == "first":
            return x[:, 0]
        if padding is None:
            return x.mean(1)
        real = padding.unsqueeze(-1).type_as(x)
        return (x * real).sum(1) / real.sum(1)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, padding: Tensor | None = None,
        target_count: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(logits (B, n), None), or with targets (B,): the same logits, and the mean loss over those not IGNORE.

        target_count: as in GPT.forward.
        """
        logits = self.classes(self.features(idx, padding)).float()
        if targets is None:
            return logits, None
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
        )
        return logits, loss / ((targets != IGNORE).sum().clamp(min=1) if target_count is None else target_count)
