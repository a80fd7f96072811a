"""Lesson 8: pretraining and supervised fine-tuning (SFT). The same loss, another mask.

Pretraining predicts every token of a text. SFT reads a whole conversation and predicts the assistant's words only: the
prompt is context, not a target. A tiny world shows what each gives: 40 animals, and the colour of each.
"""

import contextlib
import io
import random

import torch
from lesson import BLUE, GREY, ORANGE, claim, expect, figure, run, save, table
from torch import Tensor
from torch.nn import functional as F

import bpe
from decoding.stream import generate
from model import GPT, IGNORE, GPTConfig
from tasks.packing import Rows, make_examples
from text.chat import Message, Template
from text.tokenizer import BPETokenizer

ANIMALS = """fox owl cat dog bee ant elk emu hen pig rat cow bat cod eel gnu yak ape jay koi newt seal swan toad wolf
bear crab deer duck frog goat hare kiwi lion lynx mole moth orca puma slug""".split()
COLOURS = ["red", "blue", "grey", "green", "white", "black"]
WORLD = {animal: random.Random(animal).choice(COLOURS) for animal in ANIMALS}
HELD_OUT = ANIMALS[::4]  # no conversation of the fine-tuning names them


def facts(animal: str) -> list[str]:
    """Sentences for pretraining."""
    forms = (
        " the {} is {}.",
        " I saw the {}. It is {}.",
        " the {} came. It is {}.",
        " look at the {} there! It is {}.",
    )
    return [form.format(animal, WORLD[animal]) for form in forms]


def talk(animal: str) -> list[Message]:
    """A conversation for fine-tuning."""
    return [{"role": "user", "content": f"what colour has the {animal}?"},
            {"role": "assistant", "content": f"It is {WORLD[animal]}."}]  # fmt: skip


def world() -> Template:
    """The chat template, with a vocabulary that has a token for each word."""
    texts = [text for animal in ANIMALS for text in facts(animal) + [message["content"] for message in talk(animal)]]
    with contextlib.redirect_stderr(io.StringIO()):  # it says that no more merges are left
        return Template(BPETokenizer(bpe.train(texts, 600, "gpt4", special_tokens=("<|endoftext|>",))))


def fit(model: GPT, batches, steps: int, learning_rate: float) -> GPT:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, 2 * (1 - step / steps))
        model(**batches(step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def answers(model: GPT, template: Template, animals: list[str]) -> tuple[float, float]:
    """The share of right answers, and the share of answers that end by themselves."""
    prompts = [template.render(talk(animal)[:1], reply=True)[0] for animal in animals]
    said = generate(model, prompts, 8, temperature=0, eos_id=template.end_id)
    right = [template.tokenizer.encode(talk(animal)[1]["content"]) for animal in animals]
    ended = [tokens[-1] == template.end_id for tokens in said]
    same = [tokens[: len(one)] == one for tokens, one in zip(said, right, strict=True)]
    return sum(same) / len(same), sum(ended) / len(ended)


@torch.no_grad()
def losses(model: GPT, tokens: Tensor) -> Tensor:
    """The loss of each token of a row (T + 1,) but the first, counted or not: (T,)."""
    return F.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:], reduction="none")


def new(template: Template) -> GPT:
    torch.manual_seed(2)
    return GPT(GPTConfig(vocab_size=template.tokenizer.vocab_size, n_layer=1, n_head=4, n_embd=64, block_size=40))


def pretrained(template: Template, steps: int) -> GPT:
    """A model that has read the sentences in any order, in texts of 33 tokens."""
    sentences = [template.tokenizer.encode(text) for animal in ANIMALS for text in facts(animal)]
    order = random.Random(0)

    def batch(step: int) -> dict[str, Tensor]:
        texts = torch.tensor([sum(order.sample(sentences, 7), [])[:33] for _ in range(16)])
        return {"idx": texts[:, :-1], "targets": texts[:, 1:]}

    return fit(new(template), batch, steps, 1e-2)


def gradients(model: GPT, row: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one row, and its gradients in the tokens' embeddings and in the states before the head: (T, C)."""
    found: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda part, x, y: found.append(y)) for part in (model.tok_emb, model.norm)]
    loss = model(**row)[1]
    for hook in hooks:
        hook.remove()
    return loss.detach(), *(gradient[0] for gradient in torch.autograd.grad(loss, found))


def main(small: bool):
    template = world()
    tokenizer = template.tokenizer
    learned = [animal for animal in ANIMALS if animal not in HELD_OUT]
    tokens, mask = map(torch.tensor, template.render(talk("fox")))
    rows, alone = (Rows(make_examples([talk(animal) for animal in animals], template, 32).examples, 32, packing=False)
                   for animals in (learned, ["fox"]))  # fmt: skip
    row = alone.collate([[0]])
    n = len(tokens) - 1
    claim("a target is the next token where its mask is 1, and is not counted elsewhere",
          row["targets"][0, :n].tolist() == torch.where(mask[1:] == 1, tokens[1:], IGNORE).tolist())  # fmt: skip
    claim("the token that ends the answer is a target too", row["targets"][0, n - 1] == template.end_id)

    base = pretrained(template, 150 if small else 300)
    before = losses(base, tokens)
    loss, embeddings, states = gradients(base, row)
    claim("the loss of the row is the mean over the answer's tokens", torch.isclose(loss, before[mask[1:] == 1].mean()))
    moved = states[:n].abs().sum(-1) > 0
    claim("no gradient comes from the prompt: it is exactly 0 wherever the target is not counted",
          moved.tolist() == (mask[1:] == 1).tolist())  # fmt: skip
    reached = embeddings[tokens.tolist().index(*tokenizer.encode(" fox"))].abs().sum() > 0
    claim("but it goes through the prompt: the embedding of ' fox' gets one, as the answer reads it", reached)

    results = {}
    for name, model, learn in (
        ("pretrained", base, False),
        ("fine-tuned only", new(template), True),
        ("both", base, True),
    ):
        if learn:
            fit(model, lambda step: rows.batch(step, 0, 30, slice(0, 30)), 100, 2e-3)
        results[name] = [*answers(model, template, learned), *answers(model, template, HELD_OUT)]
    after = losses(base, tokens)
    print("\nOne conversation, on an animal that fine-tuning never names:")
    spelled = [tokenizer.decode([token]) for token in tokens.tolist()]
    columns = zip(map(repr, spelled[1:]), mask[1:].tolist(), before.tolist(), after.tolist(), strict=True)
    table(["token", "mask", "loss before", "loss after"], list(columns))
    print(f"\nQuestions about {len(learned)} animals of the fine-tuning, and about {len(HELD_OUT)} others:")
    table(["", "right", "ended", "others right", "others ended"], [[name, *found] for name, found in results.items()])
    both = results["both"]
    claim("after pretraining, fine-tuning on some animals answers about the others",
          both[2] >= results["fine-tuned only"][2] + 0.3)  # fmt: skip
    claim("every answer ends by itself", both[1] == both[3] == 1)
    return spelled, mask, before.tolist(), after.tolist(), results


def draw(spelled, mask, before, after, results) -> None:
    fig, (bars, right) = figure(1, 2, height=3.8, width_ratios=(2.6, 1))
    x, n = range(len(before)), len(before)
    bars.bar([i - 0.2 for i in x], before, 0.4, color=GREY, label="after pretraining")
    bars.bar([i + 0.2 for i in x], after, 0.4, color=BLUE, label="after fine-tuning too")
    first = mask.tolist().index(1) - 1
    bars.axvspan(first - 0.5, n - 0.5, color=ORANGE, alpha=0.25, linewidth=0, zorder=-1, label="mask = 1")
    labels = [text.replace(" ", "␣") for text in spelled[1:]]
    bars.set_xticks(x, labels, rotation=60, ha="right", rotation_mode="anchor")
    bars.set(
        ylabel="loss, nats",
        xlim=(-0.5, n - 0.5),
        ylim=(0, 1.35 * max(*before, *after)),
        title="The loss of each token, and the mask",
    )
    bars.legend(loc="upper left", bbox_to_anchor=(0, 1.02))
    colours = {"pretrained": GREY, "fine-tuned only": ORANGE, "both": BLUE}
    right.bar(range(3), [100 * found[2] for found in results.values()], color=[colours[name] for name in results])
    right.set_xticks(range(3), ["pre-\ntrained", "fine-\ntuned", "both"], fontsize=8)
    right.set(ylabel="% right", ylim=(0, 105), title="Animals that no\nconversation names")
    save(fig, "08_sft.svg")


def check(mask) -> None:
    """The exercise: mask(tokens, end, assistant) → a list of 0 and 1, by the special tokens' ids."""
    template = world()
    ids, long = template.ids, talk("fox") + talk("owl")
    for messages in (talk("cat"), long, [{"role": "system", "content": "It is red."}, *talk("bee")]):
        tokens, right = template.render(messages)
        given = mask(list(tokens), ids["<|end|>"], ids["<|assistant|>"])
        expect(f"mask(tokens of a conversation of {len(messages)} messages)", given, right)


if __name__ == "__main__":
    run(main, draw, check, asks="mask")
