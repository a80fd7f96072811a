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

from common.tokenizer import FILE_NAME as TOKENIZER_FILE
from common.tokenizer import Tokenizer, load_tokenizer, write_json
from model import GPT, GPTConfig

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


def save_config(out_dir: str, model: dict, train: dict) -> None:
    """Write config.json."""
    write_json(Path(out_dir) / "config.json", {"model": model, "train": train})


def load_config(out_dir: str | Path) -> dict:
    """{"model": GPTConfig's fields, "train": TrainConfig's} of a run. ValueError: no such run, or a damaged file."""
    path = Path(out_dir) / "config.json"
    if Path(out_dir).is_file():
        raise ValueError(f"{out_dir} is a file; give the folder of a run, such as one that train.py wrote")
    if not path.is_file():
        raise ValueError(f"no run in {out_dir} (no config.json there): train one first, or correct the path")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {"model": dict(config["model"]), "train": dict(config["train"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not the config.json of a run") from None


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
    # named_parameters() names a tied weight once, and leaves out the tables that are made from the config
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / FILES[0])
    save_file(optimizer_tensors(model, optimizers), folder / FILES[1])
    (folder / FILES[2]).write_text(json.dumps(state, indent=1), encoding="utf-8")
    manifest = {"files": {name: sha256(folder / name) for name in FILES}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*FILES, "manifest.json", "."):
        sync(folder / name)


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
        return {"val_loss": None, **state, "step": int(state["step"])}
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
    weights, parameters = read_tensors(checkpoint / FILES[0]), dict(model.named_parameters())
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
    """A run's model in evaluation mode, its tokenizer, and the verified checkpoint they came from."""
    config = load_config(out_dir)
    checkpoint = find_checkpoint(out_dir, which)
    verify(checkpoint)
    try:
        model = GPT(GPTConfig(**config["model"]))
    except TypeError as error:
        raise ValueError(f"{out_dir}/config.json does not describe a model: {error}") from None
    load_weights(model, checkpoint)
    tokenizer = load_tokenizer(out_dir)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} token ids, the model {model.config.vocab_size}"
        raise ValueError(f"{out_dir}/{TOKENIZER_FILE} is not the one the model was trained with: it has {sizes}")
    return model.to(device).eval(), tokenizer, checkpoint
