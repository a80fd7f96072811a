"""What a training run takes, told before anything is allocated: its weights, its memory by part, the largest batch.

Memory is counted, not estimated by a formula: a training step of this very model, with its optimizers, runs on fake
tensors, which have shapes, types and lifetimes and no numbers, while `Live` adds up the storages that are alive. So the
count follows the model when it changes. It leaves out the program itself, what kernels take inside, and the gaps of the
allocator (see MARGIN). A compiled network needs less than is counted here: it keeps little that is cheap to compute.
"""

import math
import os
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused
from common.layers import shapes_only
from model import GPT, GPTConfig
from seq2seq import model_of
from training.compiling import checkpoint_activations
from training.config import TrainConfig
from training.device import Process, autocast
from training.lora import LoraConfig, add_lora
from training.optim import make_optimizers
from training.shard import shards

ABSURD = 1 << 24  # no width of a real model reaches this
DEPTHS = (1, 2)  # blocks are alike: from models of so many of them follows what deeper ones take
TOKENS = 1 << 18  # of a batch whose passes are run to count them
MARGIN = 0.05  # share of a device's memory that is left to CUDA, its libraries and the allocator's gaps
# What the heap of the C library holds on a CPU, by what is alive. glibc: 1.15 to 1.27; on an Intel Xeon 1.37 to 1.53
HEAP = 1.3
# Memory of the GPUs of training/device.py in GB, from the vendor's data sheets
GPU_MEMORY = {
    "B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "L40": 48, "L4": 24, "RTX 4090": 24, "RTX 3090": 24,
}  # fmt: skip
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}
SMALLER = "choose a smaller n_layer, n_embd, vocab_size or block_size"


# ---------------------------------------------------------------------------------------------------------------------
# What there is


def count_weights(config: GPTConfig) -> int | float:
    """Number of weights of such a model, tied ones counted once; infinity where a size is absurd.

    Every block has the same number, so two models of one and two blocks tell the rest; they are built on PyTorch's
    meta device, which knows shapes and allocates nothing.
    """
    widths = (config.n_head, config.n_embd, config.head_dim, config.mlp_dim, config.vocab_size, config.block_size)
    if max(widths) > ABSURD:
        return math.inf
    with shapes_only():
        one, two = (model_of(replace(config, n_layer=n)).num_params() for n in (1, 2))
    return one + (config.n_layer - 1) * (two - one)


def available_memory(device: torch.device) -> float:
    """Bytes of memory of the device: a GPU's own, or the machine's (a container's limit, if it has one)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    limit = Path("/sys/fs/cgroup/memory.max")
    stated = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(stated)) if stated.isdecimal() else machine


def parse_memory(text: str) -> float:
    """Bytes of a size such as 24GB, 24GiB or 24000MB. ValueError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MGT]i?B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"memory must be a size such as 24GB, 24GiB or 24000MB, not {text!r}")
    return float(found[1]) * UNITS[found[2].upper()]


def size_of(tensor: Tensor) -> int:
    """Bytes of its numbers."""
    return tensor.numel() * tensor.element_size()


def gib(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:,.2f} GiB"


# ---------------------------------------------------------------------------------------------------------------------
# Counting the memory of a step


@dataclass(frozen=True)
class Job:
    """What a process trains: a model, with LoRA's corrections if it has some, on micro-batches of whole rows.

    dtype: the precision of autocast; weights, gradients and the optimizer's state are float32. gpu: whether attention
    runs in CUDA's kernels, which keep no (T, T) matrix for dropout. shards: the number of processes that the weights
    are sharded over, 1 if each has all of them; the parts that `count_memory` counts are those of one that has all.
    """

    model: GPTConfig
    config: TrainConfig
    dtype: str
    gpu: bool
    lora: LoraConfig | None = None
    shards: int = 1

    @classmethod
    def on(cls, process: Process, model: GPTConfig, config: TrainConfig, lora: LoraConfig | None = None) -> "Job":
        """What this process is to do."""
        count = process.world_size if shards(config, process) else 1
        return cls(model, config, process.dtype, process.device.type == "cuda", lora, count)

    def with_batch(self, batch_size: int) -> "Job":
        """The same job with another number of rows in a micro-batch."""
        return replace(self, config=replace(self.config, batch_size=batch_size))

    def build(self, n_layer: int) -> GPT:
        """The model with so many blocks, ready to train, on the device of the context."""
        config = replace(self.model, n_layer=n_layer, nope_every=0)  # a layer without RoPE takes a little less
        if self.gpu and config.attention == "flash" and not config.dropout:  # the compiled kernel needs no (T, T) mask
            config = replace(config, position="none" if config.position == "alibi" else config.position)
            config.sliding_window = 0
        model = model_of(config)
        if self.lora:
            add_lora(model, self.lora)
        if self.gpu and config.attention == "flash":
            for block in model.blocks:
                block.attention.config = replace(config, dropout=0.0)
        if self.config.activation_checkpointing:
            checkpoint_activations(model, keep_random_state=False)
        return model


class Held(NamedTuple):
    """Bytes that one process holds, whatever its batch."""

    weights: float  # and the tables of positions
    gradients: float
    optimizer: float  # its state
    saved: float  # a checkpoint: the weights that train, and the optimizer's state
    update: float  # the most that is alive while gradients are clipped and the optimizers step


class Memory(NamedTuple):
    """Bytes that one process needs; each part at its largest.

    The parts need not be there at once: gradients come while activations go, unless earlier micro-steps left some.
    """

    weights: float
    gradients: float
    optimizer: float
    saved: float
    update: float  # these five as in Held
    activations: float  # kept by the forward pass through the blocks for the backward pass
    logits: float  # output head and cross-entropy
    passes: float  # the most that is alive in the forward and backward pass, all of the above included

    @property
    def peak(self) -> float:
        """The most that is alive at any moment of a step."""
        return max(self.passes, self.update)


class Live(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make and that are still alive: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # a storage's address → its bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return made

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that has just been made."""
        address = storage._cdata
        if address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, address).atexit = False

    def remove(self, address: int) -> None:
        """Stop counting a storage, which is gone."""
        self.now -= self.sizes.pop(address)


def by_depth(measure: Callable[[int], tuple[float, ...]], n_layer: int) -> tuple[float, ...]:
    """measure(n_layer), for what is linear in the number of blocks: they are alike, and a deep model takes long."""
    return on_a_line(measure, n_layer, DEPTHS)


def on_a_line(measure: Callable[[int], tuple[float, ...]], n: int, at: tuple[int, int]) -> tuple[float, ...]:
    """measure(n), for what is linear in n: beyond the two numbers of `at` the line through both goes on."""
    if n <= at[1]:
        return measure(n)
    few, more = map(measure, at)
    return tuple(a + (b - a) / (at[1] - at[0]) * (n - at[0]) for a, b in zip(few, more, strict=True))


def count_memory(job: Job, held: Held | None = None) -> Memory:
    """The memory of a step of this job. held: what `count_held` found, if that is known: no batch changes it."""
    held = held or count_held(job)
    activations, logits, passes = by_depth(lambda n: count_passes(job, n), job.model.n_layer)
    counted = {"activations": activations, "logits": logits, "passes": held.optimizer + passes}
    return Memory(**held._asdict(), **counted)


def count_held(job: Job) -> Held:
    """Count what there is between steps, and the most while the optimizers step."""

    def measure(n_layer: int) -> Held:
        with FakeTensorMode(), Live() as live:
            model = job.build(n_layer)
            process = Process(0, 1, torch.device("cpu"), job.dtype)
            optimizers = make_optimizers(model, replace(job.config, compile=False), process)
            weights = live.now
            trained = [p for p in model.parameters() if p.requires_grad]
            for p in trained:
                p.grad = torch.empty_like(p)
            gradients, live.peak = live.now - weights, live.now
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()  # makes its state
            state = live.now - weights - gradients
            return Held(weights, gradients, state, sum(map(size_of, trained)) + state, live.peak)

    return Held(*by_depth(measure, job.model.n_layer))


def count_passes(job: Job, n_layer: int, keeps_gradients: bool = True) -> tuple[float, float, float]:
    """Count forward and backward pass: returns bytes of activations, of logits, and the most in all.

    Rows are alike: what a large batch takes follows from two smaller ones, each with several chunks of logits.
    """
    tokens = max(TOKENS, 2 * fused.LOGITS_AT_ONCE["cuda"] // job.model.vocab_size)
    few = max(1, tokens // job.model.block_size)

    def run(rows: int) -> tuple[float, float, float]:
        return run_passes(job.with_batch(rows), n_layer, keeps_gradients)

    activations, logits, most = on_a_line(run, job.config.batch_size, (few, 2 * few))
    return activations, logits, most


def run_passes(job: Job, n_layer: int, keeps_gradients: bool) -> tuple[float, float, float]:
    """`count_passes` by running both passes on fake tensors.

    The weights are included, and the gradients of earlier micro-steps if there are any; the optimizer's state is not.
    keeps_gradients: False drops each weight's gradient as soon as it is there.
    """
    with FakeTensorMode(), kernels_of(job), Live() as live:
        model = job.build(n_layer)
        for p in model.parameters():
            if p.requires_grad and not keeps_gradients:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            elif p.requires_grad and job.config.gradient_accumulation_steps > 1:
                p.grad = torch.empty_like(p)
        base, marks = live.now, watch_head(model, live)
        idx = torch.zeros(job.config.batch_size, job.model.block_size, dtype=torch.long)
        live.peak = live.now
        with autocast(torch.device("cpu"), job.dtype):  # fake tensors of a GPU would need a PyTorch with CUDA
            source = {"source": idx} if job.model.n_encoder_layer else {}
            targets = idx[:, 0] if job.model.classes else idx
            _, loss = model(idx=idx, targets=targets, target_count=1, **source)
        loss.backward()
        return marks["kept"] - base, marks["head"] - marks["kept"], max(live.peak, marks["before"], marks["head"])


def fused_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Counts RMSNorm as LayerNorm, which keeps its input and two numbers a row, as RMSNorm's kernel on a GPU does.

    A CPU composes RMSNorm of several operations, and keeps what is between them.
    """
    return F.layer_norm(x, shape, weight, None, eps)


@contextmanager
def kernels_of(job: Job) -> Iterator[None]:
    """Have fake tensors, which are a CPU's, take what they take on the job's device."""
    if not job.gpu:
        yield
        return
    with (
        patch.dict(fused.LOGITS_AT_ONCE, cpu=fused.LOGITS_AT_ONCE["cuda"]),
        patch.object(F, "rms_norm", fused_norm),
        patch.object(fused, "attention_dtype", lambda q: q.dtype),
    ):
        yield


def watch_head(model: GPT, live: Live) -> dict[str, int]:
    """Have the model note what is alive around its output head.

    Returns a dict that a forward and a backward pass fill: "kept", what is alive when the head begins; "before", the
    most until then; "head", the most until the head's backward pass has ended.
    """
    marks: dict[str, int] = {}

    def begin(_module: Any, _inputs: Any, normed: Tensor) -> None:
        marks["before"], marks["kept"] = live.peak, live.now
        live.peak = live.now
        normed.register_hook(end)

    def end(_gradient: Tensor) -> None:
        marks["head"] = live.peak
        live.peak = live.now

    last = model.blocks[-1] if model.config.post_norm else model.norm
    last.register_forward_hook(begin)
    return marks


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def need(memory: Memory, gpu: bool) -> float:
    """Bytes of the device's memory that a process asks for, with the allocator's gaps and, on a CPU, a saved copy.

    PyTorch keeps what a GPU's tensors free, for the next ones of such a size. On a CPU the C library does, less well.
    While a checkpoint is being written, a copy of it is in the host's memory.
    """
    return memory.peak / (1 - MARGIN) if gpu else memory.peak * HEAP + memory.saved


def sharded_peaks(job: Job, memory: Memory, counts: Sequence[int]) -> list[float]:
    """For each number of processes that the weights are sharded over (fsdp), the most bytes that one of them needs.

    Of weights, gradients and optimizer state it has its part. Whole it has those weights outside the blocks, and two
    blocks': the one that computes and the next; and as many gradients. Activations and logits are as without sharding.
    Muon's step, whose matrices come a few at a time, takes less.
    """
    with FakeTensorMode():
        model = job.build(1)
        block = sum(map(size_of, model.blocks[0].parameters()))
        gathered = sum(map(size_of, model.parameters())) + block
        gradients = gathered if not job.lora else 0
    held = memory.weights + memory.gradients + memory.optimizer
    *_, passes = by_depth(lambda n: count_passes(job, n, keeps_gradients=False), job.model.n_layer)
    return [held / n + gathered + gradients + passes - memory.weights for n in counts]


def largest_batch(job: Job, rooms: list[float]) -> list[int]:
    """For each number of bytes, the largest batch_size that fits; 0 if none does.

    The need is counted for 1, 2, 4, 8… rows, until it is more than the largest room, or until each further row takes as
    much as the one before and there are several chunks of logits. It is taken to be a straight line between and beyond.
    """
    config, held, needs = job.model, count_held(job), []
    slopes = [math.nan]  # of the line from the size before to each one
    while needs[-1:] <= [max(rooms)]:
        size = 2 ** len(needs)
        needs.append(need(count_memory(job.with_batch(size), held._replace(update=0.0)), job.gpu))
        if size > 1:
            slopes.append((needs[-1] - needs[-2]) / (size // 2))
        several = size * config.block_size * config.vocab_size > 2 * fused.LOGITS_AT_ONCE["cuda"]
        if several and size > 1 and math.isclose(slopes[-1], slopes[-2], rel_tol=1e-3):
            break

    def within(room: float) -> int:
        at = bisect_right(needs, room)  # the first that needs more
        if not at or need(count_memory(job.with_batch(1), held), job.gpu) > room:
            return 0
        return 2 ** (at - 1) + int((room - needs[at - 1]) / slopes[min(at, len(slopes) - 1)])

    return [within(room) for room in rooms]


def check_memory(job: Job, device: torch.device, purpose: str) -> list[str]:
    """Refuse what cannot fit into the device's memory, and return a warning for what probably does not.

    Raises ValueError if the weights, their gradients and the optimizer's state alone are more than the device has (of
    sharded ones, a process's part).
    """
    room, weights = available_memory(device), count_weights(job.model)
    copies = 1 if job.lora else 3 if job.config.optimizer == "muon" else 4
    least = 4 * copies * weights / job.shards
    if least > room:
        counted = f"{weights:,}" if weights < math.inf else "an absurd number of"
        raise ValueError(
            f"this model has {counted} weights: {purpose} takes at least {least / 2**30:,.0f} GiB, and "
            f"{device.type} has {room / 2**30:,.0f} GiB: {SMALLER}"
        )
    if at_most(job, weights) < room:
        return []
    memory = count_memory(job)
    needed = need(memory, job.gpu) if job.shards == 1 else sharded_peaks(job, memory, [job.shards])[0] / (1 - MARGIN)
    if needed < room:
        return []
    return [
        f"warning: a step of {purpose} with batch_size={job.config.batch_size} needs about "
        f"{gib(needed)}, and {device.type} has {gib(room)}: it will probably run out of memory; "
        "see --plan --memory, lower batch_size and raise gradient_accumulation_steps"
    ]


def at_most(job: Job, weights: float) -> float:
    """More than a step of this job needs, told at once: small runs need no count, which takes a second or so.

    Per token, in float32: of each block the residual stream, queries, keys, values and the MLP's hidden layer, as often
    as operations may keep them and their gradients; the logits several times; of the scores, all that is written out.
    """
    config = job.model
    heads = config.n_head * config.head_dim
    block = 24 * config.n_embd + 48 * heads + 16 * config.mlp_dim
    if job.lora:
        block += 32 * job.lora.rank
    if config.attention == "math" or config.dropout or config.position == "alibi" or config.sliding_window:
        block += 8 * config.n_head * config.block_size
    token = 4 * (config.n_layer * block + 16 * config.n_embd + 8 * config.vocab_size)
    return HEAP * (40 * weights + token * job.config.batch_size * config.block_size) + 2**28
