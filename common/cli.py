"""What every command shares: how it reports a mistake, runs out of memory, and ends.

A user's mistake is one line on stderr and exit status 1, Ctrl-C is one line and status 130; any other exception is a
bug of ours and keeps its traceback. A command imports this module before any other, because PyTorch takes seconds to
import, and Ctrl-C must be told in one line even then.
"""

import errno
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

# The words of PyTorch and NumPy for too little memory, and for a number that does not fit in 64 bits
OUT_OF_MEMORY = "out of memory|can't allocate|not enough memory|ALLOC_FAILED|Storage size"
ARRAY_TOO_BIG = "array is too big|Maximum allowed dimension exceeded"
TOO_LARGE = "[Oo]verflow|cannot be represented"
PATIENCE = 5.0  # seconds; torchrun stops the other processes well before, once one of them has failed

# Bidirectional controls can make a line show other text than it holds.
DIRECTIONS = {*"\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


# ---------------------------------------------------------------------------------------------------------------------
# Running a command


def run_command(
    main: Callable[[], None], *, if_out_of_memory: str = "give it less at once, or close other programs",
    outlives_readers: bool = False,
) -> None:  # fmt: skip
    """Call `main()`, and turn what a user can cause (see the top of this file) into one line and an exit status.

    if_out_of_memory: what to change then, naming the command's options.
    outlives_readers: a command like `train.py | head` goes on in silence when its reader leaves; others end with it.
    """
    tolerate_any_text()
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting("stderr"), lasting("stdout") if outlives_readers else nullcontext():
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has left, as in `... | head`: nothing to complain of, and the final flush must not complain.
            silence(sys.stdout)
            sys.exit(1)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # further ones change nothing
            if rank() == 0:
                print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            message = message_of(error, if_out_of_memory)
            if message is None:
                raise
            report(message)
            sys.exit(1)


def message_of(error: Exception, if_out_of_memory: str) -> str | None:
    """The one line that tells a user of this error; None if it is a bug of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    words = {RuntimeError: OUT_OF_MEMORY, ValueError: ARRAY_TOO_BIG, MemoryError: ""}
    if any(isinstance(error, kind) and re.search(pattern, text) for kind, pattern in words.items()):
        text = re.sub(r"^\[enforce fail[^]]*\] [^.]*\. ", "", text)  # the line of PyTorch's source
        return f"out of memory: {if_out_of_memory} ({text[:200]})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return f"{error.strerror}: free some space on the disk, and run the command again"
    if isinstance(error, ValueError | OSError):
        return text
    if isinstance(error, OverflowError) or isinstance(error, RuntimeError | TypeError) and re.search(TOO_LARGE, text):
        return f"a number is too large, on the command line or in a config file ({text[:200]})"
    return None


def rank() -> int:
    """The number of this process among those that torchrun started; 0 if it is the only one."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def report(message: str) -> None:
    """Print an error once, however many processes have it.

    Process 0 prints at once. Another one waits first: if process 0 has failed too, torchrun ends this one meanwhile;
    if not, the error is this process's own, such as a missing GPU, and nobody else would tell it.
    """
    if rank() == 0:
        print(f"error: {message}", file=sys.stderr)
    else:
        time.sleep(PATIENCE)
        print(f"error in process {rank()}: {message}", file=sys.stderr)


def end_at_once(_number: int, _frame: object) -> None:
    """Handle Ctrl-C while modules are imported: there is nothing to tidy up, and half an import cannot go on."""
    if rank() == 0:
        with suppress(OSError):  # stderr is closed
            os.write(2, b"interrupted\n")
    os._exit(130)


def is_command() -> bool:
    """Whether Python was started on one of this project's scripts, rather than on a program that imports them."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        return False
    path = Path(path).resolve()
    ours = path.is_relative_to(Path(__file__).resolve().parents[1]) and path.suffix == ".py"
    return ours and "site-packages" not in path.parts


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def tolerate_any_text() -> None:
    """Let no character that a terminal lacks, no input that is not UTF-8 and no closed stream end the command."""
    streams = {"stdin": ("r", "surrogateescape"), "stdout": ("w", "replace"), "stderr": ("w", "replace")}
    for name, (mode, errors) in streams.items():
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors=errors)


class LastingStream:
    """A text stream that goes on in silence once it cannot be written: its reader has left, its terminal is gone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def lasting(name: str) -> Iterator[None]:
    """Make sys.stdout or sys.stderr, whichever is named, a lasting stream for the time of the block."""
    stream = getattr(sys, name)
    setattr(sys, name, LastingStream(stream))
    try:
        yield
    finally:
        setattr(sys, name, stream)


def silence(stream: TextIO) -> None:
    """Send what the stream still holds, and all that follows, to nowhere."""
    with suppress(OSError):  # a stream in memory has no descriptor
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def visible(text: str) -> str:
    r"""Write control characters as escapes (\x1b, \r), so that a model's text can neither move the cursor nor hide.

    Line breaks and tabs stay.
    """
    hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in DIRECTIONS} - {*"\n\t"}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in hidden})
