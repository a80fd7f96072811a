"""GGUF, the file format of llama.cpp: a model with its config and its tokenizer in one file.

The package `gguf` reads the file and unpacks quantised weights; here its keys and names become those of Hugging Face's
Llama family. In files of the architecture "llama", the rows of query and key weights are in another order: RoPE there
turns neighbouring channels, and here those that are half a head apart.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import sync
from formats.hub_config import Fields
from formats.tokenizer_json import tokenizer_json, vocabulary_of
from formats.tokenizers import ADVERSARIAL, CONTROL, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, gguf_tokenizer
from formats.weights import Entry, check_range
from text.foreign import HubTokenizer, SentencePieceTokenizer
from text.tokenizer import ExtendedTokenizer, Tokenizer, start_id

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
EMBEDDING, FACTORS = "model.embed_tokens.weight", "rope_freqs"  # rope_freqs holds factors of Llama 3's RoPE scaling
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are no quantisation


class GGUF:
    """A GGUF file: `metadata` as plain values, and tensors under Hugging Face's names.

    A quantised tensor is read as float32; float32, float16 and bfloat16 stay what they are.
    """

    def __init__(self, path: Path):
        gguf = package()
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package raises whatever goes wrong first in a damaged file
            raise ValueError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
        self.place = str(path)
        self.used: set[str] = set()  # the keys that were asked for
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
        self.used.add(f"{self.architecture}.{name}")
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def dtype(self, name: str) -> torch.dtype:
        return PLAIN.get(self.tensors[name].tensor_type.name, torch.float32)

    def read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        kind = stored.tensor_type.name
        try:
            numbers = package().quants.dequantize(stored.data, stored.tensor_type)
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
        head_dim = content["head_dim"] or int(content["hidden_size"]) // int(content["num_attention_heads"])
        for name in ("rope.dimension_count", "attention.value_length"):
            if (stated := self.key(name, head_dim)) != head_dim:
                raise ValueError(f"{self.place}: {name} = {stated} is not supported here, only the head's {head_dim}")
        self.key("vocab_size")
        if scaling != "none":
            original = self.key("rope.scaling.original_context_length")
            factor = float(self.key("rope.scaling.factor"))
            content["rope_scaling"] = {"rope_type": scaling, "factor": factor,
                                       "original_max_position_embeddings": original}  # fmt: skip
        if self.factors is not None:
            content["rope_scaling"] = self.llama3_scaling(content["rope_theta"])
        left = {key for key in self.metadata if key.startswith(f"{self.architecture}.")} - self.used
        content |= {key: self.metadata[key] for key in left}  # which is then refused by its name
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


def hub_name(name: str) -> str:
    """Hugging Face's name of a tensor: blk.0.attn_q.weight → model.layers.0.self_attn.q_proj.weight."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, layer = stem.split(".", 2)
        return f"model.layers.{number}.{LAYER.get(layer, layer)}.{end}"
    return f"{WHOLE.get(stem, stem)}.{end}" if stem != FACTORS else FACTORS


# ---------------------------------------------------------------------------------------------------------------------
# Writing

# Our patterns as llama.cpp calls them. "dbrx" is GPT-4's, but for one thing: where a text ends in a line break and
# other white space, it cuts between the two.
PATTERN_NAMES = {"gpt2": "gpt-2", "gpt4": "dbrx"}


def vocabulary(
    tokenizer: Tokenizer, vocab_size: int, end_of_answer: int | None = None, chat_template: str | None = None
) -> dict[str, Any]:
    """What a GGUF file says about the tokenizer.

    end_of_answer: the token that ends an answer of a chat model; text ends there. Raises ValueError for a tokenizer
    that llama.cpp cannot run with the same ids.
    """
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    if isinstance(base, SentencePieceTokenizer):
        raise ValueError("no GGUF file is written of a SentencePiece tokenizer: export a folder, which llama.cpp's own "
                         "converter reads")  # fmt: skip
    if isinstance(base, HubTokenizer):
        content = base.content()["tokenizer"]
        own = without_offsets(content.get("pre_tokenizer"))
        names = [name for name, cut in PRE_TOKENIZERS.items() if without_offsets(cut) == own]
        pattern, pre = "its own", names[0] if names and content["model"]["type"] == "BPE" else None
    else:
        bpe = vocabulary_of(tokenizer, "the run")
        content, pattern, pre = tokenizer_json(bpe), bpe.pattern, PATTERN_NAMES.get(bpe.pattern)
    if pre is None:
        raise ValueError(f"the tokenizer's pattern ({pattern}) is none that llama.cpp knows by name: no GGUF of it")
    vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab |= tokenizer.special_tokens
    spelled = {id: name for name, id in vocab.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    special = set(tokenizer.special_tokens.values())
    matched = {token["id"] for token in content["added_tokens"]} - special
    types = [
        CONTROL if id in special else USER_DEFINED if id in matched else NORMAL if id in spelled else UNUSED
        for id in range(vocab_size)
    ]
    tokens = [spelled.get(id, f"[unused {id}]") for id in range(vocab_size)]
    fields = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges,
        "add_bos_token": start_id(tokenizer) is not None, "bos_token_id": start_id(tokenizer),
        "eos_token_id": tokenizer.eot_id,
    }  # fmt: skip
    again = gguf_tokenizer({f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    if any(again.encode(text) != tokenizer.encode(text) for text in ADVERSARIAL):
        raise ValueError(f"llama.cpp's {pre!r} would give other ids than this tokenizer does: no GGUF of it")
    end = tokenizer.eot_id if end_of_answer is None else end_of_answer
    return fields | {"eos_token_id": end, "chat_template": chat_template}


def without_offsets(part: Any) -> Any:
    """A part of a tokenizer.json without trim_offsets, which changes no ids."""
    if isinstance(part, list):
        return [without_offsets(item) for item in part]
    if isinstance(part, dict):
        return {name: without_offsets(item) for name, item in part.items() if name != "trim_offsets"}
    return part


def write_gguf(
    path: Path, content: dict[str, Any], entries: list[Entry], fields: dict[str, Any], kind: str = "F16",
    step: Callable[[int], object] = lambda size: None,
) -> None:  # fmt: skip
    """Write a model as a GGUF file: its matrices in float16 (F16) or in bytes (Q8_0), its norms in float32.

    Q8_0: blocks of 32 numbers of a row share a scale; matrices whose rows are no multiple of that stay float16.
    content, entries: config.json and tensors of the model in Hugging Face's form, from `export_weights`. fields: of the
    tokenizer, from `vocabulary`. Raises ValueError for a model that is not of ARCHITECTURES.
    """
    architecture = content["model_type"]
    if architecture not in ARCHITECTURES or content.get("rope_scaling"):
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"a GGUF file is written of {known} without scaled RoPE, not of this {architecture}")
    gguf = package()
    ours = {hub: own for own, hub in (LAYER | WHOLE).items()}
    types = [gguf.GGMLQuantizationType[stored_as(entry.shape, kind)] for entry in entries]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        write_fields(writer, content, fields)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for entry, type in zip(entries, types, strict=True):
            size = entry.size // entry.dtype.itemsize  # numbers
            block, block_bytes = gguf.GGML_QUANT_SIZES[type]
            writer.add_tensor_info(
                file_name(entry.name, ours), gguf.quant_shape_to_byte_shape(entry.shape, type) if block > 1
                else entry.shape, np.dtype({"F32": np.float32, "F16": np.float16}.get(type.name, np.uint8)),
                size // block * block_bytes, raw_dtype=type if block > 1 else None,
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, type in zip(entries, types, strict=True):
            rows = stored_rows(entry.make(), entry.name, architecture, content)
            if type.name != "F32":
                check_range(rows, rows.half(), entry.name)
            writer.write_tensor_data(gguf.quants.quantize(rows.numpy(), type))
            step(entry.size)
    finally:
        writer.close()
    sync(path)


def stored_as(shape: tuple[int, ...], kind: str) -> str:
    """The type in which a tensor of that shape is written."""
    if len(shape) == 1:
        return "F32"
    return kind if kind != "Q8_0" or shape[-1] % 32 == 0 else "F16"


def package() -> Any:
    """The package gguf. Raises ValueError if it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError("a .gguf file needs the package gguf: pip install gguf") from None
    return gguf


def write_fields(writer: Any, content: dict[str, Any], fields: dict[str, Any]) -> None:
    """Give the writer what the file says about the model and its tokenizer."""
    head_dim = content.get("head_dim", content["hidden_size"] // content["num_attention_heads"])
    said = {
        "context_length": content["max_position_embeddings"], "embedding_length": content["hidden_size"],
        "block_count": content["num_hidden_layers"], "feed_forward_length": content["intermediate_size"],
        "head_count": content["num_attention_heads"], "head_count_kv": content["num_key_value_heads"],
        "key_length": head_dim, "value_length": head_dim, "rope_dimension_count": head_dim,
        "rope_freq_base": content["rope_theta"], "layer_norm_rms_eps": content["rms_norm_eps"],
        "vocab_size": content["vocab_size"], "tokenizer_model": fields["model"], "tokenizer_pre": fields["pre"],
        "token_list": fields["tokens"], "token_types": fields["token_type"], "token_merges": fields["merges"],
        "add_bos_token": fields["add_bos_token"], "bos_token_id": fields["bos_token_id"],
        "eos_token_id": fields["eos_token_id"], "chat_template": fields["chat_template"],
    }  # fmt: skip
    for name, value in said.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def file_name(name: str, ours: dict[str, str]) -> str:
    """A tensor's name in a GGUF file: model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        number, layer = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{number}.{ours[layer]}.{end}"
    return f"{ours[stem]}.{end}"


def stored_rows(tensor: Tensor, name: str, kind: str, content: dict[str, Any]) -> Tensor:
    """The tensor in float32, with the rows of queries and keys in the file's order; the inverse of `GGUF.read`'s."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    tensor = tensor.float()
    if kind != "llama" or not heads:
        return tensor.contiguous()
    return tensor.view(content[heads], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()
