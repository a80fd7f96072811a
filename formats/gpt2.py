"""GPT-2 as Hugging Face keeps it, and nanoGPT's checkpoints, which have its names.

GPT-2 keeps the weights of its linear layers as (in, out); nanoGPT as (out, in). GPT-2's GELU is the tanh form,
nanoGPT's the exact one. Sources: Radford et al. 2019; the names of transformers' GPT2LMHeadModel and of nanoGPT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formats.hub_config import DECODER, Fields
from formats.weights import InMemory, Renaming, WithoutPrefixes, expand
from model import GPTConfig

TYPES = ("gpt2",)
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
TABLE = {
    "tok_emb": "wte",
    "pos_emb": "wpe",
    "blocks.{i}.norm_attention": "h.{i}.ln_1",
    "blocks.{i}.attention.qkv": "h.{i}.attn.c_attn",
    "blocks.{i}.attention.out": "h.{i}.attn.c_proj",
    "blocks.{i}.norm_mlp": "h.{i}.ln_2",
    "blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
    "norm": "ln_f",
    "head": "lm_head",
}
LINEAR = ("blocks.{i}.attention.qkv", "blocks.{i}.attention.out", "blocks.{i}.mlp.up", "blocks.{i}.mlp.down")
PREFIX = "transformer."  # before all names but lm_head; the files of OpenAI's models leave it out
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that older files hold


def shared(**sizes: Any) -> GPTConfig:
    """The config that both projects' models share."""
    return GPTConfig(**sizes, position="learned", norm="layernorm", norm_eps=1e-5, qk_norm=False)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2


def read_config(fields: Fields) -> tuple[GPTConfig, list[str]]:
    """Our config of the model. Raises ValueError for an option that our model does not have."""
    n_embd = fields.size("n_embd")
    activation = fields.expect("activation_function", *ACTIVATIONS)
    fields.expect("scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.expect(name, False)
    for name in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
                 "summary_first_dropout", "n_ctx"):  # fmt: skip
        fields.get(name)  # of a head for classification, which a language model lacks
    config = shared(
        block_size=fields.size("n_positions", 1024), vocab_size=fields.size("vocab_size"),
        n_layer=fields.size("n_layer"), n_head=fields.size("n_head"), n_embd=n_embd, bias=True,
        mlp_dim=fields.size("n_inner", 4 * n_embd), mlp=ACTIVATIONS[activation],
        tie_embeddings=fields.switch("tie_word_embeddings", True),
    )  # fmt: skip
    config.norm_eps = fields.number("layer_norm_epsilon", 1e-5)
    return config, []


def renaming(config: GPTConfig, kind: str) -> Renaming:
    """Where the weights of GPT-2 come from; the names are without PREFIX."""
    same = (("wte.weight", "lm_head.weight"),) if config.tie_embeddings else ()
    return Renaming(expand(config, TABLE, transposed=LINEAR if kind == "gpt2" else ()), MASKS, same)


def obstacles(config: GPTConfig) -> list[str]:
    """The options by which the config is not a GPT-2; none if it is one. Missing biases can be exported as zeros."""
    wanted: dict[str, tuple[Any, ...]] = {
        "position": ("learned",), "norm": ("layernorm",), "qk_norm": (False,),
        "mlp": ("gelu", "gelu_exact"), "norm_head": (False,), "n_kv_head": (config.n_head,),
        "head_dim": (config.n_embd // config.n_head,), "sliding_window": (0,),
    } | DECODER  # fmt: skip
    return [f"{key}={getattr(config, key)}" for key, good in wanted.items() if getattr(config, key) not in good]


def write_config(config: GPTConfig) -> dict[str, Any]:
    """The config.json of our model as a GPT-2."""
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.mlp]
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "n_inner": config.mlp_dim, "activation_function": activation, "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


def open_checkpoint(path: Path) -> tuple[GPTConfig, WithoutPrefixes, dict[str, Any]]:
    """A ckpt.pt of nanoGPT: our config, its tensors, and its training settings.

    Only tensors and plain values are loaded; a file that would run code is refused. Raises ValueError.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle's, zipfile's and PyTorch's own kinds
        raise ValueError(
            f"{path} is not loaded: it is damaged, no checkpoint of PyTorch, or it holds more than tensors and plain "
            f"values, which could run code ({type(error).__name__})"
        ) from None
    parts = [content.get(name) if isinstance(content, Mapping) else None for name in ("model", "model_args")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"{path} is no checkpoint of nanoGPT: it has no model and model_args")
    if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in parts[0].items()):
        raise ValueError(f"{path} is no checkpoint of nanoGPT: its model holds more than tensors")
    fields = Fields(dict(content["model_args"]), f"{path}: model_args")
    bias = fields.expect("bias", True, False)
    fields.get("dropout")
    sizes = {name: fields.size(name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    if left := fields.unread():
        raise ValueError(f"{path}: model_args has {', '.join(left)}, which nanoGPT's models do not have")
    config = shared(**sizes, mlp_dim=4 * sizes["n_embd"], mlp="gelu_exact", bias=bias)
    tensors = WithoutPrefixes(InMemory(str(path), dict(content["model"])), "_orig_mod.", PREFIX)
    return config, tensors, dict(content.get("config") or {})
