"""GGUF, the file format of llama.cpp: a model with its config and its tokenizer in one file.

The package `gguf` reads the file and unpacks quantised weights; here its keys and names become those of Hugging Face's
Llama family. In files of the architecture "llama", the rows of query and key weights are in another order: RoPE there
turns neighbouring channels, and here those that are half a head apart.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.hub_config import Fields

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are no quantisation


class GGUF:
    """A GGUF file: `metadata` as plain values, and tensors under Hugging Face's names.

    A quantised tensor is read as float32; float32, float16 and bfloat16 stay what they are.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ValueError("reading a .gguf file needs the package gguf: pip install gguf") from None
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package raises whatever goes wrong first in a damaged file
            raise ValueError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
        self.place = str(path)
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{path}: general.architecture = {self.architecture!r} is not supported, only {known}")
        self.tensors = {hub_name(tensor.name): tensor for tensor in reader.tensors}
        self.tensors.pop(FACTORS, None)
        self.factors = next((t.data for t in reader.tensors if t.name == f"{FACTORS}.weight"), None)
        # Their order of dimensions is the reverse of PyTorch's
        self.shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in self.tensors.items()}

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the model's architecture, such as block_count."""
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def dtype(self, name: str) -> torch.dtype:
        return PLAIN.get(self.tensors[name].tensor_type.name, torch.float32)

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored = self.tensors[name]
        kind = stored.tensor_type.name
        try:
            numbers = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{self.place}: {name} is stored as {kind}, which the package gguf cannot unpack"
            ) from None
        tensor = torch.from_numpy(np.array(numbers)).view(self.shapes[name]).to(self.dtype(name))
        heads = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
        if self.architecture == "llama" and heads:
            n = int(self.key(f"attention.{heads}", self.key("attention.head_count")))
            tensor = tensor.view(n, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def fields(self) -> Fields:
        """The file's config, in the fields of a config.json of Hugging Face."""
        scaling = self.key("rope.scaling.type", "none")
        if scaling not in ("none", "linear", "yarn"):
            raise ValueError(f"{self.place}: rope.scaling.type = {scaling!r} is not supported here")
        content = {
            "model_type": self.architecture, "hidden_act": "silu", "vocab_size": self.shapes[EMBEDDING][0],
            "hidden_size": self.key("embedding_length"), "intermediate_size": self.key("feed_forward_length"),
            "num_hidden_layers": self.key("block_count"), "num_attention_heads": self.key("attention.head_count"),
            "num_key_value_heads": self.key("attention.head_count_kv"), "head_dim": self.key("attention.key_length"),
            "max_position_embeddings": self.key("context_length"), "rope_theta": self.key("rope.freq_base", 10000.0),
            # A float32 in the file: 1e-05, not 9.999999747378752e-06
            "rms_norm_eps": float(str(np.float32(self.key("attention.layer_norm_rms_epsilon", 1e-6)))),
            "sliding_window": self.key("attention.sliding_window"), "use_sliding_window": True,
            "max_window_layers": 0, "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }  # fmt: skip
        if scaling != "none":
            original = self.key("rope.scaling.original_context_length")
            factor = float(self.key("rope.scaling.factor"))
            content["rope_scaling"] = {"rope_type": scaling, "factor": factor,
                                       "original_max_position_embeddings": original}  # fmt: skip
        if self.factors is not None:
            content["rope_scaling"] = self.llama3_scaling(content["rope_theta"])
        return Fields(json.loads(json.dumps(content, default=int)), self.place)

    def llama3_scaling(self, theta: float) -> dict[str, Any]:
        """Llama 3.1's RoPE scaling, which the file holds as one factor for each frequency.

        Raises ValueError if the factors are of another kind.
        """
        factors = np.asarray(self.factors, dtype=np.float64)
        factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
        turns = original * theta ** -(np.arange(len(factors)) / len(factors)) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ValueError(f"{self.place}: {FACTORS} holds factors of RoPE that are not Llama 3's")
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original}  # fmt: skip


FACTORS = "rope_freqs"
EMBEDDING = "model.embed_tokens.weight"


def hub_name(name: str) -> str:
    """Hugging Face's name of a tensor: blk.0.attn_q.weight → model.layers.0.self_attn.q_proj.weight."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, layer = stem.split(".", 2)
        return f"model.layers.{number}.{LAYER.get(layer, layer)}.{end}"
    return f"{WHOLE.get(stem, stem)}.{end}" if stem != FACTORS else FACTORS
