"""SIGINT and SIGTERM as requests to stop after the step."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(alone: bool) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second Ctrl-C is obeyed at once.

    Under torchrun (not alone) it is not: there, one Ctrl-C arrives as several signals.
    """
    caught: list[int] = []

    def remember(number: int, _frame) -> None:
        if alone and number == signal.SIGINT in caught:
            raise KeyboardInterrupt
        if alone:
            print("\nfinishing the step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)
        caught.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
