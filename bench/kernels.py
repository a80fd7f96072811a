"""Compile the Triton kernels of forward and backward passes for several GPUs, on a machine that has none.

    python bench/kernels.py [--gpus=75,86,90] [--networks=packed,alibi] [--heads=64,128] [--dtypes=bfloat16]

PyTorch must be built for CUDA and come with Triton, whose assembler makes machine code for every GPU. Both passes
are traced on the CPU; their tensors are then said to be on CUDA, and PyTorch's compiler writes and compiles kernels,
which never run. A line tells whether they compile, how much shared memory the largest asks for, and how much the GPU
has. Attention is FlexAttention's, as of packed rows, ALiBi and windows. Products of matrices and PyTorch's own flash
attention come from libraries, and are not looked at. Written for PyTorch 2.11, into whose insides it reaches.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fused  # noqa: E402
import model  # noqa: E402
from training.compiling import checkpoint_activations  # noqa: E402
from training.device import DTYPES, autocast  # noqa: E402
from training.lora import LoraConfig, add_lora  # noqa: E402

# Compute capability → bytes of shared memory that a block of threads may have, from NVIDIA's CUDA C++ programming guide
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
NETWORKS: dict[str, dict[str, Any]] = {
    "packed": {},
    "alibi": {"position": "alibi"},
    "window": {"sliding_window": 256},
    "grouped": {"n_kv_head": 1, "mlp": "geglu", "qk_norm": False},
    "classic": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False},
    "losses": {"label_smoothing": 0.1, "max_z_loss": 2e-4, "norm_head": True, "tie_embeddings": False},
    "checkpoints": {},
    "lora": {},
}
CUDA = torch.device("cuda", 0)


def trace(network: str, head_dim: int, dtype: str) -> list[tuple[str, torch.fx.GraphModule, list[Any]]]:
    """The forward and the backward graph of a network, traced on the CPU, and their inputs."""
    import torch._functorch.config
    import torch.nn.attention.flex_attention as flex
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: list[tuple[str, torch.fx.GraphModule, list[Any]]] = []

    def keep(name: str, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((name, graph, inputs))
        return stop

    def stop(*_: Any) -> None:
        raise InterruptedError

    def choose_flex(mask: model.Mask, q: torch.Tensor, T: int, **_: Any) -> model.Mask:
        if mask.kernel is not None:
            return mask
        return model.Mask(kernel=fused.Flex(T, mask.causal, mask.documents, mask.slopes, q.device, mask.window))

    setattr(model, "prepare_mask", choose_flex)  # noqa: B010
    setattr(flex, "_validate_device", lambda *_: None)  # noqa: B010  a CPU traces gradients, though it cannot run them
    fused.LOGITS_AT_ONCE["cpu"] = fused.LOGITS_AT_ONCE["cuda"]
    torch._functorch.config.force_non_lazy_backward_lowering = True
    config = {"block_size": 1024, "vocab_size": 50304, "n_layer": 2, "n_head": 4, "n_embd": 4 * head_dim}
    gpt = model.GPT(model.GPTConfig(**config | NETWORKS[network])).train()
    if network == "checkpoints":
        checkpoint_activations(gpt, keep_random_state=False)
    if network == "lora":
        add_lora(gpt, LoraConfig(8, 16.0, ("qkv", "out", "up", "down"), (1, 2)))
    at = torch.arange(1024).expand(4, 1024)
    packing = {} if network in ("alibi", "window") else {"documents": at // 300, "positions": at % 300}
    backend = aot_autograd(
        fw_compiler=partial(keep, "forward"), bw_compiler=partial(keep, "backward"),
        decompositions=select_decomp_table(), partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    compiled = torch.compile(gpt, backend=backend, dynamic=False)
    with suppress(InterruptedError), autocast(torch.device("cpu"), dtype):  # `stop`: both graphs are there by then
        compiled(at % 100, at % 100, target_count=torch.ones(()), **packing)
    return found


def pretend(capability: int) -> None:
    """Have PyTorch and Triton believe in a GPU of this compute capability."""
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = SimpleNamespace(
        name="pretended", major=capability // 10, minor=capability % 10, warp_size=32, multi_processor_count=100,
        total_memory=24 << 30, max_threads_per_multi_processor=1536, max_threads_per_block=1024,
        regs_per_multiprocessor=65536, shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED[capability],
        shared_memory_per_multiprocessor=SHARED[capability] + 1024, L2_cache_size=6 << 20, gcnArchName="", uuid="",
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None, "synchronize": None,
        "get_device_capability": (capability // 10, capability % 10), "get_device_properties": properties,
        "_get_device_properties": properties, "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "is_bf16_supported": True,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name, answer in {"get_device_properties": properties, "current_device": 0}.items():
        setattr(CudaInterface.Worker, name, staticmethod(lambda *_, answer=answer, **__: answer))
    for name, answer in {"is_available": True, "get_compute_capability": capability}.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer))
    setattr(fake_tensor, "init_gpu_context", lambda *_: None)  # noqa: B010
    target = GPUTarget("cuda", capability, 32)
    pretended = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    setattr(triton_helpers, "set_driver_to_gpu", lambda: driver.set_active(pretended))  # noqa: B010
    driver.set_active(pretended)
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):  # what they found out before
            function.cache_clear()


def move_to_cuda(graph: torch.fx.GraphModule) -> None:
    """Have each operation that names the CPU name CUDA."""
    for node in graph.graph.nodes:
        node.args, node.kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda x: CUDA if isinstance(x, torch.device) else x
        )
    for part in graph.children():
        if isinstance(part, torch.fx.GraphModule):
            move_to_cuda(part)


class Retyped(torch.fx.Interpreter):
    """Runs a graph on fake tensors, and notes them as what its operations give."""

    def run_node(self, n: torch.fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return torch.empty_like(value, device=CUDA) if isinstance(value, torch.Tensor) else value


def compile_graphs(graphs: list[tuple[str, torch.fx.GraphModule, list[Any]]]) -> list[int]:
    """Compile the kernels of the graphs for the pretended GPU; returns each kernel's bytes of shared memory."""
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.use_static_cuda_launcher = False
    shared: list[int] = []

    def compile_only(tuner: Any, *_: Any, **__: Any) -> None:
        tuner._precompile_worker()
        shared.extend(result.kernel.metadata.shared for result in tuner.compile_results)
        tuner.launchers = [lambda *_, **__: None]

    setattr(CachingAutotuner, "precompile", compile_only)  # noqa: B010
    for name, graph, inputs in graphs:
        move_to_cuda(graph)
        mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
                     if isinstance(x, torch.Tensor) else x for x in inputs]  # fmt: skip
            Retyped(graph).run(*moved)
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            compile_fx_inner(graph, moved, is_backward=name == "backward")
    return shared


def one(gpu: int, network: str, head_dim: int, dtype: str) -> None:
    """Trace, compile and print the line of one network."""
    graphs = trace(network, head_dim, dtype)
    pretend(gpu)
    shared = compile_graphs(graphs)
    needed, there = max(shared), SHARED[gpu]
    fits = "yes" if needed <= there else "**no**"
    print(f"| {gpu / 10} | {network} | {head_dim} | {dtype} | {len(shared)} | {needed:,} | {there:,} | {fits} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="86,90", help=f"compute capabilities: {','.join(map(str, SHARED))}")
    parser.add_argument("--networks", default=",".join(NETWORKS), help=",".join(NETWORKS))
    parser.add_argument("--heads", default="64", help="channels of a head")
    parser.add_argument("--dtypes", default="bfloat16", help=",".join(DTYPES))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if torch.version.cuda is None:
        parser.error("this PyTorch is built without CUDA: install one that is (pip install torch, on most machines)")
    choices = [arguments.gpus.split(","), arguments.networks.split(","), arguments.heads.split(","),
               arguments.dtypes.split(",")]  # fmt: skip
    for given, known in zip(choices, (map(str, SHARED), NETWORKS, None, DTYPES), strict=True):
        if known is not None and (unknown := set(given) - set(known)):
            parser.error(f"not known: {', '.join(sorted(unknown))}; see --help")
    if arguments.one:
        (gpu,), (network,), (head_dim,), (dtype,) = choices
        return one(int(gpu), network, int(head_dim), dtype)
    print(f"torch {torch.__version__}\n\n| compute capability | network | channels of a head | dtype | kernels "
          "| largest shared memory | the GPU's | fits |\n|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    failed = 0
    for gpu, network, head_dim, dtype in itertools.product(*choices):  # a process each: PyTorch remembers the GPU
        options = [f"--gpus={gpu}", f"--networks={network}", f"--heads={head_dim}", f"--dtypes={dtype}", "--one"]
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True,
                                  env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})  # fmt: skip
        failed += done.returncode != 0
        error = (done.stderr.strip().splitlines() or [""])[-1]
        print(done.stdout.strip() if not done.returncode else f"| {int(gpu) / 10} | {network} | {head_dim} | {dtype} "
              f"| | | | {error[:200]} |", flush=True)  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
