"""What to run on: the device, its precision, how fast it could go at best, and the processes that train together."""

import gc
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense peak of the tensor cores in FLOP/s, from the vendor's data sheets: (bf16 and fp16, tf32)
PEAK_FLOPS = {
    "B200": (2250e12, 1125e12), "H200": (989e12, 495e12), "H100": (989e12, 495e12), "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12), "L40": (181e12, 90e12), "L4": (121e12, 60e12),
    "RTX 4090": (165e12, 83e12), "RTX 3090": (71e12, 36e12),
}  # fmt: skip


def pick_device(device: str) -> torch.device:
    """'auto' is the first CUDA GPU if there is one, else the CPU. ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA GPUs; try --device=cpu")
    if picked.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    return picked


def pick_dtype(dtype: str, device: torch.device) -> str:
    """'auto' is what the device is fast at: on CUDA bfloat16, or float16 on GPUs older than that, float32 on a CPU.

    Most CPUs emulate bfloat16, up to 100 times slower than float32; those that have it gain only in wide models, so
    there it is for the user to ask for.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
        return dtype
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def cpu_flops(dtype: str, size: int = 512) -> float:
    """FLOP/s of a (size, size) matrix product: the best of a few."""
    a = torch.ones(size, size, dtype=DTYPES[dtype])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The denominator of MFU: the data sheet's figure for a known GPU, a measured one for a CPU, None if unknown."""
    if device.type == "cpu":
        return cpu_flops(dtype)
    name = torch.cuda.get_device_name(device)
    return next((peak[dtype == "float32"] for key, peak in PEAK_FLOPS.items() if key in name), None)


def autocast(device: torch.device, dtype: str):
    """Matrix products in dtype, sums and norms in float32; does nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


@dataclass
class Process:
    """This process among those that train together, and what it runs on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: str

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.world_size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)  # on the CPU, through gloo: does not wait for the GPU
        return sums.tolist()


def start_process(device: str, dtype: str, micro_steps: int) -> Process:
    """Join the processes that torchrun started, or be the only one. micro_steps: of a step, over all processes."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world_size > 1 else 0
    if micro_steps % world_size:
        raise ValueError(
            f"gradient_accumulation_steps ({micro_steps}) counts the micro-steps of all "
            f"{world_size} processes: make it a multiple of {world_size}"
        )
    picked = pick_device(device)
    if world_size > 1:
        if picked.type == "cuda":
            picked = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
        torch.set_float32_matmul_precision("high")  # TF32
    return Process(rank, world_size, picked, pick_dtype(dtype, picked))


def stop_process(process: Process) -> None:
    """Leave the processes that train together."""
    if process.world_size > 1:
        # DDP is a cycle of references. Left alone, it keeps gloo's threads alive until the interpreter goes down under
        # them, which now and then is a crash.
        gc.collect()
        dist.destroy_process_group()
