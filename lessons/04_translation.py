"""Lesson 4: encoder and decoder. Cross-attention lets each token of the target look at the source, and so aligns them.

A tiny encoder-decoder learns to write English dates in Chinese. Nobody tells it which letters a digit comes from; its
cross-attention finds that out, and a picture shows it.
"""

import datetime
import random

import torch
from lesson import claim, expect, figure, run, save, table
from torch import Tensor

from data.dates.prepare import DATES, MONTHS, chinese, ordinal
from model import GPTConfig
from seq2seq import EncoderDecoder, cross_attention_map
from tasks.translate import Example, collate, make_example
from text.tokenizer import CharTokenizer

FORMS = {True: ("{y}-{mm}-{dd}", "{mm}/{dd}/{y}"), False: DATES}  # for a small run, and for the whole lesson
SHOWN = ("{M} {d}, {y}", datetime.date(2026, 11, 25))
ASCII = str.maketrans("年月日", "YMD")  # what the picture's font has


def written(form: str, day: datetime.date) -> str:
    """The day in one of the forms of data/dates/prepare.py."""
    month = MONTHS[day.month - 1]
    return form.format(m=day.month, mm=f"{day.month:02}", M=month, b=month[:3], d=day.day, dd=f"{day.day:02}",
                       th=ordinal(day.day), y=day.year)  # fmt: skip


def pairs(forms: tuple[str, ...], count: int, seed: int) -> list[tuple[str, str]]:
    """Random days in random forms, and in Chinese."""
    rng = random.Random(seed)
    days = [datetime.date(1950, 1, 1) + datetime.timedelta(rng.randrange(36_525)) for _ in range(count)]
    return [(written(rng.choice(forms), day), chinese(day, False, None)) for day in days]


def train(model: EncoderDecoder, examples: list[Example], eot_id: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        start = step * 32 % (len(examples) - 32)
        loss = model(**collate(examples[start : start + 32], eot_id))[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def look(model: EncoderDecoder, example: Example, eot_id: int) -> Tensor:
    """The weights (layers, H, T, S) of cross-attention while the decoder reads the right target."""
    source, idx = torch.tensor(example.source), torch.tensor([eot_id, *example.target[:-1]])
    return torch.stack([cross_attention_map(model, source, idx, layer) for layer in range(model.config.n_layer)])


def year_found(maps: Tensor, source: str) -> Tensor:
    """Which heads (layers, H) look, while each of the year's four digits is written, at that digit in the source."""
    year = next(i for i in range(len(source) - 3) if source[i : i + 4].isdigit())
    return (maps[:, :, :4].argmax(-1) == torch.arange(year, year + 4)).float().mean(-1)


def main(small: bool):
    forms, steps, n_layer, width = (FORMS[small], 200, 1, 48) if small else (FORMS[small], 600, 2, 64)
    texts = pairs(forms, 20_000, seed=1)
    tokenizer = CharTokenizer("".join(s + t for s, t in texts) + written(*SHOWN), eot=True)
    examples = [make_example(tokenizer, pair) for pair in texts]
    model = EncoderDecoder(GPTConfig(
        block_size=32, vocab_size=tokenizer.vocab_size, n_layer=n_layer, n_encoder_layer=n_layer, n_head=2,
        n_embd=width, position="learned",
    ))  # fmt: skip
    train(model, examples, tokenizer.eot_id, steps)

    held_out = pairs(forms, 200, seed=2)
    tests = [make_example(tokenizer, pair) for pair in held_out]
    with torch.no_grad():
        batch = collate(tests, tokenizer.eot_id)
        targets = batch.pop("targets")
        guesses = model(**batch)[0].argmax(-1)
        exact = ((guesses == targets) | (targets < 0)).all(-1).float().mean().item()
        batch["source"] = torch.where(batch["source_padding"], batch["source"], 1)  # other padding
        same = torch.equal(model(**batch)[0].argmax(-1)[targets >= 0], guesses[targets >= 0])
    print(f"{n_layer} + {n_layer} layers, {steps} steps: {exact:.1%} of 200 new dates come out right.")
    maps = [look(model, example, tokenizer.eot_id) for example in tests]
    found = torch.stack([year_found(m, source) for m, (source, _) in zip(maps, held_out, strict=True)]).mean(0)
    rows = [[f"{layer + 1}.{head + 1}", share.item()] for layer, heads in enumerate(found)
            for head, share in enumerate(heads)]  # fmt: skip
    table(["layer.head", "looks at the year's digit that it writes"], rows)
    claim("every row of cross-attention sums to 1", all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps))
    claim("the source's padding changes nothing in the target", same)
    claim("most new dates come out right", exact > 0.6)
    claim("one head finds the digit to copy more than half of the time, and chance finds it less than 1 time in 6",
          found.max() > 0.5 and min(len(source) for source, _ in held_out) > 6)  # fmt: skip
    source, day = written(*SHOWN) if not small else written(forms[0], SHOWN[1]), SHOWN[1]
    target = chinese(day, False, None)
    return source, target, look(model, make_example(tokenizer, (source, target)), tokenizer.eot_id)


def draw(source: str, target: str, maps: Tensor) -> None:
    layers, heads, T, S = maps.shape
    fig, axes = figure(layers, heads, height=2.9 * layers + 0.5, sharex=True, sharey=True, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer, head]
            image = axis.imshow(maps[layer, head].numpy(), vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"layer {layer + 1}, head {head + 1}")
            axis.set_xticks(range(S), source)
            axis.set_yticks(range(T), [*target.translate(ASCII), "end"])
    fig.supxlabel("source: where the decoder looks", fontsize=9)
    fig.supylabel("target: what it then writes (Y M D: year, month, day)", fontsize=9)
    fig.colorbar(image, ax=axes, shrink=0.6, label="weight")
    save(fig, "04_translation.svg")


def check(answer) -> None:
    """The exercise: cross_mask(documents (T,), source_documents (S,), padding (S,)) → (T, S) of booleans."""
    from seq2seq import cross_mask

    for case, T, S, last in (("one pair", (0, 0), (0, 0, 0), 3), ("padded", (0, 0, 0), (0, 0, 0, 0), 2),
                             ("two pairs", (0, 0, 1), (0, 1, 1, 1), 3)):  # fmt: skip
        documents, sources = torch.tensor(T), torch.tensor(S)
        padding = torch.arange(len(S)) < last
        right = cross_mask(documents[None], sources[None], padding[None]).bias[0, 0]
        given = answer(documents, sources, padding)
        expect(f"cross_mask(documents, source_documents, padding), {case},", torch.as_tensor(given).int(), right.int())


if __name__ == "__main__":
    run(main, draw, check, asks="cross_mask")
