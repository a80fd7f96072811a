"""Compiling the network where that saves time and where the tools for it are there, and activation checkpointing."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from common.compiler import CPP_COMPILERS
from model import GPT
from training.config import TrainConfig
from training.device import Process, peak_flops
from training.shard import is_sharded

# The estimate behind compile='auto'. It is rough on purpose: near the threshold both choices take about the same time.
COMPILE_SECONDS = 60.0  # to compile the network for training and for evaluation, and Newton-Schulz
PLAIN_MFU = 0.2  # the share of the peak that a network reaches which is not compiled
SAVED = 0.5  # the share of its time that compiling saves


def pays(flops: float, process: Process) -> bool:
    """Whether compiling saves more seconds than it takes; also True where the device's peak is not known.

    flops: floating-point operations of all steps to come, over all processes. Uncompiled, they take
    flops / (PLAIN_MFU · peak · world_size) seconds. On one H100 in bfloat16, runs from 2.4e16 FLOPs on are compiled,
    which a GPT of 124M parameters reaches after 60 steps of 0.5M tokens.
    """
    peak = peak_flops(process.device, process.dtype)
    return peak is None or SAVED * flops / (PLAIN_MFU * peak * process.world_size) > COMPILE_SECONDS


def missing_tool(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, as words to be installed; None if everything seems to be there.

    On CUDA it writes Triton kernels, whose launchers Triton compiles with a C compiler; elsewhere it writes C++. Both
    need Python's C headers.
    """
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "the package triton"
        named, names = os.environ.get("CC"), ("gcc", "clang")
    else:
        windows = sys.platform == "win32"
        named, names = os.environ.get("CXX"), ("cl",) if windows else CPP_COMPILERS
    if not any(shutil.which(name) for name in ([named] if named else names)):
        return f"a compiler ({named or ' or '.join(names)})"
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).is_file():
        return f"Python's C headers ({header}; on Debian and Ubuntu the package python3-dev)"
    return None


def decide_to_compile(config: TrainConfig, process: Process, flops: float) -> tuple[bool, list[str]]:
    """Whether to compile, by config.compile, and what to tell the user; flops: see `pays`.

    "auto" compiles on CUDA where it pays and where the tools are there. Raises ValueError for True without the tools.
    """
    wanted = config.compile
    if wanted == "auto":
        wanted = process.device.type == "cuda" and pays(flops, process)
    lacks = missing_tool(process.device) if wanted else None
    if lacks is None:
        return wanted, []
    if config.compile is True:
        raise ValueError(f"compile=True needs {lacks}, which is not here: install it, or leave compile out")
    return False, [f"note: not compiled, and so perhaps half as fast, for lack of {lacks}: install it before long runs"]


def compiled(network: Callable, fixed_shapes: bool) -> Callable:
    """The network, to be compiled when it is first called.

    fixed_shapes: whether all batches have one shape. Padded ones have many lengths: there the compiler may make the
    length a variable.
    """
    return torch.compile(network, dynamic=False if fixed_shapes else None)


def checkpoint_activations(model: GPT, keep_random_state: bool) -> None:
    """Have each block keep only its input, and be computed once more in the backward pass [Chen et al. 2016].

    keep_random_state: whether the second time is to draw the same dropout as the first.
    """
    for block in (*model.blocks, *getattr(model, "encoder", ())):
        again = {"use_reentrant": False, "preserve_rng_state": keep_random_state}
        block.forward = partial(checkpoint, block.forward, **again)


def prepare(model: GPT, config: TrainConfig, fixed_shapes: bool) -> Callable:
    """What to call as the model: compiled if config.compile is True, with activations checkpointed if config says so.

    A sharded model is compiled block by block, because its weights are gathered between the blocks.
    """
    by_block = config.compile is True and is_sharded(model)
    if by_block:
        for block in model.blocks:
            block.forward = compiled(block.forward, fixed_shapes)
    if config.activation_checkpointing:
        checkpoint_activations(model, model.config.dropout > 0)
    return compiled(model, fixed_shapes) if config.compile is True and not by_block else model
