"""The weights of foreign models: reading them one tensor at a time, renaming and stacking them, writing them.

Notable:
- a model of any size passes through the memory of one tensor: files are read by memory map and written as a stream;
- a table of names says where each of our weights comes from, and serves both directions;
- a tensor that is missing, misshapen or not used is an error with its name: nothing is left out without a word.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import read_json, replacing
from common.layers import shapes_only
from model import GPT, GPTConfig

Shapes = dict[str, tuple[int, ...]]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = 5 * 10**9  # bytes: larger exports are cut into files of about this size, as the Hub has them
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}  # safetensors' names


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Tensors(Protocol):
    """Named tensors in a file or in several: their shapes are known at once, their numbers are read one by one."""

    place: str  # for messages
    shapes: Shapes

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a tensor is stored. Raises ValueError for one that is no floating-point type."""

    def read(self, name: str) -> Tensor:
        """A tensor's numbers."""


class Safetensors:
    """The .safetensors files of a folder: one, or as many shards as the index names."""

    def __init__(self, folder: Path):
        self.place = str(folder)
        files = self._files(folder)
        self.shapes: Shapes = {}
        self.file_of: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
                        self.file_of[name] = path
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        if (folder / INDEX).is_file():
            try:
                names = list(dict.fromkeys(read_json(folder / INDEX, "an index of safetensors")["weight_map"].values()))
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map") from None
            if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
                raise ValueError(f"{folder / INDEX} names {strange[0]!r}, which is no file of the folder itself")
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names: fetch them too")
            return [folder / name for name in names]
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickles = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]
        hint = (
            f": {pickles[0].name} is a pickle, which can run code when it is loaded; it is not read. Most models have "
            "a safetensors form on the Hub, or transformers' save_pretrained makes one"
            if pickles
            else f": give a folder with {SINGLE}, or with {INDEX} and its shards"
        )
        raise ValueError(f"no safetensors in {folder}{hint}")

    def dtype(self, name: str) -> torch.dtype:
        with safe_open(self.file_of[name], framework="pt") as file:
            stored = file.get_slice(name).get_dtype()
        if stored not in TYPES:
            raise ValueError(f"{self.place}: {name} is stored as {stored}; only {', '.join(TYPES)} are supported")
        return TYPES[stored]

    def read(self, name: str) -> Tensor:
        with safe_open(self.file_of[name], framework="pt") as file:
            return file.get_tensor(name)


class InMemory:
    """Tensors that are in memory already."""

    def __init__(self, place: str, tensors: dict[str, Tensor]):
        self.place, self.tensors = place, tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class WithoutPrefixes:
    """Other tensors, whose names lose those of the prefixes that they begin with, in the prefixes' order."""

    def __init__(self, tensors: Tensors, *prefixes: str):
        self.tensors, self.place = tensors, tensors.place
        self.old = {reduce(str.removeprefix, prefixes, name): name for name in tensors.shapes}
        self.shapes = {new: tensors.shapes[old] for new, old in self.old.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors.dtype(self.old[name])

    def read(self, name: str) -> Tensor:
        return self.tensors.read(self.old[name])


# ---------------------------------------------------------------------------------------------------------------------
# Names


class Weight(NamedTuple):
    """Where one of our weights comes from: foreign tensors, stacked on top of each other by rows.

    transposed: the foreign tensor holds (in, out) where ours holds (out, in). Ours is scale · theirs + shift.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]  # of each foreign tensor, before a transposition
    transposed: bool = False
    scale: float = 1.0
    shift: float = 0.0

    def shapes(self, ours: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The shape of each foreign tensor, for a weight of ours of that shape."""
        for rows in self.rows:
            shape = (rows, *ours[1:])
            yield shape[::-1] if self.transposed else shape


def our_shapes(config: GPTConfig) -> Shapes:
    """The name and shape of every weight of such a model, tied ones once."""
    with shapes_only():
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def expand(config: GPTConfig, table: dict[str, str], transposed: Iterable[str] = ()) -> dict[str, Weight]:
    """The table of a family for all layers of a model: our name → Weight.

    table: our name without .weight or .bias → foreign names, separated by blanks; i stands for the number of the layer.
    transposed: our names of layers whose foreign weights are transposed.

        {"blocks.{i}.mlp.up": "layers.{i}.gate layers.{i}.up"} → {"blocks.0.mlp.up.weight": Weight(...), ...}
    """
    H, K, D = config.n_head, config.n_kv_head, config.head_dim
    weights = {}
    for name, shape in our_shapes(config).items():
        layer, _, end = name.rpartition(".")
        number = layer.split(".")[1] if layer.startswith("blocks.") else ""
        general = layer.replace(f"blocks.{number}.", "blocks.{i}.", 1)
        if general not in table:
            raise ValueError(f"this family of models has no weight {name}")
        names = tuple(f"{theirs.format(i=number)}.{end}" for theirs in table[general].split())
        rows = {1: (shape[0],), 2: (config.mlp_dim,) * 2, 3: (H * D, K * D, K * D)}[len(names)]
        weights[name] = Weight(names, rows, general in transposed and len(shape) == 2)
    return weights


class Renaming(NamedTuple):
    """Foreign tensors as ours, and what is to be left unused among them.

    computed: ends of the names of foreign tensors that hold no weights (tables that are computed from the config).
    same: pairs of foreign names whose tensors must be equal, of which only the first is used (tied embeddings).
    """

    weights: dict[str, Weight]
    computed: tuple[str, ...] = ()
    same: tuple[tuple[str, str], ...] = ()


def check_names(tensors: Tensors, renaming: Renaming, shapes: Shapes) -> None:
    """Raise ValueError for a foreign tensor that is missing, has the wrong shape, or would be left unused."""
    wanted: Shapes = {}
    for ours, weight in renaming.weights.items():
        wanted |= zip(weight.names, weight.shapes(shapes[ours]), strict=True)
    second = {two for _, two in renaming.same}
    found = {
        n: s for n, s in tensors.shapes.items() if n not in second and not n.endswith(renaming.computed or ("\0",))
    }
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{tensors.place} lacks the tensor {name} of shape {wanted[name]}")
        if name not in wanted:
            raise ValueError(
                f"{tensors.place} has a tensor {name} of shape {found[name]}, which this kind of model has no place for"
            )
        if found[name] != wanted[name]:
            raise ValueError(f"{tensors.place}: {name} has shape {found[name]}, and its config asks for {wanted[name]}")
    for first, two in renaming.same:
        if two in tensors.shapes and not torch.equal(tensors.read(first), tensors.read(two)):
            raise ValueError(f"{tensors.place}: {first} and {two} differ, though its config says that they are tied")


def dtype_of(tensors: Tensors, weight: Weight) -> torch.dtype:
    """The precision for one of our weights: the highest of its tensors, and at least float32 if it is computed."""
    stored = reduce(torch.promote_types, map(tensors.dtype, weight.names))
    return stored if (weight.scale, weight.shift) == (1.0, 0.0) else torch.promote_types(stored, torch.float32)


def read_weight(tensors: Tensors, weight: Weight) -> Tensor:
    """One of our weights, in the precision that `dtype_of` says."""
    parts = [tensors.read(name) for name in weight.names]
    parts = [part.mT if weight.transposed else part for part in parts]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if (weight.scale, weight.shift) != (1.0, 0.0):
        tensor = tensor.to(dtype_of(tensors, weight)) * weight.scale + weight.shift
    return tensor.contiguous()


def foreign_weights(
    weights: dict[str, Weight], shapes: Shapes, read: Callable[[str], Tensor | None]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Yield (foreign name, shape, a function that makes the tensor) for each tensor of the foreign model.

    read(our name) → our weight; None for a bias that we do not have, which becomes zeros.
    """

    def make(ours: str, weight: Weight, number: int, shape: tuple[int, ...]) -> Tensor:
        tensor = read(ours)
        if tensor is None:
            return torch.zeros(shape)
        part = (tensor if len(weight.rows) == 1 else tensor.split(list(weight.rows))[number]) - weight.shift
        return ((part.mT if weight.transposed else part) / weight.scale).contiguous()

    for ours, weight in weights.items():
        for number, (name, shape) in enumerate(zip(weight.names, weight.shapes(shapes[ours]), strict=True)):
            yield name, shape, lambda args=(ours, weight, number, shape): make(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

NAME_OF = {dtype: name for name, dtype in TYPES.items()}


class Entry(NamedTuple):
    """A tensor to be written: what the file's header says, and a function that makes the numbers when they are due."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: list[Entry], step: Callable[[int], object] = lambda size: None) -> None:
    """Write a safetensors file, tensor by tensor; step(bytes) is called after each, for a progress bar.

    The format: the header's length in 8 bytes, the header as JSON, then the numbers, in the header's order.
    """
    header: dict[str, dict] = {}
    begin = 0
    for name, shape, dtype, _ in entries:
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            made = entry.make()
            tensor = made.to(entry.dtype).contiguous()
            check_range(made, tensor, f"{path}: {entry.name}")
            if tuple(tensor.shape) != tuple(entry.shape):
                raise ValueError(f"{path}: {entry.name} has shape {tuple(tensor.shape)} instead of {entry.shape}")
            file.write(tensor.view(torch.uint8).numpy().data)
            step(entry.size)


def check_range(before: Tensor, after: Tensor, place: str) -> None:
    """Raise ValueError if numbers became infinite because the new precision does not reach so far."""
    if after.dtype != before.dtype and after.isinf().any() and not before.isinf().any():
        kind = str(after.dtype).removeprefix("torch.")
        raise ValueError(f"{place} holds numbers too large for {kind}: choose another --dtype")


def write_shards(folder: Path, entries: list[Entry], step: Callable[[int], object], limit: int = SHARD) -> None:
    """Write one safetensors file, or if that would be larger than limit, several with an index, as the Hub has them."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > limit:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, entries, step)
        return
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, step)
    places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    with replacing(folder / INDEX) as file:
        json.dump({"metadata": {"total_size": sum(e.size for e in entries)}, "weight_map": places}, file, indent=1)
