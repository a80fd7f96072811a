"""Labelled texts: train.jsonl and val.jsonl in a folder, an object with `text` and `label` per line."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.files import write_whole
from common.textfile import check_text
from text.chat import BadConversation
from text.conversations import rows_of
from text.corpus import META, SPLITS


class Labelled(NamedTuple):
    """A text, and the name of its class."""

    text: str
    label: str


@dataclass
class Texts:
    """The labelled texts of a folder by split, the names of the classes in order, and fields that are not read."""

    splits: dict[str, list[Labelled]]
    labels: list[str]
    unread: set[str] = field(default_factory=set)

    def summary(self) -> str:
        """One line of counts."""
        parts = []
        for split, texts in self.splits.items():
            counts = [f"{sum(text.label == label for text in texts):,} {label}" for label in self.labels]
            parts.append(f"{len(texts):,} {split} texts ({', '.join(counts)})")
        unread = [f"fields that are not read: {', '.join(sorted(self.unread))}"] if self.unread else []
        return "; ".join([*parts, *unread])


def read_labelled(folder: Path) -> Texts:
    """Read both splits. Raises ValueError, with file and line, for a row that is wrong, and for unusable classes."""
    texts = Texts({}, [])
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        texts.splits[split] = [checked(row, f"{path}, {place}", texts.unread) for place, row in rows_of(path)]
        if not texts.splits[split]:
            raise ValueError(f"{path} holds no text")
    texts.labels = sorted({text.label for text in texts.splits["train"]})
    if len(texts.labels) < 2:
        raise ValueError(f"{folder / 'train.jsonl'}: all texts have the label {texts.labels[0]!r}: give two or more")
    for text in texts.splits["val"]:
        if text.label not in texts.labels:
            raise ValueError(f"{folder / 'val.jsonl'}: no text of train.jsonl has the label {text.label!r}")
    return texts


def checked(row: object, place: str, unread: set[str]) -> Labelled:
    """The row as a labelled text; the names of its other fields are added to `unread`. Raises ValueError."""
    match row:
        case BadConversation():
            raise ValueError(f"{place}: {row}")
        case {"text": str(text), "label": str(label), **rest} if text.strip() and label.strip():
            if "," in label:
                raise ValueError(f"{place}: the label {label!r} holds a comma, which separates labels: rename it")
            if not label.isprintable():
                raise ValueError(f"{place}: the label {label!r} holds what cannot be printed: rename it")
            unread.update(rest)
            return Labelled(check_text(text, place), label)
    raise ValueError(f'{place}: an object with "text" and "label", both strings and not empty, is needed')


def write_labelled(folder: Path, rows: Iterable[tuple[str, Labelled]]) -> None:
    """Write (split, labelled text)s. Raises ValueError if the folder holds something else, or if a split is empty."""
    foreign = (META, "config.json", "checkpoints", "tokenizer.json")
    taken = [name for name in foreign if (folder / name).exists()]
    if taken:
        raise ValueError(f"--output={folder} holds a {taken[0]}, and so other data: name a folder of its own")
    splits: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    for split, text in rows:
        splits[split].append(text)
    for split, texts in splits.items():
        if not texts:
            raise ValueError(f"no text is left for {split}: choose another --val_fraction")
    folder.mkdir(parents=True, exist_ok=True)
    contents = {f"{s}.jsonl": "\n".join(json.dumps(text._asdict()) for text in texts) for s, texts in splits.items()}
    for name, content in contents.items():
        if (folder / name).exists() and (folder / name).read_bytes() != f"{content}\n".encode():
            raise ValueError(f"{folder / name} holds other texts: delete it, or name another folder by --output")
    for name, content in contents.items():
        write_whole(folder / name, content)
    print(f"{os.path.relpath(folder)}: {', '.join(f'{len(texts):,} {split} texts' for split, texts in splits.items())}")
