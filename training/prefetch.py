"""Batches on their way to the device: read one step ahead by a thread, in pinned memory, copied without a wait.

Notable: the thread changes when a batch is read and nothing else. What is read is a pure function of the step, and an
error comes up in the step that it belongs to.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls read(step) for one step after the other, always one step ahead of the caller, in one thread.

    read: a pure function of the step. steps: how many there are; nothing beyond is read. device: what the data is for.
    """

    def __init__(self, read: Callable[[int], T], steps: int, device: torch.device):
        self.read, self.steps = read, steps
        # Pinning memory touches the thread's current GPU, which would be GPU 0 in every process.
        setup: dict = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", **setup)
        self.ahead: tuple[int, Future[T]] | None = None  # the step that is being read, and what will come of it

    def __call__(self, step: int) -> T:
        """What read(step) returns, or the exception that it raises; then begin to read the next step."""
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = step, self.thread.submit(self.read, step)
        found = self.ahead[1].result()
        self.ahead = None
        if step + 1 < self.steps:
            self.ahead = step + 1, self.thread.submit(self.read, step + 1)
        return found

    def close(self) -> None:
        """End the thread, after what it is reading now."""
        self.ahead = None
        self.thread.shutdown(cancel_futures=True)


def pin(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """For a CUDA GPU, the batch in pinned memory, from which it is copied while the GPU computes; else as it is."""
    return {name: x.pin_memory() for name, x in batch.items()} if device.type == "cuda" else batch


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch that `pin` returned, on the device; neither the host nor the GPU waits for the copy to begin."""
    return {name: x.to(device, non_blocking=device.type == "cuda") for name, x in batch.items()}
