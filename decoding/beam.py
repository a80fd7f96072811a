"""Beam search: of all continuations, follow the W most likely ones side by side.

Notable: a prompt and all its beams share one row of the cache. Each step adds W slots to the row, one per beam, and
`visible` says which slots are a beam's own past. Dropping one beam and continuing another twice therefore copies a row
of booleans and no keys or values, and the prompt's keys and values exist once. (When the search of one prompt is done,
the cache is copied without its row. When the context is full, each beam's newer half is read again.)
The rules are those of transformers' generate(num_beams=W, early_stopping="never"): no search ends while an open beam
could still be among the texts that are asked for. (transformers goes on until none could be among the W best.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from decoding.cache import NOWHERE, KVCache
from decoding.kernels import read_tokens
from decoding.stream import check_finite, check_prompts, context_start, read, split_sources
from model import GPT


@dataclass
class Hypothesis:
    """A continuation: its tokens, the closing eos_id included, and their log-probabilities, which sum to `logprob`."""

    tokens: list[int]
    score: float  # logprob / len(tokens)^length_penalty, by which hypotheses are compared
    logprob: float
    logprobs: list[float]


class Candidate(NamedTuple):
    """What a search did with one of a step's 2W best continuations, for decoding/explain.py."""

    step: int  # from 1
    parent: int  # which of the open beams it continues: 0 for the likeliest, the first that the step before kept
    token: int
    logprob: float  # of the text up to here
    score: float
    fate: Literal["kept", "finished", "dropped"]


class Search:
    """One prompt's search: up to W open beams, the likeliest first, and the W best finished hypotheses.

    wanted: how many of these are asked for.
    """

    def __init__(
        self, source: list[int], prompt: list[int], num_beams: int, length_penalty: float, eos_id: int | None,
        longest: int, wanted: int,
    ):  # fmt: skip
        self.source, self.prompt, self.longest = source, prompt, longest  # source: of an encoder–decoder, else empty
        self.W, self.alpha, self.eos_id, self.wanted = num_beams, length_penalty, eos_id, wanted
        self.open = [Hypothesis([], 0.0, 0.0, [])]
        self.finished: list[Hypothesis] = []
        self.done = False
        self.record: list[Candidate] | None = None  # where candidates are appended, if anybody wants to see them

    def step(self, candidates: list[tuple[float, int, int]]) -> list[int]:
        """Extend the beams by the 2W best candidates (log-probability, parent beam, token), the best one first.

        2W are enough for W new open beams, since at most one candidate per parent, hence W in all, ends with eos_id.
        A candidate that ends is kept only if it is among the first W, as in transformers. Returns the parents of the W
        open beams.
        """
        beams, parents = [], []
        for rank, (logprob, parent, token) in enumerate(candidates):
            if logprob == -math.inf:  # fewer than 2W continuations exist
                break
            past = self.open[parent]
            tokens, logprobs = [*past.tokens, token], [*past.logprobs, logprob - past.logprob]
            beam = Hypothesis(tokens, logprob / len(tokens) ** self.alpha, logprob, logprobs)
            ends = token == self.eos_id or len(tokens) == self.longest
            fate = "dropped"
            if ends and rank < self.W:
                self.finished.append(beam)
                fate = "finished"
            elif not ends and len(beams) < self.W:
                beams.append(beam)
                parents.append(parent)
                fate = "kept"
            if self.record is not None:
                self.record.append(Candidate(len(tokens), parent, token, logprob, beam.score, fate))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.W]
        self.open = beams or self.open
        self.done = not beams or self.decided()
        missing = self.W - len(self.open)
        self.open += [Hypothesis(self.open[0].tokens, -math.inf, -math.inf, [])] * missing
        return (parents + [0] * self.W)[: self.W]

    def decided(self) -> bool:
        """Return whether no open beam can be among the wanted hypotheses any more.

        A log-probability only falls as its beam grows, so the best open beam's bounds the scores of all.
        """
        if len(self.finished) < self.wanted:
            return False
        # W = 1 is greedy search, which ends when the likeliest token is eos_id.
        length = self.longest if self.alpha > 0 else len(self.open[0].tokens)
        return self.W == 1 or self.open[0].logprob / length**self.alpha <= self.finished[self.wanted - 1].score


def check_beams(num_beams: int, num_return: int) -> None:
    """Raise ValueError unless a search of num_beams can be asked for num_return hypotheses."""
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, not {num_beams}")
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return must be from 1 to num_beams={num_beams}, not {num_return}")


@torch.inference_mode()
def beam_search(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, *, num_beams: int = 4, length_penalty: float = 1.0,
    eos_id: int | None = None, num_return: int = 1, vocab_size: int | None = None,
    record: Sequence[list[Candidate]] = (),
) -> list[list[Hypothesis]]:  # fmt: skip
    """Find the num_return best continuations of each prompt, or all there are, of at most max_new_tokens; best first.

    prompts: token lists (an encoder–decoder's: see `split_sources`). vocab_size: the tokenizer's, where the model's is
    rounded up. Hypotheses are compared by log-probability / length^length_penalty [after Wu et al. 2016, section 7]: 0
    favours short texts, 1 compares the means per token. num_beams=1 is greedy search. record: a list per prompt, or
    none at all, to which its search appends all its candidates. Raises ValueError for num_return above num_beams.
    """
    check_prompts(prompts, model.config.vocab_size)
    check_beams(num_beams, num_return)
    W, block_size, starts = num_beams, model.config.block_size, []
    pairs = zip(*split_sources(model, prompts), strict=True)
    live = searches = [Search(*pair, W, length_penalty, eos_id, max_new_tokens, num_return) for pair in pairs]
    for search, own in zip(searches, record, strict=bool(record)):
        search.record = own

    def room() -> int:
        """Cache slots that the beams need from here until the context is read again."""
        longest = max(len(s.prompt) + step - start for s, start in zip(live, starts, strict=True))
        return W * min(max_new_tokens - 1 - step, block_size - longest)

    for step in range(max_new_tokens if prompts else 0):
        lengths = [len(search.prompt) + step for search in live]
        now = [context_start(n, block_size) for n in lengths]
        if now != starts:  # at the first step, and whenever a context is full: read what each beam sees
            starts = now
            logits, cache, visible = read_beams(model, live, starts, room())
        else:
            last = [n - 1 - start for n, start in zip(lengths, starts, strict=True)]
            logits = step_beams(model, live, last, cache, visible)
        total = torch.tensor([[beam.logprob for beam in search.open] for search in live], device=logits.device)
        logprobs = logits[:, :, :vocab_size].float().log_softmax(-1) + total[:, :, None]  # (B, W, V)
        best, tokens = logprobs.topk(n := min(2 * W, logprobs.size(2)))  # of each beam: topk's threads share out rows
        best, where = best.flatten(1).topk(min(2 * W, best[0].numel()))
        check_finite(best[:, 0].sum().item())
        candidates = zip(*(x.tolist() for x in (best, where // n, tokens.flatten(1).gather(1, where))), strict=True)
        parents = [s.step(list(zip(*c, strict=True))) for s, c in zip(live, candidates, strict=True)]
        going = [b for b, search in enumerate(live) if not search.done]
        if not going:
            break
        visible = visible[torch.arange(len(live))[:, None], parents]
        if len(going) < len(live):  # drop the rows of the searches that are done
            live, starts, visible = [live[b] for b in going], [starts[b] for b in going], visible[going]
            cache = cache.regroup(torch.tensor(going, device=visible.device)[:, None], room())
            visible = F.pad(visible[:, :, : cache.used], (0, room()))
    return [search.finished[:num_return] for search in searches]


def read_beams(model: GPT, searches: list[Search], starts: list[int], room: int) -> tuple[Tensor, KVCache, Tensor]:
    """Read all that every beam sees: returns logits (B, W, V), the cache, and visible (B, W, slots).

    room: empty slots to add to the cache. At the first step a search has one open beam, and W is 1.
    """
    windows = [
        (search.prompt + beam.tokens)[start:]
        for search, start in zip(searches, starts, strict=True)
        for beam in search.open
    ]
    B, n = len(searches), len(searches[0].open)
    sources = [search.source for search in searches for _ in search.open]
    logits, cache = read(model, windows, sources, room, side_by_side=n)
    own = torch.arange(cache.k.size(3), device=logits.device) // (cache.used // n)  # the beam that a slot belongs to
    visible = (own == torch.arange(n, device=logits.device)[:, None]) & (cache.positions != NOWHERE)[:, None]
    return logits.view(B, n, -1), cache, visible


def step_beams(model: GPT, searches: list[Search], last: list[int], cache: KVCache, visible: Tensor) -> Tensor:
    """Read the last token of every beam: returns logits (B, W, V).

    last: the position of the last token of each search's beams. visible (B, W, slots) is updated in place: each beam
    sees its new token.
    """
    W, device = searches[0].W, visible.device
    idx = torch.tensor([[beam.tokens[-1] for beam in search.open] for search in searches], device=device)
    positions = torch.tensor(last, device=device)[:, None].expand(-1, W)
    each = torch.arange(W, device=device)
    visible[:, each, cache.used + each] = True
    return read_tokens(model, idx, cache=cache.expect(positions=positions, visible=visible[:, :, : cache.used + W]))
