"""Tell the class of a text: sample.py --classify."""

import json

import torch

from classifier import class_names
from decoding.kernels import read_tokens
from decoding.prompt import TextModel
from decoding.text import note
from text.tokenizer import Tokenizer, start_id


def document_tokens(tokenizer: Tokenizer, text: str, block_size: int) -> tuple[list[int], bool]:
    """The tokens of a text as a document of its own, and whether it was cut off at block_size."""
    begin = [] if start_id(tokenizer) is None else [start_id(tokenizer)]
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    tokens = [*begin, *tokenizer.encode(text), *end]
    return tokens[:block_size], len(tokens) > block_size


@torch.inference_mode()
def write_class(model: TextModel, text: str, as_json: bool) -> None:
    """Print the classes of a text, the likeliest first, with their probabilities.

    Raises ValueError if the model is no classifier, or if there is no text.
    """
    names = class_names(model.gpt.config)
    if not names:
        raise ValueError("--classify needs a classifier, as config/classify_pydocs.py trains one: this model is none")
    if not text.strip():
        raise ValueError("--classify takes a text, and there is nothing in this one")
    tokens, cut = document_tokens(model.tokenizer, text, model.block_size)
    if cut:
        note(f"note: the text is cut off after {model.block_size} tokens: the model sees no more")
    logits = read_tokens(model.gpt, torch.tensor([tokens], device=model.gpt.tok_emb.weight.device))
    found = dict(zip(names, logits[0].float().softmax(-1).tolist(), strict=True))
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    if as_json:
        print(json.dumps({"text": text, "label": next(iter(found)), "probabilities": found}))
        return
    for name, probability in found.items():
        print(f"{probability:6.1%} {name}")
