"""The config.json of a model in Hugging Face's layout: every field is used, known to be harmless, or named.

`Fields` remembers which fields were read. What remains unread is reported by its name and value, so that an option that
changes the network can never be passed over in silence.
"""

from pathlib import Path
from typing import Any

from common.files import read_json

# Fields that do not change what the network computes: how it was trained, how it is run, how it is stored
HARMLESS = {
    "_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "pretraining_tp",
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "embedding_dropout",
    "is_decoder", "is_encoder_decoder", "cross_attention_hidden_size", "use_bfloat16", "_from_model_config",
    "tokenizer_class", "task_specific_params", "_attn_implementation", "attn_implementation", "is_llama_config",
    "z_loss_weight", "gradient_checkpointing", "n_special",
    "predict_special_tokens", "output_past", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "finetuning_task", "sep_token_id", "decoder_start_token_id",
    "transformers.js_config", "_commit_hash",
}  # fmt: skip


# What our config must say of a model that is exported, for every class: option → its possible values
DECODER: dict[str, tuple[Any, ...]] = {
    "causal": (True,), "classes": ("",), "n_encoder_layer": (0,), "post_norm": (False,),
}  # fmt: skip
MOST, MOST_LAYERS = 1 << 26, 1000  # no model has so large a size, or so many layers
LAYERS = ("num_hidden_layers", "n_layer")


class Fields:
    """The fields of a config.json. place: for messages."""

    def __init__(self, content: object, place: str):
        if not isinstance(content, dict):
            raise ValueError(f"{place} is damaged: it is no JSON object")
        self.content, self.place = content, place
        self.read: set[str] = set()

    @classmethod
    def of(cls, folder: Path) -> "Fields":
        """The config.json of a folder."""
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no config.json: give the folder of a model in Hugging Face's layout")
        return cls(read_json(path, "a model's config.json"), str(path))

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; default where it is missing or null."""
        self.read.add(name)
        value = self.content.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 to MOST. Raises ValueError for anything else, and where it is missing."""
        value = self.get(name, default)
        most = MOST_LAYERS if name in LAYERS else MOST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{self.place}: {name} must be a whole number from 1 to {most:,}, not {value!r:.60}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0. Raises ValueError for anything else, and where it is missing."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            raise ValueError(f"{self.place}: {name} must be a number above 0, not {value!r:.60}")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        """True or false. Raises ValueError for anything else."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise ValueError(f"{self.place}: {name} must be true or false, not {value!r:.60}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A JSON object, empty where the field is missing. Raises ValueError for anything else."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{self.place}: {name} must be an object, not {value!r:.60}")
        return value

    def expect(self, name: str, *allowed: Any) -> Any:
        """The field's value, which must be one of those allowed; the first holds where the field is missing or null."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.place}: {name} = {value!r} is not supported here, only {known}")
        return value

    def unread(self) -> list[str]:
        """Fields that nothing has read, that are not harmless and not null, as name=value."""
        names = self.content.keys() - self.read - HARMLESS
        return [f"{name}={self.content[name]!r:.60}" for name in sorted(names) if self.content[name] is not None]
