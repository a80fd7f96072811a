"""A pool of worker processes: results in order, bounded memory, and no worker outlives its parent.

Every worker imports this file first, so it imports little.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
_function: Callable  # in a worker: the function to apply to each task


def parallel_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int | None = None, *, few: int = 4
) -> Iterator[Result]:
    """Yield function(task) for each task, in order, computed by `workers` processes (default: one per CPU).

    `function`, tasks and results must be picklable; `function` is sent to each worker once. At most 2 * workers + 1
    tasks are in flight, which bounds the memory. Fewer than `few` tasks run in this process, because workers take about
    a second to start. Raises ValueError if workers < 1, or if a worker is killed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least 1 is needed")
    workers = workers or cpu_count()
    tasks = iter(tasks)
    first = list(itertools.islice(tasks, few))
    tasks = itertools.chain(first, tasks)
    if workers == 1 or len(first) < few:
        yield from map(function, tasks)
        return
    # Workers are spawned, not forked: the parent may have threads (pyarrow's, the progress bar's), which a fork breaks.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,))
    waiting: deque[Future] = deque()
    try:
        for task in tasks:
            waiting.append(executor.submit(_work, task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, out of memory perhaps: try fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(function: Callable) -> None:
    """Set up a worker: keep the function, leave Ctrl-C to the parent, and exit when the parent is gone."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(task: Task) -> Result:
    return _function(task)
