"""How much memory a model needs, told before anything is allocated."""

import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from model import GPT, GPTConfig

ABSURD = 1 << 24  # no width of a real model reaches this


def count_weights(config: GPTConfig) -> int | float:
    """Number of weights of such a model, tied ones counted once; infinity where a size is absurd.

    Every block has the same number, so two models of one and two blocks tell the rest; they are built on PyTorch's
    meta device, which knows shapes and allocates nothing.
    """
    widths = (config.n_head, config.n_embd, config.head_dim, config.mlp_dim, config.vocab_size, config.block_size)
    if max(widths) > ABSURD:
        return math.inf
    with torch.device("meta"):
        one, two = (GPT(replace(config, n_layer=n)).num_params() for n in (1, 2))
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


def check_memory(config: GPTConfig, device: torch.device, copies: float, purpose: str) -> None:
    """ValueError if `copies` float32 copies of the weights alone are more than the device's memory.

    copies: training keeps the weights, their gradients, and one (Muon) or two (AdamW) numbers of the optimizer each.
    """
    weights, room = count_weights(config), available_memory(device)
    if 4 * copies * weights > room:
        counted = f"{weights:,}" if weights < math.inf else "an absurd number of"
        raise ValueError(
            f"this model has {counted} weights: {purpose} takes at least {4 * copies * weights / 2**30:,.0f} GiB, and "
            f"{device.type} has {room / 2**30:,.0f} GiB: choose a smaller n_layer, n_embd, vocab_size or block_size"
        )
