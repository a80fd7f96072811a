"""Generate tokens one at a time: greedily, or at random with temperature, top-k, top-p and min-p.

Notable: a prompt is read once, and every further token costs one step through the KV cache. Prompts of different
lengths share a batch, and equal prompts are read once. Row i's random numbers come from seed + i alone, so its text
does not depend on what else is in the batch. When the context is full, its older half is dropped and the newer half is
read again (`context_start`). Beam search is in `beam.py`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from decoding.cache import KVCache
from decoding.fast import next_step
from decoding.kernels import read_tokens
from model import GPT
from seq2seq import EncoderDecoder
from text.tokenizer import Tokenizer, start_id

DRAWN = 1024  # random numbers that are drawn at once for each row


class Token(NamedTuple):
    """A chosen token, and the logarithm of the probability that the model gave it (before temperature and the like)."""

    id: int
    logprob: float


class Step(NamedTuple):
    """What the tokens of a step were chosen by, for decoding/explain.py."""

    logits: Tensor  # (B, V), the model's
    scores: Tensor  # (B, V), the logits after the repetition penalty


def context_start(n: int, block_size: int) -> int:
    """Index of the first of n tokens that the model still sees.

    0 until the tokens fill the context. Then half a context is dropped at once, so that the cache can be used until the
    next drop:  context_start(8, 8) → 0;  context_start(9, 8) = … = context_start(12, 8) → 4;  context_start(13, 8) → 8
    """
    half = max(1, block_size // 2)
    return -(-max(0, n - block_size) // half) * half


def tokens_of(rows: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Which tokens occur in each row: booleans (B, V)."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        seen[i, row] = True
    return seen


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens `seen` (B, V) less likely: l/θ where l > 0, else l·θ [Keskar et al. 2019, section 4.1]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def weigh(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The weights (B, n) by which tokens are drawn, and the tokens (B, n) that they belong to: None for 0, 1 … V-1.

    softmax(logits / temperature) for logits (B, V), after keeping the top_k most likely tokens; of these, the fewest
    whose renormalised probabilities reach top_p [Holtzman et al. 2020, section 3.1]; and of these, the ones at least
    min_p times as likely as the likeliest [Nguyen et al. 2024, section 3]. Other tokens weigh 0. temperature: above 0.
    """
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest stays 0, however low it is
    order = None
    if 0 < top_k < logits.size(-1):
        logits, order = logits.topk(top_k)
    elif top_p < 1:
        logits, order = logits.sort(descending=True, stable=True)
    probs = logits.softmax(-1)
    keep = probs >= min_p * probs.amax(-1, keepdim=True)
    if top_p < 1:
        keep &= probs.cumsum(-1) - probs < top_p  # the sum of the likelier tokens' probabilities
    return probs.masked_fill(~keep, 0), order


def choose(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Choose one token per row, (B,), by logits (B, V) and one number in [0, 1) per row, uniform (B,).

    Drawn by inverting the cumulative distribution of the weights of `weigh`. Temperature 0 chooses the most likely
    token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights, order = weigh(logits, temperature, top_k, top_p, min_p)
    cumulative = weights.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=weights.size(-1) - 1)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


def padded(rows: Iterable[Sequence[int]], fill: int = 0, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor (B, T), padded on the right with `fill`; and which tokens are real, (B, T).

    T is the longest row's length, rounded up to a multiple of `multiple`.
    """
    lengths = torch.tensor([len(row) for row in rows])
    T = -(-int(lengths.max()) // multiple) * multiple
    return torch.tensor([[*row, *[fill] * (T - len(row))] for row in rows]), torch.arange(T) < lengths[:, None]


def split_sources(model: GPT, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Split prompts into what an encoder reads, and what the decoder reads; a GPT reads all of them itself.

    A prompt of an encoder–decoder is a source and, as its last token, the one that begins a target.
    Raises ValueError for a source without tokens.
    """
    if not model.config.n_encoder_layer:
        return [[] for _ in prompts], [list(prompt) for prompt in prompts]
    if any(len(prompt) < 2 for prompt in prompts):
        raise ValueError("an encoder–decoder needs a source: a prompt is its tokens and the one that begins a target")
    return [list(prompt[:-1]) for prompt in prompts], [list(prompt[-1:]) for prompt in prompts]


def read(
    model: GPT, windows: list[list[int]], sources: list[list[int]], room: int, side_by_side: int = 1
) -> tuple[Tensor, KVCache]:
    """Read windows of tokens, equal ones once: returns the logits (B, V) after each, and a cache of them.

    sources: of each window, for an encoder–decoder, whose encoder reads them here. room: empty slots to add to the
    cache. side_by_side: how many consecutive windows share a row of the cache, which then has B / side_by_side rows
    (see KVCache.regroup).
    """
    weight, number = model.tok_emb.weight, {}
    pairs = zip(map(tuple, sources), map(tuple, windows), strict=True)
    rows = [number.setdefault(pair, len(number)) for pair in pairs]
    idx, real = padded([window for _, window in number])
    cache = KVCache(model.config, len(number), idx.size(1), weight.device, weight.dtype)
    if isinstance(model, EncoderDecoder):
        source, given = padded([source for source, _ in number])
        cache.memory = model.remember(source.to(weight.device), None if given.all() else given.to(weight.device))
    logits = read_tokens(model, idx.to(weight.device), cache=cache.expect(lengths=real.sum(1).tolist()), last_only=True)
    rows = torch.tensor(rows, device=weight.device)
    return logits[rows, -1], cache.regroup(rows.view(-1, side_by_side), room)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode the prompt as the beginning of a text, after the token of `start_id` if there is one.

    Where there is none, an empty prompt is the end-of-text token, or else a line break.
    Raises ValueError for a character that the tokenizer lacks.
    """
    start = start_id(tokenizer)
    if start is None and not prompt:
        start = tokenizer.eot_id
    if start is not None:
        return [start, *tokenizer.encode(prompt)]
    try:
        return tokenizer.encode(prompt or "\n")
    except ValueError:
        if prompt:
            raise
        raise ValueError("give a --prompt: this tokenizer has neither an end-of-text token nor a line end") from None


def check_prompts(prompts: list[list[int]], vocab_size: int) -> None:
    """Raise ValueError for a prompt without tokens, or with a token outside the model's vocabulary."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"a prompt must have at least one token, and prompt {i} has none")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt {i} has the token {token}, outside the model's vocabulary of {vocab_size}")


def check_finite(number: float) -> None:
    """Raise ValueError if a sum of log-probabilities is NaN, as nothing can be chosen by such a model."""
    if math.isnan(number):
        raise ValueError("the model's output is not a number: its weights are broken; use another checkpoint")


@torch.inference_mode()
def stream(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, eos_id: int | None = None, seed: int = 0,
    vocab_size: int | None = None, ends: Callable[[int, int], bool] | None = None, record: deque[Step] | None = None,
) -> Iterator[list[Token | None]]:  # fmt: skip
    """Yield each row's next token, step after step; None for a row that has ended.

    prompts: token lists (an encoder–decoder's: see `split_sources`). Row i draws its random numbers from seed + i.
    temperature, top_k, top_p, min_p: see `weigh`. repetition_penalty: see `penalize`; the prompt's tokens count too.
    A row ends with eos_id, or with a token for which ends(row, token), called once for each new token, is true.
    vocab_size: the tokenizer's, where the model's is rounded up; ids from there on are never drawn.
    record: where each step is appended before its tokens are yielded; its numbers are there until the next step.
    """
    check_prompts(prompts, model.config.vocab_size)
    (sources, rows), B = split_sources(model, prompts), len(prompts)
    device, block_size = model.tok_emb.weight.device, model.config.block_size
    drawing = torch.device("cpu") if device.type == "mps" else device  # Apple's mps has no float64
    draws = [np.random.default_rng(seed + i) for i in range(B)]
    seen = None if repetition_penalty == 1 else tokens_of(rows, model.config.vocab_size, device)
    alive, starts, step_model = [True] * B, None, None
    for step in range(max_new_tokens if rows else 0):
        if step % DRAWN == 0:
            uniforms = torch.from_numpy(np.stack([draw.random(DRAWN) for draw in draws])).to(drawing)  # (B, DRAWN)
        now = [context_start(len(row), block_size) for row in rows]
        if now != starts:  # at the first step, and whenever a context is full: read what each row sees
            starts, windows = now, [row[start:] for row, start in zip(rows, now, strict=True)]
            room = min(max_new_tokens - 1 - step, block_size - max(map(len, windows)))
            step_model = cache = None  # free their memory before more is allocated
            logits, cache = read(model, windows, sources, room)
        else:
            step_model = step_model or next_step(model, cache)
            logits = step_model(torch.tensor([row[-1:] for row in rows], device=device))[:, -1]
        logits = logits[:, :vocab_size]
        scores = logits if seen is None else penalize(logits, seen[:, :vocab_size], repetition_penalty)
        if record is not None:
            record.append(Step(logits, scores))
        tokens = choose(scores.to(drawing), uniforms[:, step % DRAWN], temperature, top_k, top_p, min_p).to(device)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        check_finite(sum(logprobs))
        tokens = tokens.tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        yield [Token(*pair) if going else None for *pair, going in zip(tokens, logprobs, alive, strict=True)]
        for i, token in enumerate(tokens):
            alive[i] = alive[i] and token != eos_id and not (ends is not None and ends(i, token))
        if not any(alive):
            return


def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, **options) -> list[list[int]]:
    """Return the new tokens of each prompt, the closing eos_id included; the options are those of `stream`."""
    columns = list(stream(model, prompts, max_new_tokens, **options))
    return [[column[i].id for column in columns if column[i] is not None] for i in range(len(prompts))]
