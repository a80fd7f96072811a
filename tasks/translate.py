"""Translation: predict a target from its source, with an encoder–decoder [Vaswani et al. 2017].

The encoder reads the source. The decoder reads <|endoftext|> and the target, and learns to say the target and
<|endoftext|>. A batch is padded to its longest source and its longest target; neither side sees padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from common.spread import evenly
from decoding.stream import generate, padded
from model import GPT, IGNORE, GPTConfig
from tasks.task import Task, batch_starts, dataset_folder, draw_examples
from text.pairs import Pair, Pairs, open_pairs
from text.tokenizer import Tokenizer
from training.config import TrainConfig

SHOWN, TRANSLATED = 3, 200  # validation pairs that are shown, and translated, at every sample_interval


@dataclass
class Example:
    """A pair as the model reads it."""

    source: list[int]
    target: list[int]  # with the token that ends it


@dataclass
class Translations:
    """A data set of pairs, as the model reads them."""

    pairs: Pairs
    train: list[Example]
    val: list[Example]
    left_out: int  # pairs that do not fit into block_size

    def summary(self) -> str:
        """One line about the data."""
        counts = [f"{len(examples):,} {name} pairs" for name, examples in (("train", self.train), ("val", self.val))]
        longer = f", {self.left_out:,} longer than block_size left out" if self.left_out else ""
        return f"{self.pairs.folder}: {', '.join(counts)}{longer}, vocabulary {self.pairs.vocab_size:,}"


def load_translations(dataset: str, block_size: int) -> Translations:
    """Read and encode the data set of that name under data/, or at that path. ValueError if no pair fits."""
    pairs = open_pairs(dataset_folder(dataset, "meta.json"))
    kept, left_out = {}, 0
    for split, found in (("train", pairs.train), ("val", pairs.val)):
        examples = [make_example(pairs.tokenizer, pair) for pair in found]
        kept[split] = [e for e in examples if max(len(e.source), len(e.target)) <= block_size]
        left_out += len(examples) - len(kept[split])
        if not kept[split]:
            raise ValueError(f"{pairs.folder}: no {split} pair fits into block_size={block_size}: raise it")
    return Translations(pairs, kept["train"], kept["val"], left_out)


def make_example(tokenizer: Tokenizer, pair: Pair) -> Example:
    """Encode a pair."""
    source, target = map(tokenizer.encode, pair)
    return Example(source, [*target, tokenizer.eot_id])


def collate(examples: list[Example], eot_id: int) -> dict[str, Tensor]:
    """The keyword arguments of EncoderDecoder.forward for some pairs, padded on the right."""
    source, real = padded([example.source for example in examples])
    idx, _ = padded([[eot_id, *example.target[:-1]] for example in examples])
    targets, _ = padded([example.target for example in examples], fill=IGNORE)
    return {"idx": idx, "targets": targets, "source": source, "source_padding": real}


def translation_task(data: Translations, config: TrainConfig, model_config: GPTConfig) -> Task:
    """Predict every target. ValueError for parallel=fsdp."""
    if config.parallel == "fsdp":
        raise ValueError("objective=translate is not for parallel=fsdp, which shards decoders only: leave it ddp")
    tokenizer, whole = data.pairs.tokenizer, config.batch_size * config.gradient_accumulation_steps

    def batch(step: int, rows: slice) -> dict[str, Tensor]:
        return collate(draw_examples(data.train, step, rows, config), tokenizer.eot_id)

    def validation(rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        B = config.batch_size
        for start in batch_starts(len(data.val), B, rank, world_size, config.eval_iters):
            yield collate(data.val[start : start + B], tokenizer.eot_id)

    size = sum(len(tokenizer.decode(e.target[:-1]).encode()) for e in data.val)
    per_pair = sum(len(e.source) + len(e.target) for e in data.train) / len(data.train)
    return Task(
        batch=batch,
        validation=validation,
        tokens_per_byte=sum(len(e.target) for e in data.val) / max(1, size),
        tokens_per_step=round(whole * per_pair),
        steps_per_pass=len(data.train) / whole,
        fixed_shapes=False,
        tokenizer=tokenizer,
        preview=lambda model: preview_translations(model, data, model_config.block_size),
    )


def preview_translations(model: GPT, data: Translations, longest: int) -> str:
    """A few held-out sources with the model's greedy targets, and how many of all it translates exactly."""
    tokenizer = data.pairs.tokenizer
    examples = [data.val[i] for i in evenly(TRANSLATED, len(data.val))]
    prompts = [[*example.source, tokenizer.eot_id] for example in examples]
    found = generate(
        model, prompts, longest, temperature=0, eos_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size
    )  # fmt: skip
    lines = []
    for i in evenly(SHOWN, len(examples)):
        text = tokenizer.decode(token for token in found[i] if token != tokenizer.eot_id)
        lines += [f"> {tokenizer.decode(examples[i].source)}", text]
    exact = sum(new == example.target for new, example in zip(found, examples, strict=True))
    return "\n".join([*lines, f"{exact} of {len(examples)} held-out sources translated exactly"])
