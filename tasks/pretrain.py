"""Pretraining: predict every next token of a corpus."""

from collections.abc import Iterator

from torch import Tensor

from decoding.stream import generate, prompt_tokens
from model import GPT
from tasks.task import Task, dataset_folder
from text.corpus import Corpus
from text.tokenizer import Tokenizer
from training.config import TrainConfig


def open_corpus(dataset: str) -> Corpus:
    """The corpus of that name under data/, or at that path."""
    corpus = Corpus(dataset_folder(dataset, "meta.json"))
    if corpus.num_tokens("train") < 2**28:  # a second of checksums is worth it, minutes are not
        corpus.verify()
    return corpus


def pretraining_task(corpus: Corpus, config: TrainConfig, block_size: int, causal: bool) -> Task:
    """Predict every next token of the corpus."""
    if not causal:
        raise ValueError("causal=False: a model that sees its future has nothing to predict here; leave it True")
    whole = config.batch_size * config.gradient_accumulation_steps

    def batch(step: int, rows: slice) -> dict[str, Tensor]:
        idx, targets = corpus.batch("train", step, seed=config.seed, batch_size=whole, block_size=block_size, rows=rows)
        return {"idx": idx, "targets": targets}

    batch(0, slice(1))  # a corpus too short for block_size is refused here, before there is a run

    def validation(rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        part = {"max_batches": config.eval_iters, "rank": rank, "world_size": world_size}
        # The shape of a training batch: a compiled model needs no second compilation.
        for idx, targets in corpus.windows("val", block_size, config.batch_size, **part):
            yield {"idx": idx, "targets": targets}

    return Task(
        batch, validation, corpus.num_tokens("val") / corpus.num_bytes("val"), whole * block_size, corpus.tokenizer,
        lambda model: preview(model, corpus.tokenizer, config.seed),
    )  # fmt: skip


def preview(model: GPT, tokenizer: Tokenizer, seed: int) -> str:
    """A short text from the model as it is now."""
    prompt = prompt_tokens(tokenizer, "")
    (tokens,) = generate(
        model, [prompt], 200, temperature=0.8, eos_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size, seed=seed
    )
    return tokenizer.decode(t for t in tokens if t != tokenizer.eot_id)
