"""A preparation that outlives its process: the same command goes on where an interrupted one stopped.

The hidden folder .unfinished in the corpus's folder holds the shards so far, the tokenizer if it was learned, and
state.json: what identifies the preparation, how many tasks (tokenise.py) are on the disk, and the shards as they were
then. state.json is replaced as a whole, after the shards are synced. Whatever a shard has beyond it is cut off again,
so the result is that of an uninterrupted run, byte for byte.
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpe import with_checksum, without_checksum
from common.files import checksum, read_json, write_json
from text.tokenizer import FILE_NAME, Tokenizer, load_tokenizer

FOLDER, STATE, META = ".unfinished", "state.json", "meta.json"
INTERVAL = 60.0  # seconds between two states, if no shard becomes full


class Unfinished:
    """The folder of a preparation, held as a context; outside hold_for_writing two processes would mix theirs."""

    def __init__(self, folder: Path, preparation: dict):
        """Find the unfinished preparation of the corpus in `folder`, or begin one; say so if another is given up.

        preparation: JSON, option → value, of all that the files depend on. Only the same one goes on.
        """
        self.path = folder / FOLDER
        self.state: dict[str, Any] = {"preparation": preparation, "tasks": 0, "splits": None, "spelled": {}}
        self.state["meta"] = None  # meta.json's checksum, once all is written, and being moved to the corpus's folder
        found, reason = self._found(preparation)
        if found is None:
            if reason:
                print(f"note: {self.path} holds an unfinished preparation {reason}: starting anew", file=sys.stderr)
            if self.path.exists():
                self._delete()
            self.path.mkdir()
            self._write()
        else:
            self.state = found
            tokens = sum(split["tokens"] for split in (found["splits"] or {}).values())
            print(f"note: an interrupted preparation goes on: {tokens:,} tokens are done", file=sys.stderr)
        self._saved = time.monotonic()

    def _found(self, preparation: dict) -> tuple[dict | None, str]:
        """Return the state on the disk, or None and why it is of no use, if that is worth telling."""
        path = self.path / STATE
        if not path.exists():
            return None, ""  # nor is anything else: the state comes first
        try:
            state = without_checksum(read_json(path, "a state"), path, required=True)
        except ValueError as error:
            return None, f"that cannot go on ({error})"
        old = state["preparation"]
        if changed := [option for option in preparation | old if old.get(option) != preparation.get(option)]:
            return None, f"with other {', '.join(changed)}"
        if state["meta"] and not (self.path / META).exists() and not self._is_in_place(state["meta"]):
            return None, ""  # all was moved, and another corpus has come since
        return state, ""

    def _is_in_place(self, meta: str) -> bool:
        place = self.path.parent / META
        return place.exists() and checksum(read_json(place, "a corpus's")) == meta

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: object) -> None:
        """Delete the folder when the corpus is in its place, or if there is nothing in it; else tell about it."""
        learned = isinstance(error, KeyboardInterrupt | OSError) and (self.path / FILE_NAME).exists()
        if error is not None and (self.state["tasks"] or self.state["meta"] or learned):
            print(f"note: {self.path} keeps what is done: the same command goes on from there", file=sys.stderr)
        else:
            self._delete()

    def tokenizer(self, make: Callable[[], Tokenizer]) -> Tokenizer:
        """Return the tokenizer that an interrupted run has saved; else make one, and save it."""
        if not (self.path / FILE_NAME).exists():
            make().save(self.path)
        return load_tokenizer(self.path)

    @property
    def is_due(self) -> bool:
        """Whether it is time to save the state."""
        return time.monotonic() > self._saved + INTERVAL

    def save(self, **changes: object) -> None:
        """Replace the state: every file that it speaks of must be synced. Raises WriteError."""
        self.state |= changes
        self._write()
        self._saved = time.monotonic()

    def _delete(self) -> None:
        (self.path / STATE).unlink(missing_ok=True)  # first, so that no state speaks of files that are gone
        shutil.rmtree(self.path)

    def _write(self) -> None:
        write_json(self.path / STATE, with_checksum(self.state))
