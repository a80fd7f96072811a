"""Shared by all commands: how they report errors, and how they end.

A user's mistake prints one line on stderr and exits with status 1; Ctrl-C prints one line and exits with status 130.
Any other exception is a bug of ours and keeps its traceback. A command imports this module before any other: importing
PyTorch takes seconds, and Ctrl-C must print one line even then. What must be set before that import is set here too.
"""

import errno
import json
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from common.threads import wait_briefly

# Parts of the messages of PyTorch and NumPy for too little memory, and for a number that does not fit in 64 bits
OUT_OF_MEMORY = "out of memory|can't allocate|not enough memory|ALLOC_FAILED|Storage size"
ARRAY_TOO_BIG = "array is too big|Maximum allowed dimension exceeded"
TOO_LARGE = "[Oo]verflow|cannot be represented"
PEER_GONE = "gloo|NCCL"  # in an error of processes that train together, which follows from the end of one of them
PATIENCE = 5.0  # seconds; torchrun needs less to stop the other processes when one has failed

# Bidirectional controls reorder the characters that a terminal shows.
DIRECTIONS = {*"\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


# ---------------------------------------------------------------------------------------------------------------------
# Running a command


def run_command(
    main: Callable[[], None], *, if_out_of_memory: str = "give it less at once, or close other programs"
) -> None:
    """Call `main()`, and turn every error that a user can cause into one line and an exit status.

    if_out_of_memory: the advice to print when memory runs out; it names the command's options. The command ends when
    its reader leaves, as in `sample.py | head`; what must go on is done under `lasting("stdout")`.
    """
    tolerate_any_text()
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting("stderr"):
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has left, as in `... | head`. That is no error, and the final flush must not report one.
            silence(sys.stdout)
            sys.exit(1)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore further Ctrl-C
            if not rank():
                print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            message = message_of(error, if_out_of_memory)
            if message is None:
                if rank() is not None and isinstance(error, RuntimeError) and re.search(PEER_GONE, str(error)):
                    time.sleep(3 * PATIENCE)  # torchrun ends this process, and the one that failed says why
                tell_torchrun(f"{type(error).__name__}: {error}")
                raise
            report(message)
            sys.exit(1)


def message_of(error: Exception, if_out_of_memory: str) -> str | None:
    """Return the line that explains this error to the user; None if the error is a bug of ours."""
    from common.files import WriteError, explained  # takes a tenth of a second, in which Ctrl-C would not be ours yet

    text = " ".join(str(error).split()) or type(error).__name__
    words = {RuntimeError: OUT_OF_MEMORY, ValueError: ARRAY_TOO_BIG, MemoryError: ""}
    if any(isinstance(error, kind) and re.search(pattern, text) for kind, pattern in words.items()):
        text = re.sub(r"^\[enforce fail[^]]*\] [^.]*\. ", "", text)  # drop the place in PyTorch's source
        return f"out of memory: {if_out_of_memory} ({text[:200]})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return f"{error.strerror}: free some space on the disk, and run the command again"
    if isinstance(error, OSError) and error.filename and error.strerror and not isinstance(error, WriteError):
        return f"{error.filename}: {explained(error)}"
    if isinstance(error, ValueError | OSError):
        return text
    if isinstance(error, OverflowError) or isinstance(error, RuntimeError | TypeError) and re.search(TOO_LARGE, text):
        return f"a number is too large, on the command line or in a config file ({text[:200]})"
    return None


def rank() -> int | None:
    """Return the rank of this process among those that torchrun started; None if it is the only one."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None


def report(message: str) -> None:
    """Print an error once, even if all processes have it.

    Process 0 prints at once. Any other process waits first: if process 0 has failed too, torchrun ends this process
    meanwhile. If not, only this process has the error, such as a missing GPU, so it must print it.
    """
    line = f"error: {message}"
    if rank():
        time.sleep(PATIENCE)
        line = f"error in process {rank()}: {message}"
    tell_torchrun(line)
    print(line, file=sys.stderr)


def tell_torchrun(line: str) -> None:
    """Leave the line where torchrun looks for a failed process's error: its report, printed last, ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # torchrun has gone; the line is on the screen anyway
            Path(path).write_text(json.dumps({"message": details}))


def end_at_once(_number: int, _frame: object) -> None:
    """Handle Ctrl-C during the imports: exit at once, as there is nothing to clean up yet."""
    if not rank():
        with suppress(OSError):  # stderr is closed
            os.write(2, b"interrupted\n")
    os._exit(130)


def is_command() -> bool:
    """Return whether Python runs one of this project's scripts, rather than a program that imports them."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        return False
    path = Path(path).resolve()
    ours = path.is_relative_to(Path(__file__).resolve().parents[1]) and path.suffix == ".py"
    return ours and "site-packages" not in path.parts


if is_command():
    wait_briefly()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def tolerate_any_text() -> None:
    """Keep the command alive on characters that the terminal lacks, input that is not UTF-8, and closed streams."""
    streams = {"stdin": ("r", "surrogateescape"), "stdout": ("w", "replace"), "stderr": ("w", "replace")}
    for name, (mode, errors) in streams.items():
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors=errors)


class LastingStream:
    """A text stream that discards its output once writing fails, because its reader or its terminal is gone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text, or discard it."""
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or discard what it holds."""
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def lasting(name: str) -> Iterator[None]:
    """Replace sys.stdout or sys.stderr, as `name` says, by a LastingStream during the block."""
    stream = getattr(sys, name)
    setattr(sys, name, lasts := LastingStream(stream))
    try:
        yield
    finally:
        lasts.flush()
        setattr(sys, name, stream)


def silence(stream: TextIO) -> None:
    """Discard the stream's buffered and all later output."""
    with suppress(OSError):  # an in-memory stream has no descriptor
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def visible(text: str) -> str:
    r"""Replace control characters by escapes (\x1b, \r), so that a model's text cannot control the terminal.

    Line breaks and tabs stay.
    """
    hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in DIRECTIONS} - {*"\n\t"}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in hidden})
