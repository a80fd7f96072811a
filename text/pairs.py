"""Pairs of a source and its target, for translation: read from files, written to a folder, and opened.

folder/train.jsonl  val.jsonl  tokenizer.json  meta.json      ({"source": ..., "target": ...} per line)

One tokenizer, and so one vocabulary, serves both sides.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from os.path import expanduser
from pathlib import Path

from common.files import folder_name, is_of_another, read_json
from common.textfile import check_text, json_values, split_text, text_parts
from text.conversations import check_sources, replace_together
from text.corpus import META
from text.prepare import add_vocab_size, learned_tokenizer
from text.shards import SPLITS
from text.tokenizer import FILE_NAME, Tokenizer, load_tokenizer, tokenizer_from_name

FORMAT = {"format": "plaingpt-pairs", "version": 1}

VOCAB_SIZE = 8192  # tokens to learn where neither --vocab_size nor --tokenizer is given

Pair = tuple[str, str]  # source, target


# --- reading -----------------------------------------------------------------------------------------------------


def read_pairs(paths: list[str], left_out: list[str] | None = None) -> Iterator[tuple[str, Pair]]:
    """Yield (place, pair) from two text files whose lines belong together, or from one file of pairs.

    One file: .jsonl or .json with {"source", "target"}, or else lines of source, tab, target (more columns are an
    error). Any of them may be compressed, as in data/text/prepare.py. Raises ValueError with the place of what is no
    pair: another number of lines, a line without its tab, or an empty side, unless left_out collects such places.
    """
    if len(paths) > 2:
        raise ValueError(f"--input takes one file of pairs, or two files with a line for a line, not {len(paths)}")
    found = _aligned_lines(*paths) if len(paths) == 2 else _pairs_of(paths[0])
    for place, (source, target) in found:
        if not source.strip() or not target.strip():
            if left_out is None:
                raise ValueError(f"{place}: a side is empty (--skip_bad leaves such pairs out and counts them)")
            left_out.append(place)
            continue
        yield place, (check_text(source, place), check_text(target, place))


def _lines(path: str) -> Iterator[str]:
    """The lines of a text file. What stands behind the last line break is one only if it is not empty."""
    last = None
    for line in split_text(text_parts(path), "\n", path):
        if last is not None:
            yield last.removesuffix("\r")
        last = line
    if last:
        yield last


def _aligned_lines(sources: str, targets: str) -> Iterator[tuple[str, Pair]]:
    for number, (source, target) in enumerate(zip_longest(_lines(sources), _lines(targets)), start=1):
        if source is None or target is None:
            shorter = sources if source is None else targets
            raise ValueError(f"{shorter} ends after {number - 1} lines, and the other file goes on: they do not belong "
                             "together line for line")  # fmt: skip
        yield f"{sources} and {targets}, line {number}", (source, target)


def _pairs_of(path: str) -> Iterator[tuple[str, Pair]]:
    if ".json" in "".join(Path(path).suffixes).lower():
        unread: set[str] = set()
        for place, value in json_values(text_parts(path), path):
            match value:
                case {"source": str(source), "target": str(target), **rest}:
                    unread.update(rest)
                    yield place, (source, target)
                case _:
                    raise ValueError(f'{place}: a pair is {{"source": "...", "target": "..."}}')
        if unread:
            print(f"note: {path}: fields that are not read: {', '.join(sorted(unread))}", file=sys.stderr)
        return
    for number, line in enumerate(_lines(path), start=1):
        source, *targets = line.split("\t") if line.strip() else ("", "")  # an empty line is a pair of empty sides
        if len(targets) != 1:
            raise ValueError(f"{path}, line {number}: a source, one tab and a target are needed, and there are "
                             f"{len(targets)} tabs")  # fmt: skip
        yield f"{path}, line {number}", (source, targets[0])


# --- writing -----------------------------------------------------------------------------------------------------


def pair_parser(description: str, output: Path | None, tokenizer: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options of a command that writes pairs; tokenizer: the default, else 8,192 tokens."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "; default: %(default)s" if output else ""
    text = f"folder to write train.jsonl, val.jsonl and the tokenizer to{default}"
    parser.add_argument("--output", default=output, required=output is None, type=folder_name, metavar="DIR", help=text)
    text = "share kept for validation; default: %(default)s"
    parser.add_argument("--val_fraction", default=0.02, type=float, metavar="F", help=text)
    either = parser.add_mutually_exclusive_group()
    add_vocab_size(either, None, None if tokenizer else VOCAB_SIZE)
    text = "char, the path of a saved one (such as a run's folder), or an encoding of tiktoken; default: %(default)s"
    either.add_argument("--tokenizer", default=tokenizer, type=expanduser, metavar="NAME", help=text)
    return parser


def prepare_pairs(args: argparse.Namespace, pairs: dict[str, list[Pair]], sources: Sequence[str] = ()) -> None:
    """Choose or learn the tokenizer that `args` (of `pair_parser`) names, and write the data set.

    sources: the files that the pairs come from, which must not be replaced.
    """
    check_output(Path(args.output), sources)
    documents = [(split, text) for split, found in pairs.items() for pair in found for text in pair]
    if args.vocab_size is None and args.tokenizer:
        tokenizer = tokenizer_from_name(args.tokenizer, (text for _, text in documents))
    else:
        tokenizer = learned_tokenizer(documents, args.vocab_size or VOCAB_SIZE)
    write_pairs(args.output, pairs, tokenizer)


def write_pairs(folder: str | Path, pairs: dict[str, list[Pair]], tokenizer: Tokenizer) -> None:
    """Write the pairs of each split, without duplicates, and the tokenizer; print how many there are.

    An old data set in the folder stays until the new one is complete. Raises ValueError if a split is empty, or if the
    tokenizer has no token that ends a text.
    """
    folder = Path(folder)
    if tokenizer.eot_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name} has no end-of-text token, with which targets begin and end")
    contents, described, repeated = {}, {}, 0
    for split in SPLITS:
        lines = dict.fromkeys(json.dumps({"source": s, "target": t}, ensure_ascii=False) for s, t in pairs[split])
        if not lines:
            raise ValueError(f"no pair is left for {split}: give more")
        repeated += len(pairs[split]) - len(lines)
        contents[f"{split}.jsonl"] = ("\n".join(lines) + "\n").encode()
        described[split] = _describe(contents[f"{split}.jsonl"], len(lines))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        contents[FILE_NAME] = Path(scratch, FILE_NAME).read_bytes()
    meta = FORMAT | {"splits": described, "tokenizer_sha256": hashlib.sha256(contents[FILE_NAME]).hexdigest()}
    # meta.json is renamed first: until the last rename, its checksums do not match the files.
    replace_together(folder, {META: (json.dumps(meta, indent=1) + "\n").encode()} | contents)
    left_out = f" {repeated:,} repeated pairs left out," if repeated else ""
    counts = ", ".join(f"{described[split]['pairs']:,} {split} pairs" for split in SPLITS)
    print(f"{os.path.relpath(folder)}:{left_out} {counts}, vocabulary {tokenizer.vocab_size:,}")


def check_output(folder: Path, sources: Sequence[str] = ()) -> None:
    """Raise ValueError if writing to the folder would destroy something other than pairs, or one of the sources."""
    check_sources(folder, sources)
    foreign = ["config.json", "checkpoints", "train.bin"]
    if not (folder / META).exists():
        foreign += [FILE_NAME, *(f"{split}.jsonl" for split in SPLITS)]
    others = [name for name in foreign if (folder / name).exists()]
    if folder.is_file() or others or is_of_another(folder / META, str(FORMAT["format"])):
        what = f"something other than pairs{f' (a {others[0]})' if others else ''}"
        raise ValueError(f"--output={folder} holds {what}: name a folder of its own")


def _describe(content: bytes, pairs: int) -> dict:
    return {"pairs": pairs, "sha256": hashlib.sha256(content).hexdigest()}


# --- opening -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """A prepared data set of pairs."""

    folder: Path
    train: list[Pair]
    val: list[Pair]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return self.tokenizer.vocab_size


def open_pairs(folder: str | Path) -> Pairs:
    """Return the pairs of a prepared folder, verified against its meta.json. Raises ValueError."""
    folder = Path(folder)
    script = folder / "prepare.py"
    how = f"run python {script}" if script.is_file() else (
        f"prepare them, as in python data/pairs/prepare.py --input SOURCE TARGET --output {folder}"
    )  # fmt: skip
    if not (folder / META).is_file():
        raise ValueError(f"no prepared pairs in {str(folder)!r}: {how}")
    try:
        meta = read_json(folder / META, "a data set of pairs")
        if meta["format"] != FORMAT["format"]:
            raise ValueError(f"{folder} holds a {meta['format']}, not pairs of source and target: {how}")
        if meta["version"] != FORMAT["version"]:
            raise ValueError(f"{folder / META} has format version {meta['version']}, this code reads 1")
        stated = {f"{split}.jsonl": meta["splits"][split]["sha256"] for split in SPLITS}
        stated[FILE_NAME] = meta["tokenizer_sha256"]
    except (KeyError, TypeError):
        raise ValueError(f"{folder / META} is damaged, or not of this project: {how}") from None
    contents = {}
    for name, expected in stated.items():
        contents[name] = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ValueError(f"{folder / name} is missing or damaged (its SHA-256 is not the one in {META}): {how}")
    rows = {split: map(json.loads, contents[f"{split}.jsonl"].decode().split("\n")[:-1]) for split in SPLITS}
    pairs = {split: [(row["source"], row["target"]) for row in rows[split]] for split in SPLITS}
    return Pairs(folder, pairs["train"], pairs["val"], load_tokenizer(folder))
