"""Pretraining: predict every next token of a corpus."""

from collections.abc import Iterator

from torch import Tensor

from decoding.stream import generate, prompt_tokens
from model import GPT, GPTConfig
from runs.run import Run, same_tokens
from tasks.task import Task, dataset_folder
from text.corpus import Corpus
from text.pairs import Pairs
from text.tokenizer import MASK, Tokenizer, with_special_tokens
from training.config import TrainConfig


def open_corpus(dataset: str) -> Corpus:
    """The corpus of that name under data/, or at that path."""
    corpus = Corpus(dataset_folder(dataset, "meta.json"))
    if corpus.num_tokens("train") < 2**28:  # a second of checksums is worth it, minutes are not
        corpus.verify()
    return corpus


def summary(corpus: Corpus) -> str:
    """One line about the corpus."""
    counts = [f"{corpus.num_tokens(split):,} {split} tokens" for split in ("train", "val")]
    return f"{corpus.folder}: {', '.join(counts)}, vocabulary {corpus.vocab_size:,}"


def choose_tokenizer(corpus: Corpus | Pairs, known: Run | None, objective: str, model_config: GPTConfig) -> Tokenizer:
    """The tokenizer of the run to come, for which model_config.vocab_size is set if it was 0.

    known: the run that is resumed or started from, whose tokenizer is kept; it may have special tokens that the
    corpus's lacks. A masked model's has the mask token, which is added where it is missing. ValueError if its tokens
    are not the corpus's, or if vocab_size is too small.
    """
    tokenizer = corpus.tokenizer
    if known:
        if not same_tokens(tokenizer, known.tokenizer):
            raise ValueError(
                f"{known.folder} was trained with another tokenizer than that of {corpus.folder}: prepare the text "
                f"with the run's own, by --tokenizer {known.folder}"
            )
        tokenizer = known.tokenizer
    tokenizer = with_special_tokens(tokenizer, [MASK] if objective == "masked" else [])
    model_config.vocab_size = model_config.vocab_size or tokenizer.vocab_size
    if model_config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={model_config.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} token ids"
        )
    return tokenizer


def pretraining_task(corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, model_config: GPTConfig) -> Task:
    """Predict every next token of the corpus. ValueError for a corpus that is too short for one row."""
    block_size, whole = model_config.block_size, config.batch_size * config.gradient_accumulation_steps

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
        batch=batch,
        validation=validation,
        tokens_per_byte=corpus.num_tokens("val") / corpus.num_bytes("val"),
        tokens_per_step=whole * block_size,
        steps_per_pass=corpus.num_tokens("train") / (whole * block_size),
        fixed_shapes=True,
        tokenizer=tokenizer,
        preview=lambda model: preview_text(model, tokenizer, config.seed),
    )


def preview_text(model: GPT, tokenizer: Tokenizer, seed: int) -> str:
    """A short text from the model as it is now."""
    prompt = prompt_tokens(tokenizer, "")
    (tokens,) = generate(
        model, [prompt], 200, temperature=0.8, eos_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size, seed=seed
    )
    return tokenizer.decode(t for t in tokens if t != tokenizer.eot_id)
