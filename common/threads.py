"""How PyTorch's threads wait for each other on a CPU."""

import os
import platform

SPINS = 20_000


def wait_briefly() -> None:
    """Have a thread that waits for the others keep its core busy for a short time only, and then sleep.

    This must be called before PyTorch is imported. GNU's OpenMP, which PyTorch's Linux builds for x86-64 come with,
    otherwise looks 300,000 times whether the others have come, which takes longer than the system's turns. If another
    program wants a core, the thread that waits and the thread that is waited for then keep each other from going on:
    a training step takes 30 to 50 times as long (RESULTS.md). 20,000 looks are 0.3 to 1 ms, longer than the pauses
    between a step's kernels. What the user has set for OpenMP in the environment stays.
    """
    if platform.machine() == "x86_64" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
