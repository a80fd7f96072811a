"""sample.py --explain: what it says about a step or a search is what the model computed and the decoding code did."""

import math
import re
from collections import deque

import pytest
import torch

from decoding.beam import Search, beam_search
from decoding.explain import grow, step_line, steps_heading, tree
from decoding.stream import Step, generate, stream
from sample import SampleConfig, read_options
from tests.helpers import error_of, json_lines
from text.tokenizer import CharTokenizer

pytest_plugins = ("tests.sample_runs",)

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvw", eot=False)  # the 23 tokens of tiny_gpt
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def step_of(probs, scores=None):
    logits = torch.tensor([probs]).log()
    return Step(logits, logits if scores is None else torch.tensor([scores]).log())


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_a_step_shows_the_five_likeliest_and_the_chosen_one():
    step = step_of([0.05, 0.3, 0.2, 0.25, 0.0001, 0.1, 0.0999])
    assert re.sub(" +", " ", step_line(LETTERS, step, 0, 7, 3, PLAIN)) == (
        " 7: 'b' 0.300 → 'd' 0.250 'c' 0.200 'f' 0.100 'g' 0.100"
    )
    rare = step_line(LETTERS, step, 0, 7, 4, PLAIN)
    assert rare.count("→") == 1 and rare.endswith("'g' 0.100        … → 'e' <0.001, number 7")


def test_brackets_hold_the_probabilities_by_which_a_token_was_drawn():
    step = step_of([0.4, 0.3, 0.2, 0.1])
    squares = [p * p for p in (0.4, 0.3, 0.2, 0.1)]  # softmax(logits / 0.5)

    def brackets(step=step, **options):
        return re.findall(r"\((.*?)\)", step_line(LETTERS, step, 0, 1, 0, PLAIN | options))

    assert brackets() == []
    assert brackets(temperature=0.5) == [f"{square / sum(squares):.3f}" for square in squares]
    assert brackets(top_k=2) == ["0.571", "0.429", "0.000", "0.000"]
    assert brackets(top_p=0.5) == ["0.571", "0.429", "0.000", "0.000"]
    assert brackets(min_p=0.7, temperature=0.5) == ["1.000", "0.000", "0.000", "0.000"]
    penalized = step_of([0.4, 0.3, 0.2, 0.1], [0.1, 0.3, 0.4, 0.2])
    assert brackets(penalized, repetition_penalty=2.0, temperature=0) == ["0.100", "0.300", "0.400", "0.200"]
    assert steps_heading(PLAIN | {"temperature": 0, "top_k": 3}).endswith("the chosen one")
    assert steps_heading(PLAIN | {"temperature": 0.5}).endswith("in brackets the probabilities with temperature=0.5")


def test_the_record_of_a_step_is_what_the_model_says_and_changes_nothing(tiny_gpt):
    model, prompts, options = tiny_gpt(), [[1, 2, 3], [4]], {"seed": 3, "temperature": 0.7, "repetition_penalty": 1.3}
    record, rows = deque(maxlen=1), [list(prompt) for prompt in prompts]
    for column in stream(model, prompts, 20, **options, record=record):
        for i, row in enumerate(rows):
            if len(row) <= model.config.block_size:
                with torch.no_grad():
                    logits = model(torch.tensor([row]))[0][0, -1]
                torch.testing.assert_close(record[0].logits[i], logits, rtol=1e-6, atol=1e-6)
            row.append(column[i].id)
    new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    assert new == generate(model, prompts, 20, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Beams


def test_the_tree_of_a_search_that_is_known():
    search = Search([], [0], num_beams=2, length_penalty=0.0, eos_id=0, longest=3, wanted=2)
    search.record = []

    def step(*candidates):
        search.step([(math.log(p), parent, token) for p, parent, token in candidates])

    step((0.5, 0, 1), (0.3, 0, 2), (0.1, 0, 3), (0.08, 0, 4))  # b and c are kept
    step((0.24, 1, 0), (0.2, 0, 1), (0.15, 0, 2), (0.06, 1, 3))  # ca is finished, bb and bc are kept
    step((0.16, 0, 3), (0.05, 1, 4), (0.02, 0, 4), (0.01, 1, 1))  # bbd and bce reach three tokens
    assert tree(LETTERS, search.record, 2)[1:] == [
        "│  ✗ 'd' 0.100  -2.30, 'e' 0.080  -2.53",
        "├─ 'b' 0.500  -0.69",
        "│  ├─ 'b' 0.400  -1.61",
        "│  │  │  ✗ 'e' 0.100  -3.91",
        "│  │  'd' 0.800  -1.83  ■ finished, score -1.8326",
        "│  └─ 'c' 0.300  -1.90",
        "│     │  ✗ 'b' 0.067  -4.61",
        "│     'e' 0.333  -3.00  ■ finished, score -2.9957",
        "└─ 'c' 0.300  -1.20",
        "   │  ✗ 'd' 0.200  -2.81",
        "   'a' 0.800  -1.43  ■ finished, score -1.4271",
    ]


@pytest.mark.parametrize("eos_id", [None, 3])
def test_the_record_of_a_search_leads_to_every_text_that_it_found(tiny_gpt, eos_id):
    model, W, options = tiny_gpt(), 3, {"num_beams": 3, "num_return": 3, "eos_id": eos_id}
    prompts = [[1, 2, 3], [4], [5, 6]]
    record = [[] for _ in prompts]
    found = beam_search(model, prompts, 12, **options, record=record)
    assert found == beam_search(model, prompts, 12, **options)
    for prompt, beams, candidates in zip(prompts, found, record, strict=True):
        parent = {child: i for i, children in grow(candidates).items() for child in children}
        assert sorted(parent) == list(range(len(candidates)))

        def path(i, parent=parent, candidates=candidates):
            return [] if i < 0 else [*path(parent[i]), candidates[i].token]

        finished = {tuple(path(i)): c.score for i, c in enumerate(candidates) if c.fate == "finished"}
        best = sorted(finished.items(), key=lambda item: -item[1])[:W]
        assert [(tuple(beam.tokens), beam.score) for beam in beams] == best
        for step in {c.step for c in candidates}:
            assert 0 < sum(c.step == step for c in candidates) <= 2 * W
            assert sum(c.step == step and c.fate == "kept" for c in candidates) <= W
        i = max(range(len(candidates)), key=lambda i: candidates[i].fate == "dropped")  # one that was dropped
        with torch.no_grad():
            text = prompt + path(i)
            logprobs = model(torch.tensor([text]))[0][0].float().log_softmax(-1)
        read = sum(logprobs[k - 1, text[k]].item() for k in range(len(prompt), len(text)))
        assert candidates[i].logprob == pytest.approx(read, abs=1e-4)


def test_a_long_search_needs_no_deep_recursion(tiny_gpt):
    record = [[]]
    beam_search(tiny_gpt(block_size=4, n_layer=1), [[1]], 1200, num_beams=2, record=record)
    lines = tree(LETTERS, record[0], 2)
    assert sum("■" in line for line in lines) == 2 and any("none of its continuations" in line for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_explains_and_then_prints_the_same_text(sample):
    for options in (["--temperature=0"], ["--seed=3", "--top_k=4"], ["--num_beams=3"], ["--num_samples=2", "--seed=3"]):
        options = ["--prompt=the ", "--max_new_tokens=8", *options]
        plain, explained = sample(*options).stdout, sample(*options, "--explain")
        assert explained.returncode == 0, explained.stderr
        lines = explained.stdout.splitlines(keepends=True)
        more = [line for line in lines if not re.match(r" *\d+: |each step: |3 beams; |[│├└ ]+", line)]
        assert "".join(more) == plain
        steps = [line for line in lines if re.match(r" *\d+: ", line)]
        texts = 0 if "--num_beams=3" in options else 2 if "--num_samples=2" in options else 1
        assert len(steps) <= 8 * texts and all(step.count("→") == 1 for step in steps)
        assert ("■ finished, score" in explained.stdout) == ("--num_beams=3" in options)


def test_the_chosen_tokens_are_those_of_the_text(sample):
    options = ["--prompt=the ", "--seed=5", "--max_new_tokens=20", "--stop=o"]
    (line,) = json_lines(sample(*options, "--json"))
    chosen = re.findall(r"→ '(.+?)' ", sample(*options, "--explain").stdout)
    assert "".join(chosen).removesuffix("<|endoftext|>") == line["text"] + "o" * (line["finish"] == "stop")
    greedy = sample(*options[:1], "--max_new_tokens=6", "--temperature=0", "--explain").stdout.splitlines()
    assert all(re.match(r" *\d: → ", line) for line in greedy[1:7])  # the likeliest stands first


def test_a_file_of_prompts_is_explained_prompt_by_prompt(sample, tmp_path):
    (tmp_path / "p.txt").write_text("the quick\na\n")
    options = [f"--prompts={tmp_path}/p.txt", "--max_new_tokens=3", "--explain"]
    drawn = sample(*options).stdout.splitlines()
    assert drawn[0].startswith("each step") and [line for line in drawn if line.startswith("---")] == [
        f"--- {tmp_path}/p.txt, line {i}" for i in (1, 2)
    ]
    assert drawn[2].startswith("   1: ") and drawn[5].startswith("the quick")
    beams = sample(*options, "--num_beams=2").stdout
    assert [line for line in beams.splitlines() if line.endswith("the search")] == [
        f"--- {tmp_path}/p.txt, line {i}: the search" for i in (1, 2)
    ]


def test_what_a_terminal_obeys_is_spelled_out(sample, wild):
    for more in (["--seed=2"], ["--num_beams=2"]):
        shown = sample("--prompt=[", "--explain", "--max_new_tokens=12", *more, run=wild).stdout
        lines = [line for line in shown.split("\n") if re.match(" *\\d+: |[│├└]", line)]
        assert any(r"'\x1b'" in line for line in lines) and not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--json"], "--json has no effect with --explain"),
        (["--json", "--num_beams=2"], "--json has no effect with --explain"),
        (["--chat"], "--explain has no effect with --chat: leave it out"),
        (["--score=file"], "--explain has no effect with --score: leave it out"),
        (["--num_beams=17"], "--explain draws the tree of at most 16 beams, not 17"),
        (["--num_beams=2", "--seed=1"], "--seed has no effect with --num_beams above 1"),
    ],
)
def test_what_cannot_be_explained_is_one_line(sample, options, sentence):
    assert sentence in error_of(sample("--explain", *options))


def test_not_explaining_goes_with_everything():
    assert not SampleConfig().explain
    for options in (["--chat"], ["--score=file"], ["--json"], ["--num_beams=17"]):
        read_options([*options, "--explain=False"])
