"""A run: the folder that train.py or finetune.py writes, read into one record.

out_dir/config.json  tokenizer.json  log.jsonl  checkpoints/  base/      (base/: the base run of a LoRA run)
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from common.config import build
from common.files import checksum, read_json, write_json
from common.layers import shapes_only
from model import GPT, GPTConfig
from positions import position_tables
from runs.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_weights,
    number_of_weights,
    put_weights,
    verify,
)
from seq2seq import model_of
from text.chat import Template
from text.styles import PLAINGPT, STYLES, TOKENS
from text.tokenizer import FILE_NAME as TOKENIZER_FILE
from text.tokenizer import Tokenizer, load_tokenizer
from training.lora import LoraConfig, add_lora, merge_lora
from training.plan import count_weights

CONFIG = "config.json"
FORMAT = {"format": "plaingpt-run", "version": 1}
KEYS = {*FORMAT, "task", "origin", "model", "train", "chat"}  # of config.json, besides its checksum
SCRATCH = "scratch"
IMPORT = "import"  # the task of a run that convert.py made of a foreign model


@dataclass(frozen=True)
class Origin:
    """The source of a run's initial weights."""

    source: str = SCRATCH  # another run's folder, or "scratch" for random weights
    checkpoint: str = "best"  # that run's checkpoint


@dataclass(frozen=True)
class Run:
    """A run as its config.json describes it."""

    folder: Path
    model_config: GPTConfig
    settings: dict  # the training settings by name, as config files give them
    task: Literal["pretrain", "sft", "import"]  # decides which command resumes it; nothing resumes an imported model
    fine_tuned: bool  # whether it was trained on the chat template
    lora: LoraConfig | None = None
    base_checkpoint: str = ""  # the checkpoint in base/, for a run with LoRA
    origin: Origin = Origin()
    chat_style: str = PLAINGPT  # the style of the chat template, of text/styles.py
    default_system: str = ""  # the system message of conversations that have none

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Read the run in the folder. Raises ValueError if there is none, or if its config.json is damaged."""
        folder, path = Path(folder), Path(folder) / CONFIG
        if folder.is_file():
            raise ValueError(
                f"{folder} is a file; give the folder of a run, such as one that train.py or convert.py import wrote"
            )
        if not path.is_file():
            raise ValueError(f"no run in {folder} (no {CONFIG} there): train one first, or correct the path")
        content = read_json(path, f"the {CONFIG} of a run")
        if isinstance(content, dict) and "model_type" in content:
            raise ValueError(f"{folder} is a model in Hugging Face's form: make a run of it by convert.py import")
        try:
            return cls._from_content(folder, dict(content))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged: it is not the {CONFIG} of a run") from None

    @classmethod
    def _from_content(cls, folder: Path, content: dict) -> "Run":
        """Make a run from the content of config.json. The first format had no checksum, task and origin."""
        path, stated = folder / CONFIG, content.pop("sha256", None)
        if stated is not None and stated != checksum(content):
            raise ValueError(
                f"{path} is damaged: its checksum differs (after a change by hand, delete its line with sha256)"
            )
        if unknown := content.keys() - KEYS:
            raise ValueError(f"{path} is damaged, or of a later version: it has a key {min(unknown)!r}")
        if content.get("version", FORMAT["version"]) != FORMAT["version"]:
            raise ValueError(f"{path} has format version {content['version']}, this code reads {FORMAT['version']}")
        try:
            model = {key: (value, str(path)) for key, value in dict(content["model"]).items()}
            (model_config,) = build(model, GPTConfig)
        except ValueError as error:
            raise ValueError(f"{path} does not describe a model: {str(error).splitlines()[0]}") from None
        settings, chat = dict(content["train"]), content.get("chat")
        lora, style, system = None, PLAINGPT, ""
        if chat is not None:  # older files have one style only, our own
            lora, style, system = chat["lora"], chat.get("style", style), chat.get("default_system", system)
        if style not in STYLES or not isinstance(system, str):
            raise ValueError(f"{path}: the chat style {style!r} is not known here: {', '.join(STYLES)}")
        origin = content.get("origin", {"source": settings.get("init_from", SCRATCH)})
        task = content.get("task", "pretrain" if chat is None else "sft")
        if task not in (tasks := get_args(cls.__annotations__["task"])):
            raise ValueError(f"{path}: task {task!r} is not known here: {', '.join(tasks)}")
        base = "" if lora is None else str(lora["checkpoint"])
        fine_tuned, lora_config = chat is not None, _lora_of(lora, path)
        return cls(
            folder, model_config, settings, task, fine_tuned, lora_config, base, Origin(**origin), style, system
        )  # fmt: skip

    def save(self) -> None:
        """Write config.json, with a checksum, into the run's folder."""
        self.save_in(self.folder)

    def save_in(self, folder: Path) -> None:
        """Write config.json into another folder, which becomes the run's when it is complete."""
        lora = chat = None
        if self.lora:
            lora = asdict(self.lora) | {"checkpoint": self.base_checkpoint}
        if self.fine_tuned:
            chat = {"lora": lora, "style": self.chat_style, "default_system": self.default_system}
        content = FORMAT | {
            "task": self.task, "origin": asdict(self.origin), "model": asdict(self.model_config),
            "train": self.settings, "chat": chat,
        }  # fmt: skip
        content = json.loads(json.dumps(content))  # as it will be read back: tuples become lists
        write_json(folder / CONFIG, content | {"sha256": checksum(content)})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self.folder)

    def template(self) -> Template:
        """Return the run's chat template; for a base model, the one that fine-tuning it would use.

        Raises ValueError if the tokenizer lacks a special token of the run's chat style.
        """
        return Template(self.tokenizer, self.chat_style, self.default_system)

    def with_template_of(self, source: "Run | None") -> "Run":
        """Return this run with the chat template of the run that its weights come from."""
        if source is None:
            return self
        return replace(self, chat_style=source.chat_style, default_system=source.default_system)

    @property
    def base(self) -> "Run":
        """The base run of a run with LoRA."""
        return Run.open(self.folder / "base")

    def checkpoints(self) -> list[Path]:
        """Return the run's checkpoints, oldest first."""
        return list_checkpoints(self.folder)

    def checkpoint(self, which: str) -> Path:
        """Return the "best", "latest" or named checkpoint. Raises ValueError if there is none."""
        return find_checkpoint(self.folder, which)

    def load_model(self, which: str = "best", dtype: torch.dtype | None = torch.float32) -> GPT:
        """Return the model of a verified checkpoint, in evaluation mode, on the CPU, with LoRA merged in.

        dtype: the precision of the weights; None keeps that of the file. The tables of positions are float32.
        A run in training deletes old checkpoints; if that happens during the reading, this method tries once more.
        Raises ValueError if the checkpoint is missing or damaged, or if the tokenizer has more ids than the model.
        """
        before = self.checkpoints()
        try:
            model = self._load(self.checkpoint(which), dtype)
        except (ValueError, OSError):
            if self.checkpoints() == before:
                raise
            model = self._load(self.checkpoint(which), dtype)
        if self.tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"it has {self.tokenizer.vocab_size} token ids, the model {model.config.vocab_size}"
            path = self.folder / TOKENIZER_FILE
            raise ValueError(f"{path} is not the one the model was trained with: {sizes}")
        return model.eval()

    def _load(self, checkpoint: Path, dtype: torch.dtype | None) -> GPT:
        verify(checkpoint)
        if not self.lora:
            return self.model_of(checkpoint, dtype)
        model = self.corrected_base()
        load_weights(model, checkpoint)
        merge_lora(model)
        for p in model.parameters():
            p.data = p.data.to(dtype or p.dtype)
        return model

    def model_of(self, checkpoint: Path, dtype: torch.dtype | None) -> GPT:
        """Return the model of a checkpoint that holds all weights. Raises ValueError if they are not of its shape."""
        described, held = count_weights(self.model_config), number_of_weights(checkpoint)
        if described != held:
            raise ValueError(
                f"{self.folder / CONFIG} describes a model of {described:,} weights, and {checkpoint.name} holds "
                f"{held:,}: one of them is damaged or was replaced"
            )
        with shapes_only():
            model = model_of(replace(self.model_config))  # a copy: `grow` may change the model's config
        put_weights(model, checkpoint, dtype)
        add_tables(model)
        return model

    def corrected_base(self) -> GPT:
        """Return the base model of a run with LoRA, with corrections that are still zero."""
        model = model_to_fine_tune(self.base, self.base_checkpoint, self.tokenizer)
        add_lora(model, self.lora)
        return model


def add_tables(model: GPT, device: torch.device | None = None) -> None:
    """Give a model that was made without numbers its tables of positions."""
    for name, table in position_tables(model.config).items():
        model.register_buffer(name, table.to(device), persistent=False)


def _lora_of(content: dict | None, path: Path) -> LoraConfig | None:
    """Return the LoraConfig in config.json, None without LoRA."""
    match content:
        case None:
            return None
        case {"rank": int(rank), "alpha": float() | int() as alpha, "targets": [*targets]} if rank > 0:
            return LoraConfig(rank, alpha, tuple(targets), tuple(map(int, content.get("new_rows", ()))))
    raise ValueError(f"{path} is damaged: it does not describe LoRA's corrections")


def same_tokens(base: Tokenizer, extended: Tokenizer) -> bool:
    """Return whether `extended` is `base`, perhaps with special tokens added."""
    content, more = base.content(), extended.content()
    if content.get("kind") != "extended" or more.get("kind") != "extended":
        return content in (more, more.get("base"))
    added = content["special_tokens"]
    return content["base"] == more["base"] and more["special_tokens"][: len(added)] == added


def unseen_tokens(run: Run, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of our own chat template if the run was never trained on one, else ().

    A run of another chat style was trained on its template elsewhere, and gets no new tokens.
    """
    return () if run.fine_tuned else tuple(tokenizer.special_tokens[name] for name in TOKENS)


def model_to_fine_tune(run: Run, which: str, tokenizer: Tokenizer) -> GPT:
    """Return the run's model, on the CPU, with a new embedding for each unseen token of the chat template.

    Raises ValueError unless `tokenizer` is the run's, perhaps with special tokens added.
    """
    if not same_tokens(run.tokenizer, tokenizer):
        raise ValueError(f"{run.folder} was trained with another tokenizer")
    model = run.load_model(which)
    if unseen := unseen_tokens(run, tokenizer):
        grow(model, tokenizer.vocab_size, unseen)
    return model


@torch.no_grad()
def grow(model: GPT, vocab_size: int, unseen: tuple[int, ...]) -> None:
    """Extend the model to vocab_size token ids, and set the embedding of each unseen id to the mean plus noise.

    The mean of the known embeddings makes a new token about as likely as any other [Hewitt 2021]. The noise, the same
    in every run, gives new tokens different embeddings, so that they can learn to differ.
    """
    old = model.config.vocab_size
    model.config.vocab_size = max(old, vocab_size)
    noise = torch.Generator().manual_seed(0)
    known = [token for token in range(old) if token not in unseen]
    for layer in (model.tok_emb, model.head):
        weight = layer.weight
        if len(weight) < vocab_size:
            weight = torch.cat((weight, weight.new_zeros(vocab_size - old, weight.size(1))))
        mean, std = weight[known].mean(0), weight[known].std(0)
        for token in unseen:
            weight[token] = mean + 0.1 * std * torch.randn(std.shape, generator=noise)
        layer.weight = nn.Parameter(weight)
    if model.config.tie_embeddings:
        model.head.weight = model.tok_emb.weight
    model.tok_emb.num_embeddings = model.head.out_features = model.config.vocab_size
