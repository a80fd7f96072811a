"""Write documents to token files, and read batches from token files.

A corpus is a folder: train.bin and val.bin (raw little-endian uint16 or uint32 tokens), tokenizer.json, and meta.json
with their sizes and SHA-256. `write_corpus` streams: worker processes encode the documents in pieces of bounded size,
so memory use does not grow with the text. It writes all files to a temporary folder and then moves them into place,
meta.json last, so a half-written corpus never opens.
`Corpus.batch` is a pure function of (seed, step): there is no loader state to save, a resumed run asks for its next
step, and N processes together read the same batch as one process alone.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from bpe import with_checksum
from common.files import checksum, errors_name, locked, write_json
from text.documents import Document
from text.order import drawn
from text.tokenise import Encoded, encode_documents
from text.tokenizer import FILE_NAME, Tokenizer, load_tokenizer

if TYPE_CHECKING:  # torch takes seconds and much memory to import, so the worker processes do without it
    import torch

SPLITS = ("train", "val")
META = "meta.json"
FORMAT = {"format": "plaingpt-corpus", "version": 1}
KEYS = {*FORMAT, "dtype", "tokenizer", "vocab_size", "splits", "tokenizer_sha256", "special_tokens_in_text"}
IGNORE = -100  # target that the loss ignores: equal to model.IGNORE, which would import torch

# --- writing -----------------------------------------------------------------------------------------------------


TEMPORARY = ".prepare-"  # prefix of the names of temporary folders


def write_corpus(
    folder: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    total_bytes: int | None = None,
) -> dict:
    """Tokenise `documents` into a corpus in `folder`; returns the content of meta.json.

    The tokenizer's bos_id and eot_id, if it has them, stand around each document; empty documents are left out. The
    files do not depend on `workers` (default: one per CPU). total_bytes: size of the text, if known, for the progress
    bar.
    An old corpus in `folder` stays until the new one is complete. Raises ValueError if a split is empty or the
    tokenizer does not reproduce a text, and as `hold_for_writing` does; WriteError if a file cannot be written.
    """
    with hold_for_writing(folder):
        return write_held_corpus(folder, documents, tokenizer, workers, total_bytes)


@contextlib.contextmanager
def hold_for_writing(folder: str | os.PathLike) -> Iterator[None]:
    """Make `folder`, lock it against other writers, and delete the temporary folders of killed processes.

    Raises ValueError if `folder` is a file or a run, or if another process holds the lock.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"--output={folder} is a file: name a folder")
    if (folder / "config.json").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"--output={folder} is a run, whose tokenizer would be lost: name a folder of its own")
    with locked(folder, "choose another --output"):
        for leftover in folder.glob(f"{TEMPORARY}*/"):
            shutil.rmtree(leftover)
        yield


def write_held_corpus(
    folder: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    workers: int | None = None,
    total_bytes: int | None = None,
) -> dict:
    """Do what `write_corpus` does, in a folder that `hold_for_writing` has locked."""
    folder, dtype = Path(folder), "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    new = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        encoded = encode_documents(documents, tokenizer, np.dtype(dtype).newbyteorder("<"), workers)
        splits, spelled = _write_tokens(new, encoded, total_bytes)
        tokenizer.save(new)
        meta = FORMAT | {
            "dtype": dtype, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "splits": splits,
            "tokenizer_sha256": hashlib.sha256((new / FILE_NAME).read_bytes()).hexdigest(),
            "special_tokens_in_text": spelled,
        }  # fmt: skip
        write_json(new / META, with_checksum(meta))
        # Between these renames meta.json is missing, so the folder does not open: old and new files never mix.
        (folder / META).unlink(missing_ok=True)
        for name in (*(f"{split}.bin" for split in SPLITS), FILE_NAME, META):
            os.replace(new / name, folder / name)
        return meta
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_tokens(
    folder: Path, encoded: Iterator[dict[str, Encoded]], total_bytes: int | None
) -> tuple[dict[str, dict], dict[str, int]]:
    """Write the encoded tasks to train.bin and val.bin, synced to disk.

    Returns each split's counts and SHA-256, and how often the text spells out each special token.
    """
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    hashes, spelled = {split: hashlib.sha256() for split in SPLITS}, Counter()
    paths = {split: folder / f"{split}.bin" for split in SPLITS}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(encoded))
        bar = stack.enter_context(tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenise", disable=None))
        # Without a buffer, so that a full disk fails in `write`, and not once more in `close`.
        files = {split: stack.enter_context(open(paths[split], "wb", buffering=0)) for split in SPLITS}
        for result in encoded:
            for split, part in result.items():
                content = part.tokens.tobytes()
                with errors_name(paths[split]):
                    _write_all(files[split], content)
                hashes[split].update(content)
                splits[split]["tokens"] += len(part.tokens)
                splits[split]["bytes"] += part.bytes
                splits[split]["documents"] += part.documents
                spelled.update(part.spelled)
                bar.update(part.bytes)
        bar.total = bar.n  # the total was an estimate: escapes in JSON are longer than their text
        for split, file in files.items():
            with errors_name(paths[split]):
                os.fsync(file.fileno())
    for split in SPLITS:
        if not splits[split]["tokens"]:
            raise ValueError(f"the {split} split is empty: give more text, or another val_fraction")
    return {split: splits[split] | {"sha256": hashes[split].hexdigest()} for split in SPLITS}, dict(spelled)


def _write_all(file, content: bytes) -> None:
    """Write all of `content` to an unbuffered file, whose `write` may write only a part."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


# --- reading -----------------------------------------------------------------------------------------------------


class Corpus:
    """A prepared corpus. Its token files are memory-mapped, so opening takes the same time for every size."""

    def __init__(self, folder: str | os.PathLike):
        """Raise ValueError if `folder` holds no complete corpus; the message names the command that makes one."""
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.vocab_size: int = self.meta["vocab_size"]
        self._dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._tokens: dict[str, np.ndarray] = {}
        for split in SPLITS:
            path = self.folder / f"{split}.bin"
            size = path.stat().st_size if path.is_file() else 0
            expected = self.num_tokens(split) * self._dtype.itemsize
            if size != expected:
                raise ValueError(
                    f"{str(path)!r} has {size} bytes instead of {expected}: {_how_to_prepare(self.folder)}"
                )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encoded the corpus. Raises ValueError if it is missing, damaged or another one."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"the tokenizer in {str(self.folder)!r} has {tokenizer.vocab_size} tokens, its corpus was made with "
                f"{self.vocab_size}: {_how_to_prepare(self.folder)}"
            )
        content = (self.folder / FILE_NAME).read_bytes()
        if self.meta.get("tokenizer_sha256") not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError(
                f"the tokenizer in {str(self.folder)!r} is not the one its corpus was made with (its SHA-256 differs): "
                f"{_how_to_prepare(self.folder)}"
            )
        return tokenizer

    def num_tokens(self, split: str) -> int:
        """Return the number of tokens of the split."""
        return self._counts(split)["tokens"]

    def num_bytes(self, split: str) -> int:
        """Return the size of the split's text in bytes of UTF-8, the denominator of bits per byte."""
        return self._counts(split)["bytes"]

    def verify(self) -> None:
        """Read both token files. Raises ValueError if the SHA-256 of one is not that of meta.json."""
        for split in SPLITS:
            if hashlib.sha256(self._map(split)).hexdigest() != self._counts(split)["sha256"]:
                path = str(self.folder / f"{split}.bin")
                raise ValueError(f"{path!r} is damaged (its SHA-256 differs): {_how_to_prepare(self.folder)}")

    def batch(
        self, split: str, step: int, *, seed: int, batch_size: int, block_size: int, rows: slice = slice(None)
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return the training batch of `step`: (idx, targets), both (B, T) int64; targets are one token ahead.

        A pure function of its arguments. Each epoch cuts the split into windows of T = block_size tokens, at an offset
        and in an order of its own, and uses every window once. batch_size: rows of the whole step, over all
        micro-batches and processes; rows: the B rows of the step to return, the only ones that are read.
        Raises ValueError if the split is shorter than a window, or if seed or step is negative.
        """
        import torch

        tokens = self._map(split)
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"the {split} split of {str(self.folder)!r} has {len(tokens)} tokens, and block_size={block_size} "
                f"needs {block_size + 1}: choose a smaller block_size, or prepare more text"
            )
        if seed < 0 or step < 0:
            raise ValueError(f"seed={seed}, step={step}: neither may be negative")
        # One window fewer than would fit, to leave room for the offset
        count = max(1, (len(tokens) - 1) // block_size - 1)
        numbers = range(step * batch_size, (step + 1) * batch_size)[rows]
        windows, offsets = drawn(seed, numbers, count, len(tokens) - 1 - count * block_size)
        block = np.empty((len(numbers), block_size + 1), dtype=np.int64)  # (B, T+1)
        for row, start in zip(block, (offsets + block_size * windows).tolist(), strict=True):
            row[:] = tokens[start : start + block_size + 1]
        self._check_ids(split, block)
        block = torch.from_numpy(block)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def windows(
        self, split: str, block_size: int, batch_size: int, *, max_batches: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """Yield the whole split in consecutive windows, for evaluation: (idx, targets), both (B, T) int64.

        Every token but the first is a target exactly once. All batches have the same shape, so that the model compiles
        once: the last batch is padded with idx 0 and target -100, which the loss ignores.
        max_batches: if above 0, yield only so many batches, evenly spread, the same ones in every call.
        Process `rank` of `world_size` gets every world_size-th batch, starting with batch `rank`.
        """
        import torch

        tokens = self._map(split)
        if len(tokens) < 2:
            raise ValueError(f"the {split} split of {str(self.folder)!r} has one token: nothing to predict")
        B = min(batch_size, -(-(len(tokens) - 1) // block_size))
        count = -(-(len(tokens) - 1) // (B * block_size))
        chosen = [i * count // max_batches for i in range(max_batches)] if 0 < max_batches < count else range(count)
        for i in chosen[rank::world_size]:
            part = tokens[i * B * block_size : (i + 1) * B * block_size + 1]
            self._check_ids(split, part)
            idx = torch.zeros(B * block_size, dtype=torch.int64)
            targets = torch.full_like(idx, IGNORE)
            idx[: len(part) - 1] = torch.from_numpy(part[:-1].astype(np.int64))
            targets[: len(part) - 1] = torch.from_numpy(part[1:].astype(np.int64))
            yield idx.view(B, block_size), targets.view(B, block_size)

    def _counts(self, split: str) -> dict:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: a corpus has {' and '.join(SPLITS)}")
        return self.meta["splits"][split]

    def _check_ids(self, split: str, tokens: np.ndarray) -> None:
        """Raise ValueError if an id is outside the vocabulary, before the embedding fails on it."""
        if tokens.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{str(self.folder / split)}.bin holds token id {tokens.max()}, beyond its vocabulary of "
                f"{self.vocab_size:,}: {_how_to_prepare(self.folder)}"
            )

    def _map(self, split: str) -> np.ndarray:
        self._counts(split)
        if split not in self._tokens:
            self._tokens[split] = np.asarray(np.memmap(self.folder / f"{split}.bin", self._dtype, mode="r"))
        return self._tokens[split]


def _read_meta(folder: Path) -> dict:
    """Return the content of meta.json. Raises ValueError if it or a field is missing, or if a field is impossible."""
    path = folder / META
    if not path.is_file():
        raise ValueError(f"no prepared corpus in {str(folder)!r}: {_how_to_prepare(folder)}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        meta = None
    match meta:
        case {
            "format": "plaingpt-corpus",
            "version": int(version),
            "dtype": "uint16" | "uint32" as dtype,
            "vocab_size": vocab_size,
            "splits": {
                "train": {"tokens": tokens, "bytes": size, "sha256": str()},
                "val": {"tokens": val_tokens, "bytes": val_size, "sha256": str()},
            },
        }:
            if version != FORMAT["version"]:
                raise ValueError(f"{str(path)!r} has format version {version}, this code reads {FORMAT['version']}")
            stated, sizes = meta.pop("sha256", None), (tokens, size, val_tokens, val_size)
            intact = meta.keys() <= KEYS and stated in (None, checksum(meta))  # files of earlier versions have none
            possible = all(_is_size(n, 1 << 63) for n in sizes)
            if intact and possible and _is_size(vocab_size, 1 << 8 * np.dtype(dtype).itemsize):
                return meta
    raise ValueError(f"{str(path)!r} is damaged, or not of this project: {_how_to_prepare(folder)}")


def _is_size(value: object, largest: int) -> bool:
    """Return whether the value is an integer from 1 to `largest` (True is not, although Python counts it as 1)."""
    return type(value) is int and 1 <= value <= largest


def _how_to_prepare(folder: Path) -> str:
    script = folder / "prepare.py"
    if script.is_file():
        return f"run python {script}"
    return f"prepare it, as in python data/text/prepare.py --input FILES --output {folder}"
