"""Masked language modelling: find the tokens that are hidden in a text, from those on both sides of them, as BERT does.

Notable: 15% of a row's tokens are chosen, and only they count in the loss; which ones is a pure function of (seed,
step, row) in training, and of the row's content in validation, so that every evaluation of every run hides the same.
The mask token is added to the tokenizer of the run: the corpus need not be prepared for it.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from decoding.fill import spelled
from model import GPT, IGNORE, GPTConfig
from tasks.task import Task
from text.corpus import Corpus
from text.tokenizer import MASK, Tokenizer
from training.config import TrainConfig

# [Devlin et al. 2019, section 3.1]
CHOSEN = 0.15  # the share of the tokens that are to be found
MASKED, SWAPPED = 0.8, 0.1  # of these: become the mask token; become a random token; all others stay as they are


@dataclass
class Hiding:
    """How tokens are hidden: the mask token's id, and the ids that are no special tokens, which alone are hidden."""

    mask_id: int
    ordinary: np.ndarray  # (n,)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Hiding":
        """How those of this tokenizer are. It has a mask token."""
        special = list(tokenizer.special_tokens.values())
        return cls(tokenizer.special_tokens[MASK], np.setdiff1d(np.arange(tokenizer.vocab_size), special))

    def hide(self, row: np.ndarray, source: np.random.SeedSequence) -> tuple[np.ndarray, np.ndarray]:
        """Hide tokens of a row (T,): returns what the model reads, and what it is to find or IGNORE, both (T,).

        Some of the chosen tokens are not masked, so that the model has to know every token's meaning in its place, and
        not only that of the mask, which later texts will not contain.
        """
        # NumPy promises that the words of a SeedSequence stay the same; it does not promise this of its generators.
        order, fate, drawn = source.generate_state(3 * len(row), np.uint64).reshape(3, len(row))
        places = np.flatnonzero(np.isin(row, self.ordinary))
        count = min(len(places), max(1, round(CHOSEN * len(places))))
        chosen = places[np.argsort(order[places])[:count]]
        share = fate[chosen] / 2.0**64
        idx, targets = row.copy(), np.full_like(row, IGNORE)
        targets[chosen] = row[chosen]
        idx[chosen[share < MASKED]] = self.mask_id
        swapped = chosen[(share >= MASKED) & (share < MASKED + SWAPPED)]
        idx[swapped] = self.ordinary[drawn[swapped] % np.uint64(len(self.ordinary))]
        return idx, targets


def masked_task(corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, model_config: GPTConfig) -> Task:
    """Find the hidden tokens of the corpus. ValueError for a corpus that is too short for one row.

    There are no bits per byte: a model that sees both sides gives no probability of a text. val_loss is in nats per
    hidden token.
    """
    block_size, whole = model_config.block_size, config.batch_size * config.gradient_accumulation_steps
    hiding = Hiding.of(tokenizer)

    def batch(step: int, rows: slice) -> dict[str, Tensor]:
        idx, _ = corpus.batch("train", step, seed=config.seed, batch_size=whole, block_size=block_size, rows=rows)
        numbers = range(whole)[rows]
        sources = [np.random.SeedSequence(config.seed, spawn_key=(step, number)) for number in numbers]
        return collate([hiding.hide(row, source) for row, source in zip(idx.numpy(), sources, strict=True)])

    batch(0, slice(1))  # a corpus too short for block_size is refused here, before there is a run

    def validation(rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        part = {"max_batches": config.eval_iters, "rank": rank, "world_size": world_size}
        for idx, following in corpus.windows("val", block_size, config.batch_size, **part):
            real = following != IGNORE  # the last batch may have an unused rest
            found = collate([hide_by_content(hiding, row.numpy(), n) for row, n in zip(idx, real.sum(1), strict=True)])
            yield found if real.all() else found | {"padding": real}

    return Task(
        batch=batch,
        validation=validation,
        tokens_per_byte=None,
        tokens_per_step=whole * block_size,
        steps_per_pass=corpus.num_tokens("train") / (whole * block_size),
        fixed_shapes=True,
        tokenizer=tokenizer,
        preview=lambda model: preview_found(model, next(validation(0, 1)), tokenizer),
    )


def hide_by_content(hiding: Hiding, row: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hide some of the first n tokens of a row (T,), always the same ones; what follows these is padding."""
    idx, targets = hiding.hide(row[:n], np.random.SeedSequence(zlib.crc32(row[:n].tobytes())))
    return np.concatenate((idx, row[n:])), np.concatenate((targets, np.full_like(row[n:], IGNORE)))


def collate(rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    """A batch of rows: idx and targets (B, T)."""
    idx, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return {"idx": idx, "targets": targets}


@torch.inference_mode()
def preview_found(model: GPT, batch: dict[str, Tensor], tokenizer: Tokenizer) -> str:
    """The first row of the batch, with the model's guess at each hidden token, and how many of the batch are right."""
    device, targets = model.tok_emb.weight.device, batch["targets"]
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "targets"}
    guesses = model(**inputs)[0][..., : tokenizer.vocab_size].argmax(-1).cpu()

    spell, text = partial(spelled, tokenizer), ""
    for token, guess, target in zip(*(x[0].tolist() for x in (batch["idx"], guesses, targets)), strict=True):
        wrong = f"[{spell(guess)}|{spell(target)}]" if target != IGNORE else spell(token)
        text += f"[{spell(guess)}]" if guess == target else wrong
    hidden, right = int((targets != IGNORE).sum()), int((guesses == targets).sum())
    return f"{text}\n{right} of {hidden} hidden tokens found; above, as [guess], or as [guess|truth] where it is wrong"
