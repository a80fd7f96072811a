"""Files that are there whole or not at all, and JSON with clear errors."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write the file so that it is there whole or not at all; a pipe or a device is written to, never replaced."""
    if os.path.exists(path) and not os.path.isfile(path):
        Path(path).write_text(text + "\n", encoding="utf-8")
        return
    path = Path(os.path.realpath(path))  # through a link, not over it
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk, a folder of that name, Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write `content` to `path` as JSON: the new file is there whole and on disk, or the old one still is."""
    write_whole(path, json.dumps(content, indent=1))


def read_json(path: str | os.PathLike, what: str = "a vocabulary") -> Any:
    """The content of a JSON file. ValueError, with what the file should have been, if it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged, or not {what}: it is not JSON") from None


def checksum(content: dict) -> str:
    """SHA-256 of the content, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
