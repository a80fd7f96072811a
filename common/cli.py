"""What every command here shares: a user's mistake is told in one line on stderr, and the exit status says so."""

import os
import re
import signal
import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Call `main()`; a ValueError, OSError or lack of memory ends as one line and exit status 1, Ctrl-C as status 130.

    Anything else is our own bug and keeps its traceback.
    """
    # A terminal that lacks a character must not end a run, nor must input that is no UTF-8.
    streams = {"stdin": ("r", "surrogateescape"), "stdout": ("w", "replace"), "stderr": ("w", "replace")}
    for name, (mode, errors) in streams.items():
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors=errors)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Our reader has left, as in `... | head`: no complaint, and none from the final flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # numpy's, PyTorch's for the CPU, PyTorch's for CUDA
        message = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not re.search("can't allocate|out of memory|Storage size", message):
            raise
        print(f"error: out of memory; try a smaller batch, context or model ({message[:200]})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has been heard
        print("interrupted", file=sys.stderr)
        sys.exit(130)
