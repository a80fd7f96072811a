"""A foreign model in any form: a folder or a name of the Hugging Face Hub, a GGUF file, nanoGPT's ckpt.pt.

`open_source` finds out which, and returns what an import needs: our config, the tensors with the table of their names,
the tokenizer, the chat template, and notes for the user. To add a family of models, add a file beside this one with
TYPES, `read_config` and `renaming`, and its name to FAMILIES.
"""

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import read_json
from formats import baichuan2, gpt2, llama
from formats.gguf import GGUF
from formats.hub_config import Fields
from formats.tokenizers import gguf_tokenizer, import_tokenizer
from formats.weights import Renaming, Safetensors, Tensors, WithoutPrefixes, check_names, our_shapes
from model import GPTConfig
from text.tokenizer import CharTokenizer, TiktokenTokenizer, Tokenizer, tokenizer_from_name

FAMILIES = (gpt2, llama, baichuan2)
HUB = "hf:"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # taken without "hf:", as nanoGPT's --init_from does
HUB_FILES = ["*.json", "*.safetensors", "*.model", "merges.txt", "*.jinja"]
HUB_OTHERS = ["*/*", "consolidated*"]  # the same weights in other forms
BAICHUAN2_TOKENS = ("<reserved_106>", "<reserved_107>")  # of the user and of the assistant
BAICHUAN2_TEMPLATE = "".join(BAICHUAN2_TOKENS)  # the names by which text/styles.py knows the style
GPT2_VOCABULARIES = (50257, 50304)  # GPT-2's tokens; nanoGPT pads them to a multiple of 64


@dataclass
class Foreign:
    """A model of another project, not read yet."""

    origin: str  # where it came from, for the run's config.json
    config: GPTConfig
    tensors: Tensors
    renaming: Renaming
    tokenizer: Tokenizer
    model_type: str = ""  # as config.json names its class
    chat_template: str | None = None  # as Jinja
    notes: list[str] = field(default_factory=list)


def is_hub_name(source: str) -> bool:
    """Whether the source names a model of the Hub, rather than a path."""
    return source.startswith(HUB) or (source in GPT2_NAMES and not Path(source).exists())


def open_source(source: str, tokenizer: str = "", ignore: tuple[str, ...] = ()) -> Foreign:
    """Open a model folder in Hugging Face's layout, a .gguf file, a ckpt.pt of nanoGPT, or a name of the Hub.

    tokenizer: a tokenizer to take in place of the model's own. ignore: fields of config.json to pass over, which the
    user knows to be harmless. Raises ValueError for what cannot be held exactly, and for files that are damaged.
    """
    try:
        foreign = open_any(source, tokenizer, ignore)
        check_names(foreign.tensors, foreign.renaming, our_shapes(foreign.config))
    except ValueError as error:
        named = source.removeprefix(HUB) in str(error)
        raise ValueError(str(error) if named else f"{source}: {error}") from None
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        # A foreign file can be wrong in any place, and what reads it does not check every value
        raise ValueError(f"{source} is damaged, or not what its name says ({type(error).__name__}: {error})") from None
    if (ids := foreign.tokenizer.vocab_size) > foreign.config.vocab_size:
        raise ValueError(f"{foreign.tensors.place} has embeddings for {foreign.config.vocab_size:,} tokens, and its "
                         f"tokenizer has {ids:,}: give the one it was trained with, by --tokenizer")  # fmt: skip
    return foreign


def open_any(source: str, tokenizer: str, ignore: tuple[str, ...]) -> Foreign:
    """What `open_source` does, by the kind of the source."""
    if is_hub_name(source):
        foreign = open_folder(download(source.removeprefix(HUB)), tokenizer, ignore)
        foreign.origin = HUB + source.removeprefix(HUB)
        return foreign
    path = Path(source)
    if path.is_dir():
        return open_folder(path, tokenizer, ignore)
    if not path.is_file():
        hint = f"; a model of the Hugging Face Hub is written {HUB}{source}" if source.count("/") <= 1 else ""
        raise ValueError(f"there is nothing at {source}{hint}")
    if path.suffix == ".gguf":
        return open_gguf(path, tokenizer, ignore)
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"{source} is of no known kind: give a model's folder, a .gguf file or nanoGPT's ckpt.pt")
    if ignore:
        raise ValueError(f"{source} has no config.json, so that there is nothing to --ignore")
    return open_nanogpt(path, tokenizer)


def download(name: str) -> Path:
    """Fetch a model of the Hub into its cache; returns the folder. Raises ValueError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError("fetching a model needs the package huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_OTHERS))
    except Exception as error:  # of the network or of the Hub, in many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"cannot fetch {name} from the Hugging Face Hub ({reason}); a local folder works too"
        ) from None


def read_family(fields: Fields, ignore: tuple[str, ...]) -> tuple[GPTConfig, Renaming, list[str]]:
    """Our config, the table of names, and notes, by the family that model_type names."""
    kind = fields.get("model_type")
    for family in FAMILIES:
        if kind in family.TYPES:
            break
    else:
        known = ", ".join(kind for family in FAMILIES for kind in family.TYPES)
        raise ValueError(f"{fields.place}: model_type = {kind!r} is not supported here; known are {known}")
    if (quantisation := fields.get("quantization_config")) is not None:
        method = dict(quantisation).get("quant_method", quantisation)
        raise ValueError(f"{fields.place}: quantization_config = {method!r} is not supported: take the whole weights")
    config, notes = family.read_config(fields)
    left = [text for text in fields.unread() if text.split("=")[0] not in ignore]
    if left:
        names = ",".join(text.split("=")[0] for text in left)
        raise ValueError(
            f"{fields.place}: {'; '.join(left)}: not known here, and it may change what the network computes. "
            f"If it does not, import with --ignore={names}"
        )
    for name in ignore:
        if name in fields.read or name not in fields.content:
            state = "is used" if name in fields.content else "is not there"
            raise ValueError(f"{fields.place}: {name} {state}: it cannot be passed over; leave it out of --ignore")
    passed = [f"{name} of {fields.place} was passed over, as asked" for name in ignore]
    return config, family.renaming(config, kind), [*notes, *passed]


def open_folder(folder: Path, tokenizer: str, ignore: tuple[str, ...]) -> Foreign:
    """A model in Hugging Face's layout: config.json, safetensors, and the tokenizer's files."""
    fields = Fields.of(folder)
    config, renaming, notes = read_family(fields, ignore)
    tensors: Tensors = Safetensors(folder)
    if fields.get("model_type") in gpt2.TYPES:
        tensors = WithoutPrefixes(tensors, gpt2.PREFIX)
    own = tokenizer_from_name(tokenizer) if tokenizer else import_tokenizer(folder)
    template = read_chat_template(folder) or baichuan2_template(folder, own)
    return Foreign(os.path.abspath(folder), config, tensors, renaming, own, fields.get("model_type"), template, notes)


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a model folder, as Jinja; None without one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template: Any = dict(read_json(path, "a tokenizer's config")).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def baichuan2_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Stands for the chat template that Baichuan 2's chat models do not have; None for other models.

    Their generation_config.json numbers the tokens that begin a turn. Baichuan 1's numbers stand for other tokens.
    """
    path = folder / "generation_config.json"
    said = dict(read_json(path, "a generation_config.json")) if path.is_file() else {}
    numbered = [said.get("user_token_id"), said.get("assistant_token_id")]
    known = [tokenizer.special_tokens.get(name, -1) for name in BAICHUAN2_TOKENS]
    return BAICHUAN2_TEMPLATE if numbered == known else None


def open_gguf(path: Path, tokenizer: str, ignore: tuple[str, ...]) -> Foreign:
    """A GGUF file of the Llama family."""
    file = GGUF(path)
    config, renaming, notes = read_family(file.fields(), ignore)
    own = tokenizer_from_name(tokenizer) if tokenizer else gguf_tokenizer(file.metadata)
    kinds = sorted({tensor.tensor_type.name for tensor in file.tensors.values()})
    notes.append(f"weights stored as {', '.join(kinds)}; quantised ones become float32")
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{path} is damaged: its tokenizer.chat_template is no text")
    return Foreign(os.path.abspath(path), config, file, renaming, own, "gguf", template, notes)


def open_nanogpt(path: Path, tokenizer: str) -> Foreign:
    """A checkpoint of nanoGPT."""
    config, tensors, settings = gpt2.open_checkpoint(path)
    own = nanogpt_tokenizer(path, tokenizer, config, settings)
    same = Renaming(gpt2.renaming(config, "nanogpt").weights, gpt2.MASKS, (("wte.weight", "lm_head.weight"),))
    return Foreign(os.path.abspath(path), config, tensors, same, own, "nanogpt")


def nanogpt_tokenizer(path: Path, tokenizer: str, config: GPTConfig, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a nanoGPT model: GPT-2's by its number of tokens, else the characters of a meta.pkl."""
    if not tokenizer and config.vocab_size in GPT2_VOCABULARIES:
        return TiktokenTokenizer("gpt2")
    meta = Path(tokenizer) if tokenizer else path.with_name("meta.pkl")
    if meta.suffix != ".pkl":
        return tokenizer_from_name(tokenizer)
    if not meta.is_file():
        data = f"data/{settings.get('dataset', 'NAME')}/meta.pkl"
        raise ValueError(
            f"{path} has {config.vocab_size} tokens and no tokenizer: give nanoGPT's --tokenizer=nanoGPT/{data}, or "
            "one of ours"
        )
    return read_meta_pkl(meta)


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values only: no class, and so no code, is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse whatever class a pickle names."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_meta_pkl(path: Path) -> Tokenizer:
    """The characters of nanoGPT's data/NAME/meta.pkl. Raises ValueError if their ids are not in sorted order."""
    try:
        with open(path, "rb") as file:
            ids = dict(PlainUnpickler(file).load()["stoi"])
        characters = sorted(ids, key=ids.__getitem__)
        tokenizer = CharTokenizer(characters, eot=False)
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"{path} is not a meta.pkl of nanoGPT ({type(error).__name__}: {error})") from None
    if list(tokenizer.characters) != characters or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path}: the ids of its characters are not in sorted order from 0, which is not supported")
    return tokenizer
