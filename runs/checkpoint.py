"""Checkpoints: written whole or not at all, verified when they are loaded, and free of executable code.

    out_dir/checkpoints/step_00001000/   model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is copied to the host's memory, and written from there by a thread while training goes on: under a
temporary name, synced to disk and renamed. Its manifest holds the SHA-256 of every file. All of it is JSON and raw
arrays. There is no random state to save, since batches and dropout are pure functions of (seed, step).
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import read_json, sync
from model import GPT
from training.optim import Optimizer
from training.shard import held_rows, local, whole

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
FORMAT = {"format": "plaingpt-checkpoint", "version": 1}
INITIAL_STATE = {
    "step": 0, "val_loss": None, "best_val_loss": None, "seconds": 0.0, "scaler": {},
    "skipped": 0, "skipped_in_row": 0,  # steps whose gradient was not finite
    "evaluation_due": False,  # whether this step is one to evaluate, and was saved before that
    "log": None,  # what `seal_log` says of log.jsonl up to this step
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@dataclass(frozen=True)
class Snapshot:
    """A copy of what a checkpoint holds, in the host's memory, which training does not change any more."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict


def take_snapshot(model: GPT, optimizers: list, state: dict, keep: bool = True) -> Snapshot:
    """Copy the weights, the optimizers' state and `state`; from a GPU all tensors are copied before one wait.

    The copy needs as much memory as the checkpoint has bytes, until it is written: 4 per weight, and 4 (Muon) or 8
    (AdamW) for the optimizer's state. `to` makes copies that do not wait in pinned memory. Of a sharded model one
    tensor after the other is gathered: all processes call this together, and those without `keep` copy nothing.
    """

    def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, x in tensors.items():
            x = whole(x.detach()).contiguous()
            if keep:
                copies[name] = x.to("cpu", non_blocking=x.is_cuda, copy=True)
        return copies

    taken = Snapshot(copy(trained_weights(model)), copy(optimizer_tensors(model, optimizers)), dict(state))
    if any(p.is_cuda for p in model.parameters()):
        torch.cuda.synchronize()
    return taken


class Saver:
    """Saves the checkpoints of a run in a thread, one after the other."""

    def __init__(self, out_dir: str | Path, keep: int = 2):
        self.out_dir, self.keep = out_dir, keep
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self.writing: Future[Path] | None = None

    def save(self, model: GPT, optimizers: list, state: dict) -> None:
        """`save_checkpoint`, without waiting for the disk; the checkpoint before it is written whole first."""
        self.wait()
        snapshot = take_snapshot(model, optimizers, state)
        self.writing = self.thread.submit(write_checkpoint, self.out_dir, snapshot, self.keep)

    def wait(self) -> None:
        """Wait until what was saved is on the disk. Raises the ValueError of `save_checkpoint` if it is not."""
        if self.writing is not None:
            wait([self.writing])
            written, self.writing = self.writing, None
            written.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()


def save_checkpoint(out_dir: str | Path, model: GPT, optimizers: list, state: dict, keep: int = 2) -> Path:
    """Save a checkpoint of step state["step"]; delete all but the best (lowest state["val_loss"]) and the last `keep`.

    Returns the checkpoint's folder. A crash at any moment leaves the previous checkpoints as they were. Raises
    ValueError if it cannot be written.
    """
    return write_checkpoint(out_dir, take_snapshot(model, optimizers, state), keep)


def write_checkpoint(out_dir: str | Path, snapshot: Snapshot, keep: int) -> Path:
    """What `save_checkpoint` does after the copy."""
    parent = Path(out_dir) / "checkpoints"
    for leftover in parent.glob(".*.tmp"):  # left by a save that was killed
        shutil.rmtree(leftover)
    folder = parent / f"step_{snapshot.state['step']:08d}"
    temporary = parent / f".{folder.name}.tmp"
    try:
        write_files(temporary, snapshot)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"cannot write {folder}: {error}; make room, then --init_from=resume") from None
    if folder.exists():  # the run resumed from an older checkpoint, and reaches this step again
        delete(folder)
    temporary.rename(folder)
    sync(parent)
    checkpoints = list_checkpoints(out_dir)
    for old in set(checkpoints) - {*checkpoints[-keep:], best_of(checkpoints, or_raise=False)}:
        delete(old)
    return folder


def write_files(folder: Path, snapshot: Snapshot) -> None:
    """Write the files of a checkpoint; they are on the disk when this returns."""
    folder.mkdir(parents=True)
    save_file(snapshot.weights, folder / FILES[0])
    save_file(snapshot.optimizer, folder / FILES[1])
    (folder / FILES[2]).write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
    for name in FILES[:2]:  # safetensors makes files that only their owner can read
        shutil.copymode(folder / FILES[2], folder / name)
    seal(folder)


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint whose other files are there, and wait until all of it is on the disk."""
    manifest = FORMAT | {"files": checksums(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*FILES, "manifest.json", "."):
        sync(folder / name)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a checkpoint stores, by name: all but the frozen ones, which LoRA takes from another run.

    named_parameters() gives a tied weight once, and skips the tables that are computed from the config.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(model: GPT, optimizers: list) -> dict[str, Tensor]:
    """Return the optimizers' state as one flat dict: "name of weight/name of state" → tensor."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}/{key}": tensor
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. Renaming it first makes sure that a kill leaves no incomplete checkpoint under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def sha256(path: Path) -> str:
    """The file's checksum, in hex; empty if there is no such file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each of a checkpoint's files, all at once: hashing keeps a core busy, at 0.3 to 1.5 GB/s."""
    with ThreadPoolExecutor(max_workers=len(FILES)) as threads:
        return dict(zip(FILES, threads.map(sha256, (folder / name for name in FILES)), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    found = [path for path in Path(out_dir).glob("checkpoints/step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[5:]))


def best_of(checkpoints: list[Path], or_raise: bool = True) -> Path:
    """Return the checkpoint with the lowest val_loss; the last one if none was evaluated.

    Raises ValueError if the state of one is damaged, or passes it over if or_raise is False.
    """
    losses: dict[Path, float] = {}
    for path in checkpoints:
        try:
            loss = read_state(path)["val_loss"]
        except ValueError:
            if or_raise:
                raise
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.__getitem__, default=checkpoints[-1])


def find_checkpoint(out_dir: str | Path, which: str) -> Path:
    """Return the "best" (lowest val_loss), "latest" or named checkpoint of a run. Raises ValueError without one."""
    checkpoints = list_checkpoints(out_dir)
    if not checkpoints:
        raise ValueError(f"no checkpoint in {out_dir} yet: train first, or wait for the run's first evaluation")
    if which == "latest":
        return checkpoints[-1]
    if which == "best":
        return best_of(checkpoints)
    named = Path(out_dir) / "checkpoints" / which
    if named not in checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(f"no checkpoint {which!r} in {out_dir}: choose best, latest or one of {names}")
    return named


def read_state(checkpoint: Path) -> dict:
    """Return state.json, with the keys of INITIAL_STATE. Raises ValueError if it is damaged."""
    path = checkpoint / "state.json"
    try:
        content = dict(read_json(path, "a checkpoint's state"))
        state: dict = INITIAL_STATE | content
        good = (
            type(content["step"]) is int
            and state["step"] >= 0
            and isinstance(state["log"], dict | None)
            and all(type(state[key]) is int for key in ("skipped", "skipped_in_row"))
            and isinstance(state["seconds"], float | int)
            and all(isinstance(state[key], float | int | None) for key in ("val_loss", "best_val_loss"))
            and all(isinstance(value, float | int) for value in state["scaler"].values())
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{path} is damaged, or missing: use another checkpoint, by --checkpoint=NAME")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def verify(checkpoint: Path) -> None:
    """Compare every file with its checksum in the manifest. Raises ValueError for the first that differs."""
    path = checkpoint / "manifest.json"
    try:
        manifest: dict = dict(read_json(path, "a checkpoint's manifest"))
        expected = {name: manifest["files"][name] for name in FILES}
        version = manifest.get("version", FORMAT["version"])  # the first checkpoints have no format and no version
        if manifest != {"files": expected} and manifest != FORMAT | {"version": version, "files": expected}:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is missing or damaged; use another checkpoint") from None
    if version != FORMAT["version"]:
        raise ValueError(f"{path} has format version {version}, this code reads {FORMAT['version']}")
    found = checksums(checkpoint)
    for name, checksum in expected.items():
        if found[name] != checksum:
            differs = f"its checksum is not that of {path}"
            raise ValueError(f"{checkpoint / name} is damaged (missing, or {differs}); use another checkpoint")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading. Raises ValueError for any other kind of file, such as a pickle."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); no other kind is loaded") from None


def number_of_weights(checkpoint: Path) -> int:
    """Return the number of weights in the checkpoint, which the file's header tells. Raises ValueError."""
    with open_tensors(checkpoint / FILES[0]) as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())


def check_shapes(model: nn.Module, checkpoint: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a checkpoint's weights, given by name, have the names and shapes of the model's."""
    wanted = {name: tuple(p.shape) for name, p in trained_weights(model).items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        there, here = shapes.get(name, "none"), wanted.get(name, "none")
        if there != here:
            raise ValueError(f"{checkpoint} does not fit the config: {name} has shape {there} there and {here} here")


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy the checkpoint's weights into the model. Raises ValueError if names or shapes differ.

    Of a sharded model, each process reads the rows that it holds.
    """
    with open_tensors(checkpoint / FILES[0]) as file:
        check_shapes(model, checkpoint, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
        for name, parameter in trained_weights(model).items():
            local(parameter).copy_(file.get_slice(name)[held_rows(parameter)])


def put_weights(model: GPT, checkpoint: Path, dtype: torch.dtype | None) -> None:
    """Give a model without numbers the checkpoint's weights, one after the other, in that precision or in their own.

    Raises ValueError if names or shapes differ.
    """
    with open_tensors(checkpoint / FILES[0]) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        check_shapes(model, checkpoint, shapes)
        for name in shapes:
            stored = file.get_tensor(name)
            layer, _, kind = name.rpartition(".")
            # A copy: the file may be replaced while the model is in use
            setattr(model.get_submodule(layer), kind, nn.Parameter(stored.to(dtype or stored.dtype, copy=True)))
    if model.config.tie_embeddings:
        model.head.weight = model.tok_emb.weight


def load_optimizers(model: GPT, optimizers: list, checkpoint: Path) -> None:
    """Restore the optimizers' state, of a sharded model each process's rows of it.

    Raises ValueError if its names or shapes are not those of this model.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    owner: dict[Tensor, Optimizer] = {}
    for optimizer in optimizers:
        owner |= {p: optimizer for group in optimizer.param_groups for p in group["params"]}
    with open_tensors(checkpoint / FILES[1]) as file:
        for label in file.keys():
            name, _, key = label.rpartition("/")
            p, stored = parameters.get(name), file.get_slice(label)
            shape, kind = stored.get_shape(), stored.get_dtype()
            if p is None or p not in owner or (shape and shape != list(p.shape)) or not kind.startswith(("F", "BF")):
                raise ValueError(f"{checkpoint}: its optimizer state is not of this model: {label}")
            if shape:
                rows = stored[held_rows(p)]
                owner[p].state[p][key] = torch.empty_like(p, dtype=rows.dtype, requires_grad=False)
                local(owner[p].state[p][key]).copy_(rows)
            else:
                owner[p].state[p][key] = file.get_tensor(label).to(p.device, copy=True)
