"""Compile decoding/native.cpp for this machine, and call it: a linear layer for one row, and RMSNorm, on a CPU."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from decoding.text import note

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("g++", "c++", "clang++")  # the first that is here, unless the environment variable CXX names one
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
WEIGHTS = {torch.float32: "linear_float32", torch.bfloat16: "linear_bfloat16", torch.int8: "linear_int8"}
# The types of the arguments in native.cpp: pointers, numbers of rows and columns, and the last one
LINEAR = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2 + [ctypes.c_int]
RMS_NORM = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_float]


@lru_cache
def library() -> ctypes.CDLL | None:
    """native.cpp as a library of functions, or None where it cannot be compiled, which a note says.

    Compiling takes 0.15 seconds, so each process does it anew: a library that is kept might meet another processor.
    """
    named = shlex.split(os.environ.get("CXX", ""))  # a compiler, perhaps with options of its own
    compiler = named or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/native.so"
            subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", file], check=True, capture_output=True, text=True)
            found = ctypes.CDLL(file)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        note(f"note: decoding is slower without decoding/native.cpp, which needs a C++ compiler with OpenMP: {why}")
        return None
    for name, arguments in {**dict.fromkeys(WEIGHTS.values(), LINEAR), "rms_norm": RMS_NORM}.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """scale ⊙ (weight·x) + bias in float32, (…, out), where there is the `library`.

    x: one row in float32, (…, n), the other sizes being 1; weight: (out, n) in float32, bfloat16 or int8, contiguous.
    scale, bias: (out,) in float32, or None. No gradient flows.
    """
    out, n = weight.shape
    x, y = x.contiguous(), torch.empty(x.shape[:-1] + (out,))
    s = None if scale is None else scale.data_ptr()
    b = None if bias is None else bias.data_ptr()
    function = getattr(library(), WEIGHTS[weight.dtype])
    function(weight.data_ptr(), s, b, x.data_ptr(), y.data_ptr(), out, n, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x/√(mean(x²) + ε) ⊙ weight over the last dimension, (…, n), in float32, where there is the `library`."""
    x, n = x.contiguous(), x.size(-1)
    y = torch.empty_like(x)
    library().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n, n, epsilon)
    return y
