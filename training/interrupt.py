"""Signals that ask a run to stop: it finishes its step, or leaves its evaluation, and saves first."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from training.device import Process

T = TypeVar("T")

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


class Interrupted(Exception):
    """Some process has caught a signal to stop, in the middle of an evaluation."""


def until_interrupted(batches: Iterable[T], process: Process, caught: list[int]) -> Iterator[T]:
    """Yield the batches of this process. Raises Interrupted in all processes together once one has caught a signal.

    caught: of `interruptible`. The processes agree after every batch, even where some have one batch less than others.
    """
    rest = iter(batches)
    while True:
        batch = next(rest, None)
        signals, going = process.total(len(caught), batch is not None)
        if signals:
            raise Interrupted
        if not going:
            return
        if batch is not None:
            yield batch
