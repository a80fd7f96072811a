"""training/device.py: which device a name means, its random numbers, its peak, and the processes of torchrun."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.fake_cuda import emulated
from training.device import Peak, Process, pick_device, pick_dtype, reuse_freed_memory, seed_random, start_process

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "xpu", "meta", "CPU"])
def test_what_is_not_a_device_is_refused(name):
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda, cuda:N or mps, not "):
        pick_device(name)


@pytest.mark.parametrize("kind, there, missing", [("cuda", ["cuda", "cuda:0", "cuda:1"], ["cuda:2", "mps"]),
                                                  ("mps", ["mps", "mps:0"], ["mps:1", "cuda"])])  # fmt: skip
def test_a_picked_gpu_has_its_index_and_one_that_is_not_there_is_refused(kind, there, missing):
    with emulated(kind, count=2):
        assert [str(pick_device(name)) for name in there] == [f"{kind}:0", f"{kind}:0", f"{kind}:1"][: len(there)]
        assert str(pick_device("auto")) == ("cuda:0" if kind == "cuda" else "cpu")
        for name in missing:
            with pytest.raises(ValueError, match=f"device={name}: PyTorch finds .* try --device=cpu"):
                pick_device(name)


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")], ids=str
)
def test_a_gpu_computes_in_bfloat16_if_it_does_not_emulate_it(monkeypatch, capability, dtype):
    with emulated("cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert pick_dtype("auto", pick_device("cuda")) == pick_dtype("auto", pick_device("cuda"), trains=False) == dtype


@pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16", "neither"])
def test_a_cpu_trains_in_bfloat16_if_it_does_not_emulate_it_and_decodes_in_float32(monkeypatch, has):
    assert "architecture" in torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, has: True})
    assert pick_dtype("auto", CPU) == ("float32" if has == "neither" else "bfloat16")
    assert pick_dtype("auto", CPU, trains=False) == "float32"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pick_dtype("auto", CPU) == "float32"


def test_seeding_decides_all_random_numbers_of_the_cpu_and_of_the_device():
    for kind in ("cuda", "mps"):
        with emulated(kind):
            device = pick_device(kind)

            def draw():
                return torch.rand(8).tolist(), torch.rand(8, device=device).tolist()  # noqa: B023

            seed_random(5, device)
            first = draw()
            assert draw() != first
            seed_random(5, device)
            assert draw() == first
    torch.manual_seed(2**63 - 1)
    expected = torch.rand(8)
    seed_random(2**63 - 1, CPU)
    assert torch.equal(torch.rand(8), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes. There is no NCCL on a CPU, so these stop where it would start.


@pytest.fixture
def joined(monkeypatch):
    """The environment of torchrun's second of two processes; records what it hands to torch.distributed, and when."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    calls = []

    def join(backend, **options):
        calls.append((backend, options, torch.cuda.current_device() if torch.cuda.is_available() else None))

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))  # the other process says the same
    return calls


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_sets_its_own_gpu_before_it_joins_and_joins_with_it(joined, name):
    with emulated("cuda", count=2):
        process = start_process(name, "auto", 2)
    device = torch.device("cuda", 1)
    assert process == Process(3, 2, device, "bfloat16")
    assert joined == [("cpu:gloo,cuda:nccl", {"device_id": device}, 1)]


def test_on_cpus_processes_join_without_a_device(joined):
    assert start_process("cpu", "auto", 2) == Process(3, 2, CPU, pick_dtype("auto", CPU))
    assert joined == [("gloo", {}, None)]  # gloo refuses a device_id


@pytest.mark.parametrize("mine", [True, False])
def test_processes_whose_cpus_differ_compute_in_float32(joined, monkeypatch, mine):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": mine})
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.fill_(1))  # one of the two has bfloat16
    assert start_process("cpu", "auto", 2).dtype == "float32"
    assert start_process("cpu", "bfloat16", 2).dtype == "bfloat16"


@pytest.mark.parametrize(
    "kind, count, device, message",
    [("cuda", 2, "cuda:0", "device=cuda:0 is one GPU, and torchrun started several processes: try --device=cuda"),
     ("mps", 1, "mps", "device=mps is one GPU"), ("cuda", 1, "auto", "process 2 on a machine with 1 CUDA GPUs")],
)  # fmt: skip
def test_processes_that_would_share_a_gpu_are_refused_before_they_join(joined, kind, count, device, message):
    with emulated(kind, count=count), pytest.raises(ValueError, match=message):
        start_process(device, "auto", 2)
    assert not joined


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def test_a_peak_that_was_measured_too_low_is_measured_again_and_mfu_is_never_above_1():
    peak = Peak(Process(0, 2, CPU, "float32"))
    peak.flops = 4e3  # as if other programs had kept the machine busy at the start
    assert peak.mfu(4e3) == 0.5 and peak.flops == 4e3  # possible: nothing to measure
    assert 0 < peak.mfu(1e6) < 1 and peak.flops > 1e6
    assert peak.mfu(1e30) is None  # faster than any CPU: nothing to compare with


def test_the_peak_of_a_gpu_is_its_data_sheets():
    with emulated("cuda"):
        device = pick_device("cuda")
        half, full = (Peak(Process(0, 4, device, dtype)) for dtype in ("bfloat16", "float32"))
    assert half.mfu(4 * 989e12) == 1 and full.mfu(495e12) == 0.25
    assert half.mfu(4 * 989e12 * 1.01) is None
    with emulated("mps"):
        assert Peak(Process(0, 1, pick_device("mps"), "float32")).mfu(1.0) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to keep what is freed")
def test_training_on_a_cpu_takes_the_memory_of_freed_tensors_again():
    """A tensor's pages are new only once: each would be a page fault, in which the system fills it with zeros."""
    code = """if True:
        import ctypes, resource, torch
        from training.device import start_process

        start_process("cpu", "float32", 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.zeros(2**24)  # 64 MB
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**26)
        print(ctypes.CDLL(None).mallopt(-3, 2**27))
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    new, accepted = done.stdout.split()
    if accepted == "0":
        pytest.skip("this version of glibc keeps up to 32 MB only")
    assert float(new) < 10  # tensors' worth of new pages: the first few find their place


@pytest.mark.parametrize("most, kept", [(2**27, 2**27), (2**25, 2**25), (0, None)])
def test_an_older_glibc_is_asked_for_less_and_left_alone_if_it_refuses_that_too(monkeypatch, most, kept):
    """To set only when memory is given back would fix the other threshold at 128 KB, and nothing would be kept."""
    settings = {}

    def mallopt(parameter: int, value: int) -> int:
        if parameter == M_MMAP_THRESHOLD and value > most:
            return 0
        settings[parameter] = value
        return 1

    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, never = -3, -1, -1  # mallopt(3)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    reuse_freed_memory()
    assert settings == ({} if kept is None else {M_MMAP_THRESHOLD: kept, M_TRIM_THRESHOLD: never})
