"""Greedy and random decoding: what is drawn, cached and not, alone and in a batch, here and in transformers."""

import numpy as np
import pytest
import torch

from decoding.beam import beam_search
from decoding.score import log_likelihood
from decoding.stream import choose, context_start, generate, penalize, stream
from model import GPT
from tests.fake_cuda import emulated
from tests.helpers import POSITIONS, WINDOWS, assert_close, label, random, tokens
from tests.twins import gpt2_twins, mistral_twins, qwen3_twins

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
SAMPLING = {"temperature": 1.3, "top_k": 15, "top_p": 0.9, "seed": 5}
EVERYTHING = SAMPLING | {"min_p": 0.02, "repetition_penalty": 1.4}
METHODS = pytest.mark.parametrize(
    "options", [{"temperature": 0}, SAMPLING, EVERYTHING], ids=["greedy", "sampling", "all"]
)


@torch.no_grad()
def recomputed(model, prompt, max_new_tokens, *, repetition_penalty=1.0, seed=0, **options):
    """The definition of a sample: every token from the whole visible context, read anew."""
    row, uniforms = list(prompt), np.random.default_rng(seed).random(max_new_tokens)
    for uniform in uniforms:
        window = row[context_start(len(row), model.config.block_size) :]
        logits = model(torch.tensor([window]))[0][:, -1]
        for token in set(row):
            logits[0, token] *= repetition_penalty if logits[0, token] < 0 else 1 / repetition_penalty
        row += choose(logits, torch.tensor([uniform]), **{"temperature": 1.0} | options).tolist()
    return row[len(prompt) :]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@METHODS
@pytest.mark.parametrize("n", [1, 5, 8, 9, 20], ids=lambda n: f"prompt of {n}")
@pytest.mark.parametrize("positions", [*({"position": p} for p in POSITIONS), *WINDOWS], ids=label)
def test_cached_generation_equals_recomputing_everything_within_and_beyond_block_size(tiny_gpt, positions, n, options):
    model, prompt = tiny_gpt(**positions, block_size=8, tie_embeddings=False), [(7 * i) % 23 for i in range(n)]
    (text,) = generate(model, [prompt], 25, **options)
    assert text == recomputed(model, prompt, 25, **options)
    assert len(set(text)) > 1  # a text that says something about the positions


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_generation_works_for_every_context_however_short(tiny_gpt, block_size):
    model = tiny_gpt(block_size=block_size)
    for prompt, text in zip(PROMPTS, generate(model, PROMPTS, 12, temperature=0), strict=True):
        assert text == recomputed(model, prompt, 12, temperature=0)


@METHODS
@pytest.mark.parametrize("block_size", [8, 64])
def test_a_rows_text_does_not_depend_on_what_else_is_in_the_batch(tiny_gpt, block_size, options):
    model = tiny_gpt(block_size=block_size)
    for i, text in enumerate(generate(model, PROMPTS, 20, **options)):
        alone = options | {"seed": options.get("seed", 0) + i}
        assert [text] == generate(model, [PROMPTS[i]], 20, **alone)


def test_the_same_seed_gives_the_same_text_and_another_one_another(tiny_gpt):
    model = tiny_gpt()
    first, again, other = (generate(model, PROMPTS, 12, seed=seed) for seed in (1, 1, 100))
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    rows = generate(model, [[1]] * 4, 12)
    assert len({tuple(row) for row in rows}) == 4  # each sample of one prompt is its own


def test_generation_leaves_the_global_random_state_alone(tiny_gpt):
    model, state = tiny_gpt(), torch.get_rng_state()
    generate(model, PROMPTS, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_ends_with_eos_and_the_others_go_on(tiny_gpt):
    model = tiny_gpt()
    free = generate(model, PROMPTS, 12, **SAMPLING)
    eos = free[0][5]
    ended = generate(model, PROMPTS, 12, eos_id=eos, **SAMPLING)
    for text, whole in zip(ended, free, strict=True):
        assert text == (whole[: whole.index(eos) + 1] if eos in whole else whole)
    assert len(ended[0]) <= 6 and len({len(text) for text in ended}) > 1


def test_the_stream_gives_none_for_rows_that_have_ended_and_stops_with_the_last(tiny_gpt):
    model = tiny_gpt()
    free = generate(model, [[1]] * 2, 12, **SAMPLING)
    eos = next(token for token in free[0] if token in free[1])
    columns = list(stream(model, [[1]] * 2, 12, eos_id=eos, **SAMPLING))
    ends = [row.index(eos) for row in free]
    assert len(columns) == max(ends) + 1
    for step, column in enumerate(columns):
        shown = [None if token is None else token.id for token in column]
        assert shown == [row[step] if step <= end else None for row, end in zip(free, ends, strict=True)]


def test_a_row_ends_where_the_caller_says_so_and_is_asked_once_per_token(tiny_gpt):
    model, asked = tiny_gpt(), []
    free = generate(model, PROMPTS, 12, **SAMPLING)
    wanted = [0, 3, 11, 5]  # the last token of each row
    steps = [-1] * 4

    def ends(row, token):
        asked.append((row, token))
        steps[row] += 1
        return steps[row] == wanted[row]

    ended = generate(model, PROMPTS, 12, ends=ends, **SAMPLING)
    assert ended == [row[: n + 1] for row, n in zip(free, wanted, strict=True)]
    assert sorted(asked) == sorted((i, token) for i, row in enumerate(ended) for token in row)


@METHODS
def test_the_vocabulary_may_be_smaller_than_the_models(tiny_gpt, options):
    columns = list(stream(tiny_gpt(), PROMPTS, 30, vocab_size=5, **options))
    assert {token.id for column in columns for token in column} <= set(range(5))
    assert all(token.logprob <= 0 for column in columns for token in column)


@METHODS
def test_log_probabilities_are_the_models_own(tiny_gpt, options):
    model = tiny_gpt()
    columns = list(stream(model, PROMPTS, 9, **options))
    for i, prompt in enumerate(PROMPTS):
        row = [column[i] for column in columns]
        whole = prompt + [token.id for token in row]
        expected = log_likelihood(model, whole)[len(prompt) - 1 :]
        assert [token.logprob for token in row] == pytest.approx(expected.tolist(), abs=1e-5)


def test_equal_prompts_are_read_once(tiny_gpt, monkeypatch):
    model, read = tiny_gpt(block_size=64), []
    monkeypatch.setattr(model, "forward", lambda idx, **more: read.append(idx.shape) or GPT.forward(model, idx, **more))
    texts = generate(model, [PROMPTS[2]] * 3 + [PROMPTS[0]], 4, seed=5)
    assert read == [(2, 6), (4, 1), (4, 1), (4, 1)]
    assert texts[2:] == [
        generate(model, [prompt], 4, seed=5 + i)[0] for i, prompt in ((2, PROMPTS[2]), (3, PROMPTS[0]))
    ]


@pytest.mark.parametrize(
    "prompt, sentence",
    [
        ([], "must have at least one token, and prompt 1 has none"),
        ([3, 23], "prompt 1 has the token 23, outside the model's vocabulary of 23"),
        ([-1], "prompt 1 has the token -1"),
    ],
)
def test_an_impossible_prompt_is_refused(tiny_gpt, prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(tiny_gpt(), [[1], prompt], 5)


# ---------------------------------------------------------------------------------------------------------------------
# transformers is the oracle


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("twins", [qwen3_twins, gpt2_twins, mistral_twins], ids=["qwen3", "gpt2", "mistral"])
@torch.no_grad()
def test_greedy_texts_are_those_of_transformers(twins, seed, penalty):
    theirs, ours = twins(seed)
    T = max(map(len, PROMPTS))
    masks = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in PROMPTS])
    fill = [p[0] for p in PROMPTS]  # theirs counts the padding as there already: so it is a token of the prompt
    eos_id = None
    for _ in range(2):  # without and then with an end
        out = theirs.generate(
            torch.tensor([[pad] * (T - len(p)) + p for pad, p in zip(fill, PROMPTS, strict=True)]),
            attention_mask=masks, max_new_tokens=20, do_sample=False, repetition_penalty=penalty, pad_token_id=0,
            eos_token_id=eos_id,
        )  # fmt: skip
        expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in out[:, T:].tolist()]
        found = generate(ours, PROMPTS, 20, temperature=0, repetition_penalty=penalty, eos_id=eos_id)
        assert found == expected
        eos_id = eos_id or found[0][4]
    assert len(found[0]) <= 5 and len({len(row) for row in found}) > 1


ALL = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05}


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, ALL], ids=str)
def test_the_tokens_that_may_be_drawn_and_their_probabilities_are_those_of_transformers(options):
    from transformers.generation import logits_process

    logits = random(1, 101)
    kinds = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}
    theirs = logits
    for name, value in options.items():
        theirs = getattr(logits_process, f"{kinds[name]}LogitsWarper")(value)(None, theirs)
    expected, n = theirs.softmax(-1)[0], 200_000
    numbers = (torch.arange(n).double() + 0.5) / n
    chosen = choose(logits.expand(n, -1), numbers, **{"temperature": 1.0} | options).bincount(minlength=101)
    assert torch.equal(chosen > 0, expected > 1e-5)
    assert_close(chosen.double() / n, expected, 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The likelihood of a text


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 10, 13, 50, 100])
@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 64])
@torch.no_grad()
def test_the_likelihood_of_a_text_is_what_its_generation_would_have_seen(tiny_gpt, block_size, n):
    model, text = tiny_gpt(block_size=block_size), tokens(1, n)[0].tolist()
    expected = []
    for i in range(1, n):
        logits = model(torch.tensor([text[context_start(i, block_size) : i]]))[0][0, -1]
        expected.append((logits - logits.exp().sum().log())[text[i]])
    assert_close(log_likelihood(model, text), torch.tensor(expected, dtype=torch.float32), 1e-5)
    if n > 1:
        fewer = [token % 5 for token in text]
        assert log_likelihood(model, fewer, vocab_size=5).sum() > log_likelihood(model, fewer).sum()


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
def test_the_context_is_dropped_by_halves_and_only_when_it_is_full(block_size):
    half, previous = max(1, block_size // 2), 0
    for n in range(1, 60):
        start = context_start(n, block_size)
        assert start % half == 0 and n - start <= block_size  # whole halves, and what remains fits
        if start != previous:
            assert n - previous > block_size and start == previous + half
        previous = start


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a token


def frequencies(probs, n=20_000, temperature=1.0, **options):
    """How often each token is chosen as the uniform number runs evenly through [0, 1)."""
    logits = torch.tensor(probs, dtype=torch.float64).log().expand(n, -1)
    chosen = choose(logits, (torch.arange(n).double() + 0.5) / n, temperature, **options)
    return chosen.bincount(minlength=len(probs)) / n


P = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    "probs, options, expected",
    [
        (P, {}, P),
        (P, {"temperature": 0.5}, [p**2 / sum(q**2 for q in P) for p in P]),
        (P, {"temperature": 2.0}, [p**0.5 / sum(q**0.5 for q in P) for p in P]),
        (P, {"top_k": 1}, [0, 1, 0, 0, 0]),
        (P, {"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        (P, {"top_k": 5}, P),
        (P, {"top_k": 99}, P),
        (P, {"top_p": 0.39}, [0, 1, 0, 0, 0]),
        (P, {"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        (P, {"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        (P, {"top_p": 0.71}, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (P, {"top_p": 0.96}, P),
        (P, {"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        # top-p looks at the renormalised probabilities of what top-k has left: 4/7 and 3/7
        (P, {"top_k": 2, "top_p": 0.56}, [0, 1, 0, 0, 0]),
        (P, {"top_k": 2, "top_p": 0.58}, [0, 4 / 7, 0, 3 / 7, 0]),
        (P, {"top_k": 99, "top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        # ... and at those that the temperature has made
        (P, {"temperature": 0.5, "top_p": 0.55}, [0, 1, 0, 0, 0]),
        (P, {"temperature": 0.5, "top_p": 0.57}, [0, 16 / 25, 0, 9 / 25, 0]),
        # probabilities of exactly a quarter: "reach" includes equality, and among equals the first ones stay
        ([0.25] * 4, {"top_p": 0.25}, [1, 0, 0, 0]),
        ([0.25] * 4, {"top_p": 0.5}, [0.5, 0.5, 0, 0]),
        ([0.25] * 4, {"top_p": 0.51}, [1 / 3, 1 / 3, 1 / 3, 0]),
        # min-p looks at the likeliest: 0.4·0.3 = 0.12, and "at least" includes equality
        (P, {"min_p": 0.3}, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (P, {"min_p": 0.9}, [0, 1, 0, 0, 0]),
        (P, {"min_p": 0.1}, P),
        (P, {"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ([0.25] * 4, {"min_p": 1.0}, [0.25] * 4),
        ([0.5, 0.25, 0.25], {"min_p": 0.5}, [0.5, 0.25, 0.25]),
        (P, {"top_p": 0.71, "min_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        (P, {"temperature": 0.5, "min_p": 0.5}, [0, 16 / 25, 0, 9 / 25, 0]),
        ([0.0, 0.5, 0.0, 0.5], {}, [0, 0.5, 0, 0.5]),
        ([0.0, 0.5, 0.0, 0.5], {"top_k": 3}, [0, 0.5, 0, 0.5]),
    ],
)
def test_tokens_are_drawn_by_their_probabilities_after_temperature_top_k_and_top_p(probs, options, expected):
    assert frequencies(probs, **options).tolist() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_keeps_k_tokens_even_where_the_kth_is_tied(k):
    kept = frequencies([0.2, 0.3, 0.2, 0.2, 0.1], top_k=k)
    assert (kept > 0).sum() == k and kept[1] > 0 and kept[4] == 0


def test_each_row_draws_by_its_own_number_and_its_own_distribution():
    logits = torch.tensor([P, P[::-1]], dtype=torch.float64).log().repeat(2, 1)
    numbers = torch.tensor([0.05, 0.05, 0.999, 0.999], dtype=torch.float64)
    assert choose(logits, numbers, 1.0, 0, 1.0).tolist() == [0, 0, 4, 4]
    assert choose(logits, numbers, 1.0, 0, 0.01).tolist() == [1, 3, 1, 3]


def test_a_temperature_near_zero_is_greedy():
    logits = torch.randn(50, 23, generator=torch.Generator().manual_seed(0)).double()
    for temperature in (1e-5, 1e-300, 1e-320):
        assert torch.equal(choose(logits, torch.rand(50).double(), temperature), logits.argmax(-1))


def test_the_ends_of_the_unit_interval_never_draw_what_was_cut_off():
    logits = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]], dtype=torch.float64).log()
    for number in (0.0, 1 - 2**-53):
        for options in ((1.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.99), (0.1, 4, 0.9)):
            assert choose(logits, torch.tensor([number], dtype=torch.float64), *options).item() in (1, 3)


def test_a_penalty_makes_what_was_there_less_likely_whatever_its_sign():
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0]])
    seen = torch.tensor([[True, True, True, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 0.0, 3.0]]


def test_temperature_zero_is_the_most_likely_token():
    logits = torch.randn(50, 23, generator=torch.Generator().manual_seed(0))
    greedy = choose(logits, torch.rand(50), 0, 0, 1.0)
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(greedy, choose(logits, torch.rand(50).double(), 1e-3, 0, 1.0))  # its limit


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampled_frequencies_match_the_softmax(tiny_gpt, temperature):
    model, n = tiny_gpt(vocab_size=8), 4000
    model.norm.weight.data *= 0.3  # less sure of itself: every token has a chance
    texts = generate(model, [[3, 1]] * n, 1, temperature=temperature, seed=42)
    counts = torch.tensor(texts).flatten().bincount(minlength=8)
    with torch.no_grad():
        expected = n * (model(torch.tensor([[3, 1]]))[0][0, -1] / temperature).softmax(-1)
    assert expected.min() > 5  # what the test of the next line asks for
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded by chance once in a thousand


def test_decoding_on_a_gpu_never_uses_cudnns_attention_and_leaves_the_callers_choice_alone(tiny_gpt, monkeypatch):
    enabled, forward = [], GPT.forward

    def watched(self, *args, **options):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, *args, **options)

    monkeypatch.setattr(GPT, "forward", watched)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with emulated("cuda"):
        model = tiny_gpt().float().to("cuda")
        for _ in stream(model, [[1, 2], [3]], 20):  # reading, steps, and reading again when the context is full
            assert torch.backends.cuda.cudnn_sdp_enabled()  # also while the generator waits
        beam_search(model, [[1, 2], [3]], 5, num_beams=3)
        log_likelihood(model, list(range(20)))
    assert len(enabled) > 10 and not any(enabled)
