"""Beam search against transformers, against exhaustive search, and against itself without cache and batch."""

from itertools import product

import pytest
import torch

from decoding.beam import beam_search
from decoding.cache import KVCache
from decoding.stream import context_start, generate
from model import GPT
from tests.helpers import POSITIONS, WINDOWS, label
from tests.twins import gpt2_twins, mistral_twins, qwen3_twins

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]


def plain(found):
    return [[(beam.tokens, pytest.approx(beam.score, abs=1e-6)) for beam in beams] for beams in found]


# ---------------------------------------------------------------------------------------------------------------------
# transformers is the oracle


def theirs(model, prompts, W, alpha, eos_id, max_new_tokens):
    """What generate of transformers finds: W (tokens, score) per prompt."""
    T = max(map(len, prompts))
    out = model.generate(
        torch.tensor([[0] * (T - len(p)) + p for p in prompts]), num_beams=W, num_return_sequences=W,
        attention_mask=torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=max_new_tokens, length_penalty=alpha, early_stopping="never", do_sample=False, pad_token_id=0,
        eos_token_id=eos_id, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = []
    for tokens, score in zip(out.sequences[:, T:].tolist(), out.sequences_scores.tolist(), strict=True):
        found.append((tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens, score))
    return [found[i : i + W] for i in range(0, len(found), W)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("twins", [qwen3_twins, gpt2_twins, mistral_twins], ids=["qwen3", "gpt2", "mistral"])
@torch.no_grad()
def test_beams_and_their_scores_are_those_of_transformers(twins, seed):
    model, ours = twins(seed, vocab_size=19, n_embd=16)
    generator, ended = torch.Generator().manual_seed(seed), 0
    for W, alpha in product((2, 3, 8), (-1.0, 0.0, 0.6, 1.0, 2.0)):
        lengths = torch.randint(1, 8, (3,), generator=generator).tolist()
        prompts = [torch.randint(1, 19, (n,), generator=generator).tolist() for n in lengths]
        free = beam_search(ours, prompts, 9, num_beams=W, length_penalty=alpha, num_return=W)
        eos_id = free[0][-1].tokens[3]  # a token that is likely to come
        for eos in (None, eos_id):
            expected = theirs(model, prompts, W, alpha, eos, 9)
            found = beam_search(ours, prompts, 9, num_beams=W, length_penalty=alpha, num_return=W, eos_id=eos)
            for beams, others in zip(found, expected, strict=True):
                assert [beam.tokens for beam in beams] == [tokens for tokens, _ in others]
                assert [beam.score for beam in beams] == pytest.approx([score for _, score in others], abs=1e-4)
            ended += sum(beam.tokens[-1] == eos for beams in found for beam in beams)
    assert ended > 50  # or the end-of-sequence token would have been no test


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


def score_of(model, prompt, tokens):
    """The sum of log-probabilities of a continuation, read anew as a whole."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + tokens]))[0].float().log_softmax(-1)
    return sum(logprobs[0, len(prompt) + i - 1, token].item() for i, token in enumerate(tokens))


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("eos_id", [None, 2])
def test_a_full_width_beam_finds_the_best_of_all_sequences(tiny_gpt, eos_id, alpha):
    model, prompt, n = tiny_gpt(vocab_size=4), [1, 3], 4
    everything = set()  # all that can be generated: of n tokens, or shorter and closed by eos_id
    for tokens in product(range(4), repeat=n):
        end = tokens.index(eos_id) + 1 if eos_id in tokens else n
        everything.add(tokens[:end])
    scores = {tokens: score_of(model, prompt, list(tokens)) / len(tokens) ** alpha for tokens in everything}
    best = sorted(scores, key=scores.__getitem__, reverse=True)
    (found,) = beam_search(model, [prompt], n, num_beams=4**n, length_penalty=alpha, eos_id=eos_id, num_return=4**n)
    assert [tuple(beam.tokens) for beam in found] == best
    assert [beam.score for beam in found] == pytest.approx([scores[tokens] for tokens in best], abs=1e-5)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("eos", [False, True])
def test_one_beam_is_greedy_search(tiny_gpt, eos, alpha):
    model = tiny_gpt()
    free = generate(model, PROMPTS, 12, temperature=0)
    eos_id = free[0][4] if eos else None
    found = beam_search(model, PROMPTS, 12, num_beams=1, length_penalty=alpha, eos_id=eos_id)
    assert [beam.tokens for (beam,) in found] == generate(model, PROMPTS, 12, temperature=0, eos_id=eos_id)


def test_scores_are_log_probabilities_over_length_to_the_penalty(tiny_gpt):
    model = tiny_gpt(block_size=64)
    for alpha in (0.0, 0.5, 1.0):
        for prompt, beams in zip(PROMPTS, beam_search(model, PROMPTS, 9, length_penalty=alpha, eos_id=3, num_return=4),
                                 strict=True):  # fmt: skip
            assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)
            for beam in beams:
                assert beam.logprob == pytest.approx(score_of(model, prompt, beam.tokens), abs=1e-5)
                assert beam.logprob == pytest.approx(sum(beam.logprobs), abs=1e-6)
                assert beam.score == pytest.approx(beam.logprob / len(beam.tokens) ** alpha)


def test_a_wider_search_finds_likelier_texts_than_greedy(tiny_gpt):
    gains = []
    for seed in range(8):
        model = tiny_gpt(seed=seed)
        greedy, wide = (beam_search(model, PROMPTS, 10, num_beams=W, length_penalty=0) for W in (1, 8))
        gains += [w[0].logprob - g[0].logprob for g, w in zip(greedy, wide, strict=True)]
    assert sum(gain > 0.01 for gain in gains) > len(gains) / 2 > sum(gain < -0.01 for gain in gains) * 5


# ---------------------------------------------------------------------------------------------------------------------
# The cache, the batch, the context


@torch.no_grad()
def recomputed(model, prompt, max_new_tokens, W, alpha, eos_id):
    """Beam search written down plainly: every beam read anew, every candidate sorted."""
    beams, finished = [([], 0.0)], []
    for n in range(1, max_new_tokens + 1):
        candidates = []
        for tokens, logprob in beams:
            text = prompt + tokens
            logits = model(torch.tensor([text[context_start(len(text), model.config.block_size) :]]))[0][0, -1]
            logprobs = logits.float().log_softmax(-1).tolist()
            candidates += [([*tokens, token], logprob + p) for token, p in enumerate(logprobs)]
        candidates = sorted(candidates, key=lambda c: -c[1])[: 2 * W]
        ends = [c[0][-1] == eos_id or n == max_new_tokens for c in candidates]
        finished += [(tokens, p / n**alpha) for (tokens, p), end in zip(candidates[:W], ends[:W], strict=True) if end]
        finished = sorted(finished, key=lambda c: -c[1])[:W]
        beams = [c for c, end in zip(candidates, ends, strict=True) if not end][:W]
        longest = max_new_tokens if alpha > 0 else n
        if not beams or len(finished) == W and beams[0][1] / longest**alpha <= finished[-1][1]:
            break
    return finished


@pytest.mark.parametrize("block_size", [3, 8, 64])
@pytest.mark.parametrize("options", [*({"position": p} for p in POSITIONS), *WINDOWS], ids=label)
def test_cached_beams_equal_recomputing_everything_within_and_beyond_block_size(tiny_gpt, options, block_size):
    model = tiny_gpt(**options, block_size=block_size, tie_embeddings=False, n_kv_head=2)
    for eos_id, alpha in ((None, 1.0), (7, 0.5)):
        options = {"num_beams": 3, "length_penalty": alpha, "eos_id": eos_id, "num_return": 3}
        found = beam_search(model, PROMPTS, 14, **options)
        for prompt, beams in zip(PROMPTS, found, strict=True):
            expected = recomputed(model, prompt, 14, 3, alpha, eos_id)
            assert [(beam.tokens, pytest.approx(beam.score, abs=1e-5)) for beam in beams] == expected


@pytest.mark.parametrize("block_size", [6, 64])
def test_a_prompts_beams_do_not_depend_on_what_else_is_in_the_batch(tiny_gpt, block_size):
    model = tiny_gpt(block_size=block_size)
    for eos_id in (None, 3):
        options = {"num_beams": 4, "num_return": 4, "eos_id": eos_id}
        alone = [beam_search(model, [prompt], 12, **options)[0] for prompt in PROMPTS]
        assert plain(beam_search(model, PROMPTS, 12, **options)) == plain(alone)


@pytest.mark.parametrize("kind", ["flash", "math"])
def test_beams_leave_the_keys_of_the_prompt_where_they_are(tiny_gpt, kind, monkeypatch):
    model, regroup, caches = tiny_gpt(attention=kind, block_size=64), KVCache.regroup, []
    monkeypatch.setattr(KVCache, "regroup", lambda *args: caches.append(regroup(*args)) or caches[-1])
    beam_search(model, PROMPTS, 10, num_beams=4)
    (cache,) = caches  # read once, and never copied again
    assert cache.k.shape[1] == len(PROMPTS) and cache.k.shape[3] == 6 + 4 * 9


def test_a_search_ends_when_nothing_open_can_win(tiny_gpt, monkeypatch):
    model, forward, steps = tiny_gpt(block_size=64, tie_embeddings=False), GPT.forward, []
    eos_id = generate(model, [PROMPTS[0]], 1, temperature=0)[0][0]  # the end is the likeliest continuation
    model.head.weight.data[eos_id] *= 3
    monkeypatch.setattr(GPT, "forward", lambda *args, **more: steps.append(1) or forward(*args, **more))
    for alpha, W in product((0.0, -1.0, 1.0), (1, 2, 3)):
        steps.clear()
        (found,) = beam_search(model, [PROMPTS[0]], 50, num_beams=W, length_penalty=alpha, eos_id=eos_id)
        assert found[0].tokens[-1] == eos_id
        assert len(steps) < 50 and (alpha > 0 or len(steps) <= 2 * W)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.6, 1.0, 2.0])
def test_a_search_for_fewer_texts_ends_sooner_with_the_same_ones(tiny_gpt, alpha, monkeypatch):
    forward, tokens = GPT.forward, []
    monkeypatch.setattr(GPT, "forward", lambda *args, **more: tokens.append(args[1].numel()) or forward(*args, **more))
    work = dict.fromkeys((1, 2, 4), 0)
    for seed in range(6):
        torch.manual_seed(seed)
        model = tiny_gpt(block_size=64, tie_embeddings=False)
        eos_id = generate(model, PROMPTS, 3, temperature=0)[0][-1]
        model.head.weight.data[eos_id] *= 2
        found = {}
        for n in work:
            tokens.clear()
            found[n] = plain(
                beam_search(model, PROMPTS, 30, num_beams=4, length_penalty=alpha, num_return=n, eos_id=eos_id)
            )
            work[n] += sum(tokens)
        for n, rows in found.items():
            assert rows == [row[:n] for row in found[4]]
    assert work[1] <= work[2] <= work[4] and (work[1] < work[4] or alpha > 1)  # a high penalty keeps long texts in play


def test_no_prompts_no_texts(tiny_gpt):
    assert beam_search(tiny_gpt(), [], 5) == generate(tiny_gpt(), [], 5) == []


def test_the_vocabulary_may_be_smaller_than_the_models(tiny_gpt):
    found = beam_search(tiny_gpt(), PROMPTS, 10, num_beams=4, num_return=4, vocab_size=5)
    assert {token for beams in found for beam in beams for token in beam.tokens} <= set(range(5))


@pytest.mark.parametrize(
    "prompts, options, sentence",
    [
        ([[1], []], {}, "a prompt must have at least one token, and prompt 1 has none"),
        ([[1, 23]], {}, "prompt 0 has the token 23, outside the model's vocabulary of 23"),
        ([[1]], {"num_beams": 3, "num_return": 4}, "num_return must be from 1 to num_beams=3, not 4"),
        ([[1]], {"num_return": 0}, "num_return must be from 1"),
        ([[1]], {"num_beams": 0}, "num_beams must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny_gpt, prompts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        beam_search(tiny_gpt(), prompts, 5, **options)
