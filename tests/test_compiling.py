"""Whether a run is compiled: only where it pays, and only with the tools that compiling needs."""

import json
from pathlib import Path

import pytest
import torch

import train
from tests.fake_cuda import emulated
from tests.test_runs import call, pretrain  # noqa: F401
from training import compiling
from training.compiling import decide_to_compile, missing_tool, pays
from training.config import TrainConfig
from training.device import Process

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """tools(*names) makes a machine that has these: compilers, and "triton"."""

    def install(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            (folder / name).touch(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(compiling, "find_spec", lambda name: "its specification" if name in names else None)

    return install


@pytest.fixture
def compilations(monkeypatch):
    """The functions that torch.compile was called with; it returns them as they are."""
    found = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: found.append(function) or function)
    return found


def test_a_run_of_124m_pays_after_60_steps_and_a_small_model_s_thousand_steps_do_not():
    with emulated("cuda"):
        one, eight = (Process(0, n, GPU, "bfloat16") for n in (1, 8))
        step = 6 * 124e6 * 500_000
        assert pays(70 * step, one) and not pays(60 * step, one)
        assert pays(8 * 70 * step, eight) and not pays(8 * 60 * step, eight)
        assert not pays(1000 * 6 * 10e6 * 64 * 256, one)
        full = Process(0, 1, GPU, "float32")  # half the peak: half the FLOPs take as long
        assert pays(35 * step, full) and not pays(30 * step, full)


def test_a_gpu_of_unknown_speed_is_compiled_for(monkeypatch):
    with emulated("cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Unheard-of 1")
        assert pays(1.0, Process(0, 1, GPU, "bfloat16"))


@pytest.mark.parametrize("names, device, lacks", [
    (["g++"], CPU, None), (["clang++"], CPU, None), (["gcc"], CPU, "a compiler (g++ or clang++ or c++)"),
    (["triton", "gcc"], GPU, None), (["triton", "clang"], GPU, None), (["triton"], GPU, "a compiler (gcc or clang)"),
    (["gcc"], GPU, "the package triton"),
])  # fmt: skip
def test_what_is_missing_is_named(tools, names, device, lacks):
    tools(*names)
    assert missing_tool(device) == lacks


def test_a_compiler_that_the_environment_names_is_the_one_that_is_looked_for(tools, monkeypatch):
    tools("g++", "mine")
    monkeypatch.setenv("CXX", "mine")
    assert missing_tool(CPU) is None
    monkeypatch.setenv("CXX", "theirs")
    assert missing_tool(CPU) == "a compiler (theirs)"


def test_pythons_headers_are_looked_for(tools, monkeypatch, tmp_path):
    tools("g++")
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_tool(CPU).startswith(f"Python's C headers ({tmp_path}")


@pytest.mark.parametrize("choice, compiles", [("auto", False), (False, False), (True, True)])
def test_on_a_cpu_only_true_compiles(choice, compiles):
    assert decide_to_compile(TrainConfig(compile=choice), Process(0, 1, CPU, "float32"), 1e30) == (compiles, [])


SHORT_RUN = ["--device=cuda", "--max_iters=2", "--eval_interval=2", "--eval_iters=1"]


def test_a_short_run_on_a_gpu_needs_no_tools_and_says_nothing_of_them(pretrain, tools, compilations, capsys):  # noqa: F811
    tools()
    with emulated("cuda"):
        pretrain("a", *SHORT_RUN)
    assert not compilations and "compile" not in capsys.readouterr().out


def test_a_long_run_on_a_gpu_without_tools_says_so_and_runs(pretrain, tools, compilations, monkeypatch, capsys):  # noqa: F811
    tools("triton")
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.0)  # to an instant compiler, every run is long
    with emulated("cuda"):
        pretrain("a", *SHORT_RUN)
    notes = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
    assert not compilations and len(notes) == 1 and "for lack of a compiler (gcc or clang)" in notes[0]


def test_a_long_run_is_compiled_and_remembers_that_it_was_auto(pretrain, tools, compilations, monkeypatch):  # noqa: F811
    tools("triton", "gcc")
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.0)
    with emulated("cuda"):
        pretrain("a", *SHORT_RUN)
    assert len(compilations) == 2  # the network, and Newton-Schulz
    assert json.loads(Path("a/config.json").read_text())["train"]["compile"] == "auto"


def test_to_insist_without_tools_is_refused_before_there_is_a_run(pretrain, tools):  # noqa: F811
    tools("triton", "gcc")
    with pytest.raises(ValueError, match="compile=True needs a compiler .* install it, or leave compile out"):
        pretrain("a", "--compile=True")
    assert not Path("a").exists()


@pytest.mark.parametrize("choice", [True, False])
def test_eval_only_uses_the_network_that_training_uses(pretrain, call, compilations, capsys, choice):  # noqa: F811
    pretrain("a", "--optimizer=adamw", f"--compile={choice}")
    trained = list(compilations)
    capsys.readouterr()
    call(train.main, "--init_from=resume", "--out_dir=a", "--eval_only", config=None)
    assert len(trained) == choice and len(compilations) == 2 * len(trained)
    assert capsys.readouterr().out.startswith("val_loss ")
