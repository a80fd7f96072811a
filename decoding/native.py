"""Compile decoding/native.cpp for this machine, and call it: a linear layer for one row, and RMSNorm, on a CPU."""

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from common.compiler import cpp_compiler
from decoding.text import note

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
PATIENCE = 30  # seconds that the compiler may take
WEIGHTS = {torch.float32: "linear_float32", torch.bfloat16: "linear_bfloat16", torch.int8: "linear_int8"}
# The types of the arguments in native.cpp: pointers, numbers of rows and columns, and the number of threads, or ε
LINEAR = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2 + [ctypes.c_int]
RMS_NORM = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_float]


@lru_cache
def library() -> ctypes.CDLL | None:
    """native.cpp as a library of functions, or None where it cannot be compiled, which a note says.

    Compiling takes about 0.2 seconds, so each process does it anew: a library that is kept might meet another
    processor.
    """
    try:
        return compiled()
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"{error.cmd[0]} ended with status {error.returncode}"]
        why = next((line for line in lines if "error" in line), lines[0])
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        why = str(error)
    note(f"note: decoding is slower without decoding/native.cpp, which needs a C++ compiler with OpenMP: {why}")
    return None


def compiled() -> ctypes.CDLL:
    """Compile and load native.cpp. Raises OSError, ValueError, AttributeError or SubprocessError if that fails."""
    command, *options = cpp_compiler()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/native.so"
        subprocess.run([command, *FLAGS, *options, str(SOURCE), "-o", file], check=True, stdin=subprocess.DEVNULL,
                       capture_output=True, text=True, errors="replace", timeout=PATIENCE)  # fmt: skip
        found = ctypes.CDLL(file)
    for name, arguments in {**dict.fromkeys(WEIGHTS.values(), LINEAR), "rms_norm": RMS_NORM}.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def is_one_row(x: Tensor, n: int) -> bool:
    """Whether x is a row that `linear` can take: (1, …, 1, n), in float32 on the CPU."""
    return x.numel() == x.size(-1) == n and x.dtype == torch.float32 and x.is_cpu


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """scale ⊙ (weight·x) + bias in float32, (…, out), where there is the `library`.

    x: see `is_one_row`; weight: (out, n) in float32, bfloat16 or int8, contiguous.
    scale, bias: (out,) in float32, or None. No gradient flows.
    """
    out, n = weight.shape
    x, y = x.contiguous(), x.new_empty(x.shape[:-1] + (out,))
    s = None if scale is None else scale.data_ptr()
    b = None if bias is None else bias.data_ptr()
    function = getattr(library(), WEIGHTS[weight.dtype])
    function(weight.data_ptr(), s, b, x.data_ptr(), y.data_ptr(), out, n, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x/√(mean(x²) + ε) ⊙ weight over the last dimension, (…, n), where there is the `library`.

    x: (…, n), weight: (n,), both in float32 on the CPU. No gradient flows.
    """
    x, n = x.contiguous(), x.size(-1)
    y = torch.empty_like(x)
    library().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n, n, epsilon)
    return y
