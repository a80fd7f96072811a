"""Signals that ask a run to stop: it finishes its step and saves first."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ctrl-C, a request to end (kill, job schedulers), and a terminal that is closed (Windows has no such signal)
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def interruptible(alone: bool) -> Iterator[list[int]]:
    """Collect the signals that ask to stop in the list that is yielded, instead of dying of them.

    alone: whether this is the only process. Then a second Ctrl-C stops it at once; under torchrun it does not, because
    there a single Ctrl-C arrives as several signals. A run that `nohup` has made deaf to SIGHUP stays so.
    """
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if alone and number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        if alone and number != getattr(signal, "SIGHUP", None):  # after a SIGHUP nobody reads any more
            print("\nfinishing the step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)
        caught.append(number)

    nohup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heeded = [number for number in STOPPING if not (nohup and number == signal.SIGHUP)]
    previous = {number: signal.signal(number, remember) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
