"""Write documents to token files, and read batches from token files.

A corpus is a folder: train.bin and val.bin (raw little-endian uint16 or uint32 tokens), or their shards (shards.py),
tokenizer.json, and meta.json with their sizes and SHA-256. `write_corpus` streams: worker processes encode the
documents in pieces of bounded size, so memory use does not grow with the text. It writes all files to a temporary
folder and then moves them into place, meta.json last, so a half-written corpus never opens.
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
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from bpe import with_checksum
from common.files import checksum, is_of_another, locked, read_json, sync, write_json
from text.documents import Document
from text.order import drawn
from text.shards import NAME, SHARD_TOKENS, SPLITS, ShardWriter, Tokens, how_to_prepare, shard_name, shards_of
from text.tokenise import Encoded, encode_documents
from text.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from text.unfinished import Unfinished

if TYPE_CHECKING:  # torch takes seconds and much memory to import, so the worker processes do without it
    import torch

META = "meta.json"
FORMAT = {"format": "plaingpt-corpus"}
VERSIONS = (1, 2)  # 2: a split in shards, which the first version did not have
KEYS = {  # of meta.json, besides its checksum
    *FORMAT, "version", "dtype", "tokenizer", "vocab_size", "splits", "tokenizer_sha256", "special_tokens_in_text",
    "part", "preparation",
}  # fmt: skip
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
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Tokenise `documents` into a corpus in `folder`; returns the content of meta.json.

    The tokenizer's bos_id and eot_id, if it has them, stand around each document; empty documents are left out. The
    files do not depend on `workers` (default: one per CPU). total_bytes: size of the text, if known, for the progress
    bar. shard_tokens: tokens per file of a split that has more.
    An old corpus in `folder` stays until the new one is complete. Raises ValueError if a split is empty or the
    tokenizer does not reproduce a text, and as `hold_for_writing` does; WriteError if a file cannot be written.
    """
    with hold_for_writing(folder):
        return write_held_corpus(folder, documents, tokenizer, workers, total_bytes, shard_tokens)


@contextlib.contextmanager
def hold_for_writing(folder: str | os.PathLike) -> Iterator[None]:
    """Make `folder`, lock it against other writers, and delete the temporary folders of killed processes.

    Raises ValueError if `folder` is a file or a run, if it holds files of the same names that are not a corpus's, or if
    another process holds the lock.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"--output={folder} is a file: name a folder")
    if (folder / "config.json").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"--output={folder} is a run, whose tokenizer would be lost: name a folder of its own")
    if foreign := _foreign_file(folder):
        raise ValueError(f"--output={folder} holds a {foreign} that is not a corpus's: name a folder of its own")
    with locked(folder, "choose another --output"):
        for leftover in folder.glob(f"{TEMPORARY}*/"):
            shutil.rmtree(leftover)
        yield


def _foreign_file(folder: Path) -> str | None:
    """Return the name of a file that a corpus would replace, but that belongs to something else, if there is one.

    Without a meta.json, a lock file tells what a preparation left that was killed.
    """
    if is_of_another(folder / META, FORMAT["format"]):
        return META
    if not folder.is_dir() or any((folder / name).exists() for name in (META, ".lock")):
        return None
    names = sorted(path.name for path in folder.iterdir())
    return next((name for name in names if name == FILE_NAME or NAME.fullmatch(name)), None)


def write_held_corpus(
    folder: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    workers: int | None = None,
    total_bytes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    unfinished: Unfinished | None = None,
    part: dict | None = None,
) -> dict:
    """Do what `write_corpus` does, in a folder that `hold_for_writing` has locked.

    unfinished: go on where this preparation of the same documents was interrupted, and keep what is done if it is
    interrupted again; without it, nothing is kept. part: what meta.json says of a part of a corpus, for `join`; a
    split of a part may be empty.
    """
    if shard_tokens < 1:
        raise ValueError(f"--shard_tokens={shard_tokens}: give 1 or more tokens")
    folder = Path(folder)
    new = unfinished.path if unfinished else Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        if not (new / META).exists() and not (unfinished and unfinished.state["meta"]):
            encode = partial(encode_documents, documents, tokenizer, _dtype(tokenizer), workers)
            writers = _writers(new, tokenizer, shard_tokens, unfinished)
            spelled = _write_tokens(encode, writers, total_bytes, unfinished)
            splits = {split: writer.counts() for split, writer in writers.items()}
            if not part:
                check_splits(splits)
            _complete(new, tokenizer, splits, spelled, part or {})
        meta = read_json((new if (new / META).exists() else folder) / META, "a corpus's")
        if unfinished:
            unfinished.save(meta=checksum(meta))
        _move_into_place(new, folder, meta)
        return meta
    finally:
        if not unfinished:
            shutil.rmtree(new, ignore_errors=True)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _writers(
    folder: Path, tokenizer: Tokenizer, shard_tokens: int, unfinished: Unfinished | None
) -> dict[str, ShardWriter]:
    done = (unfinished and unfinished.state["splits"]) or {}
    return {split: ShardWriter(folder, split, _dtype(tokenizer), shard_tokens, done.get(split)) for split in SPLITS}


def _write_tokens(
    encode: Callable[[int], Iterator[dict[str, Encoded]]],
    writers: dict[str, ShardWriter],
    total_bytes: int | None,
    unfinished: Unfinished | None,
) -> dict[str, int]:
    """Write the encoded tasks to the shards of both splits, synced to disk.

    encode: returns the tasks but for the first so many. Returns how often the text spells out each special token.
    """
    done: int = unfinished.state["tasks"] if unfinished else 0
    spelled: Counter[str] = Counter(unfinished.state["spelled"] if unfinished else {})
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenise", disable=None)
    with contextlib.ExitStack() as stack:
        for resource in (bar, *writers.values(), encoded := encode(done)):
            stack.callback(resource.close)
        bar.update(sum(writer.counts()["bytes"] for writer in writers.values()))
        for tasks, result in enumerate(encoded, done + 1):
            full = False
            for split, part in result.items():
                full |= writers[split].add(part)
                spelled.update(part.spelled)
                bar.update(part.bytes)
            if unfinished and (full or unfinished.is_due):
                for writer in writers.values():
                    writer.sync()
                splits = {split: writer.counts() for split, writer in writers.items()}
                unfinished.save(tasks=tasks, splits=splits, spelled=dict(spelled))
        bar.total = bar.n  # the total was an estimate: escapes in JSON are longer than their text
    return dict(spelled)


def check_splits(splits: dict[str, dict]) -> None:
    """Raise ValueError if one of the splits has no tokens."""
    for split, counts in splits.items():
        if not counts["tokens"]:
            raise ValueError(f"the {split} split is empty: give more text, or another val_fraction")


def _complete(new: Path, tokenizer: Tokenizer, splits: dict[str, dict], spelled: dict[str, int], part: dict) -> None:
    """Write the tokenizer and meta.json beside the shards in the temporary folder."""
    tokenizer.save(new)
    for split, counts in splits.items():
        if len(counts["shards"]) == 1:  # as the first version of the format has it
            splits[split] = counts | {"sha256": counts["shards"][0]["sha256"]}
            del splits[split]["shards"]
    sharded = any("shards" in counts for counts in splits.values())
    meta = FORMAT | {
        "version": 2 if sharded else 1, "dtype": _dtype(tokenizer).name, "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size, "splits": splits,
        "tokenizer_sha256": hashlib.sha256((new / FILE_NAME).read_bytes()).hexdigest(),
        "special_tokens_in_text": spelled,
    }  # fmt: skip
    write_json(new / META, with_checksum(meta | part))


def _move_into_place(new: Path, folder: Path, meta: dict) -> None:
    """Move the files of a complete corpus from its temporary folder to `folder`, in place of an old corpus there.

    An interrupted move goes on with the files that are left.
    """
    if not (new / META).exists():  # it is the last one to move
        return
    # Between these renames meta.json is missing, so the folder does not open: old and new files never mix.
    (folder / META).unlink(missing_ok=True)
    moves = {
        new / shard_name(split, number): folder / shard["file"]
        for split, counts in meta["splits"].items()
        for number, shard in enumerate(shards_of(split, counts))
    }
    remove_shards(folder, set(moves.values()))
    for source, target in (moves | {new / name: folder / name for name in (FILE_NAME, META)}).items():
        if source.exists() or not target.exists():
            os.replace(source, target)
    sync(folder)


def remove_shards(folder: Path, but: Collection[Path] = ()) -> None:
    """Delete the shards of an old corpus in the folder itself, but for these files."""
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and path not in but:
            path.unlink()


# --- reading -----------------------------------------------------------------------------------------------------


class Corpus:
    """A prepared corpus. Its token files are memory-mapped, so opening takes the same time for every size."""

    def __init__(self, folder: str | os.PathLike):
        """Raise ValueError if `folder` holds no complete corpus; the message names the command that makes one."""
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.vocab_size: int = self.meta["vocab_size"]
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._tokens = {
            split: Tokens(self.folder, shards_of(split, self._counts(split)), dtype, self.vocab_size)
            for split in SPLITS
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encoded the corpus. Raises ValueError if it is missing, damaged or another one."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"the tokenizer in {str(self.folder)!r} has {tokenizer.vocab_size} tokens, its corpus was made with "
                f"{self.vocab_size}: {how_to_prepare(self.folder)}"
            )
        content = (self.folder / FILE_NAME).read_bytes()
        if self.meta.get("tokenizer_sha256") not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError(
                f"the tokenizer in {str(self.folder)!r} is not the one its corpus was made with (its SHA-256 differs): "
                f"{how_to_prepare(self.folder)}"
            )
        return tokenizer

    def num_tokens(self, split: str) -> int:
        """Return the number of tokens of the split."""
        return self._counts(split)["tokens"]

    def num_bytes(self, split: str) -> int:
        """Return the size of the split's text in bytes of UTF-8, the denominator of bits per byte."""
        return self._counts(split)["bytes"]

    def verify(self) -> None:
        """Read all token files. Raises ValueError that names the first one whose SHA-256 is not that of meta.json."""
        for tokens in self._tokens.values():
            tokens.verify()

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

        tokens = self._of(split)
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
            row[:] = tokens.read(start, start + block_size + 1)
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

        tokens = self._of(split)
        if len(tokens) < 2:
            raise ValueError(f"the {split} split of {str(self.folder)!r} has one token: nothing to predict")
        B = min(batch_size, -(-(len(tokens) - 1) // block_size))
        count = -(-(len(tokens) - 1) // (B * block_size))
        chosen = [i * count // max_batches for i in range(max_batches)] if 0 < max_batches < count else range(count)
        for i in chosen[rank::world_size]:
            part = tokens.read(i * B * block_size, (i + 1) * B * block_size + 1)
            idx = torch.zeros(B * block_size, dtype=torch.int64)
            targets = torch.full_like(idx, IGNORE)
            idx[: len(part) - 1] = torch.from_numpy(part[:-1].astype(np.int64))
            targets[: len(part) - 1] = torch.from_numpy(part[1:].astype(np.int64))
            yield idx.view(B, block_size), targets.view(B, block_size)

    def _counts(self, split: str) -> dict:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: a corpus has {' and '.join(SPLITS)}")
        return self.meta["splits"][split]

    def _of(self, split: str) -> Tokens:
        self._counts(split)
        return self._tokens[split]


def _read_meta(folder: Path) -> dict:
    """Return the content of meta.json. Raises ValueError if it or a field is missing, or if a field is impossible."""
    path = folder / META
    if not path.is_file():
        raise ValueError(f"no prepared corpus in {str(folder)!r}: {how_to_prepare(folder)}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        meta = None
    kind = str(meta.get("format")) if isinstance(meta, dict) else ""
    if kind.startswith("plaingpt-") and kind != FORMAT["format"]:
        raise ValueError(f"{str(folder)!r} holds {kind}, no corpus of text: name another dataset")
    if isinstance(meta, dict) and "part" in meta:
        raise ValueError(f"{str(folder)!r} is one part of a corpus: join the parts with --join, and name their folder")
    version = meta.get("version") if isinstance(meta, dict) and meta.get("format") == FORMAT["format"] else None
    if type(version) is int and version not in VERSIONS:
        raise ValueError(f"{str(path)!r} has format version {version}, this code reads 1 and 2")
    if is_sound(meta, smallest=1):
        return meta  # type: ignore[return-value]
    raise ValueError(f"{str(path)!r} is damaged, or not of this project: {how_to_prepare(folder)}")


def is_sound(meta: object, smallest: int = 0) -> bool:
    """Return whether this can be the content of a meta.json; smallest: tokens of a split."""
    match meta:
        case {
            "format": "plaingpt-corpus",
            "version": 1 | 2,
            "dtype": "uint16" | "uint32" as dtype,
            "vocab_size": vocab_size,
            "splits": {"train": dict(train), "val": dict(val)},
        }:
            rest = {key: value for key, value in meta.items() if key != "sha256"}  # type: ignore[attr-defined]
            intact = rest.keys() <= KEYS and meta.get("sha256") in (None, checksum(rest))  # early files have none
            sizes = _is_size(vocab_size, 1, 1 << 8 * np.dtype(dtype).itemsize)
            return intact and sizes and all(_are_counts(split, smallest) for split in (train, val))
    return False


def _is_size(value: object, smallest: int, largest: int = 1 << 63) -> bool:
    """Return whether the value is an integer in this range (True is not, although Python counts it as 1)."""
    return type(value) is int and smallest <= value <= largest


def _are_counts(split: dict, smallest: int) -> bool:
    """Return whether a split's entry of meta.json has counts, and one SHA-256 or shards that add up to its tokens."""
    if not all(_is_size(split.get(key), smallest) for key in ("tokens", "bytes")):
        return False
    if "shards" not in split:
        return isinstance(split.get("sha256"), str)
    shards = split["shards"]
    return (
        isinstance(shards, list) and all(map(_is_shard, shards)) and sum(s["tokens"] for s in shards) == split["tokens"]
    )


def _is_shard(shard: object) -> bool:
    match shard:
        case {"file": str(name), "tokens": tokens, "sha256": str()}:
            return NAME.fullmatch(name) is not None and _is_size(tokens, 1)
    return False
