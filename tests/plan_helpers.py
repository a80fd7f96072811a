"""Jobs to plan, and the same jobs done for real; run as a script, it measures the memory that one of them takes."""

import json
import re
import sys
from pathlib import Path

import torch

from model import GPTConfig
from training.config import TrainConfig
from training.device import Process, autocast, reuse_freed_memory
from training.lora import LoraConfig
from training.optim import make_optimizers
from training.plan import Job


def job(
    dtype: str = "float32", gpu: bool = False, lora: LoraConfig | None = None, batch_size: int = 2,
    micro_steps: int = 1, optimizer: str = "adamw", **options,
) -> Job:  # fmt: skip
    """A job with a tiny model, unless options of GPTConfig say otherwise."""
    shape = {"vocab_size": 96, "n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 32} | options
    config = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=micro_steps, optimizer=optimizer)
    return Job(GPTConfig(**shape), config, dtype, gpu, lora)


def train_steps(job: Job, batch_sizes: list[int], device: str) -> None:
    """Steps with these numbers of rows, as train.py does them; the first makes the optimizer's state."""
    model = job.build(job.model.n_layer).to(device)
    optimizers = make_optimizers(model, job.config, Process(0, 1, torch.device(device), job.dtype))
    for B in batch_sizes:
        idx = torch.randint(job.model.vocab_size, (B, job.model.block_size), device=device)
        for _ in range(job.config.gradient_accumulation_steps):
            with autocast(torch.device(device), job.dtype):
                _, loss = model(idx, targets=idx, target_count=idx.numel())
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def resident(name: str) -> int:
    """Bytes of this process in physical memory: now (VmRSS), or the most so far (VmHWM)."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    reuse_freed_memory()  # as training on a CPU does
    planned = job(**json.loads(sys.argv[1]))
    train_steps(job(), [1, 1], "cpu")
    before = resident("VmRSS")
    train_steps(planned, [1, planned.config.batch_size], "cpu")
    print(resident("VmHWM") - before)
