"""A model of ours as a folder that transformers loads without code of ours: config.json, safetensors, tokenizer, card.

The class is the one that our config equals: Llama, Mistral, Qwen2, Qwen3, SmolLM3 or GPT-2. A config that equals none
is refused with the options that stand in the way. The weights are written tensor by tensor.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.files import write_json, write_whole
from formats import gpt2, llama
from formats.tokenizers import export_tokenizer
from formats.weights import Entry, Renaming, foreign_weights, our_shapes, write_shards
from model import GPTConfig
from text.tokenizer import Tokenizer, start_id

Read = Callable[[str], Tensor | None]  # the weight of that name; None for a bias that the model does not have


def target(config: GPTConfig) -> str:
    """The model type that the config equals, such as "qwen3". Raises ValueError with the options that equal none."""
    kind, first = llama.type_of(config)
    if kind:
        return kind
    if not (second := gpt2.obstacles(config)):
        return "gpt2"
    nearest, obstacles = min((("Llama and its relatives", first), ("GPT-2", second)), key=lambda pair: len(pair[1]))
    raise ValueError(f"this model equals no class of transformers; from {nearest} it differs by {', '.join(obstacles)}")


def exported(config: GPTConfig, kind: str) -> tuple[dict[str, Any], Renaming, GPTConfig]:
    """config.json, the table of names, and the config that has all the foreign model's weights."""
    if kind == "gpt2":
        whole = replace(config, bias=True)  # missing biases are written as zeros
        content, renaming = gpt2.write_config(config), gpt2.renaming(whole, kind)
        names = {
            ours: weight._replace(names=tuple(n if n.startswith("lm_head") else gpt2.PREFIX + n for n in weight.names))
            for ours, weight in renaming.weights.items()
        }
        return content, Renaming(names), whole
    return llama.write_config(config, kind), llama.renaming(config, kind), config


def export_weights(config: GPTConfig, read: Read, dtype: torch.dtype) -> tuple[dict[str, Any], list[Entry]]:
    """config.json, and the tensors of the foreign model, to be made one at a time."""
    kind = target(config)
    content, renaming, whole = exported(config, kind)
    content["torch_dtype"] = str(dtype).removeprefix("torch.")

    def read_normalised(name: str) -> Tensor | None:
        tensor = read(name)
        return F.normalize(tensor.float(), dim=-1) if name == "head.weight" and config.norm_head else tensor

    made = foreign_weights(renaming.weights, our_shapes(whole), read_normalised)
    return content, [Entry(name, shape, dtype, make) for name, shape, make in made]


def write_folder(
    folder: Path, content: dict[str, Any], entries: list[Entry], tokenizer: Tokenizer, card: str = "", *,
    chat_template: str | None = None, end_of_answer: int | None = None,
    step: Callable[[int], object] = lambda size: None,
) -> None:  # fmt: skip
    """Write a model, from `export_weights`, into a folder that is there; step(bytes) follows each tensor.

    end_of_answer: the id that ends an answer of a chat model; text ends there, or at the end-of-text token.
    """
    ends = [token for token in dict.fromkeys((end_of_answer, tokenizer.eot_id)) if token is not None]
    ids = {"bos_token_id": start_id(tokenizer), "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    write_json(folder / "config.json", content | ids)
    write_json(folder / "generation_config.json", ids)
    export_tokenizer(tokenizer, folder, chat_template)
    write_whole(folder / "README.md", card)
    write_shards(folder, entries, step)
