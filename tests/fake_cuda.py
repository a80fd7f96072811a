"""An emulated GPU, so that the code for CUDA and for Apple's mps runs in tests on a machine that has neither.

    with emulated("cuda") as gpu:
        train.main()                    # with --device=cuda
    gpu.events                          # how often host and device copied, or waited for each other

A tensor on the emulated GPU is a CPU tensor of the class `OnGPU`: it has real values and real gradients, and says that
its device is cuda:0. A TorchFunctionMode sees every call from Python into PyTorch, and enforces a GPU's rules:
- an operation on tensors of two devices is refused; as on a GPU, scalars and indices may lie on the CPU;
- every copy between host and device, and every wait of the host for the device, is counted in `events`;
- random numbers on the device come from a generator of its own;
- a CUDA graph records operations without carrying them out, and refuses waits and copies meanwhile; its replay
  repeats the operations, with the Python numbers of the recording, on the memory of the recording;
- mps has no float64.

What it cannot emulate: kernels (their speed, their memory, their rounding; autocast is the CPU's), asynchrony and
streams (nothing is ever read too early), several GPUs and NCCL, compilation, and whatever C++ code does by itself, such
as a wait inside an operator that is not listed in WAITS. `pytest -m cuda` on a real GPU is for these.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
T = Tensor

# The host needs the result of these, and waits until the device has computed it.
WAITS = {
    T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.__contains__, T.__format__, T.nonzero,
    torch.nonzero, T.equal, torch.equal, T.allclose, torch.allclose, T.masked_select, torch.masked_select, T.unique,
    torch.unique, T.bincount, torch.bincount,
}  # fmt: skip
# These draw random numbers (and whatever is called with a dropout_p).
DRAWS = {
    F.dropout, torch.dropout, torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like,
    torch.multinomial, torch.bernoulli, torch.normal, T.normal_, T.uniform_, T.bernoulli_, T.random_, T.multinomial,
}  # fmt: skip
# These take no scalar from the CPU.
ONE_DEVICE = {torch.stack, torch.cat, F.linear, F.embedding, torch.matmul, T.__matmul__, T.gather, T.scatter_}


class OnGPU(Tensor):
    """A tensor in the emulated GPU's memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # the rules are in EmulatedGPU


class Pinned(Tensor):
    """A CPU tensor in pinned memory, from which a copy to the device need not wait."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def tensors_in(x) -> list[Tensor]:
    """The tensors among arguments or results, however deep in lists and tuples."""
    return [leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor)]


def raw(function, *args, **kwargs):
    """What PyTorch itself returns, without the emulation."""
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


class EmulatedGPU(TorchFunctionMode):
    """The rules.

    events: how many copies and waits there were of each kind (waits begin with "wait"); where: the same by line of
    code. graphs: the CUDA graphs that were recorded. current: the index that torch.cuda.set_device was given.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.device, self.current = torch.device(kind, 0), 0
        self.events, self.where = Counter(), Counter()
        self.capturing, self.graphs = False, []
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Seed the device's random generator."""
        self.random_state = torch.Generator().manual_seed(int(seed)).get_state()

    def waits(self) -> int:
        """How often the host waited for the device so far."""
        return sum(count for event, count in self.events.items() if event.startswith("wait"))

    def note(self, event: str) -> None:
        """Count an event; refuse it while a CUDA graph is recorded."""
        frame = sys._getframe(1)
        while "site-packages" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.events[event] += 1
        self.where[f"{event}, {frame.f_code.co_filename.rsplit('/')[-1]}:{frame.f_lineno}"] += 1
        if self.capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({event})")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        touched = any(isinstance(x, OnGPU) for x in tensors)
        if function in (T.to, T.cuda, T.cpu):
            return self.move(function, *args, **kwargs)
        if function is T.pin_memory:
            return args[0].clone().as_subclass(Pinned)
        if not touched and "device" not in kwargs:
            return raw(function, *args, **kwargs)
        if function.__name__ == "__get__":
            return self.attribute(function, args[0])
        if function in (T.numpy, T.__array__):
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
        if function in WAITS:
            self.note(f"wait: {function.__name__}")
        elif function in (T.__getitem__, T.__setitem__):
            self.check_index(*args)
            return self.put(raw(function, *args)) if isinstance(args[0], OnGPU) else raw(function, *args)
        elif function is T.copy_:
            if self.note_copy(args[1], self.device_of(args[0]), kwargs.get("non_blocking", False)):
                return raw(function, *args, **kwargs)
        return self.compute(function, args, kwargs, tensors, touched)

    def device_of(self, x: Tensor) -> torch.device:
        return self.device if isinstance(x, OnGPU) else CPU

    def known(self, x) -> torch.device | None:
        """The device that x names, if it is the CPU or the emulated GPU."""
        name = str(x) if isinstance(x, (str, torch.device)) else ""
        return {"cpu": CPU, self.device.type: self.device}.get(name.split(":")[0])

    def put(self, x):
        """The result of an operation on the device: its tensors, also those in tuples and lists, are on the device."""
        if isinstance(x, (tuple, list)) and not isinstance(x, torch.Size):
            return tree_map(self.put, x)
        if isinstance(x, Tensor) and x.dtype == torch.float64 and self.device.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return x.as_subclass(OnGPU) if isinstance(x, Tensor) and not isinstance(x, OnGPU) else x

    def attribute(self, getter, x: Tensor):
        """x.device, x.grad and so on."""
        answers = {T.device: self.device, T.is_cpu: False, T.is_cuda: self.device.type == "cuda",
                   T.is_mps: self.device.type == "mps"}  # fmt: skip
        return answers[getter.__self__] if getter.__self__ in answers else self.put(raw(getter, x))

    def move(self, function, x: Tensor, *args, non_blocking=False, device=None, **kwargs) -> Tensor:
        """x.to(...), x.cuda(), x.cpu()."""
        target = {T.cpu: CPU, T.cuda: self.device}.get(function, self.device_of(x))
        rest = []
        for argument in (*args, device):
            if isinstance(argument, bool):
                non_blocking = argument
            elif isinstance(argument, Tensor):
                target = self.device_of(argument)
                rest.append(argument.dtype)
            elif (named := self.known(argument)) is not None:
                target = named
            elif argument is not None:
                rest.append(argument)
        copied = self.note_copy(x, target, non_blocking)
        out = raw(T.to, x, *rest, **kwargs) if rest or kwargs else x
        if copied:
            out = (raw(T.clone, x) if out is x else out).as_subclass(Tensor)
        return self.put(out) if target == self.device else out

    def note_copy(self, x, target: torch.device, non_blocking=False) -> bool:
        """Note that x is copied to another device; False if it is there already."""
        if not isinstance(x, Tensor) or self.device_of(x) == target:
            return False
        waits = not (non_blocking and isinstance(x, Pinned))
        self.note(f"{'wait: ' if waits else ''}copy to the {'CPU' if target == CPU else 'GPU'}")
        return True

    def check_index(self, x: Tensor, index, value=None) -> None:
        """Note what x[index] and x[index] = value make the host wait for."""
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, OnGPU) and not isinstance(x, OnGPU):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            if isinstance(part, (list, np.ndarray)) or isinstance(part, Tensor) and part.dim():
                self.note_copy(torch.as_tensor(part), self.device_of(x))
            if isinstance(part, OnGPU) and (part.dtype == torch.bool or not part.dim()):
                self.note("wait: index of unknown size or value")
        if isinstance(value, Tensor) and (value.dim() or isinstance(value, OnGPU)):
            self.note_copy(value, self.device_of(x))

    def compute(self, function, args, kwargs, tensors: list[Tensor], touched: bool):
        """Any other operation."""
        target = self.device if touched else CPU
        if (named := self.known(kwargs.get("device"))) is not None:
            target, kwargs = named, kwargs | {"device": CPU}
            if function in (torch.tensor, torch.as_tensor) and not touched and target == self.device:
                self.note("wait: copy to the GPU")
        here = [x for x in tensors if not isinstance(x, OnGPU) and (x.dim() or function in ONE_DEVICE)]
        if touched and here:
            shapes = [f"{self.device_of(x)} {tuple(x.shape)}" for x in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {function.__name__} of {shapes}")
        if target == CPU:
            return raw(function, *args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{self.device.type}' device type for generator but found 'cpu'")
        with self.own_random() if function in DRAWS or kwargs.get("dropout_p") else nullcontext():
            out = raw(function, *args, **kwargs)
        return self.put(out)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Random numbers come from the device's generator, not from the CPU's."""
        host = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        yield
        self.random_state = torch.get_rng_state()
        torch.set_rng_state(host)

    @contextmanager
    def capture(self, graph, pool=None, stream=None, capture_error_mode="global") -> Iterator[None]:
        """torch.cuda.graph(graph): record what is done in this context."""
        self.capturing = True
        try:
            with graph:
                yield
        finally:
            self.capturing = False
        graph.end()
        self.graphs.append(graph)

    def module_apply(self, module: torch.nn.Module, function, recurse=True) -> torch.nn.Module:
        """nn.Module._apply, which .to(), .cuda() and .double() call: each weight stays the same Python object."""
        for tensor in [*module.parameters(), *module.buffers()]:  # each once, however often it is used
            assert tensor.grad is None, "the emulation moves no gradients"
            with torch.no_grad():
                moved = function(tensor)
            is_weight = isinstance(tensor, torch.nn.Parameter)
            with torch._C.DisableTorchFunction():
                tensor.data = moved.as_subclass(Tensor)
            tensor.__class__ = OnGPU if isinstance(moved, OnGPU) else torch.nn.Parameter if is_weight else Tensor
            tensor._is_param = is_weight
        return module

    def grouped(self, tensor_lists, with_indices=False) -> dict:
        """What optimizers and gradient clipping ask C++ for: tensors by device and dtype."""
        groups = raw(GROUP, tensor_lists, with_indices)
        return {(self.device_of(group[0][0][0]), dtype): group for (_, dtype), group in groups.items()}


GROUP = torch._C._group_tensors_by_device_and_dtype


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph. Operations have to run while they are recorded, so `end` undoes what they did."""

    def __init__(self, *_, **__):
        super().__init__()
        self.operations = []  # (function, args, kwargs, its outputs, whether each has memory of its own)
        self.before = {}  # address → (memory that was written to, what it held)
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors_in(args[position] if position < len(args) else kwargs.get(argument.name)):
                    memory = x.untyped_storage()
                    self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        out = function(*args, **kwargs)
        outputs = tensors_in(out)
        own = [x.untyped_storage().data_ptr() not in inputs for x in outputs]
        self.operations.append((function, args, kwargs, outputs, own))
        return out

    def end(self) -> None:
        for memory, held in self.before.values():
            memory.copy_(held)
        for *_, outputs, own in self.operations:
            for x, new in zip(outputs, own, strict=True):
                if new and x.is_floating_point() and x.untyped_storage().data_ptr() not in self.before:
                    raw(x.fill_, float("nan"))  # nobody can have computed it yet

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, outputs, own in self.operations:
                results = tensors_in(function(*args, **kwargs))
                for x, result, new in zip(outputs, results, own, strict=True):
                    if new:
                        x.copy_(result)
        self.replays += 1


@contextmanager
def emulated(kind: Literal["cuda", "mps"] = "cuda", count: int = 1) -> Iterator[EmulatedGPU]:
    """In this context, the machine has `count` GPUs of this kind; tensors can be put on the first of them."""
    gpu = EmulatedGPU(kind)
    autocast = torch.autocast

    def stream(*_, **__):  # the emulated GPU does one thing after the other: there is nothing to order
        return SimpleNamespace(wait_stream=lambda other: None)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "is_available": lambda: kind == "cuda", "device_count": lambda: count if kind == "cuda" else 0,
            "current_device": lambda: gpu.current, "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
            "get_device_properties": lambda *_: SimpleNamespace(total_memory=80 << 30, multi_processor_count=132),
            "get_device_capability": lambda *_: (9, 0), "is_bf16_supported": lambda *_, **__: True,
            "manual_seed": gpu.seed, "manual_seed_all": gpu.seed, "_lazy_init": lambda: None,
            "synchronize": lambda *_: gpu.note("wait: synchronize"), "CUDAGraph": Graph, "graph": gpu.capture,
            "Stream": stream, "current_stream": stream, "stream": nullcontext, "device": nullcontext,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        # torch.cuda.set_device itself stays: it refuses a device without an index
        patch.setattr(torch._C, "_cuda_setDevice", lambda index: setattr(gpu, "current", index), raising=False)
        patch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        patch.setattr(torch.mps, "manual_seed", gpu.seed if kind == "mps" else torch.mps.manual_seed)
        patch.setattr(torch, "autocast", lambda _, dtype=None, **options: autocast("cpu", dtype=dtype, **options))
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", gpu.grouped)
        patch.setattr(torch.nn.Module, "_apply", lambda *args, **options: gpu.module_apply(*args, **options))
        with gpu:
            yield gpu
