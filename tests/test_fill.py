"""sample.py --fill: the likeliest tokens for the blanks of a text, from the text on both sides."""

import json
import sys

import pytest
import torch

import train
from bench import cloze
from decoding.fill import blank_tokens, likeliest
from runs.run import Run
from tests.helpers import SIZES, error_of, json_lines, make_run
from text.corpus import Corpus
from text.tokenizer import MASK, BPETokenizer, ExtendedTokenizer

pytest_plugins = ("tests.sample_runs",)


@pytest.fixture(scope="module")
def masked(corpus_folder, tmp_path_factory):
    """A masked model, trained for a moment."""
    folder = tmp_path_factory.mktemp("masked")
    options = ["--objective=masked", "--causal=False", "--max_iters=40", "--learning_rate=0.02"]
    return make_run(train.main, "train.py", folder, f"--dataset={corpus_folder}", *SIZES, *options)


@torch.no_grad()
def test_each_blank_gets_the_models_five_likeliest_tokens(sample, masked):
    (found,) = json_lines(sample(f"--fill={MASK}he quick {MASK}og", "--json", run=masked))
    run = Run.open(masked)
    model, tokenizer = run.load_model(), run.tokenizer
    mask, end = tokenizer.special_tokens[MASK], tokenizer.eot_id
    row = [end, mask, *tokenizer.encode("he quick "), mask, *tokenizer.encode("og"), end]
    logits = model(torch.tensor([row]))[0][0]
    for blank, place in zip(found["blanks"], (1, row.index(mask, 2)), strict=True):
        expected = logits[place].softmax(-1).sort(descending=True)
        assert [guess["token"] for guess in blank] == expected.indices[:5].tolist()
        assert [guess["probability"] for guess in blank] == pytest.approx(expected.values[:5].tolist(), rel=1e-4)
        assert [guess["text"] for guess in blank] == [tokenizer.decode([guess["token"]]) for guess in blank]
    first, second = (blank[0]["text"] for blank in found["blanks"])
    assert found["filled"] == f"{first}he quick {second}og" and found["text"] == f"{MASK}he quick {MASK}og"


def test_people_see_the_filled_text_and_a_line_for_each_blank(sample, masked, tmp_path):
    (tmp_path / "text").write_text(f"the {MASK}ox\n")
    (found,) = json_lines(sample(f"--fill=FILE:{tmp_path}/text", "--json", run=masked))
    filled, line = sample(f"--fill=the {MASK}ox", run=masked).stdout.splitlines()
    assert filled == found["filled"] and line.startswith("blank 1: ") and line.count("%") == 5
    best = found["blanks"][0][0]
    assert f"{best['probability']:.1%} {json.dumps(best['text'])}" in line


def test_a_space_before_a_blank_belongs_to_the_word_in_it(vocabularies):
    base = BPETokenizer(next(iter(vocabularies.values())))
    tokenizer = ExtendedTokenizer(base, [MASK])
    mask, around = base.vocab_size, ([] if base.eot_id is None else [base.eot_id])
    tokens, fits = blank_tokens(tokenizer, f"Return the {MASK} of {MASK}({MASK})")
    words = [base.encode(text) for text in ("Return the", " of", "(", ")")]
    assert tokens == [*around, *words[0], mask, *words[1], mask, *words[2], mask, *words[3], *around]
    (spaced,), (plain, *_) = tokenizer.encode(" the"), tokenizer.encode("self")
    assert fits[:, spaced].tolist() == [True, True, False] and fits[:, plain].tolist() == [False, False, True]
    assert fits.shape == (3, tokenizer.vocab_size)


def test_padding_of_the_vocabulary_is_never_shown(tiny_gpt):
    model = tiny_gpt(causal=False)
    with torch.no_grad():
        model.head.weight[20:] += 100 * model.head.weight[3]
    (guesses,) = likeliest(model, [1, 22, 3], 22, torch.ones(1, 20, dtype=torch.bool), count=99)
    assert sorted(guess.id for guess in guesses) == list(range(20))
    assert sum(guess.probability for guess in guesses) == pytest.approx(1)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--fill=the quick"], "--fill takes a text with blanks, each written <|mask|>"),
        ([f"--fill={'fox ' * 20}{MASK}"], "the text has 83 tokens, and the model sees 48"),
        ([f"--fill={MASK}", "--temperature=0.5"], "--temperature has no effect with --fill"),
        ([f"--fill={MASK}", "--max_new_tokens=5"], "--max_new_tokens has no effect with --fill"),
        ([f"--fill={MASK}", "--prompt=a"], "--prompt has no effect with --fill"),
        ([f"--fill=Zebra {MASK}"], "character 'Z'"),
        (["--fill=FILE:nowhere"], "cannot read the file of the text nowhere"),
        (["--prompt=the"], "but fill its blanks, by --fill"),
    ],
)
def test_what_cannot_be_filled_is_told_in_one_line(sample, masked, options, sentence):
    assert sentence in error_of(sample(*options, run=masked))


def test_a_model_that_predicts_the_next_token_fills_no_blanks(sample, trained):
    assert "--fill needs a masked model" in error_of(sample(f"--fill=the {MASK}", run=trained))


@torch.no_grad()
def test_the_benchmark_gives_both_models_the_same_blanks(masked, trained, corpus_folder, monkeypatch, capsys):
    corpus, models = Corpus(corpus_folder), {name: Run.open(run) for name, run in (("m", masked), ("c", trained))}
    windows, places = cloze.choose_blanks(corpus, 48, 40)
    found = {name: cloze.ranks(run, windows, places) for name, run in models.items()}
    for i, (row, place) in enumerate(zip(windows, places.tolist(), strict=True)):
        hidden = row.clone()
        hidden[place] = models["m"].tokenizer.special_tokens[MASK]
        looks = {"m": models["m"].load_model()(hidden[None])[0][0, place, : corpus.vocab_size + 1],
                 "c": models["c"].load_model()(row[None, :place])[0][0, -1]}  # fmt: skip
        for name, logits in looks.items():
            assert found[name][i] == (logits.argsort(descending=True) == row[place]).nonzero().item()
    command = ["cloze.py", f"--masked={masked}", f"--causal={trained}", f"--dataset={corpus_folder}", "--count=40"]
    monkeypatch.setattr(sys, "argv", command)
    cloze.main()
    table = capsys.readouterr().out
    for name, kind in (("m", "masked"), ("c", "causal")):
        assert f"| any token | 40 | {kind} | {(found[name] == 0).double().mean():.1%} |" in table
    monkeypatch.setattr(sys, "argv", [*command, f"--causal={masked}"])
    with pytest.raises(ValueError, match="--causal one with causal=True"):
        cloze.main()


def test_a_whole_word_begins_with_a_space_and_ends_where_no_letter_follows(vocabularies):
    tokenizer = BPETokenizer(next(iter(vocabularies.values())))
    (the,), (comma,), (letter,) = (tokenizer.encode(text) for text in (" the", ",", "s"))
    windows = torch.tensor([[comma, the, comma], [comma, the, letter], [comma, letter, comma], [comma, comma, the]])
    words = cloze.whole_words(windows, torch.tensor([1, 1, 1, 2]), tokenizer)
    assert words.tolist() == [True, False, False, False]
