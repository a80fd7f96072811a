"""The hardware that a command runs on: device, precision, random numbers, peak speed, and the processes of torchrun.

Notable:
- a picked GPU always has its index ("cuda" becomes cuda:0), because `torch.cuda.set_device` demands one;
- Apple's mps has no float64: what is accumulated or drawn in float64 stays on the CPU there (`float64_device`);
- MFU is never reported above 100%: a peak that training exceeds was measured wrongly.
"""

import ctypes
import gc
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fused import product
from model import GPT, GPTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense peak of the tensor cores in FLOP/s, from the vendor's data sheets: (bfloat16 and float16, TF32)
PEAK_FLOPS = {
    "B200": (2250e12, 1125e12), "H200": (989e12, 495e12), "H100": (989e12, 495e12), "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12), "L40": (181e12, 90e12), "L4": (121e12, 60e12),
    "RTX 4090": (165e12, 83e12), "RTX 3090": (71e12, 36e12),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One device


def pick_device(device: str) -> torch.device:
    """The device of that name, with its index if it is a GPU; "auto" is the first CUDA GPU if there is one, else cpu.

    Raises ValueError for a name that is not a device's, and for a device that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    if picked.type == "cpu":
        return torch.device("cpu")
    index = picked.index or 0
    if picked.type == "cuda" and index >= torch.cuda.device_count():
        lacks = "" if torch.version.cuda or torch.version.hip else " (this PyTorch was built without CUDA)"
        count = torch.cuda.device_count()
        raise ValueError(f"device={device}: PyTorch finds {count} CUDA GPUs on this machine{lacks}; try --device=cpu")
    if picked.type == "mps" and (index or not torch.backends.mps.is_available()):
        raise ValueError(f"device={device}: PyTorch finds no such Apple GPU on this machine; try --device=cpu")
    return torch.device(picked.type, index)


def pick_dtype(dtype: str, device: torch.device, trains: bool = True) -> str:
    """The name of the precision to compute in; "auto" is the fastest that is reliable on the device.

    That is bfloat16 where the hardware computes in it, float16 on CUDA GPUs too old for it, and float32 on everything
    else: most CPUs emulate bfloat16, up to 100 times slower than float32. trains: False for decoding, where the weights
    themselves are stored in it: there a CPU keeps float32. Raises ValueError for an unknown name.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
        return dtype
    if has_bfloat16(device) and (trains or device.type != "cpu"):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself: a CUDA GPU from Ampere on, an x86 CPU with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    multiplies = able.get("avx512_bf16") or able.get("amx_bf16")
    return device.type == "cpu" and bool(multiplies) and torch.backends.mkldnn.is_available()


def float64_device(device: torch.device) -> torch.device:
    """Where to keep float64 tensors of a computation on this device: there, or on the CPU if it is Apple's mps."""
    return torch.device("cpu") if device.type == "mps" else device


def autocast(device: torch.device, dtype: str):
    """A context with matrix products in dtype, and sums and norms in float32; it does nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def seed_random(seed: int, device: torch.device) -> None:
    """Seed the CPU's default random generator and the device's own, from which dropout draws. seed: 0 to 2^63 - 1.

    Does what `torch.manual_seed` does for the devices used here, in 8 µs instead of 600 on a CPU: that one also asks
    for every kind of device that PyTorch knows, and records the call's stack for a CUDA that may be initialised later.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@dataclass
class Process:
    """One of the processes that train together, and what it runs on."""

    rank: int  # from 0 to world_size - 1
    world_size: int  # number of processes
    device: torch.device
    dtype: str

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.world_size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)  # on the CPU, through gloo: this does not wait for the GPU
        return sums.tolist()


def start_process(device: str, dtype: str, micro_steps: int, parallel: str = "ddp") -> Process:
    """Join the processes that torchrun started, or be the only one.

    Processes whose devices would not pick the same precision for dtype="auto" compute in float32.
    micro_steps: micro-steps per step, over all processes. Raises ValueError if they cannot be shared out equally, if
    the device is not there, or for float16 with parallel="fsdp".
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world_size > 1 else 0
    if micro_steps % world_size:
        raise ValueError(
            f"gradient_accumulation_steps ({micro_steps}) counts the micro-steps of all "
            f"{world_size} processes: make it a multiple of {world_size}"
        )
    picked = pick_device(device)
    if world_size > 1:
        picked = pick_local_device(device, picked)
    chosen = pick_dtype(dtype, picked)
    if chosen == "float16" and parallel == "fsdp":
        raise ValueError("parallel=fsdp knows no scaling of float16's gradients: use bfloat16, float32 or parallel=ddp")
    if picked.type == "cpu":
        reuse_freed_memory()
    if picked.type == "cuda":
        torch.cuda.set_device(picked)  # before NCCL starts, which would otherwise put a context on GPU 0 as well
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size > 1 and picked.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=picked)
    elif world_size > 1:
        dist.init_process_group("gloo")  # refuses a device_id
    process = Process(rank, world_size, picked, chosen)
    (in_bfloat16,) = process.total(chosen == "bfloat16")
    return replace(process, dtype="float32") if dtype == "auto" and 0 < in_bfloat16 < world_size else process


def reuse_freed_memory() -> None:
    """Have glibc keep the memory of tensors of up to 128 MB that are freed, for those that come next.

    Else it gives back what tensors of 32 MB and more had, such as logits, and the system fills each page with zeros
    when it is asked for again. With a vocabulary of 49,152 a step takes a sixth less time, and 5% more memory. Older
    versions of glibc take no more than 32 MB. What the user has set for glibc in the environment stays.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, never = -1, -3, -1  # malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # other C libraries than glibc lack it
        if libc.mallopt(M_MMAP_THRESHOLD, 2**27) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
            libc.mallopt(M_TRIM_THRESHOLD, never)  # which alone would fix the other one at 128 KB


def pick_local_device(device: str, picked: torch.device) -> torch.device:
    """The device of one process among several: on CUDA, each takes the GPU whose number is its LOCAL_RANK.

    device: the name that was asked for; picked: what `pick_device` made of it. Raises ValueError where several
    processes cannot share the device.
    """
    if picked.type == "cpu":
        return picked
    if picked.type == "mps" or ":" in device:
        raise ValueError(f"device={device} is one GPU, and torchrun started several processes: try --device=cuda")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun started process {local_rank + 1} on a machine with {torch.cuda.device_count()} CUDA GPUs: "
            "each process needs its own, so use --nproc_per_node=gpu"
        )
    return torch.device("cuda", local_rank)


def stop_process(process: Process) -> None:
    """Leave the processes that train together."""
    if process.world_size > 1:
        # DDP is a cycle of references. If it is not collected, it keeps gloo's threads alive until the interpreter
        # shuts down under them, which sometimes crashes.
        gc.collect()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def cpu_flops(dtype: str, size: int = 512) -> float:
    """FLOP/s of a (size, size) matrix product on this CPU: the fastest of those that fit into 0.03 s, or of one."""
    a = torch.ones(size, size, dtype=DTYPES[dtype])
    seconds: list[float] = []
    while sum(seconds) < 0.03:
        start = time.perf_counter()
        product(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The most FLOP/s of one device: from the data sheet for a known GPU, measured for a CPU, None if unknown."""
    if device.type == "cpu":
        return cpu_flops(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak[dtype == "float32"] for key, peak in PEAK_FLOPS.items() if key in name), None)


def attention_flops(config: GPTConfig, T: int) -> int:
    """FLOPs of QKᵀ and the sum over V, to train on one token of a sequence of T: 12·H·D·T in each layer.

    By convention the masked half counts too [PaLM, appendix B]; of a sliding window, only its keys count instead of T.
    """
    keys = min(T, config.sliding_window or T)
    return 12 * config.n_layer * config.n_head * config.head_dim * keys


def flops_per_token(model: GPT, T: int | None = None) -> int:
    """Floating-point operations to train on one token of a sequence of T (default block_size), for MFU.

    6 per weight that multiplies (2 forward, 4 backward), and those of attention.
    """
    config = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith("_emb.weight"))
    tied = config.tie_embeddings and not config.classes  # used as the head, which a classifier lacks
    weights += config.vocab_size * config.n_embd if tied else 0
    return 6 * weights + attention_flops(config, T or config.block_size)


class Peak:
    """The most FLOP/s of the devices that train together: the denominator of MFU, the model FLOPs utilization."""

    def __init__(self, process: Process):
        self.process = process
        self.flops = peak_flops(process.device, process.dtype)  # of one process's device; None if unknown

    def mfu(self, flops: float) -> float | None:
        """The share of the peak that training reached with `flops` FLOP/s over all processes; None if unknown.

        A CPU's peak is measured too low while other programs keep it busy. So when training exceeds it, it is measured
        again; if training exceeds that too, there is no peak to compare with.
        """
        if self.flops is None:
            return None
        share = flops / (self.flops * self.process.world_size)
        if share > 1 and self.process.device.type == "cpu":
            self.flops = max(self.flops, cpu_flops(self.process.dtype))
            share = flops / (self.flops * self.process.world_size)
        return share if share <= 1 else None
