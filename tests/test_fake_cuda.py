"""The commands on an emulated GPU: what a GPU refuses is not done, and texts and losses are the CPU's."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from decoding.beam import beam_search
from decoding.stream import generate
from tests.fake_cuda import emulated
from tests.test_runs import call, events, pretrain, talk, tune  # noqa: F401
from training import device as device_module

SMALL = ["--max_iters=6", "--eval_interval=3", "--sample_interval=3", "--compile=False", "--optimizer=adamw"]
DEVICES = ["auto", "cuda", "cuda:0"]


@pytest.fixture
def gpu():
    with emulated("cuda") as device:
        yield device


def losses(run: Path) -> list[float]:
    return [event.get("train_loss", event.get("val_loss")) for event in events(run, "step")]


def on_both(command, name: str, *options: str) -> tuple[Path, Path]:
    """The command on the CPU and on the emulated GPU: two runs."""
    cpu = command(f"{name}_cpu", *options, "--device=cpu")
    with emulated("cuda"):
        return cpu, command(f"{name}_gpu", *options, "--device=cuda")


# ---------------------------------------------------------------------------------------------------------------------
# The emulator refuses what a GPU refuses


@pytest.mark.parametrize(
    "mixed",
    [lambda a, b: a + b, lambda a, b: a @ b, lambda a, b: torch.cat((a, b)), lambda a, b: torch.where(a > 0, a, b),
     lambda a, b: b[a.long()], lambda a, b: torch.nn.functional.linear(a, b)],
)  # fmt: skip
def test_tensors_of_two_devices_are_refused(gpu, mixed):
    with pytest.raises(RuntimeError, match="same device"):
        mixed(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))


@pytest.mark.parametrize(
    "waiting", [lambda x: x.item(), lambda x: x.cpu(), lambda x: x + torch.ones(1).to("cuda"), lambda x: bool(x > 0),
                lambda x: x.tolist(), lambda x: x[x > 0]],
)  # fmt: skip
def test_what_makes_the_host_wait_is_counted_and_refused_while_a_graph_is_recorded(gpu, waiting):
    x = torch.ones((), device="cuda")
    waiting(x)
    assert gpu.waits() == 1
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            waiting(x)


def test_a_recorded_graph_has_not_happened_and_its_replay_uses_what_is_there_then(gpu):
    x, total = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += 2 * x
        doubled = total * 2
    assert total.tolist() == [0, 0] and doubled.isnan().all()
    for step in (1, 2):
        x.fill_(step)
        graph.replay()
    assert total.tolist() == [6, 6] and doubled.tolist() == [12, 12]


def test_a_device_without_an_index_cannot_be_set_and_a_picked_one_has_one(gpu):
    from training.device import pick_device

    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    assert {str(pick_device(name)) for name in DEVICES} == {"cuda:0"}
    with pytest.raises(ValueError, match="PyTorch finds 1 CUDA GPUs"):
        pick_device("cuda:1")


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_gives_the_cpus_losses(pretrain, dtype):  # noqa: F811
    cpu, gpu = on_both(pretrain, "a", *SMALL, f"--dtype={dtype}")
    assert losses(cpu) == pytest.approx(losses(gpu), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_every_name_of_the_device_trains_resumes_and_evaluates(pretrain, call, gpu, capsys, device):  # noqa: F811
    run = pretrain("a", *SMALL, f"--device={device}", "--optimizer=muon", "--dropout=0.1")
    call(train.main, "--init_from=resume", "--out_dir=a", "--max_iters=9", config=None)
    assert [event["step"] for event in events(run, "val_loss")] == [0, 3, 6, 9]
    assert "bfloat16 on 1 x cuda:0" in capsys.readouterr().out
    call(train.main, "--init_from=resume", "--out_dir=a", "--eval_only", config=None)
    last = events(run, "val_loss")[-1]
    assert f"val_loss {last['val_loss']:.4f}" in capsys.readouterr().out


def test_killed_and_resumed_is_never_stopped(pretrain, call, gpu, monkeypatch):  # noqa: F811
    whole = pretrain("whole", *SMALL, "--device=cuda", "--dropout=0.1")
    next_batches = train.Trainer.next_batches

    def deadly(trainer, step):
        if step == 4:
            raise KeyboardInterrupt
        return next_batches(trainer, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "next_batches", deadly)
        pretrain("killed", *SMALL, "--device=cuda", "--dropout=0.1")
    call(train.main, "--init_from=resume", "--out_dir=killed", config=None)
    assert losses(Path("killed")) == losses(whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_between_two_logs_the_host_never_waits_for_the_gpu(pretrain, gpu, monkeypatch, dtype, optimizer):  # noqa: F811
    waits, flush = [], train.Trainer.flush

    def watched(trainer):
        waits.append(gpu.waits())
        flush(trainer)
        waits.append(gpu.waits())

    monkeypatch.setattr(train.Trainer, "flush", watched)
    options = ["--max_iters=8", "--eval_interval=100", "--log_interval=4", f"--dtype={dtype}"]
    pretrain("a", *options, "--device=cuda", "--compile=False", f"--optimizer={optimizer}")
    # flushes: before the evaluation at step 0, at steps 4 and 8, and before the last evaluation
    assert len(waits) == 8 and waits[4] == waits[3] and waits[5] > waits[4], gpu.where


@pytest.mark.parametrize("more", [[], ["--packing=False"], ["--lora_rank=2"]], ids=["packed", "padded", "lora"])
def test_fine_tuning_gives_the_cpus_losses(pretrain, tune, more):  # noqa: F811
    pretrain("base")
    options = [*SMALL, "--eval_questions=3", "--eval_tokens=5", "--dtype=float32", *more]
    cpu, gpu = on_both(lambda name, *given: tune(name, "base", *options, *given), "a")
    assert losses(cpu) == pytest.approx(losses(gpu), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize(
    "options",
    [["--temperature=0"], ["--seed=3"], ["--num_samples=3"], ["--num_beams=3", "--num_samples=2"],
     ["--repetition_penalty=1.2", "--top_k=5"]], ids=" ".join,
)  # fmt: skip
def test_samples_are_the_cpus(pretrain, call, capsys, options):  # noqa: F811
    pretrain("a")
    texts = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        arguments = ["--out_dir=a", "--prompt=the ", "--max_new_tokens=70", *options, "--dtype=float32"]
        with emulated("cuda") as gpu:
            call(sample.main, *arguments, f"--device={device}", config=None)
        texts.append(capsys.readouterr().out)
        recorded = [graph.replays for graph in gpu.graphs]
    assert texts[0] == texts[1] and len(texts[0]) > 70
    if not any("beams" in option for option in options):
        assert len(recorded) >= 2 and min(recorded) > 1  # a graph for each reading of the context, and its steps


def test_scores_and_chats_are_the_cpus(pretrain, tune, call, capsys, monkeypatch):  # noqa: F811
    tune("a", pretrain("base"), "--max_iters=4")
    Path("text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 5)
    told = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nfox\n/quit\n"))
        with emulated("cuda"):
            common = ["--out_dir=a", f"--device={device}", "--dtype=float32"]
            call(sample.main, "--score=text.txt", "--json", *common, config=None)
            call(sample.main, "--chat", "--max_new_tokens=30", *common, config=None)
        score, *rest = capsys.readouterr().out.splitlines()
        told.append((pytest.approx(json.loads(score)["log_likelihood"], rel=1e-6), rest))
    assert told[0][1] == told[1][1] and told[0][0] == told[1][0].expected


def test_recorded_steps_give_the_tokens_of_plain_steps_across_refills_of_the_context(tiny_gpt):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    plain = generate(tiny_gpt(block_size=32).float(), prompts, 60, temperature=0)
    beams = beam_search(tiny_gpt(block_size=32).float(), prompts, 30, num_beams=3)
    with emulated("cuda") as gpu:
        model = tiny_gpt(block_size=32).float().to("cuda")
        assert generate(model, prompts, 60, temperature=0) == plain
        assert sum(graph.replays for graph in gpu.graphs) > 40
        found = beam_search(model, prompts, 30, num_beams=3)
    assert [[beam.tokens for beam in row] for row in found] == [[beam.tokens for beam in row] for row in beams]


def test_apples_gpu_trains_and_samples_without_float64(pretrain, call, capsys):  # noqa: F811
    cpu = pretrain("cpu", *SMALL, "--device=cpu")
    with emulated("mps"):
        gpu = pretrain("mps", *SMALL, "--device=mps")
        call(sample.main, "--out_dir=mps", "--prompt=the ", "--max_new_tokens=20", "--device=mps", config=None)
    assert losses(cpu) == pytest.approx(losses(gpu), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def test_a_peak_that_was_measured_too_low_is_measured_again_and_never_exceeded(monkeypatch):
    measured = iter([100.0, 400.0, 300.0])
    monkeypatch.setattr(device_module, "cpu_flops", lambda dtype: next(measured))
    peak = device_module.Peak(device_module.Process(0, 1, torch.device("cpu"), "float32"))
    assert peak.mfu(50.0) == 0.5
    assert peak.mfu(200.0) == 0.5  # measured again: 400
    assert peak.mfu(500.0) is None  # measured once more, to no avail
