"""The tokens of a split in files, its shards: append to them, and read them as if they were one file.

A split of one shard is the file train.bin (or val.bin); the shards of a longer one are train_00000.bin, train_00001.bin
and so on, of a fixed number of tokens but for the last. meta.json lists them with their tokens and SHA-256.
"""

import hashlib
import itertools
import mmap
import os
import re
from bisect import bisect_right
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from common.files import errors_name, sync
from text.tokenise import Encoded

SPLITS = ("train", "val")
SHARD_TOKENS = 10**9  # 2 or 4 GB on disk
# Shards mapped at once. A map of Python's holds a file descriptor, of which a process may often have 1,024 only.
MAPS = 256
NAME = re.compile(r"(part_\d{5}_of_\d{5}/)?(train|val)(_\d{5,})?\.bin")  # of a shard, in the folder of its corpus


def shard_name(split: str, number: int) -> str:
    """Return the name of the file of a split's shard, counted from 0, where there are several."""
    return f"{split}_{number:05}.bin"


def shards_of(split: str, counts: dict) -> list[dict]:
    """Return the shards in a split's entry of meta.json, each with file, tokens and sha256."""
    if "shards" in counts:
        return counts["shards"]
    return [{"file": f"{split}.bin", "tokens": counts["tokens"], "sha256": counts["sha256"]}]


def how_to_prepare(folder: Path) -> str:
    """Return the advice that ends the messages about a missing or damaged corpus."""
    script = folder / "prepare.py"
    if script.is_file():
        return f"run python {script}"
    return f"prepare it, as in python data/text/prepare.py --input FILES --output {folder}"


# --- writing -----------------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends tokens to the shards of a split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, counts: dict | None = None):
        """Go on where `counts`, a result of `counts()`, was the state of the files: cut off what came after it.

        Raises ValueError if a shard is missing or too short, or if the last one is not as it was then.
        """
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        empty: dict = {"tokens": 0, "bytes": 0, "documents": 0, "shards": []}
        self._counts = empty if counts is None else counts | {"shards": [*counts["shards"]]}
        self._file, self._hash = None, hashlib.sha256()
        for shard in self._counts["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size < shard["tokens"] * dtype.itemsize:
                raise ValueError(f"{str(path)!r} is missing or too short to go on: delete {folder}, and begin again")
        if self._counts["shards"] and self._counts["shards"][-1]["tokens"] < shard_tokens:
            self._reopen(self._counts["shards"].pop())

    def _reopen(self, shard: dict) -> None:
        self._file = open(self._path, "r+b", buffering=0)
        self._file.truncate(shard["tokens"] * self.dtype.itemsize)
        self._hash = hashlib.file_digest(self._file, "sha256")  # type: ignore[assignment, arg-type]
        if self._hash.hexdigest() != shard["sha256"]:
            raise ValueError(f"{str(self._path)!r} is damaged (its SHA-256 differs): delete {self.folder}")

    def add(self, part: Encoded) -> bool:
        """Append the tokens; return whether a shard became full. Raises WriteError."""
        full, left = False, part.tokens
        while len(left):
            room = self.shard_tokens - self._open_tokens
            self._write(left[:room].tobytes())
            self._counts["tokens"] += len(left[:room])
            left = left[room:]
            if self._open_tokens == self.shard_tokens:
                full = True
                self.close()
                self._counts["shards"].append(self._open_shard())
                self._hash = hashlib.sha256()
        self._counts["bytes"] += part.bytes
        self._counts["documents"] += part.documents
        return full

    def counts(self) -> dict:
        """Return the split's entry of meta.json, in which every shard, also the last one, is listed as it is now."""
        shards = [*self._counts["shards"], *([self._open_shard()] if self._open_tokens else [])]
        return self._counts | {"shards": shards}

    def sync(self) -> None:
        """Wait until everything is on the disk. Raises WriteError."""
        if self._file is not None:
            with errors_name(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file; a further `add` must begin a new shard."""
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return self.folder / shard_name(self.split, len(self._counts["shards"]))

    @property
    def _open_tokens(self) -> int:
        return self._counts["tokens"] - len(self._counts["shards"]) * self.shard_tokens

    def _open_shard(self) -> dict:
        return {"file": self._path.name, "tokens": self._open_tokens, "sha256": self._hash.hexdigest()}

    def _write(self, content: bytes) -> None:
        """Write all of the content to the open shard; the file has no buffer, so its `write` may write only a part."""
        with errors_name(self._path):
            if self._file is None:
                # Without a buffer, so that a full disk fails in `write`, and not once more in `close`.
                self._file = open(self._path, "wb", buffering=0)
                sync(self.folder)
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
        self._hash.update(content)


# --- reading -----------------------------------------------------------------------------------------------------


def map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map the tokens of a file into memory, to be read at random places.

    The system is told so. Otherwise it would read up to megabytes around each row, as if the rest came next.
    """
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(content, "madvise"):  # not on Windows
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype=dtype)


class Tokens:
    """The tokens of a split, from memory maps of its shards."""

    def __init__(self, folder: Path, shards: list[dict], dtype: np.dtype, vocab_size: int, advice: str = ""):
        """Raise ValueError if a file has not the size that its entry says.

        advice: how messages about damage end, by default that of `how_to_prepare`.
        """
        self.folder, self.shards, self.vocab_size = folder, shards, vocab_size
        self.advice = advice or how_to_prepare(folder)
        self._starts = [0, *itertools.accumulate(shard["tokens"] for shard in shards)]
        self._map = lru_cache(maxsize=MAPS)(partial(map_tokens, dtype=dtype))
        for shard in shards:
            path, expected = folder / shard["file"], shard["tokens"] * dtype.itemsize
            size = path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise ValueError(f"{str(path)!r} has {size} bytes instead of {expected}: {self.advice}")

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`, or up to the last one. Raises ValueError for an unknown id."""
        parts, stop = [], min(stop, len(self))
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            begin, end = self._starts[number], min(stop, self._starts[number + 1])
            path = self.folder / self.shards[number]["file"]
            part = self._map(path)[start - begin : end - begin]
            if part.max() >= self.vocab_size:  # the embedding would fail on it
                raise ValueError(
                    f"{str(path)} holds token id {part.max()}, beyond its vocabulary of {self.vocab_size:,}: "
                    f"{self.advice}"
                )
            parts.append(part)
            start, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def verify(self) -> None:
        """Read all files. Raises ValueError that names the first one whose SHA-256 is not that of its entry."""
        for shard in self.shards:
            path = self.folder / shard["file"]
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ValueError(f"{str(path)!r} is damaged (its SHA-256 differs): {self.advice}")
