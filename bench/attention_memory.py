"""Peak memory of attention, forward and backward, as the context grows: flash beside math, and that they agree.

    python bench/attention_memory.py [--device=cuda] [--lengths=1024,2048,4096] [--batches=causal,packed,alibi]

The model is one layer with little but attention in it, and chooses its kernels itself. Math keeps the (T, T) scores,
flash is to grow as T. Batches: causal rows; packed rows, of documents of T/2, T/4, T/8, … tokens; ALiBi. On the CPU, in
float32, memory is the growth of a process's peak (ru_maxrss), a process for each kind. On CUDA, in bfloat16 and with
flash compiled, as training is, it is what PyTorch allocated; each case runs twice there, and the second run counts.
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
H, D, V = 2, 64, 64  # few heads, so that math at T = 16k fits into 20 GB; a small vocabulary
BATCHES, KERNELS = ("causal", "packed", "alibi"), ("flash", "math")
DEFAULT_LENGTHS = "1024,2048,4096,8192,16384"


def one_layer(T: int, batch: str, kernel: str, device: str) -> Callable[[], dict]:
    """A function that takes one row of T tokens forward and backward through a model of one layer.

    It returns the loss, and the gradient of each weight by its name.
    """
    import torch  # here and not above: a process starts with the peak of the one that started it

    from model import GPT, GPTConfig
    from training.device import autocast, pick_device, pick_dtype

    picked = pick_device(device)
    dtype = pick_dtype("auto", picked) if picked.type == "cuda" else "float32"
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=T, vocab_size=V, n_layer=1, n_head=H, n_embd=H * D, mlp_dim=64, attention=kernel,
        position="alibi" if batch == "alibi" else "rope",
    )  # fmt: skip
    model, tokens = GPT(config).to(picked), torch.randint(V, (1, T + 1)).to(picked)
    packing = {}
    if batch == "packed":
        lengths = [T >> i for i in range(1, T.bit_length())]  # T/2, T/4, …, 1
        lengths[-1] += T - sum(lengths)
        packing = {
            "documents": torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]]).to(picked),
            "positions": torch.tensor([[i for n in lengths for i in range(n)]]).to(picked),
        }
    network = model
    if picked.type == "cuda" and kernel == "flash":
        torch._dynamo.reset()  # the lengths before this one count towards the limit of recompilations
        network = torch.compile(model, dynamic=False)

    def forward_and_backward() -> dict:
        model.zero_grad(set_to_none=True)
        with autocast(picked, dtype):
            _, loss = network(tokens[:, :-1], tokens[:, 1:], **packing)
        loss.backward()
        return {"loss": loss.detach(), **{name: weight.grad for name, weight in model.named_parameters()}}

    return forward_and_backward


def measure(batch: str, kernel: str, lengths: list[int], device: str, folder: Path) -> list[tuple[float, float, float]]:
    """For each T: the MiB and seconds that it takes, and how far loss and gradients are from the other kernel's.

    lengths: in growing order, as a process's peak only grows. The results lie in `folder`: the first kernel to come
    here writes them, the second one compares, relative to the largest gradient of each weight.
    """
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors.torch import load_file, save_file

    cuda, found = device != "cpu", []
    synchronize = torch.cuda.synchronize if cuda else lambda: None

    def peak() -> int:
        if cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    if not cuda:
        one_layer(16, batch, kernel, device)()  # what the libraries load on first use is not attention's
        before = peak()
    for T in lengths:
        run = one_layer(T, batch, kernel, device)
        if cuda:
            run()  # compiles
            synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = peak()
        begin = time.perf_counter()
        mine = run()
        synchronize()
        grown, seconds = peak() - before, time.perf_counter() - begin
        mine = {name: x.float().cpu() for name, x in mine.items()}
        results, difference = folder / f"{batch}-{T}", math.nan
        if results.exists():
            theirs = load_file(results)
            difference = max(
                ((mine[name] - x).abs().max() / x.abs().max().clamp(min=1e-30)).item() for name, x in theirs.items()
            )
        else:
            save_file(mine, results)
        found.append((grown / 2**20, seconds, difference))
    return found


def growth(lengths: list[int], memory: list[float]) -> str:
    """How memory grows between the last two lengths, as in T^0.98."""
    if memory[-2] <= 0:
        return "too small to see"
    return f"T^{math.log(memory[-1] / memory[-2]) / math.log(lengths[-1] / lengths[-2]):.2f}"


def in_a_process(batch: str, kernel: str, arguments: argparse.Namespace, folder: str) -> list[list[float]]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, f"--lengths={arguments.lengths}", "--case", batch, kernel, folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [[float(number) for number in line.split()] for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--lengths", default=DEFAULT_LENGTHS, help="growing values of T (default: %(default)s)")
    parser.add_argument("--batches", default=",".join(BATCHES), help="which of %(default)s (the default)")
    parser.add_argument("--one_process", action="store_true", help="on a CPU: a quick check that all of it runs")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # batch, kernel, folder: one measurement
    arguments = parser.parse_args()
    lengths = [int(T) for T in arguments.lengths.split(",")]
    if arguments.case:
        batch, kernel, folder = arguments.case
        for numbers in measure(batch, kernel, lengths, arguments.device, Path(folder)):
            print(*numbers)
        return

    print("| batch | T | flash MiB | math MiB | flash s | math s | largest relative difference |")
    print("|---|---|---|---|---|---|---|")
    powers = []
    for batch in arguments.batches.split(","):
        if batch not in BATCHES:
            sys.exit(f"error: --batches takes {', '.join(BATCHES)}, not {batch}")
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for kernel in KERNELS:
                if arguments.device != "cpu" or arguments.one_process:
                    found[kernel] = measure(batch, kernel, lengths, arguments.device, Path(folder))
                else:
                    found[kernel] = in_a_process(batch, kernel, arguments, folder)
        for T, (flash, flash_s, _), (math_, math_s, difference) in zip(lengths, *found.values(), strict=True):
            print(
                f"| {batch} | {T:,} | {flash:,.1f} | {math_:,.1f} | {flash_s:.3f} | {math_s:.3f} | {difference:.1e} |"
            )
        if len(lengths) > 1:
            words = [f"{kernel} {growth(lengths, [mib for mib, *_ in rows])}" for kernel, rows in found.items()]
            powers.append(f"{batch}: {', '.join(words)}")
    if powers:
        print(f"\nGrowth of memory over the last step of T: {'; '.join(powers)}.")


if __name__ == "__main__":
    main()
