"""Peak memory of flash and math attention, forward and backward, as the context grows; checks that both agree.

    python bench/attention_memory.py [--device=cuda] [--lengths=1024,2048,4096]

Math attention stores the (T, T) scores, flash attention does not. Each case has a process of its own: on the CPU its
memory is the growth of the process's peak (ru_maxrss), on CUDA the peak of PyTorch's allocations. Results are compared
through a file, so that the two kinds are never in memory together.
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
B, H, D = 1, 2, 64  # few heads, so that math at T = 16k fits into 20 GB
DEFAULT_LENGTHS = "1024,2048,4096,8192,16384"


def measure(kind: str, T: int, device: str, results: Path) -> None:
    """Print the MiB and seconds that attention takes, and the largest difference from `results`; in its own process.

    The first kind writes the file `results`; the second one compares with it.
    """
    sys.path.insert(0, str(ROOT))
    import torch  # not at the top: a process inherits the memory peak of its parent
    from safetensors.torch import load_file, save_file

    from model import Mask, attention

    def forward_and_backward(T: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        q, k, v, slope = (torch.randn(B, H, T, D, device=device) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()
        y = attention(q, k, v, Mask(causal=True), kind=kind)
        y.backward(slope)
        return {"y": y.detach(), "q": q.grad, "k": k.grad, "v": v.grad}

    def peak() -> int:
        if device != "cpu":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    forward_and_backward(16)  # do not count what the libraries load on first use
    synchronize()
    before, start = peak(), time.perf_counter()
    mine = forward_and_backward(T)
    synchronize()
    grown, seconds = peak() - before, time.perf_counter() - start
    difference = float("nan")
    if results.exists():
        theirs = load_file(results, device)
        difference = max((mine[name] - theirs[name]).abs().max().item() for name in mine)
    else:
        save_file({name: x.contiguous() for name, x in mine.items()}, results)
    print(grown / 2**20, seconds, difference)


def growth(lengths: list[int], memory: list[float]) -> float:
    """Return the exponent p of memory ~ T^p, from the last two lengths."""
    return math.log(memory[-1] / memory[-2]) / math.log(lengths[-1] / lengths[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--lengths", default=DEFAULT_LENGTHS, help=f"values of T (default {DEFAULT_LENGTHS})")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # kind, T, file: one measurement
    arguments = parser.parse_args()
    if arguments.case:
        kind, T, results = arguments.case
        return measure(kind, int(T), arguments.device, Path(results))

    lengths = [int(T) for T in arguments.lengths.split(",")]
    memory: dict[str, list[float]] = {"flash": [], "math": []}
    print(f"causal attention, forward and backward, float32 on {arguments.device}: B={B}, H={H}, D={D}")
    print("(largest difference: between the kinds' outputs, or their gradients of q, k, v)")
    print(f"{'T':>7} {'flash MiB':>10} {'math MiB':>10} {'flash s':>8} {'math s':>8} {'largest difference':>19}")
    for T in lengths:
        with tempfile.TemporaryDirectory() as folder:
            seconds = {}
            for kind in memory:
                command = [sys.executable, __file__, f"--device={arguments.device}", "--case", kind, str(T)]
                done = subprocess.run([*command, f"{folder}/results"], check=True, stdout=subprocess.PIPE, text=True)
                mib, seconds[kind], difference = map(float, done.stdout.split())
                memory[kind].append(mib)
        sizes = " ".join(f"{memory[kind][-1]:>10.1f}" for kind in memory)
        times = " ".join(f"{seconds[kind]:>8.2f}" for kind in memory)
        print(f"{T:>7} {sizes} {times} {difference:>19.1e}", flush=True)
    if len(lengths) > 1:
        powers = ", ".join(f"{kind} as T^{growth(lengths, memory[kind]):.2f}" for kind in memory)
        print(f"growth over the last step of T: {powers}")


if __name__ == "__main__":
    main()
