"""An emulated GPU, so that the code for CUDA and for Apple's mps runs in tests on a machine that has neither.

    with emulated("cuda") as gpu:
        train.main()                    # with --device=cuda
    gpu.events                          # how often host and device copied, or waited for each other

A tensor on the emulated GPU is a CPU tensor of the class `OnGPU`: it has real values and real gradients, and says that
its device is cuda:0. A TorchFunctionMode sees every call from Python into PyTorch, and enforces a GPU's rules:
- an operation on tensors of two devices is refused; as on a GPU, scalars and indices may lie on the CPU;
- random numbers on the device come from a generator of its own, and mps has no float64;
- a CUDA graph records operations without carrying them out, and refuses waits and copies meanwhile; its replay
  repeats the operations, with the Python numbers of the recording, on the memory of the recording.

What it cannot emulate: kernels (their speed, memory and rounding; autocast is the CPU's), asynchrony and streams
(nothing is read too early), several GPUs, NCCL, compilation, and what C++ does by itself, such as a wait inside an
operator that WAITS does not list. The tests of `pytest -m cuda` are for these.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import torch._dynamo  # it makes tables of PyTorch's functions when it is imported: of the real ones, please
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from decoding import fast

T, CPU = Tensor, torch.device("cpu")
# Operations by name. The host needs the result of these, and waits until the device has computed it:
WAITS = set("item tolist nonzero equal allclose masked_select bincount".split())
WAITS |= {f"__{name}__" for name in ("bool", "int", "float", "index", "contains", "format")}
# These draw random numbers, as does whatever is called with a dropout_p:
DRAWS = set("dropout rand randn randint randperm rand_like randn_like multinomial bernoulli normal".split())
DRAWS |= {"normal_", "uniform_", "bernoulli_", "random_"}
# These take not even a scalar from the CPU:
ONE_DEVICE = set("stack cat linear embedding matmul __matmul__ gather scatter_".split())


class OnGPU(Tensor):
    """A tensor in the emulated GPU's memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # the rules are in EmulatedGPU


class Pinned(Tensor):
    """A CPU tensor in pinned memory, from which a copy to the device need not wait."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def tensors_in(x) -> list[Tensor]:
    """The tensors in arguments or results, however deep in lists and tuples."""
    return [leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor)]


def raw(function, *args, **kwargs):
    """What PyTorch itself returns, without the emulation."""
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


class EmulatedGPU(TorchFunctionMode):
    """The rules. events: copies and waits by kind, where: by line of code; waits: how often the host waited so far.

    graphs: the CUDA graphs that were recorded. current: the index that torch.cuda.set_device was given.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.device, self.current, self.capturing, self.graphs = torch.device(kind, 0), 0, False, []
        self.events, self.where, self.waits = Counter(), Counter(), 0
        self.seed(0)

    def seed(self, seed: int) -> None:
        self.random_state = torch.Generator().manual_seed(int(seed)).get_state()

    def note(self, event: str) -> None:
        """Count an event; refuse it while a CUDA graph is recorded."""
        frame = sys._getframe(1)
        while "site-packages" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.events[event] += 1
        self.waits += event.startswith("wait")
        self.where[f"{event}, {frame.f_code.co_filename.rsplit('/')[-1]}:{frame.f_lineno}"] += 1
        if self.capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({event})")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, tensors = getattr(function, "__name__", ""), tensors_in((args, kwargs))
        touched = any(isinstance(x, OnGPU) for x in tensors)
        if function in (T.to, T.cuda, T.cpu):
            return self.move(function, *args, **kwargs)
        if not touched and "device" not in kwargs:
            return raw(function, *args, **kwargs)
        if name == "__get__":
            return self.attribute(function, args[0])
        if function in (T.numpy, T.__array__):
            raise TypeError(f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu() first")
        if name in WAITS:
            self.note(f"wait: {name}")
            args = [x.as_subclass(Tensor) if isinstance(x, OnGPU) else x for x in args]
        elif function in (T.__getitem__, T.__setitem__):
            self.check_index(*args)
            return self.put(raw(function, *args)) if isinstance(args[0], OnGPU) else raw(function, *args)
        elif function is T.copy_ and self.note_copy(args[1], self.device_of(args[0]), **kwargs):
            return raw(function, *args, **kwargs)
        return self.compute(function, name, args, kwargs, tensors, touched)

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
        kind = self.device.type
        answers = {T.device: self.device, T.is_cpu: False, T.is_cuda: kind == "cuda", T.is_mps: kind == "mps"}
        return answers[getter.__self__] if getter.__self__ in answers else self.put(raw(getter, x))

    def move(self, function, x: Tensor, *args, non_blocking=False, device=None, **kwargs) -> Tensor:
        """x.to(...), x.cuda(), x.cpu()."""
        target = {T.cpu: CPU, T.cuda: self.device}.get(function, self.device_of(x))
        for other in [argument for argument in args if isinstance(argument, Tensor)]:  # x.to(other)
            args, device = [other.dtype], self.device_of(other)
        for argument in (*args, device):
            target = self.known(argument) or target
            non_blocking = argument if isinstance(argument, bool) else non_blocking
        rest = [a for a in args if a is not None and not isinstance(a, bool) and self.known(a) is None]
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

    def compute(self, function, name: str, args, kwargs, tensors: list[Tensor], touched: bool):
        """Any other operation."""
        target = self.device if touched else CPU
        if (named := self.known(kwargs.get("device"))) is not None:
            target, kwargs = named, kwargs | {"device": CPU}
            if function in (torch.tensor, torch.as_tensor) and not touched and target == self.device:
                self.note("wait: copy to the GPU")
        here = [x for x in tensors if not isinstance(x, OnGPU) and (x.dim() or name in ONE_DEVICE)]
        if touched and here:
            shapes = [f"{self.device_of(x)} {tuple(x.shape)}" for x in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {shapes}")
        if target == CPU:
            return raw(function, *args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{self.device.type}' device type for generator but found 'cpu'")
        with self.own_random() if name in DRAWS or kwargs.get("dropout_p") else nullcontext():
            out = raw(function, *args, **kwargs)
        return self.put(out)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Random numbers come from the device's generator, not from the CPU's."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random_state)
            yield
            self.random_state = torch.get_rng_state()

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

    def group(self, tensor_lists, with_indices=False, real=torch._C._group_tensors_by_device_and_dtype) -> dict:
        """What optimizers and gradient clipping ask C++ for: tensors by device and dtype."""
        groups = real(tensor_lists, with_indices)
        return {(self.device_of(group[0][0][0]), dtype): group for (_, dtype), group in groups.items()}


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph. Operations have to run while they are recorded, so `end` undoes what they did."""

    def __init__(self, *_, **__):
        super().__init__()
        self.operations = []  # (function, args, kwargs, its outputs that are no views, by position)
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
        own = {i: x for i, x in enumerate(tensors_in(out)) if x.untyped_storage().data_ptr() not in inputs}
        self.operations.append((function, args, kwargs, own))
        return out

    def end(self) -> None:
        for memory, held in self.before.values():
            memory.copy_(held)
        for *_, own in self.operations:
            for x in own.values():
                if x.is_floating_point() and x.untyped_storage().data_ptr() not in self.before:
                    raw(x.fill_, float("nan"))  # nothing has computed it yet

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, own in self.operations:
                results = tensors_in(function(*args, **kwargs))
                for i, x in own.items():
                    x.copy_(results[i])
        self.replays += 1


@contextmanager
def emulated(kind: Literal["cuda", "mps"] = "cuda", count: int = 1) -> Iterator[EmulatedGPU]:
    """In this context, the machine has `count` GPUs of this kind; tensors can be put on the first of them."""
    gpu = EmulatedGPU(kind)
    stream = SimpleNamespace(wait_stream=lambda other: None)  # the emulated GPU does one thing after the other
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "is_available": lambda: kind == "cuda", "device_count": lambda: count if kind == "cuda" else 0,
            "current_device": lambda: gpu.current, "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
            "get_device_capability": lambda *_: (9, 0), "is_bf16_supported": lambda *_, **__: True,
            "manual_seed": gpu.seed, "manual_seed_all": gpu.seed, "_lazy_init": lambda: None,
            "get_device_properties": lambda *_: SimpleNamespace(total_memory=80 << 30, multi_processor_count=132),
            "synchronize": lambda *_: gpu.note("wait: synchronize"), "Stream": lambda *_: stream,
            "current_stream": lambda *_: stream, "stream": nullcontext, "device": nullcontext,
            "CUDAGraph": Graph, "graph": gpu.capture,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        # torch.cuda.set_device itself stays: it refuses a device without an index
        patch.setattr(torch._C, "_cuda_setDevice", lambda index: setattr(gpu, "current", index), raising=False)
        patch.setattr(T, "pin_memory", lambda x: raw(T.clone, x).as_subclass(Pinned))  # in other threads too
        patch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        patch.setattr(torch.mps, "manual_seed", gpu.seed)
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # TF32 is not emulated
        patch.setattr(torch, "autocast", lambda _, dtype=None, real=torch.autocast, **more: real("cpu", dtype, **more))
        patch.setattr(torch, "is_autocast_enabled", lambda _, real=torch.is_autocast_enabled: real("cpu"))
        patch.setattr(torch, "get_autocast_dtype", lambda _, real=torch.get_autocast_dtype: real("cpu"))
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", gpu.group)
        patch.setattr(torch.nn.Module, "_apply", lambda *args, **options: gpu.module_apply(*args, **options))
        # Streams are kept for the life of the process: those of the emulated GPU must not reach a real one.
        patch.setattr(fast, "recording_stream", lru_cache(fast.recording_stream.__wrapped__))
        with gpu:
            yield gpu
