"""From documents to token files, and from token files to batches.

A corpus is a folder: train.bin and val.bin (raw little-endian uint16 or uint32 tokens), tokenizer.json, and meta.json
with their sizes and SHA-256. `write_corpus` streams: documents of any size pass through a few worker processes in
bounded pieces, so memory stays flat, and meta.json comes last, so that a half-written corpus never opens.
`Corpus.batch` is a pure function of (seed, step): there is no loader state to save, resuming is asking for the next
step, and N processes see together what one would see alone.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from common.files import write_json
from text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # torch takes seconds to import and much memory: the workers that tokenise must do without
    import torch

SPLITS = ("train", "val")
META = "meta.json"
FORMAT = {"format": "plaingpt-corpus", "version": 1}
IGNORED = -100  # the target that no loss counts

PIECE = 1 << 18  # characters: a longer document is cut, so that none is ever held whole
TASK = 1 << 20  # characters handed to a worker at once: enough to outweigh the hand-over

# A document is (split, text); `text` is a string, or string parts one after the other where it may not fit in memory.
Document = tuple[str, str | Iterable[str]]


def parts_of(text: str | Iterable[str]) -> Iterable[str]:
    return [text] if isinstance(text, str) else text


# --- writing -----------------------------------------------------------------------------------------------------


def write_corpus(
    folder: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    total_bytes: int | None = None,
) -> dict:
    """Tokenise `documents` into a corpus in `folder`; returns what meta.json holds.

    Each document is followed by the tokenizer's eot_id, if it has one; empty documents are left out. The files do not
    depend on `workers` (default: all CPUs). `total_bytes`, if known, lets the progress bar tell the time left.
    An old corpus in `folder` stays until the new one is complete. ValueError when a split ends up empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {split: folder / f"{split}.bin.tmp" for split in SPLITS}
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    try:
        encoded = _encoded(documents, tokenizer, np.dtype(dtype).newbyteorder("<"), workers)
        splits = _write_tokens(temporary, encoded, total_bytes)
        for split in SPLITS:
            if not splits[split]["tokens"]:
                raise ValueError(f"the {split} split is empty: give more text, or another val_fraction")
        # Between these renames the folder is no corpus: what opens is the old one or the new one, never a mixture.
        (folder / META).unlink(missing_ok=True)
        for split in SPLITS:
            os.replace(temporary[split], folder / f"{split}.bin")
        tokenizer.save(folder)
        meta = FORMAT | {
            "dtype": dtype, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "splits": splits,
        }  # fmt: skip
        write_json(folder / META, meta)
        return meta
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _write_tokens(paths: dict[str, Path], encoded: Iterator[dict], total_bytes: int | None) -> dict[str, dict]:
    """Write the encoded tasks to `paths`, synced to disk; returns each split's counts and SHA-256."""
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(encoded))
        bar = stack.enter_context(tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenise", disable=None))
        files = {split: stack.enter_context(open(paths[split], "wb")) for split in SPLITS}
        for result in encoded:
            for split, (tokens, counts) in result.items():
                files[split].write(tokens)
                hashes[split].update(tokens)
                for key, count in counts.items():
                    splits[split][key] += count
                bar.update(counts["bytes"])
        bar.total = bar.n  # the total was an estimate: JSON escapes are no text
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return {split: splits[split] | {"sha256": hashes[split].hexdigest()} for split in SPLITS}


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype, workers: int | None) -> Iterator:
    """The result of `_encode` for each task, in order, computed here or by worker processes."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least 1 is needed")
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    encode = partial(_encode, tokenizer, dtype)
    tasks = _tasks(pieces(documents))
    first = list(itertools.islice(tasks, 4))
    if workers == 1 or len(first) < 4:  # a few megabytes are done before workers have started
        yield from map(encode, itertools.chain(first, tasks))
        return
    # Spawned, not forked: the parent may have threads (pyarrow's, the progress bar's), which a fork would break.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encode,))
    waiting = deque()
    try:
        for task in itertools.chain(first, tasks):
            waiting.append(executor.submit(_work, task))
            if len(waiting) > 2 * workers:  # the bound that keeps memory flat
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a tokenising process died, out of memory perhaps: try fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(encode: partial) -> None:
    global _worker_encode
    _worker_encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()  # a killed parent leaves no orphans behind


def _work(task: list) -> dict:
    return _worker_encode(task)


def _encode(tokenizer: Tokenizer, dtype: np.dtype, task: list[tuple[str, str, bool]]) -> dict[str, tuple[bytes, dict]]:
    """For each split in the task: its tokens as bytes, and what they count for."""
    result = {}
    for split in SPLITS:
        arrays, size, ended = [], 0, 0
        for _, text, ends in (piece for piece in task if piece[0] == split):
            ids = tokenizer.encode(text)
            if ends and tokenizer.eot_id is not None:
                ids.append(tokenizer.eot_id)
            arrays.append(np.array(ids, dtype=dtype))
            size += len(text.encode("utf-8", "surrogatepass"))
            ended += ends
        if arrays:
            tokens = np.concatenate(arrays)
            result[split] = tokens.tobytes(), {"tokens": len(tokens), "bytes": size, "documents": ended}
    return result


def _tasks(pieces: Iterator[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    """Pieces gathered to about TASK characters."""
    task, size = [], 0
    for piece in pieces:
        task.append(piece)
        size += len(piece[1])
        if size >= TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def pieces(documents: Iterable[Document]) -> Iterator[tuple[str, str, bool]]:
    """Documents cut into (split, text of 1 to PIECE characters, whether the document ends with it)."""
    for split, text in documents:
        assert split in SPLITS, split
        rest = ""
        for part in parts_of(text):
            rest += part
            start = 0
            while len(rest) - start > PIECE:
                end = _cut(rest, start)
                yield split, rest[start:end], False
                start = end
            rest = rest[start:]
        if rest:
            yield split, rest, True


def _cut(text: str, start: int) -> int:
    """Where to end the piece that begins at `start`: before a space, or else a line break, that follows a word.

    There the patterns of GPT-2, GPT-4 and their kin cut anyway, so that the tokens are those of the uncut text.
    """
    for mark in " \n":
        place = text.rfind(mark, start + 1, start + PIECE)
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(mark, start + 1, place)
        if place > 0:
            return place
    return start + PIECE


# --- reading -----------------------------------------------------------------------------------------------------


class Corpus:
    """A prepared corpus; its token files are mapped, not read, so opening is quick whatever their size."""

    def __init__(self, folder: str | os.PathLike):
        """ValueError when `folder` is no complete corpus, saying which command makes one."""
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
        """The tokenizer that the corpus was made with."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"the tokenizer in {str(self.folder)!r} has {tokenizer.vocab_size} tokens, its corpus was made with "
                f"{self.vocab_size}: {_how_to_prepare(self.folder)}"
            )
        return tokenizer

    def num_tokens(self, split: str) -> int:
        return self._counts(split)["tokens"]

    def num_bytes(self, split: str) -> int:
        """Bytes of the split's text as UTF-8: what bits per byte are counted in."""
        return self._counts(split)["bytes"]

    def verify(self) -> None:
        """Read the token files once through; ValueError when one is not what was prepared."""
        for split in SPLITS:
            if hashlib.sha256(self._map(split)).hexdigest() != self._counts(split)["sha256"]:
                path = str(self.folder / f"{split}.bin")
                raise ValueError(f"{path!r} is damaged (its SHA-256 differs): {_how_to_prepare(self.folder)}")

    def batch(
        self, split: str, step: int, *, seed: int, batch_size: int, block_size: int, rows: slice = slice(None)
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The training batch of `step`: (idx, targets), both (B, T) int64, T = block_size, targets one token ahead.

        A pure function of its arguments. An epoch is the split cut into windows, in an order and with an offset of its
        own; every window comes once. `batch_size` is that of the whole step, over all micro-batches and processes;
        `rows` picks this one's share of it, B rows, and only those are read.
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
        # One window less than fits leaves room for the offset
        count = max(1, (len(tokens) - 1) // block_size - 1)
        block = np.empty((len(range(batch_size)[rows]), block_size + 1), dtype=np.int64)  # (B, T+1)
        for row, number in zip(block, range(step * batch_size, (step + 1) * batch_size)[rows], strict=True):
            offset, order = epoch_order(seed, number // count, count, len(tokens) - 1 - count * block_size)
            start = offset + block_size * order[number % count]
            row[:] = tokens[start : start + block_size + 1]
        block = torch.from_numpy(block)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def windows(
        self, split: str, block_size: int, batch_size: int, *, max_batches: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """The whole split, for evaluation: batches (idx, targets), both (B, T) int64, of consecutive windows.

        Every token but the first is a target exactly once. All batches have one shape, so that a compiled model is
        compiled once: what the last one lacks has idx 0 and target -100, which no loss counts.
        `max_batches` > 0 takes only so many, spread evenly, the same ones each time. Of `world_size` processes, each
        gets every world_size-th batch from its `rank` on; some may get one less than others, or none.
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
            idx = torch.zeros(B * block_size, dtype=torch.int64)
            targets = torch.full_like(idx, IGNORED)
            idx[: len(part) - 1] = torch.from_numpy(part[:-1].astype(np.int64))
            targets[: len(part) - 1] = torch.from_numpy(part[1:].astype(np.int64))
            yield idx.view(B, block_size), targets.view(B, block_size)

    def _counts(self, split: str) -> dict:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: a corpus has {' and '.join(SPLITS)}")
        return self.meta["splits"][split]

    def _map(self, split: str) -> np.ndarray:
        self._counts(split)
        if split not in self._tokens:
            self._tokens[split] = np.asarray(np.memmap(self.folder / f"{split}.bin", self._dtype, mode="r"))
        return self._tokens[split]


@lru_cache(maxsize=2)  # a step may lie across two epochs
def epoch_order(seed: int, epoch: int, count: int, spare: int = 0) -> tuple[int, np.ndarray]:
    """The epoch's offset, 0 to spare, and its order of the count windows."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(spare + 1)), rng.permutation(count)


def _read_meta(folder: Path) -> dict:
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
            "dtype": "uint16" | "uint32",
            "vocab_size": int(),
            "splits": {
                "train": {"tokens": int(), "bytes": int(), "sha256": str()},
                "val": {"tokens": int(), "bytes": int(), "sha256": str()},
            },
        }:
            sizes = [meta["splits"][split][key] for split in SPLITS for key in ("tokens", "bytes")]
            if min(*sizes, meta["vocab_size"]) < 1:
                raise ValueError(f"{str(path)!r} is damaged: a size in it is not positive; {_how_to_prepare(folder)}")
            if version == FORMAT["version"]:
                return meta
            raise ValueError(f"{str(path)!r} has format version {version}, this code reads {FORMAT['version']}")
    raise ValueError(f"{str(path)!r} is damaged, or not of this project: {_how_to_prepare(folder)}")


def _how_to_prepare(folder: Path) -> str:
    script = folder / "prepare.py"
    if script.is_file():
        return f"run python {script}"
    return f"prepare it, as in python data/text/prepare.py --input FILES --output {folder}"
