"""Training speed on one GPU: nanoGPT's own step, ours with nanoGPT's architecture, and ours with the modern one.

    python bench/gpu_train.py [--nanogpt PATH_TO_A_CLONE] [--shapes=124m,1b] [--seconds=300]

124m has a context of 1024 and takes the step that config/gpt2_124m.py gives one of 8 GPUs; 1b, 0.9 billion weights, has
a context of 2048. All take the same random tokens, in bfloat16, compiled, one after the other in one process. MFU is
the model's FLOP/s, by the count of the PaLM paper's appendix B that both projects use, as a share of two peaks: the
data sheet's, and the fastest matrix product of this run. Memory is what PyTorch allocated at most in the timed steps.
"""

import argparse
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.nanogpt import nanogpt_module  # noqa: E402
from common import cli  # noqa: E402
from common.config import build, read_arguments  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from tasks.task import Task  # noqa: E402
from train import Trainer  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.device import DTYPES, Process, autocast, cpu_flops, flops_per_token, peak_flops, start_process  # noqa: E402
from training.optim import make_optimizers  # noqa: E402


class Shape(NamedTuple):
    """The size of a model, and of its steps."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch_size: int  # rows per micro-step
    gradient_accumulation_steps: int  # micro-steps per step


SHAPES = {
    "124m": Shape(12, 12, 768, 1024, 50304, 32, 2),
    "1b": Shape(16, 16, 2048, 2048, 50304, 8, 4),
    "tiny": Shape(2, 2, 32, 32, 96, 2, 2),
}
# The configs' own shapes are replaced. nanoGPT trains without biases unless it is told otherwise.
OURS = {
    "ours, nanoGPT's architecture": ("config/gpt2_124m_classic.py", "--bias=False"),
    "ours, modern": ("config/gpt2_124m.py",),
}
A100 = 312e12  # FLOP/s; nanoGPT's estimate is a share of it


class Engine(NamedTuple):
    """Something that trains: step(i) takes step i and returns its loss, still on the device."""

    step: Callable[[int], Tensor]
    weights: int
    flops_per_token: float
    close: Callable[[], None]


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def synthetic(shape: Shape, step: int, rows: slice) -> dict[str, Tensor]:
    """Random tokens for these rows of the step's batch: idx and targets, each (rows, T). The same at every call."""
    size = (rows.stop - rows.start, shape.block_size + 1)
    tokens = torch.from_numpy(np.random.default_rng([step, rows.start]).integers(shape.vocab_size, size=size))
    return {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def our_engine(arguments: tuple[str, ...], shape: Shape, device: str, compiled: bool) -> Engine:
    """The step of train.py: the Trainer's own methods, with random tokens in the place of a corpus."""
    sizes = [f"--{name}={value}" for name, value in shape._asdict().items()]
    options = [str(ROOT / arguments[0]), *arguments[1:], *sizes, f"--device={device}", f"--compile={compiled}"]
    config, model_config = build(read_arguments(options, TrainConfig, GPTConfig), TrainConfig, GPTConfig)
    process = start_process(config.device, config.dtype, config.gradient_accumulation_steps)
    with process.device:
        model = GPT(model_config)
    task = Task(
        batch=partial(synthetic, shape), validation=lambda *_: iter(()), tokens_per_byte=1.0,
        tokens_per_step=tokens_per_step(shape), steps_per_pass=1.0, fixed_shapes=True, tokenizer=None, preview=str,
    )  # fmt: skip
    trainer = Trainer(model, make_optimizers(model, config, process), task, config, process)

    def step(i: int) -> Tensor:
        batches, target_count = trainer.next_batches(i)
        loss = trainer.forward_backward(i, batches, target_count)
        trainer.update_weights(i, trainer.clip_gradients())
        return loss

    return Engine(step, model.num_params(), flops_per_token(model), trainer.close)


def nanogpt_engine(clone: str, shape: Shape, device: str, compiled: bool) -> Engine:
    """The step of nanoGPT's train.py, with its model, its optimizer, its settings for GPT-2 and its estimate of FLOPs.

    As there, the next batch is read and copied while the GPU computes the forward pass. Its gradient scaler, which does
    nothing in bfloat16, and its wait for the loss of every step are left out, in its favour.
    """
    process, nanogpt = start_process(device, "auto", 1), nanogpt_module(clone)
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    with process.device, redirect_stdout(sys.stderr):
        model = nanogpt.GPT(nanogpt.GPTConfig(**sizes, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), process.device.type)
    network = torch.compile(model) if compiled else model
    micro_steps = shape.gradient_accumulation_steps

    def load(i: int, micro: int) -> list[Tensor]:
        batch = synthetic(shape, i, slice(micro * shape.batch_size, (micro + 1) * shape.batch_size)).values()
        if process.device.type != "cuda":
            return list(batch)
        return [x.pin_memory().to(process.device, non_blocking=True) for x in batch]

    batch = load(0, 0)

    def step(i: int) -> Tensor:
        nonlocal batch
        for micro in range(micro_steps):
            with autocast(process.device, process.dtype):
                _, loss = network(*batch)
                loss = loss / micro_steps
            batch = load(*divmod(i * micro_steps + micro + 1, micro_steps))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach() * micro_steps

    flops_per_token = model.estimate_mfu(1, 1.0) * A100 / shape.block_size
    return Engine(step, sum(p.numel() for p in model.parameters()), flops_per_token, lambda: None)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def tokens_per_step(shape: Shape) -> int:
    """Return the number of tokens of a step, over all its micro-steps."""
    return shape.batch_size * shape.gradient_accumulation_steps * shape.block_size


def synchronize(process: Process) -> None:
    """Wait until a GPU has done its work."""
    if process.device.type == "cuda":
        torch.cuda.synchronize()


def matmul_peak(process: Process, size: int = 8192) -> float:
    """FLOP/s of a (size, size) matrix product of random numbers, the fastest of ten rounds of ten products.

    Random, as products of equal numbers draw less power, and so run at a higher clock.
    """
    if process.device.type == "cpu":
        return cpu_flops(process.dtype)
    a, b = (torch.randn(size, size, device=process.device, dtype=DTYPES[process.dtype]) for _ in range(2))
    seconds = []
    for _ in range(11):  # the first one chooses a kernel
        synchronize(process)
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize(process)
        seconds.append(time.perf_counter() - begin)
    return 10 * 2 * size**3 / min(seconds)


class Measured(NamedTuple):
    """What was measured of one way to train."""

    tokens_per_second: float
    first_step: float  # seconds, with the compilation
    gib: float  # the highest memory of the timed steps
    loss: float  # of the last step
    weights: int
    flops_per_token: float


def measure(engine: Engine, shape: Shape, process: Process, round_seconds: float) -> Measured:
    """Time 5 rounds of about round_seconds each, after 4 steps to compile and warm up; the median counts."""
    cuda = process.device.type == "cuda"
    begin = time.perf_counter()
    engine.step(0)
    synchronize(process)
    first_step = time.perf_counter() - begin
    for i in range(1, 4):
        synchronize(process)
        begin = time.perf_counter()
        engine.step(i)
        synchronize(process)
    n = max(1, int(round_seconds / (time.perf_counter() - begin)))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    speeds = []
    for rounds in range(5):
        begin = time.perf_counter()
        for i in range(n):
            loss = engine.step(4 + rounds * n + i)
        synchronize(process)
        speeds.append(n * tokens_per_step(shape) / (time.perf_counter() - begin))
    scale = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    engine.close()
    speed = statistics.median(speeds)
    return Measured(speed, first_step, peak / 2**30, loss.item(), engine.weights, engine.flops_per_token)


def row(cells: list[object]) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


HEADER = ["", "weights", "tokens/s", "against nanoGPT", "MFU, data sheet", "MFU, measured peak", "GiB", "ms per step",
          "first step, s", "loss"]  # fmt: skip


def compare(name: str, args: argparse.Namespace, process: Process, peaks: tuple, begin: float, longest: float) -> float:
    """Measure nanoGPT and ours in one shape, and print a row for each; what is left out is a row too.

    peaks: FLOP/s of the data sheet (None if unknown), and as measured. begin: when the whole run began. longest: the
    seconds that the longest case took so far, which the next one is expected to take; returned with these cases.
    """
    shape, base = SHAPES[name], None
    makers = {"nanoGPT": partial(nanogpt_engine, args.nanogpt)}
    makers |= {ours: partial(our_engine, arguments) for ours, arguments in OURS.items()}
    for peer, make in makers.items():
        label, start, found = f"{name}, {peer}", time.perf_counter(), None
        if peer == "nanoGPT" and not args.nanogpt:
            row([label, "left out: no --nanogpt", *[""] * 8])
            continue
        if start + longest - begin > args.seconds:
            row([label, f"left out: {start - begin:.0f} of {args.seconds:.0f} s are over", *[""] * 8])
            continue
        try:
            found = measure(make(shape, args.device, args.compile), shape, process, 0.0 if name == "tiny" else 1.0)
        except torch.OutOfMemoryError:
            row([label, f"out of memory, with {shape.batch_size} x {shape.block_size} tokens", *[""] * 8])
        free(process)
        longest = max(longest, time.perf_counter() - start)
        if found is None:
            continue
        speed = found.tokens_per_second
        base = speed if peer == "nanoGPT" else base
        shares = [f"{speed * found.flops_per_token / peak:.1%}" if peak else "unknown" for peak in peaks]
        row([label, f"{found.weights:,}", f"{speed:,.0f}", f"{speed / base:.2f}x" if base else "", *shares,
             f"{found.gib:.1f}", f"{1000 * tokens_per_step(shape) / speed:,.1f}", f"{found.first_step:.0f}",
             f"{found.loss:.2f}"])  # fmt: skip
    return longest


def free(process: Process) -> None:
    """Give back the memory of the case before, and say so if some is still held."""
    torch._dynamo.reset()
    gc.collect()
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() / 2**30
        if held > 0.5:
            print(f"note: {held:.1f} GiB of this case are still held and count in the next one's", file=sys.stderr)


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="a clone of nanoGPT; without one, its rows are left out")
    parser.add_argument("--shapes", default="124m,1b", help=f"which of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction, help="default: True")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no case that would end later than this")
    args = parser.parse_args()
    shapes = args.shapes.split(",")
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise ValueError(f"--shapes takes {', '.join(SHAPES)}, not {', '.join(unknown)}")
    process = start_process(args.device, "auto", 1)
    cuda = process.device.type == "cuda"
    peaks = peak_flops(process.device, process.dtype) if cuda else None, matmul_peak(process)
    sheet = f"{peaks[0] / 1e12:,.1f}" if peaks[0] else "unknown"
    measured = f"{peaks[1] / 1e12:,.1f}"
    print(f"{process.dtype} on {process.device.type}; peak in TFLOP/s: data sheet {sheet}, measured {measured}\n")
    row(HEADER)
    row(["---"] * len(HEADER))
    longest = 0.0
    for name in shapes:
        longest = compare(name, args, process, peaks, begin, longest)


if __name__ == "__main__":
    cli.run_command(main)
