import numpy as np
import pytest
import torch

from sample import SampleConfig, choose, context_start, generate, read_prompt, show_text, stream

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
SAMPLING = {"temperature": 1.3, "top_k": 15, "top_p": 0.9, "seed": 5}
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")


@torch.no_grad()
def recomputed(model, prompt, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """The definition of a sample: every token from the whole visible context, read anew."""
    row, uniforms = list(prompt), np.random.default_rng(seed).random(max_new_tokens)
    for uniform in uniforms:
        window = row[context_start(len(row), model.config.block_size) :]
        logits = model(torch.tensor([window]))[0][:, -1]
        row += choose(logits, torch.tensor([uniform]), temperature, top_k, top_p).tolist()
    return row[len(prompt) :]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("n", [1, 5, 8, 9, 20], ids=lambda n: f"prompt of {n}")
@pytest.mark.parametrize("position", POSITIONS)
def test_cached_generation_equals_recomputing_everything_within_and_beyond_block_size(tiny_gpt, position, n, options):
    model, prompt = tiny_gpt(position=position, block_size=8, tie_embeddings=False), [(7 * i) % 23 for i in range(n)]
    (text,) = generate(model, [prompt], 25, **options)
    assert text == recomputed(model, prompt, 25, **options)
    assert len(set(text)) > 1  # a text that says something about the positions


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_generation_works_for_every_context_however_short(tiny_gpt, block_size):
    model = tiny_gpt(block_size=block_size)
    for prompt, text in zip(PROMPTS, generate(model, PROMPTS, 12, temperature=0), strict=True):
        assert text == recomputed(model, prompt, 12, temperature=0)


@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLING], ids=["greedy", "sampling"])
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
        assert column == [row[step] if step <= end else None for row, end in zip(free, ends, strict=True)]


def test_an_empty_prompt_is_refused(tiny_gpt):
    with pytest.raises(ValueError, match="a prompt must have at least one token"):
        generate(tiny_gpt(), [[1], []], 5)


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


def frequencies(probs, n=20_000, temperature=1.0, top_k=0, top_p=1.0):
    """How often each token is chosen as the uniform number runs evenly through [0, 1)."""
    logits = torch.tensor(probs, dtype=torch.float64).log().expand(n, -1)
    chosen = choose(logits, (torch.arange(n).double() + 0.5) / n, temperature, top_k, top_p)
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


def test_the_ends_of_the_unit_interval_never_draw_what_was_cut_off():
    logits = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]], dtype=torch.float64).log()
    for number in (0.0, 1 - 2**-53):
        for options in ((1.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.99), (0.1, 4, 0.9)):
            assert choose(logits, torch.tensor([number], dtype=torch.float64), *options).item() in (1, 3)


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


# ---------------------------------------------------------------------------------------------------------------------
# The command's parts


def test_characters_that_take_several_tokens_are_printed_whole(tiny_encoding, capsys):
    from common.tokenizer import TiktokenTokenizer

    tokenizer, shown = TiktokenTokenizer(tiny_encoding), []
    text = "Grüße, 世界! 🙂"

    def tokens():
        for token in [*tokenizer.encode(text), None, tokenizer.eot_id]:
            shown.append(capsys.readouterr().out)
            yield token

    show_text(tokenizer, tokens())
    shown.append(capsys.readouterr().out)
    assert "".join(shown) == text + "\n"
    assert "\ufffd" not in "".join(shown) and sum(map(bool, shown)) > 8  # as it comes, not all at the end


def test_a_prompt_can_be_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße\n", encoding="utf-8")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    assert read_prompt("text: FILE") == "text: FILE"
    assert read_prompt(f"FILE:{tmp_path}/prompt.txt") == "Grüße\n"
    for name, reason in {"missing": "No such file", "bytes": "not UTF-8"}.items():
        with pytest.raises(ValueError, match=f"cannot read the prompt file .*{name}: .*{reason}"):
            read_prompt(f"FILE:{tmp_path}/{name}")


@pytest.mark.parametrize(
    "option", [{"max_new_tokens": 0}, {"num_samples": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0},
               {"top_p": 1.1}, {"seed": -1}, {"temperature": float("nan")}], ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be "):
        SampleConfig(**option)
