"""One corpus from many machines: each prepares a part of the input files, and joining lists the shards of all parts.

Part 3 of 64 is a folder part_00003_of_00064 in the corpus's folder. It holds what a corpus holds, but its meta.json has
the field "part", with a checksum of all that the parts must share. The parts have consecutive input files, so the
joined corpus has the tokens of an undivided one in the same order. A document's split does not depend on the parts.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from bpe import with_checksum
from common.files import read_json, replacing, write_json
from text.corpus import FORMAT, META, check_splits, hold_for_writing, is_sound, remove_shards
from text.shards import SPLITS, Tokens, shards_of
from text.tokenizer import FILE_NAME

PART = re.compile(r"part_(\d{5})_of_(\d{5})")
LARGEST = 99_999
KEPT = ("dtype", "tokenizer", "vocab_size", "tokenizer_sha256")  # fields of meta.json that all parts share


def part_of(option: str) -> tuple[int, int]:
    """Return (3, 64) for --part 3/64. Raises ValueError for anything else than K/N with 1 <= K <= N."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", option)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"--part={option}: give K/N with K from 1 to N, as in 3/64, and N at most {LARGEST:,}")
    return number, of


def part_folder(folder: str | Path, part: tuple[int, int]) -> Path:
    """Return where a part of the corpus in `folder` lies."""
    return Path(folder, f"part_{part[0]:05}_of_{part[1]:05}")


def is_done(folder: Path, part: dict) -> bool:
    """Return whether the folder holds this part, whole and undamaged; part: as in `write_held_corpus`.

    Raises ValueError for another part that a joined corpus lists, and which is to be replaced by this one.
    """
    try:
        meta = read_json(folder / META, "a part's") if (folder / META).is_file() else None
    except ValueError:
        meta = None
    if not is_sound(meta):
        return False
    if not part.items() <= meta.items():
        check_not_joined(folder)
        return False
    try:
        for split in SPLITS:
            _tokens(folder, meta, split, "this part is prepared again").verify()
    except ValueError as error:
        print(f"note: {error}", file=sys.stderr)
        return False
    return True


def check_not_joined(folder: Path) -> None:
    """Raise ValueError if a joined corpus lists the files of the part in this folder."""
    path = folder.parent / META
    whole = read_json(path, "a corpus's") if path.is_file() else None
    if is_sound(whole) and any(
        shard["file"].startswith(f"{folder.name}/")
        for split in SPLITS
        for shard in shards_of(split, whole["splits"][split])
    ):
        raise ValueError(
            f"{path} is a corpus joined from this part, which was prepared from other input files or with other "
            f"options: delete {path} first, or name another --output"
        )


def _tokens(folder: Path, meta: dict, split: str, advice: str) -> Tokens:
    """The tokens of a part. Raises ValueError, which ends with the advice, for a file that has not its size."""
    return Tokens(folder, shards_of(split, meta["splits"][split]), np.dtype(meta["dtype"]), meta["vocab_size"], advice)


def join(folder: str | Path) -> dict:
    """Make one corpus of the parts in `folder`, whose files stay where they are; returns the content of meta.json.

    Raises ValueError that names the parts that are missing, unfinished or of another preparation.
    """
    folder = Path(folder)
    metas = _parts(folder)
    first_name, first = next(iter(metas.items()))
    for name, meta in metas.items():
        if any(meta.get(key) != first[key] for key in ("part", *KEPT)):
            raise ValueError(
                f"{folder / name} was prepared otherwise than {folder / first_name} (other input files, options or "
                "tokenizer): prepare it again"
            )
    splits = {split: _joined(metas, split) for split in SPLITS}
    check_splits(splits)
    for name, meta in metas.items():
        number, of = map(int, PART.fullmatch(name).groups())  # type: ignore[union-attr]
        for split in SPLITS:  # every file has its size
            _tokens(folder / name, meta, split, f"prepare this part again, by its command with --part {number}/{of}")
    spelled: Counter[str] = Counter()
    for meta in metas.values():
        spelled.update(meta["special_tokens_in_text"])
    meta = FORMAT | {"version": 2} | {key: first[key] for key in KEPT}
    meta |= {"splits": splits, "special_tokens_in_text": dict(spelled)}
    with hold_for_writing(folder):
        (folder / META).unlink(missing_ok=True)
        remove_shards(folder)
        with replacing(folder / FILE_NAME, "wb") as file:
            file.write((folder / first_name / FILE_NAME).read_bytes())
        write_json(folder / META, with_checksum(meta))
    return meta


def _parts(folder: Path) -> dict[str, dict]:
    """Return the meta.json of every part in the folder, by name, in order. Raises ValueError as `join` does."""
    names = sorted(path.name for path in folder.glob("part_*/") if PART.fullmatch(path.name))
    if not names:
        raise ValueError(f"{folder} has no parts to join: make them with --part 1/N to --part N/N")
    totals = sorted({PART.fullmatch(name)[2] for name in names})  # type: ignore[index]
    if len(totals) > 1:
        raise ValueError(
            f"{folder} has parts of {' and of '.join(str(int(n)) for n in totals)}: delete those that you do not want"
        )
    wanted = [part_folder("", (number, int(totals[0]))).name for number in range(1, int(totals[0]) + 1)]
    if missing := [name for name in wanted if not (folder / name / META).is_file()]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{folder}: {len(missing)} of {len(wanted)} parts are missing or unfinished: {shown}")
    metas = {name: read_json(folder / name / META, "a part's") for name in wanted}
    for name, meta in metas.items():
        if not is_sound(meta) or "part" not in meta or "special_tokens_in_text" not in meta:
            raise ValueError(f"{folder / name / META} is damaged, or not of this project: prepare the part again")
    return metas


def _joined(metas: dict[str, dict], split: str) -> dict:
    """Return the split's entry of meta.json: the sums, and the shards of all parts with their folders."""
    entries = [(name, meta["splits"][split]) for name, meta in metas.items()]
    counts: dict = {key: sum(entry[key] for _, entry in entries) for key in ("tokens", "bytes", "documents")}
    return counts | {
        "shards": [
            shard | {"file": f"{name}/{shard['file']}"} for name, entry in entries for shard in shards_of(split, entry)
        ]
    }
