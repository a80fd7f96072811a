"""Lesson 9: BERT. A model that sees both sides of a blank fills it better than one that reads from left to right.

Two tiny models of one size learn the same little language, one to find hidden words, one to predict the next word.
Then both fill the same blanks.
"""

from types import SimpleNamespace

import numpy as np
import torch
from lesson import BLUE, ORANGE, claim, expect, figure, run, save, table
from torch import Tensor

from model import GPT, GPTConfig
from tasks.masked import CHOSEN, Hiding, collate
from text.tokenizer import MASK
from training.config import TrainConfig
from training.optim import make_optimizers

NAMES = "Ann Bob Eve Kim Leo Max Pia Tom".split()
SOUNDS = {"cat": "meows", "cow": "moos", "dog": "barks", "duck": "quacks", "horse": "neighs", "sheep": "bleats"}
WORDS = [*NAMES, "feeds", "sees", "the", "and", "it", ".", *SOUNDS, *SOUNDS.values(), MASK]
ID = {word: i for i, word in enumerate(WORDS)}
FIXED = {2: "the", 4: "and", 5: "it", 7: "."}  # places whose word never changes
LENGTH, ANIMAL, SOUND = 8, 3, 6  # of a sentence: "Ann feeds the cat and it meows ." and the places of its two words
TOKENIZER = SimpleNamespace(special_tokens={MASK: ID[MASK]}, vocab_size=len(WORDS))


def sentences(count: int, seed: int) -> np.ndarray:
    """Random sentences of the language, (count, LENGTH) ids."""
    rng, animals = np.random.default_rng(seed), list(SOUNDS)
    rows = []
    for name, verb, animal in zip(rng.choice(NAMES, count), rng.choice(["feeds", "sees"], count),
                                  rng.choice(animals, count), strict=True):  # fmt: skip
        rows.append([ID[word] for word in (name, verb, "the", animal, "and", "it", SOUNDS[animal], ".")])
    return np.array(rows)


def train(causal: bool, steps: int) -> GPT:
    """A model that predicts the next word (causal), or finds words that tasks/masked.py hides."""
    model = GPT(
        GPTConfig(
            block_size=LENGTH, vocab_size=len(WORDS), n_layer=2, n_head=2, n_embd=32, position="learned", causal=causal
        )
    )
    optimizers, hiding = make_optimizers(model, TrainConfig(compile=False)), Hiding.of(TOKENIZER)
    all_rows = sentences(32 * steps, seed=1)
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-2 * min(1, 2 * (1 - step / steps))
        rows = all_rows[32 * step : 32 * step + 32]
        if causal:
            batch = {"idx": torch.tensor(rows[:, :-1]), "targets": torch.tensor(rows[:, 1:])}
        else:
            sources = [np.random.SeedSequence(0, spawn_key=(step, i)) for i in range(len(rows))]
            batch = collate([hiding.hide(row, source) for row, source in zip(rows, sources, strict=True)])
        loss = model(**batch)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def fill(model: GPT, rows: Tensor, place: int) -> Tensor:
    """The probabilities (B, V) that a model gives the words at a place, which is hidden from it."""
    if model.config.causal:  # it sees what is to the left
        return model(rows[:, :place])[0][:, -1].softmax(-1)
    hidden = rows.clone()
    hidden[:, place] = ID[MASK]
    return model(hidden)[0][:, place].softmax(-1)


@torch.no_grad()
def score(model: GPT, rows: Tensor) -> Tensor:
    """A left-to-right model's log-probability of whole sentences, (B,), given their first word."""
    logp = model(rows[:, :-1])[0].log_softmax(-1)
    return logp.gather(-1, rows[:, 1:, None]).sum((1, 2))


def fill_by_score(model: GPT, rows: Tensor) -> Tensor:
    """Which animal makes each whole sentence the likeliest: a pass of the left-to-right model for each candidate."""
    candidates = [ID[animal] for animal in SOUNDS]
    scores = []
    for candidate in candidates:
        tried = rows.clone()
        tried[:, ANIMAL] = candidate
        scores.append(score(model, tried))
    return torch.tensor(candidates)[torch.stack(scores).argmax(0)]


def shares_of_fates(count: int) -> dict[str, float]:
    """What tasks/masked.py does to the words of many sentences: the share of each fate."""
    rows, hiding = sentences(count, seed=0), Hiding.of(TOKENIZER)
    hidden = [hiding.hide(row, np.random.SeedSequence(i)) for i, row in enumerate(rows)]
    idx, targets = (np.stack(part) for part in zip(*hidden, strict=True))
    chosen, masked = targets >= 0, idx == ID[MASK]
    claim("what is not to be found is not changed", (idx == rows)[~chosen].all())
    return {"chosen": chosen.mean(), "of these: masked": masked[chosen].mean(),
            "of these: another word": (~masked & (idx != rows))[chosen].mean()}  # fmt: skip


def main(small: bool):
    fates = shares_of_fates(2000 if small else 20_000)
    table(["what happens to a word", "share"], [[name, float(share)] for name, share in fates.items()])
    one = round(CHOSEN * LENGTH) / LENGTH  # a row of 8 words has one blank
    claim("one word of a row of eight is chosen, and four of five chosen words are masked",
          abs(fates["chosen"] - one) < 1e-9 and abs(fates["of these: masked"] - 0.8) < 0.03)  # fmt: skip

    steps = 200 if small else 400
    models = {"left to right": train(True, steps), "both sides": train(False, 2 * steps)}
    rows = torch.tensor(sentences(1000, seed=0))
    right = {name: [0.0] + [(fill(model, rows, place).argmax(-1) == rows[:, place]).float().mean().item()
                            for place in range(1, LENGTH)] for name, model in models.items()}  # fmt: skip
    table(["the blank is the", *models], [
        [word, *(found[place] for found in right.values())] for word, place in (("animal", ANIMAL), ("sound", SOUND))
    ])  # fmt: skip
    left, both = right.values()
    claim("both models know the sound, for the animal is to its left", min(left[SOUND], both[SOUND]) > 0.95)
    claim("from the left the animal can only be guessed, 1 of 6; from both sides it is known",
          left[ANIMAL] < 0.3 and both[ANIMAL] > 0.95)  # fmt: skip
    by_score = (fill_by_score(models["left to right"], rows) == rows[:, ANIMAL]).float().mean().item()
    print(f"Tried with all 6 animals, by the likelihood of whole sentences, left to right finds {by_score:.1%}.")
    claim("the left-to-right model finds it too if it may score whole sentences, at a pass for each candidate",
          by_score > 0.95)  # fmt: skip
    sentence = torch.tensor([[ID[word] for word in "Ann feeds the cat and it meows .".split()]])
    animals = [ID[animal] for animal in SOUNDS]
    blank = {name: fill(model, sentence, ANIMAL)[0, animals].tolist() for name, model in models.items()}
    return blank, right


def draw(blank: dict[str, list[float]], right: dict[str, list[float]]) -> None:
    fig, (one, two) = figure(1, 2, height=3.2)
    for i, (name, colour) in enumerate(zip(blank, (ORANGE, BLUE), strict=True)):
        one.bar(np.arange(len(SOUNDS)) + 0.4 * i - 0.2, blank[name], 0.4, label=name, color=colour)
        two.bar(np.arange(1, LENGTH) + 0.4 * i - 0.2, right[name][1:], 0.4, label=name, color=colour)
    one.set_xticks(range(len(SOUNDS)), list(SOUNDS))
    one.set_title("Ann feeds the ___ and it meows .")
    one.set_ylabel("probability")
    one.legend()
    words = ["verb", "the", "animal", "and", "it", "sound", "."]
    two.set_xticks(range(1, LENGTH), words)
    two.set_title("blanks filled right, by place")
    two.set_ylabel("share of 1,000 sentences")
    for axis in (one, two):
        axis.set_ylim(0, 1.05)
    save(fig, "09_bert.svg")


def check(answer) -> None:
    """The exercise: hide(tokens, chosen, fates, mask_id) → (what the model reads, its targets), two lists."""
    for tokens, chosen, fates in (
        ([5, 6, 7, 8], [1], ["mask"]),
        ([5, 6, 7, 8, 9], [0, 3, 4], ["keep", "mask", 6]),
        ([3, 3], [], []),
    ):
        idx, targets = list(tokens), [-100] * len(tokens)
        for place, fate in zip(chosen, fates, strict=True):
            targets[place] = tokens[place]
            idx[place] = 99 if fate == "mask" else tokens[place] if fate == "keep" else fate
        given = answer(list(tokens), list(chosen), list(fates), 99)
        expect(f"hide({tokens}, {chosen}, {fates}, 99)", tuple(map(list, given)), (idx, targets))


if __name__ == "__main__":
    run(main, draw, check, asks="hide")
