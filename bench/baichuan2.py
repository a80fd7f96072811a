"""What Baichuan 2 chose, tried out small: max-z loss, NormHead, RoPE against ALiBi, and digits one by one.

    python data/pydocs/prepare.py
    python bench/baichuan2.py [--parts=logits,positions,digits] [--seeds=3] [--sum_steps=2000] [--tiny]

Prints the tables of docs/baichuan2.md: means over the seeds, ± the standard deviation between them. All models are
trained with the report's AdamW [arXiv 2309.10305, section 2.5] on one thread, from the same batches for each seed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bpe  # noqa: E402
from decoding.stream import penalize  # noqa: E402
from model import GPT, IGNORE, GPTConfig  # noqa: E402
from text.corpus import Corpus  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.optim import learning_rate_at, make_optimizers  # noqa: E402

PARTS = ("logits", "positions", "digits")
PENALTY = 1.2  # of repetitions, when a text is generated


class Size(NamedTuple):
    """How large the models, the runs and the tables are."""

    n_layer: int
    n_head: int
    n_embd: int
    mlp_dim: int
    block_size: int
    steps: int = 400
    batch_size: int = 16
    sum_steps: int = 2000  # steps on sums, of sum_rows sums each
    sum_rows: int = 64
    limit: int = 100  # of the numbers that are added
    held_out: int = 1000  # sums for the test
    vocabularies: tuple[int, ...] = (320, 445)  # token ids where digits are merged, 256 of them single bytes

    @property
    def shape(self) -> dict[str, int]:
        """Options of GPTConfig."""
        return {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "mlp_dim", "block_size")}


SMALL = Size(n_layer=2, n_head=4, n_embd=64, mlp_dim=128, block_size=64)
TINY = Size(
    1, 2, 16, 32, 8, steps=3, batch_size=2, sum_steps=3, sum_rows=8, limit=20, held_out=50,
    vocabularies=(300,),
)  # fmt: skip
BAICHUAN = {"qk_norm": False, "tie_embeddings": False, "norm_head": True, "max_z_loss": 2e-4}


def train(
    batch: Callable[[int], tuple[Tensor, Tensor]], steps: int, seed: int, learning_rate: float = 3e-3, **options
) -> GPT:
    """A model trained with the report's optimizer: AdamW, weight decay 0.1, gradients clipped to 0.5, a cosine.

    batch: from a step to its idx and targets. options: of GPTConfig.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**BAICHUAN | options))
    config = TrainConfig(
        optimizer="adamw", learning_rate=learning_rate, min_lr=learning_rate / 10, beta1=0.9, beta2=0.95,
        weight_decay=0.1, grad_clip=0.5, lr_schedule="cosine", warmup_iters=max(1, steps // 20), max_iters=steps,
    )  # fmt: skip
    optimizers = make_optimizers(model, config)
    for step in range(steps):
        model(*batch(step))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@cache
def train_on(corpus: Corpus, size: Size, seed: int, **options) -> GPT:
    """A model trained on the corpus; a later call with the same arguments gets the same one."""
    options = {"vocab_size": corpus.vocab_size} | size.shape | options
    how = {"batch_size": size.batch_size, "block_size": options["block_size"]}
    return train(lambda step: corpus.batch("train", step, seed=seed, **how), size.steps, seed, **options)


def mean_and_spread(numbers: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, the latter only of two numbers or more."""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def print_table(title: str, header: list[str], rows: Iterator[tuple[str, list[list[float]], int]]) -> None:
    """rows: a label, for each column the seeds' numbers, and the number of digits after the point."""
    print(f"\n{title}\n\n| | {' | '.join(header)} |\n|---|{'---|' * len(header)}")
    for label, columns, digits in rows:
        cells = [mean_and_spread(numbers, digits) for numbers in columns]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Logits: max-z loss and NormHead


@torch.no_grad()
def logit_numbers(model: GPT, corpus: Corpus, size: Size) -> list[float]:
    """Validation loss, the same with a repetition penalty, largest logit, mean over the tokens of max |z|, and the
    length of the output head's rows, of the tenth of the tokens that are rarest in the batches over the commonest."""
    T, V = size.block_size, corpus.vocab_size
    loss = penalized = total = count = 0.0
    largest = -torch.inf
    for idx, targets in corpus.windows("val", T, 16):
        counted = (targets != IGNORE).flatten()
        z = model(idx)[0]
        seen = F.one_hot(idx, V).cumsum(1) > 0  # the tokens of the row so far
        loss += F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum").item()
        z_penalized = penalize(z, seen, PENALTY)
        penalized += F.cross_entropy(z_penalized.flatten(0, 1), targets.flatten(), reduction="sum").item()
        z = z.flatten(0, 1)[counted]
        total += z.abs().amax(-1).sum().item()
        largest, count = max(largest, z.max().item()), count + len(z)
    return [loss / count, penalized / count, largest, total / count, rare_to_common(model, corpus)]


def rare_to_common(model: GPT, corpus: Corpus) -> float:
    """Mean length of the head's rows as they are stored: those of the rarest tenth of the tokens over the commonest's.

    Tokens that the training split lacks, such as most single bytes, are left out.
    """
    tokens = np.fromfile(corpus.folder / "train.bin", dtype=corpus.meta["dtype"])
    counts = torch.from_numpy(np.bincount(tokens, minlength=corpus.vocab_size))
    lengths = model.head.weight.norm(dim=-1)[counts.argsort()][(counts == 0).sum() :]
    tenth = max(1, len(lengths) // 10)
    return (lengths[:tenth].mean() / lengths[-tenth:].mean()).item()


LOGITS = [
    ("both (Baichuan 2)", {}),
    ("max-z loss only", {"norm_head": False}),
    ("NormHead only", {"max_z_loss": 0.0}),
    ("neither", {"norm_head": False, "max_z_loss": 0.0}),
    ("max-z loss only, 2e-2", {"norm_head": False, "max_z_loss": 2e-2}),
    ("NormHead only, learning rate 3e-2", {"max_z_loss": 0.0, "learning_rate": 3e-2}),
    ("neither, learning rate 3e-2", {"norm_head": False, "max_z_loss": 0.0, "learning_rate": 3e-2}),
]


def logits(corpus: Corpus, size: Size, seeds: int) -> None:
    """The table of experiments 1 and 2."""

    def rows():
        for label, options in LOGITS:
            models = (train_on(corpus, size, seed, **options) for seed in range(seeds))
            numbers = [logit_numbers(model, corpus, size) for model in models]
            yield label, list(zip(*numbers, strict=True)), 3

    header = ["val loss", f"with a repetition penalty of {PENALTY}", "largest z", "mean of max abs(z)",
              "head rows, rare / common"]  # fmt: skip
    print_table("Max-z loss and NormHead", header, rows())


# ---------------------------------------------------------------------------------------------------------------------
# Positions: longer than the training context


@torch.no_grad()
def loss_at(model: GPT, corpus: Corpus, length: int, **options) -> float:
    """Validation loss per token, in windows of `length` tokens, by a model with the same weights and a longer table."""
    longer = GPT(replace(model.config, block_size=length, **options)).eval()
    longer.load_state_dict(model.state_dict())
    loss = count = 0
    for idx, targets in corpus.windows("val", length, 8):
        counted = (targets != IGNORE).sum().item()
        loss, count = loss + counted * longer(idx, targets)[1].item(), count + counted
    return loss / count


def positions(corpus: Corpus, size: Size, seeds: int) -> None:
    """The table of experiment 3: the same tokens, read in windows of T, 2T and 4T."""
    T = size.block_size
    lengths = (T, 2 * T, 4 * T)

    def rows() -> Iterator[tuple]:
        """Yield the rows of the table."""
        kinds = {"rope": {}, "alibi": {"position": "alibi"}}  # rope is the default
        models = {kind: [train_on(corpus, size, s, **o) for s in range(seeds)] for kind, o in kinds.items()}
        for label, kind, scaling in (("RoPE", "rope", False), ("RoPE, YaRN", "rope", True), ("ALiBi", "alibi", False)):
            columns = []
            for L in lengths:
                yarn = {"rope_scaling": "yarn", "rope_factor": L / T, "rope_original": T, "rope_high": 32.0}
                options = yarn if scaling and L > T else {}
                columns.append([loss_at(model, corpus, L, **options) for model in models[kind]])
            yield label, columns, 3

    print_table(f"Trained with {T} tokens, reading more", [f"{L} tokens" for L in lengths], rows())


# ---------------------------------------------------------------------------------------------------------------------
# Digits: one by one, or merged


def equation(a: int, b: int) -> tuple[str, str]:
    """Question and answer: the text that is given, and the text that is to be predicted."""
    return f"{a}+{b}=", f"{a + b}\n"


def encode_sums(pairs: np.ndarray, vocabulary: bpe.BPE) -> tuple[Tensor, Tensor]:
    """idx and targets (B, T) of sums, padded on the right; only the tokens of the answers are targets."""
    rows = [[vocabulary.encode(part) for part in equation(a, b)] for a, b in pairs.tolist()]
    width = max(len(question) + len(answer) for question, answer in rows)
    idx = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(idx, IGNORE)
    for i, (question, answer) in enumerate(rows):
        tokens = torch.tensor(question + answer)
        idx[i, : len(tokens)] = tokens
        targets[i, len(question) - 1 : len(tokens) - 1] = tokens[len(question) :]
    return idx, targets


@torch.no_grad()
def answers(model: GPT, idx: Tensor, targets: Tensor) -> tuple[float, float]:
    """Nats per answer, and the share of the answers that greedy decoding would get right.

    If the most likely token is right at every place of the right answer, greedy decoding gives this answer.
    """
    z = model(idx)[0]
    counted = targets != IGNORE
    loss = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum").item() / len(idx)
    right = ((z.argmax(-1) == targets) | ~counted).all(-1)
    return loss, right.float().mean().item()


def cuts(vocabulary: bpe.BPE) -> list[tuple[int, ...]]:
    """How each number with two digits is cut: the lengths of its tokens."""
    return [tuple(len(vocabulary.decode([id])) for id in vocabulary.encode(str(n))) for n in range(10, 100)]


def digits(size: Size, seeds: int) -> None:
    """The table of experiment 4: sums, by vocabularies that merge digits or do not."""
    pairs = np.random.default_rng(0).permutation(size.limit**2)
    pairs = np.stack(np.divmod(pairs, size.limit), axis=1)
    taught = pairs[size.held_out :]
    texts = ["".join(equation(a, b)) for a, b in taught.tolist()]
    vocabularies = {"one by one": bpe.train(texts, 256, "digits", ())}
    vocabularies |= {f"merged, {n} tokens": bpe.train(texts, n, "gpt2", ()) for n in size.vocabularies}

    def train_sums(vocabulary: bpe.BPE, idx: Tensor, targets: Tensor, seed: int) -> GPT:
        """A model that has learned sums."""

        def batch(step: int) -> tuple[Tensor, Tensor]:
            chosen = np.random.default_rng([seed, step]).choice(len(taught), size.sum_rows)
            return idx[chosen], targets[chosen]

        shape = size.shape | {"vocab_size": vocabulary.vocab_size, "block_size": idx.size(1)}
        return train(batch, size.sum_steps, seed, **shape)

    def rows() -> Iterator[tuple]:
        """Yield the rows of the table."""
        for label, vocabulary in vocabularies.items():
            encoded = encode_sums(pairs, vocabulary)
            unseen, seen = ([x[part] for x in encoded] for part in (slice(size.held_out), slice(size.held_out, None)))
            models = (train_sums(vocabulary, *seen, seed) for seed in range(seeds))
            losses, shares = map(list, zip(*(answers(model, *unseen) for model in models), strict=True))
            found = cuts(vocabulary)
            tokens = statistics.mean(map(len, found))
            yield label, [[tokens], [len(set(found))], losses, [100 * share for share in shares]], 2

    header = ["tokens per two digits", "ways to cut two digits", "nats per answer", "right answers, %"]
    print_table(
        f"{size.held_out:,} unseen sums of numbers below {size.limit}, after {size.sum_steps:,} steps", header, rows()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--corpus", default=str(ROOT / "data" / "pydocs"), help="a prepared corpus")
    parser.add_argument("--sum_steps", type=int, help=f"steps on sums; default: {SMALL.sum_steps:,}")
    parser.add_argument("--tiny", action="store_true", help="only try whether it runs")
    args = parser.parse_args()
    unknown = set(parts := args.parts.split(",")) - set(PARTS)
    if unknown:
        raise ValueError(f"--parts takes some of {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    size = TINY if args.tiny else SMALL
    size = size._replace(sum_steps=args.sum_steps or size.sum_steps)
    corpus = Corpus(args.corpus) if parts != ["digits"] else None
    if "logits" in parts:
        logits(corpus, size, args.seeds)
    if "positions" in parts:
        positions(corpus, size, args.seeds)
    if "digits" in parts:
        digits(size, args.seeds)


if __name__ == "__main__":
    main()
