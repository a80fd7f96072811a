"""What a task is, and where its data lies."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model import GPT, GPTConfig
from text.tokenizer import Tokenizer


@dataclass
class Task:
    """What there is to learn, as the loop sees it: batches are keyword arguments of GPT.forward, on the CPU."""

    batch: Callable[[int, slice], dict[str, Tensor]]  # (step, rows of that step's whole batch) → a micro-batch
    validation: Callable[[int, int], Iterator[dict[str, Tensor]]]  # (rank, world_size) → that process's share
    tokens_per_byte: float | None  # of the validation text; turns a loss per token into bits per byte; None: it cannot
    tokens_per_step: int  # on average
    steps_per_pass: float  # steps that read the training data once
    fixed_shapes: bool  # whether all training batches have one shape, and all validation batches
    tokenizer: Tokenizer
    preview: Callable[[GPT], str]  # what to show of the model as it is now, at every sample_interval


def check_model(objective: str, model_config: GPTConfig) -> None:
    """Raise ValueError unless such a model can learn the objective."""
    if (objective == "translate") != (model_config.n_encoder_layer > 0):
        raise ValueError(
            f"objective={objective} and n_encoder_layer={model_config.n_encoder_layer} do not go together: translating "
            "needs an encoder, and nothing else has sources for it to read"
        )
    if model_config.classes and objective != "classify":
        raise ValueError(f"objective={objective} needs a model with a head, and this run is a classifier")
    if objective == "masked" and model_config.causal:
        raise ValueError("objective=masked finds tokens from those on both sides: it needs --causal=False")
    if objective in ("pretrain", "sft") and not model_config.causal:
        raise ValueError(
            f"causal=False: objective={objective} predicts the next token, and a model that sees its future has "
            "nothing to predict; leave causal=True, or choose --objective=masked"
        )


def dataset_folder(dataset: str, file: str) -> Path:
    """The data set of that name under data/, or at that path if the file is there."""
    named = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "data" / dataset))
    return named if named.is_dir() and not Path(dataset, file).exists() else Path(dataset)
