"""A run folder: its config, tokenizer and log, and checkpoints that are there whole or not at all.

    out_dir/config.json  tokenizer.json  log.jsonl
    out_dir/checkpoints/step_00001000/   model.safetensors  optimizer.safetensors  state.json  manifest.json

Notable: a checkpoint is written under a temporary name, synced and renamed; its manifest holds the SHA-256 of every
file and is verified on loading; all of it is JSON and raw arrays, so that loading can run no code. There is no random
state to save, since batches and dropout are pure functions of (seed, step).
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config import build
from common.files import write_json
from model import GPT, GPTConfig
from text.chat import TOKENS
from text.tokenizer import FILE_NAME as TOKENIZER_FILE
from text.tokenizer import Tokenizer, load_tokenizer
from training.lora import add_lora, merge_lora

GO_ON = "delete that checkpoint's folder to go on from the one before"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def start_run(out_dir: str, tokenizer: Tokenizer) -> Path | None:
    """Make the folder of a new run; a run that is already there moves aside to out_dir.1, .2, …, which is returned.

    ValueError for a folder that is something else.
    """
    folder, aside = Path(out_dir), None
    if not folder.name or folder.is_file() or (folder / "meta.json").exists() or (folder / "prepare.py").exists():
        raise ValueError(f"out_dir={out_dir!r} is no place for a run: name a new folder, such as out/mine")
    if (folder / "config.json").exists() or (folder / "checkpoints").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return aside


def lock_run(out_dir: str | Path) -> TextIO:
    """Hold the run while the returned file is open. ValueError if another process is training there."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    file = open(Path(out_dir) / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {out_dir}: choose another --out_dir, or stop it") from None
    return file


def save_config(out_dir: str, model: dict, train: dict, chat: dict | None = None) -> None:
    """Write config.json; chat: of a fine-tuned run, see finetune.py."""
    config = {"model": model, "train": train} | ({"chat": chat} if chat is not None else {})
    write_json(Path(out_dir) / "config.json", config)


def load_config(out_dir: str | Path) -> dict:
    """{"model": GPTConfig's fields, "train": TrainConfig's, "chat": None or what finetune.py adds} of a run.

    ValueError: no such run, or a damaged file.
    """
    path = Path(out_dir) / "config.json"
    if Path(out_dir).is_file():
        raise ValueError(f"{out_dir} is a file; give the folder of a run, such as one that train.py wrote")
    if not path.is_file():
        raise ValueError(f"no run in {out_dir} (no config.json there): train one first, or correct the path")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        chat = config.get("chat")
        chat = chat if chat is None else {"lora": check_lora(dict(chat)["lora"])}
        return {"model": dict(config["model"]), "train": dict(config["train"]), "chat": chat}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not the config.json of a run") from None


def check_lora(lora: object) -> dict | None:
    """What config.json says of LoRA, None if there is none; TypeError for anything else."""
    match lora:
        case None:
            return None
        case {"checkpoint": str(), "rank": int(rank), "alpha": float() | int(), "targets": list()} if rank > 0:
            return lora
    raise TypeError("no description of LoRA")


def keep_run(out_dir: str, which: str, target: Path) -> None:
    """Keep a run with one of its checkpoints in the folder target, as links where the disk allows it."""

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy)
        except OSError:  # another disk
            shutil.copy2(source, copy)

    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    chosen = Path("checkpoints", which)
    parts = [Path("config.json"), Path(TOKENIZER_FILE), *(chosen / name for name in (*FILES, "manifest.json"))]
    if Path(out_dir, "base").is_dir():  # itself a run with LoRA
        parts += [path.relative_to(out_dir) for path in Path(out_dir, "base").rglob("*") if path.is_file()]
    for part in parts:
        (temporary / part).parent.mkdir(parents=True, exist_ok=True)
        link(str(Path(out_dir, part)), str(temporary / part))
    temporary.rename(target)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(out_dir: str | Path, model: GPT, optimizers: list, state: dict) -> Path:
    """Save step state["step"]; then delete all older ones but the best (lowest state["val_loss"]). Returns its folder.

    A crash at any moment leaves the previous checkpoints as they were.
    """
    parent = Path(out_dir) / "checkpoints"
    for leftover in parent.glob(".*.tmp"):  # of a save that was killed
        shutil.rmtree(leftover)
    folder = parent / f"step_{state['step']:08d}"
    temporary = parent / f".{folder.name}.tmp"
    try:
        write_checkpoint(temporary, model, optimizers, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"cannot write {folder}: {error}; make room, then --init_from=resume") from None
    if folder.exists():  # the same step again, of a run that went back to an older checkpoint
        delete(folder)
    temporary.rename(folder)
    sync(parent)
    keep = {folder, find_checkpoint(out_dir, "best")}
    for old in list_checkpoints(out_dir):
        if old not in keep:
            delete(old)
    return folder


def write_checkpoint(folder: Path, model: GPT, optimizers: list, state: dict) -> None:
    """The files of a checkpoint, on the disk when this returns."""
    folder.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in trained_weights(model).items()}, folder / FILES[0])
    save_file(optimizer_tensors(model, optimizers), folder / FILES[1])
    (folder / FILES[2]).write_text(json.dumps(state, indent=1), encoding="utf-8")
    manifest = {"files": {name: sha256(folder / name) for name in FILES}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*FILES, "manifest.json", "."):
        sync(folder / name)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: all weights but frozen ones, which are those of another run (LoRA).

    named_parameters() names a tied weight once, and leaves out the tables that are made from the config.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, out of sight first: a kill on the way leaves no half of one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def optimizer_tensors(model: GPT, optimizers: list) -> dict[str, Tensor]:
    """The optimizers' state as one flat dict: "weight's name/state's name" → tensor."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}/{key}": tensor.detach().contiguous()
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def sync(path: Path) -> None:
    """Have the file's (or folder's) content on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The file's checksum, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in Path(out_dir).glob("checkpoints/step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[5:]))


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's state.json: step, val_loss, seconds and so on. ValueError if it is missing or damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        state = {"val_loss": None, **state, "step": int(state["step"])}
        if not isinstance(state["val_loss"], float | int | None):
            raise ValueError
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise ValueError(f"{checkpoint} is damaged: state.json cannot be read; delete it to use another one") from None


def find_checkpoint(out_dir: str | Path, which: str) -> Path:
    """The run's "best" (lowest val_loss) or "latest" checkpoint, or the one so named. ValueError if there is none."""
    checkpoints = list_checkpoints(out_dir)
    if not checkpoints:
        raise ValueError(f"no checkpoint in {out_dir} yet: train first, or wait for the run's first evaluation")
    if which == "latest":
        return checkpoints[-1]
    if which == "best":
        losses = {path: read_state(path)["val_loss"] for path in checkpoints}
        measured = [path for path in checkpoints if losses[path] is not None]
        return min(measured, key=losses.__getitem__, default=checkpoints[-1])
    named = Path(out_dir) / "checkpoints" / which
    if named not in checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(f"no checkpoint {which!r} in {out_dir}: choose best, latest or one of {names}")
    return named


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest's checksum. ValueError names the first file that differs."""
    try:
        expected = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        expected = {name: expected[name] for name in FILES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{checkpoint}/manifest.json is missing or damaged; {GO_ON}") from None
    for name, checksum in expected.items():
        if not (checkpoint / name).is_file() or sha256(checkpoint / name) != checksum:
            raise ValueError(
                f"{checkpoint / name} is damaged (missing, or its checksum differs); use another checkpoint"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; anything else, a pickle above all, is refused with a ValueError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); no other kind is loaded") from None


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy the checkpoint's weights into the model. ValueError if the two do not fit together."""
    weights, parameters = read_tensors(checkpoint / FILES[0]), trained_weights(model)
    for name in sorted(weights.keys() | parameters.keys()):
        given, wanted = (tuple(d[name].shape) if name in d else "none" for d in (weights, parameters))
        if given != wanted:
            raise ValueError(f"{checkpoint} does not fit the config: {name} has shape {given} there and {wanted} here")
        parameters[name].copy_(weights[name])


def load_optimizers(model: GPT, optimizers: list, checkpoint: Path) -> None:
    """Restore the optimizers' state. ValueError if it was made by another choice of optimizers."""
    parameters, owner = dict(model.named_parameters()), {}
    for optimizer in optimizers:
        owner |= {p: optimizer for group in optimizer.param_groups for p in group["params"]}
    for label, tensor in read_tensors(checkpoint / FILES[1]).items():
        name, key = label.rsplit("/", 1)
        p = parameters.get(name)
        if p is None or p not in owner or tensor.dim() and tensor.shape != p.shape:
            raise ValueError(f"{checkpoint}: its optimizer state is not of this model: {name}")
        owner[p].state[p][key] = tensor.to(p.device)


def load_model(
    out_dir: str | Path, which: str = "best", device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer, Path]:
    """A run's model in evaluation mode, its tokenizer, and the verified checkpoint they came from.

    Of a run with LoRA, the base model with the corrections merged into it.
    """
    config = load_config(out_dir)
    checkpoint = find_checkpoint(out_dir, which)
    verify(checkpoint)
    lora = (config["chat"] or {}).get("lora")
    tokenizer = load_tokenizer(out_dir)
    if lora:
        model = load_base(str(Path(out_dir, "base")), lora["checkpoint"], tokenizer)[0]
        add_lora(model, lora["rank"], lora["alpha"], lora["targets"])
        load_weights(model, checkpoint)
        merge_lora(model)
    else:
        model = new_model(out_dir, config["model"])
        load_weights(model, checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} token ids, the model {model.config.vocab_size}"
        raise ValueError(f"{out_dir}/{TOKENIZER_FILE} is not the one the model was trained with: it has {sizes}")
    return model.to(device).eval(), tokenizer, checkpoint


def new_model(out_dir: str | Path, config: dict) -> GPT:
    """A model of the shape that the run's config.json tells."""
    path = f"{out_dir}/config.json"
    try:
        (built,) = build({key: (value, path) for key, value in config.items()}, GPTConfig)
        return GPT(built)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not describe a model: {str(error).splitlines()[0]}") from None


def load_base(out_dir: str, which: str, tokenizer: Tokenizer) -> tuple[GPT, Path]:
    """The model to fine-tune, from a run and its checkpoint, and that checkpoint.

    For a base model the embeddings of the chat template's tokens are made anew, added where the model has none: it has
    never seen one. ValueError unless `tokenizer` is the run's, perhaps with special tokens added.
    """
    own = load_tokenizer(out_dir).content()
    content = tokenizer.content()
    if own not in (content, content.get("base")):
        raise ValueError(f"{out_dir} was trained with another tokenizer")
    model, _, checkpoint = load_model(out_dir, which)
    if load_config(out_dir)["chat"] is None:
        grow(model, tokenizer.vocab_size, [tokenizer.special_tokens[name] for name in TOKENS])
    return model, checkpoint


@torch.no_grad()
def grow(model: GPT, vocab_size: int, unseen: list[int]) -> None:
    """Give the model at least vocab_size token ids, and the unseen ones an embedding: the mean of all, and some noise.

    The mean makes a new token about as likely as any [Hewitt 2021]; the noise lets equal ones learn to differ.
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
