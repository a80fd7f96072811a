"""What a task is, where its data lies, and how examples become batches."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from common.spread import evenly
from model import GPT, GPTConfig
from text.order import drawn
from text.tokenizer import Tokenizer
from training.config import TrainConfig

Item = TypeVar("Item")


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


def draw_examples(examples: Sequence[Item], step: int, rows: slice, config: TrainConfig) -> list[Item]:
    """The examples in these rows of the step's batch: a pass takes each of them once, in an order of its own."""
    whole = config.batch_size * config.gradient_accumulation_steps
    numbers, _ = drawn(config.seed, range(step * whole, (step + 1) * whole)[rows], len(examples))
    return [examples[i] for i in numbers]


def batch_starts(count: int, batch_size: int, rank: int, world_size: int, limit: int = 0) -> list[int]:
    """Where a process's share of the validation batches begins, of `count` rows in order: every world_size-th batch.

    limit: if above 0, at most so many batches over all processes, evenly spread.
    """
    starts = range(0, count, batch_size)
    return [starts[i] for i in evenly(limit or len(starts), len(starts))][rank::world_size]


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
