"""Atomic writes, locks on folders, and JSON with clear errors.

Notable:
- a file is written under a unique temporary name, synced to the disk and renamed. A kill or a power loss at any moment
  therefore leaves the old file or the new one, and two writers never mix their content;
- an error of writing names the file, and says what to do.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)  # disk, quota or file size
ADVICE = {
    **dict.fromkeys(FULL_DISK, "free some space there, or choose another place, and run the command again"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of this path is a file, not a folder"),
    errno.ENAMETOOLONG: "choose a shorter one",
}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class WriteError(OSError):
    """A file could not be written: `filename` names it, `strerror` says why and what to do."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


def explained(error: OSError) -> str:
    """The system's words for an error, and what to do."""
    words = error.strerror or str(error)
    return f"{words}; {ADVICE[error.errno]}" if error.errno in ADVICE else words


@contextmanager
def errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError in the block, which writes `path`, into a WriteError that names `path` and says what to do.

    Errors of files in other folders, and BrokenPipeError, pass unchanged.
    """
    try:
        yield
    except (BrokenPipeError, WriteError):
        raise
    except OSError as error:
        folder = os.path.dirname(os.path.realpath(path))
        if error.filename is not None and not Path(os.path.realpath(error.filename)).is_relative_to(folder):
            raise
        raise WriteError(error.errno, explained(error), os.fspath(path)) from error


@contextmanager
def replacing(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file for writing; it replaces `path` when the block ends, and is deleted if the block fails.

    mode: "w" (UTF-8 text, line ends as they are) or "wb". The new file has the permissions of the old one, or those
    that open() gives. A link is followed; a pipe or a device is written to directly. Raises WriteError.
    """
    options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with errors_name(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file() and not target.is_dir():
            with open(target, mode, **options) as file:
                yield file
            return
        temporary = target.with_name(f"{target.name[:50]}.{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.is_file():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
            sync(target.parent)
        except BaseException:  # a full disk, a folder of that name, Ctrl-C
            delete(temporary)
            raise


def folder_name(text: str) -> str:
    """For argparse: the name of a folder, with ~ expanded. Raises ArgumentTypeError for "$X" where X is not set."""
    if not text:
        raise ArgumentTypeError("the name is empty: name a folder")
    return os.path.expanduser(text)


def check_new(path: Path, option: str) -> None:
    """Raise ValueError unless a folder or a file can be made there: nothing may be there but an empty folder."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{path} exists already: choose another {option}, or delete it")


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, where the block makes a folder or a file; then rename it to `path`.

    If the block fails, what it made is deleted. Raises WriteError.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")
    try:
        with errors_name(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if path.is_dir():
                path.rmdir()
            temporary.rename(path)
            sync(path.parent)
    except BaseException:  # also Ctrl-C
        delete(temporary)
        raise


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


def sync(path: str | os.PathLike) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk (Windows syncs folders itself)."""
    if os.name == "nt" and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write the text and a line break to the file, whole or not at all. Raises WriteError; see `replacing`."""
    with replacing(path) as file:
        file.write(text + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@contextmanager
def locked(folder: str | os.PathLike, otherwise: str) -> Iterator[None]:
    """Hold a lock on the folder during the block; make the folder if it does not exist.

    Raises ValueError at once if another process holds the lock: the message names that process, and ends with "stop
    it, or" and `otherwise`. The system releases the lock when the process ends, even if it is killed.
    """
    folder = Path(folder)
    holder = folder / ".lock.json"  # not in the lock file itself, which Windows lets nobody read
    with errors_name(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"{folder} is in use by {describe(holder)}: stop it, or {otherwise}") from None
        except NotImplementedError:
            raise ValueError(f"the file system of {folder} has no locks: choose a folder on another disk") from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        process = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[:200]}
        write_json(holder, process | {"since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def is_of_another(meta: Path, kind: str) -> bool:
    """Return whether a meta.json is there that does not state `kind` as its format, and so describes something else.

    A damaged one is our own if a lock file stands beside it, which every preparation leaves.
    """
    try:
        content = json.loads(meta.read_bytes()) if meta.exists() else {"format": kind}
    except (OSError, ValueError, RecursionError):
        return not (meta.parent / ".lock").exists()
    return not isinstance(content, dict) or content.get("format") != kind


def is_locked(folder: str | Path) -> bool:
    """Return whether a process holds the lock on the folder; see `locked`. A killed process leaves its file behind."""
    if not (Path(folder) / ".lock.json").exists():
        return False
    lock = FileLock(Path(folder) / ".lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):  # OSError: a folder that we may only read
        return True
    lock.release()
    return False


def describe(holder: Path) -> str:
    """Describe the process that holds a lock, as its file `holder` does."""
    try:
        found = read_json(holder)
        return f"process {found['pid']} on {found['host']} ({found['command']}, since {found['since']})"
    except (ValueError, TypeError, KeyError):  # the process is starting or ending, or an earlier version wrote the file
        return "another process"


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` to `path` as JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1))


def read_json(path: str | os.PathLike, what: str = "a vocabulary") -> Any:
    """Return the content of a JSON file. Raises ValueError if it cannot be read; `what` names the expected content."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged, or not {what}: it is not JSON") from None


def checksum(content: object) -> str:
    """Return the SHA-256 of JSON content, in hex. The order of keys and the layout of the file do not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
