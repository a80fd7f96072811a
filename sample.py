"""Text from a trained model: greedy, or drawn at random with temperature, top-k and top-p.

    python sample.py --out_dir=out/pydocs --prompt="os.path"

Notable: the prompt is read once and every further token costs one step through the KV cache; prompts of different
lengths share a batch; row i's random numbers come from seed + i alone, so that its text does not depend on what else is
in the batch. When the context is full, its older half is dropped and the newer half read again (`context_start`).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import cli
from common.checkpoint import load_model
from common.config import build, help_text, read_arguments
from common.device import DTYPES, pick_device, pick_dtype
from common.tokenizer import Tokenizer
from model import GPT, KVCache

USAGE = """usage: python sample.py [--key=value ...]

Prints text from a trained model as it is made. Text may grow longer than the model's block_size: when the context is
full, its older half is forgotten and the newer half read again."""


@dataclass
class SampleConfig:
    out_dir: str = "out/pydocs"  # the run to sample from
    checkpoint: str = "best"  # best (lowest validation loss) | latest | a name such as step_00001000
    prompt: str = ""  # text to continue, or FILE:path; empty = the beginning of a document
    max_new_tokens: int = 500  # stop after this many tokens, or when the model ends the document
    num_samples: int = 1  # how many texts; the first is shown as it comes, the others when all are done
    temperature: float = 0.8  # below 1 bolder, above 1 wilder; 0 = greedy, always the most likely token
    top_k: int = 0  # draw among the k most likely tokens only; 0 = all
    top_p: float = 1.0  # draw among the fewest most likely tokens that together reach this probability
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16

    def __post_init__(self):
        for name, low in {"max_new_tokens": 1, "num_samples": 1, "temperature": 0, "top_k": 0, "seed": 0}.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def context_start(n: int, block_size: int) -> int:
    """Index of the first of n tokens that the model still sees.

    0 until they fill the context; from then on, a whole half of it at a time: the cache survives until the next jump.
    """
    half = max(1, block_size // 2)
    return -(-max(0, n - block_size) // half) * half


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token per row, (B,), from logits (B, V) and one number in [0, 1) per row, (B,).

    Drawn by inverting the cumulative distribution of softmax(logits / temperature), after keeping the top_k most likely
    tokens and, of these, the fewest whose renormalised probabilities reach top_p [Holtzman et al. 2020, section 3.1].
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    order = None
    if 0 < top_k < logits.size(-1):
        logits, order = logits.topk(top_k)
    elif top_p < 1:
        logits, order = logits.sort(descending=True, stable=True)
    probs = logits.softmax(-1)
    if top_p < 1:
        more_likely = probs.cumsum(-1) - probs  # what the tokens before this one reach without it
        probs = probs.masked_fill(more_likely >= top_p, 0)
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).clamp(
        max=probs.size(-1) - 1
    )
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


@torch.inference_mode()
def stream(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, eos_id: int | None = None, seed: int = 0, vocab_size: int | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield each row's next token, step after step; None for a row that has ended with eos_id.

    prompts: token lists of any lengths of at least 1. Row i draws from the stream of seed + i, whatever the batch.
    vocab_size: the tokenizer's, where the model's is rounded up; ids from there on are never drawn.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt must have at least one token")
    rows, B = [list(prompt) for prompt in prompts], len(prompts)
    weight, block_size = model.head.weight, model.config.block_size
    draws = np.stack([np.random.default_rng(seed + i).random(max_new_tokens) for i in range(B)])
    uniforms = torch.from_numpy(draws).to(weight.device)  # (B, max_new_tokens)
    capacity = min(block_size, max(map(len, rows)) + max_new_tokens)
    alive, starts, cache = [True] * B, None, None
    for step in range(max_new_tokens):
        now = [context_start(len(row), block_size) for row in rows]
        if now != starts:  # at first, and whenever a context is full: read what each row still sees
            starts, windows = now, [row[start:] for row, start in zip(rows, now, strict=True)]
            lengths = [len(window) for window in windows]
            padded = [window + [0] * (max(lengths) - len(window)) for window in windows]
            cache = KVCache(model.config, B, capacity, weight.device, weight.dtype)
            idx = torch.tensor(padded, device=weight.device)
            logits, _ = model(idx, cache=cache, lengths=lengths, last_only=True)
        else:
            logits, _ = model(torch.tensor([row[-1:] for row in rows], device=weight.device), cache=cache)
        tokens = choose(logits[:, -1, :vocab_size], uniforms[:, step], temperature, top_k, top_p).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        yield [token if going else None for token, going in zip(tokens, alive, strict=True)]
        alive = [going and token != eos_id for going, token in zip(alive, tokens, strict=True)]
        if not any(alive):
            return


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, eos_id: int | None = None, seed: int = 0, vocab_size: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """The new tokens of each prompt, the closing eos_id included; the arguments are those of `stream`."""
    columns = list(stream(model, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                          eos_id=eos_id, seed=seed, vocab_size=vocab_size))  # fmt: skip
    return [[column[i] for column in columns if column[i] is not None] for i in range(len(prompts))]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as the beginning of a document: after an end-of-text token where the tokenizer has one."""
    if tokenizer.eot_id is not None:
        return [tokenizer.eot_id, *tokenizer.encode(prompt)]
    return tokenizer.encode(prompt or "\n")


def show_text(tokenizer: Tokenizer, tokens: Iterator[int | None]) -> None:
    """Print tokens as they come, holding back those that end within a character."""
    pending: list[int] = []
    for token in tokens:
        if token is None or token == tokenizer.eot_id:
            continue
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 8:
            print(text, end="", flush=True)
            pending = []
    print(tokenizer.decode(pending))


def read_prompt(prompt: str) -> str:
    """The prompt itself, or the file's text for FILE:path."""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt[5:]).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read the prompt file {prompt[5:]}: {reason}") from None


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, SampleConfig))
        return
    (config,) = build(read_arguments(sys.argv[1:]), SampleConfig)
    device = pick_device(config.device)
    model, tokenizer, _ = load_model(config.out_dir, config.checkpoint, device)
    for p in model.parameters():  # not the tables of positions: training has them in float32 too
        p.data = p.data.to(DTYPES[pick_dtype(config.dtype, device)])
    text = read_prompt(config.prompt)
    prompts = [prompt_tokens(tokenizer, text)] * config.num_samples
    columns = stream(
        model, prompts, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        eos_id=tokenizer.eot_id, seed=config.seed, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    others: list[list[int | None]] = []

    def first_row() -> Iterator[int | None]:
        for column in columns:
            others.append(column[1:])
            yield column[0]

    print(text, end="", flush=True)
    show_text(tokenizer, first_row())
    for row in zip(*others, strict=True):
        print("-" * 20)
        print(text, end="")
        show_text(tokenizer, iter(row))


if __name__ == "__main__":
    cli.run(main)
