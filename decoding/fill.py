"""Fill the blanks of a text: a masked model's likeliest tokens for each <|mask|>, from the text on both sides of it."""

import json
from typing import NamedTuple

import torch
from torch import Tensor

from decoding.kernels import read_tokens
from decoding.prompt import TextModel
from decoding.text import show
from model import GPT
from text.tokenizer import MASK, Tokenizer, start_id

SHOWN = 5  # tokens for each blank


class Guess(NamedTuple):
    """A token that may stand in a blank, and the probability that the model gives it."""

    id: int
    probability: float


def blank_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], Tensor]:
    """The tokens of a text as a document of its own, with the mask token where the text has <|mask|>; and which tokens
    fit into each blank, (blanks, V).

    Where tokens may begin with a space, the space before a blank is left out, for the token in it brings its own: then
    only such tokens fit, and only others where the text has no space.
    """
    begins, ends = start_id(tokenizer), tokenizer.eot_id
    tokens = [] if begins is None else [begins]
    spellings = map(tokenizer.bytes_of, range(tokenizer.vocab_size))
    spaced = torch.tensor([spelling.startswith(b" ") and len(spelling) > 1 for spelling in spellings])
    fits = torch.ones(text.count(MASK), len(spaced), dtype=torch.bool)
    for i, piece in enumerate(text.split(MASK)):
        if i > 0:
            tokens.append(tokenizer.special_tokens[MASK])
            piece = piece.removeprefix(" ") if tokenizer.adds_space else piece
        if i < len(fits) and spaced.any():
            fits[i] = spaced == (piece.endswith(" ") or (tokenizer.adds_space and i == 0 and not piece))
            piece = piece.removesuffix(" ")
        tokens += tokenizer.encode(piece) if piece else []
    return tokens if ends is None else [*tokens, ends], fits


@torch.inference_mode()
def likeliest(model: GPT, tokens: list[int], mask_id: int, fits: Tensor, count: int = SHOWN) -> list[list[Guess]]:
    """For each mask among the tokens, the `count` likeliest of the tokens that fit, the best first; fits: (blanks, V).

    Each blank is filled by itself: the model sees the others as blanks.
    """
    idx = torch.tensor([tokens], device=model.tok_emb.weight.device)
    probabilities = read_tokens(model, idx)[idx == mask_id][:, : fits.size(1)].float().softmax(-1).cpu()
    top = probabilities.masked_fill(~fits, 0).topk(min(count, fits.size(1)))
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[Guess(*guess) for guess in zip(*row, strict=True)] for row in rows]


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, in which bytes that are no character become U+FFFD."""
    return tokenizer.bytes_of(token).decode(errors="replace")


def write_filled(model: TextModel, text: str, as_json: bool) -> None:
    """Print the text with its blanks filled by the likeliest tokens, and the likeliest ones for each blank.

    Raises ValueError if the model is not a masked one, or if the text has no blank or does not fit.
    """
    tokenizer = model.tokenizer
    if model.gpt.config.causal or MASK not in tokenizer.special_tokens:
        raise ValueError("--fill needs a masked model, as config/bert_pydocs.py trains one: this one predicts the next "
                         "token, from the left only; give it a --prompt")  # fmt: skip
    (tokens, fits), mask_id = blank_tokens(tokenizer, text), tokenizer.special_tokens[MASK]
    if not len(fits):
        raise ValueError(f"--fill takes a text with blanks, each written {MASK}: there is none in {text[:60]!r}")
    if len(tokens) > model.block_size:
        raise ValueError(f"the text has {len(tokens)} tokens, and the model sees {model.block_size}: shorten it")
    blanks = likeliest(model.gpt, tokens, mask_id, fits)

    best = iter([guesses[0].id for guesses in blanks])
    inner = tokens[start_id(tokenizer) is not None : len(tokens) - (tokenizer.eot_id is not None)]
    filled = tokenizer.decode(next(best) if token == mask_id else token for token in inner)
    if as_json:
        found = [
            [{"token": id, "text": spelled(tokenizer, id), "probability": p} for id, p in guesses] for guesses in blanks
        ]
        print(json.dumps({"text": text, "filled": filled, "blanks": found}))
        return
    show(filled)
    for number, guesses in enumerate(blanks, start=1):
        words = [f"{p:6.1%} {json.dumps(spelled(tokenizer, id), ensure_ascii=False)}" for id, p in guesses]
        show(f"blank {number}: {'  '.join(words)}")
