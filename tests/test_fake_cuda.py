"""The commands on an emulated GPU: what a GPU refuses is not done, and texts and losses are the CPU's."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from decoding.beam import beam_search
from decoding.stream import generate
from tests.fake_cuda import OnGPU, emulated
from tests.test_runs import call, events, pretrain, talk, tune  # noqa: F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: see tests/test_cuda.py")
DEVICES = ["auto", "cuda", "cuda:0"]
TRAIN = ["--max_iters=6", "--eval_interval=3", "--eval_iters=2", "--batch_size=4", "--dropout=0.1", "--compile=False",
         "--optimizer=adamw"]  # fmt: skip
PREVIEW = ["--sample_interval=6", "--dtype=float32"]
# Without dropout: packed rows attend document by document on a CPU only, which draws other numbers.
TUNE = [*TRAIN, *PREVIEW, "--dropout=0", "--learning_rate=0.01", "--eval_questions=3", "--eval_tokens=5"]


@pytest.fixture
def gpu():
    with emulated("cuda") as device:
        yield device


@pytest.fixture
def compared(capsys):
    """compare(run) calls run(device) on the CPU and on the emulated GPU by each of its names.

    run returns losses, which must be the CPU's; so must what it prints.
    """

    def compare(run, kind="cuda", names=DEVICES) -> None:
        capsys.readouterr()
        expected, text = run("cpu"), printed(capsys)
        for name in names:
            with emulated(kind) as gpu:
                assert run(name) == pytest.approx(expected, rel=1e-6)
            assert printed(capsys) == text
            assert gpu.waits  # it was not the CPU that ran

    return compare


def printed(capsys) -> str:
    """What was printed since the last time, but for what the clock, the device and an earlier run decide."""
    left_out = r"^\w+ held a run .*\n| on 1 x \S+|[\d,]+ tokens/s|, mfu \d+%|, \d+ s$"
    return re.sub(left_out, "", capsys.readouterr().out, flags=re.M)


def losses(run: Path) -> list[float]:
    return [event.get("train_loss", event.get("val_loss")) for event in events(run, "step")]


# ---------------------------------------------------------------------------------------------------------------------
# The emulator refuses what a GPU refuses


@pytest.mark.parametrize(
    "mixed",
    [lambda a, b: a + b, lambda a, b: b.add_(a), lambda a, b: a @ b, lambda a, b: torch.cat((a, b)),
     lambda a, b: torch.where(a > 0, a, b), lambda a, b: torch.nn.functional.linear(a, b), lambda a, b: b[a.long()],
     lambda a, b: torch.stack((a[0, 0], b[0, 0])), lambda a, b: setattr(a, "data", b),
     lambda a, b: torch.nn.functional.embedding(a.long(), b)],
)  # fmt: skip
def test_tensors_of_two_devices_are_refused(gpu, mixed):
    with pytest.raises(RuntimeError, match="same device"):
        mixed(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))


def test_what_a_gpu_allows_is_allowed(gpu):
    x = torch.arange(4.0, device="cuda")
    assert (x * torch.tensor(2.0) + 1).tolist() == [1, 3, 5, 7]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    assert x.device == torch.device("cuda", 0) and x.is_cuda and (x * 2).sum().is_cuda and not x.cpu().is_cuda
    x.requires_grad_()
    (x * x).sum().backward()
    assert x.grad.device == x.device and x.grad.tolist() == [0, 2, 4, 6]


def test_the_host_cannot_read_the_devices_memory_nor_share_its_generator(gpu):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(2, device="cuda").numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    torch.default_generator.manual_seed(3)
    first = torch.rand(4, device="cuda").tolist()
    torch.default_generator.manual_seed(3)  # not the device's
    assert torch.rand(4, device="cuda").tolist() != first


WAITING = {
    "item": lambda x: x[0].item(), "bool": lambda x: bool((x > 0).all()), "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x.sum()), "format": lambda x: f"{x.sum():.1f}", "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(), "to_cpu": lambda x: x.to("cpu", non_blocking=True),
    "to_gpu": lambda x: torch.ones(2).to(x.device), "unpinned": lambda x: torch.ones(2).to("cuda", non_blocking=True),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device="cuda"), "copy_": lambda x: x.copy_(torch.ones(2)),
    "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 0], "list": lambda x: x[[1, 0]],
    "cpu_index": lambda x: x[torch.tensor([1, 0])], "set": lambda x: x.__setitem__(slice(2), torch.ones(2)),
    "synchronize": lambda x: torch.cuda.synchronize(),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITING)
def test_what_makes_the_host_wait_is_counted_and_refused_while_a_graph_is_recorded(gpu, name):
    x = torch.ones(2, device="cuda")
    assert gpu.waits == 0
    WAITING[name](x)
    assert gpu.waits == 1, gpu.where
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            WAITING[name](x)


def test_a_copy_from_pinned_memory_is_no_wait_but_is_refused_while_a_graph_is_recorded(gpu):
    x = torch.ones(2).pin_memory()
    assert x.to("cuda", non_blocking=True).tolist() == [1, 1] and gpu.events["copy to the GPU"] == 1
    with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.to("cuda", non_blocking=True)


def test_a_recorded_graph_has_not_happened_and_its_replay_uses_the_tensors_then_and_the_numbers_of_now(gpu):
    x, total, number = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += number * x
        doubled = total * 2
    assert total.tolist() == [0, 0] and doubled.isnan().all()
    number = 7  # is no tensor, so the graph goes on with 2
    for step in (1, 2):
        x.fill_(step)
        graph.replay()
    assert total.tolist() == [6, 6] and doubled.tolist() == [12, 12] and graph.replays == 2


def test_a_moved_model_keeps_its_parameters_and_its_ties(tiny_gpt):
    model = tiny_gpt()
    names = {id(p): name for name, p in model.named_parameters()}
    with emulated("cuda"):
        model.to("cuda")
        assert {id(p): name for name, p in model.named_parameters()} == names
        assert model.head.weight is model.tok_emb.weight and all(p.is_cuda for p in model.parameters())
        assert model.cos.is_cuda and model.cpu() is model
    assert not any(isinstance(x, OnGPU) for x in model.state_dict().values()) and model.cos.device.type == "cpu"


def test_nothing_of_the_emulation_is_left_behind():
    def known():
        modules = (torch, torch._C, torch.cuda, torch.mps, torch.backends.mps, torch.nn.Module)
        return {(module, name): value for module in modules for name, value in vars(module).items()}

    before = known()
    with emulated("cuda"):
        changed = {name for key, value in known().items() if before.get(name := key) is not value}
        assert (torch.cuda, "is_available") in changed and (torch.nn.Module, "_apply") in changed
    assert known() == before
    assert not torch.ones(1).is_cuda and not torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_gives_the_cpus_losses(pretrain, compared, dtype):  # noqa: F811
    # A CPU's fused attention is in float32; written out, the softmax is in the training's precision on both
    precision = [f"--dtype={dtype}", *(["--attention=math"] if dtype != "float32" else [])]
    compared(lambda device: losses(pretrain("a", *TRAIN, *precision, f"--device={device}")))


def test_previews_are_the_cpus(pretrain, compared):  # noqa: F811
    compared(lambda device: losses(pretrain("a", *TRAIN, *PREVIEW, f"--device={device}")))


def test_the_default_precision_is_bfloat16_and_close_to_float32(pretrain, gpu, capsys):  # noqa: F811
    runs = [pretrain(f"on_{device}", "--compile=False", "--dropout=0.1", f"--device={device}", f"--dtype={dtype}")
            for device, dtype in (("cpu", "float32"), ("auto", "auto"))]  # fmt: skip
    assert "float32 on 1 x cpu" in (out := capsys.readouterr().out) and "bfloat16 on 1 x cuda:0" in out
    cpu, cuda = (torch.tensor(losses(run)) for run in runs)
    assert 1e-6 < (cpu - cuda).abs().max() < 0.02


def test_resuming_and_evaluating_give_the_cpus_losses(pretrain, call, compared):  # noqa: F811
    def run(device):
        found = pretrain("a", *TRAIN, f"--device={device}", "--dtype=float32")
        call(train.main, "--init_from=resume", "--out_dir=a", "--max_iters=9", config=None)
        call(train.main, "--init_from=resume", "--out_dir=a", "--eval_only", config=None)  # prints the loss
        return losses(found)

    compared(run)


def test_killed_and_resumed_is_never_stopped(pretrain, call, gpu, monkeypatch):  # noqa: F811
    whole = losses(pretrain("whole", *TRAIN, "--device=cuda"))
    next_batches = train.Trainer.next_batches

    def deadly(trainer, step):
        if step == 4:
            raise KeyboardInterrupt
        return next_batches(trainer, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "next_batches", deadly)
        pretrain("killed", *TRAIN, "--device=cuda")
    call(train.main, "--init_from=resume", "--out_dir=killed", config=None)
    assert losses(Path("killed")) == whole


@pytest.fixture
def steps(gpu, monkeypatch):
    """What each training step copies and waits for, from fetching its batches to the next step or log."""
    found, marks = [], []

    def watch(name):
        method = getattr(train.Trainer, name)

        def watched(trainer, *arguments):
            if marks and marks[-1][0] == "next_batches":
                found.append(gpu.where - marks[-1][1])
            marks.append((name, gpu.where.copy()))
            return method(trainer, *arguments)

        monkeypatch.setattr(train.Trainer, name, watched)

    watch("next_batches")
    watch("flush")
    return found


STEPS = ["--max_iters=4", "--eval_iters=1", "--eval_interval=4", "--log_interval=4", "--device=cuda", "--compile=False"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_of_pretraining_never_waits_for_the_gpu(pretrain, steps, dtype, optimizer):  # noqa: F811
    options = [f"--dtype={dtype}", f"--optimizer={optimizer}", "--gradient_accumulation_steps=2", "--dropout=0.1"]
    pretrain("a", *STEPS, *options)
    kinds = {event.split(",")[0] for step in steps for event in step}
    if dtype == "float16":  # the host must know whether a gradient overflowed, before it changes the weights
        kinds -= {"wait: __bool__", "wait: item"}
    assert len(steps) == 4 and kinds == {"copy to the GPU"}, steps


@pytest.mark.parametrize("more", [[], ["--packing=False"], ["--lora_rank=2"]], ids=["packed", "padded", "lora"])
def test_a_step_of_fine_tuning_never_waits_for_the_gpu(pretrain, tune, steps, more):  # noqa: F811
    pretrain("base", "--max_iters=1")
    steps.clear()
    tune("a", "base", *STEPS, "--optimizer=adamw", *more)
    assert len(steps) == 4
    for step in steps:
        assert {event.split(",")[0] for event in step} == {"copy to the GPU"}, step


@pytest.mark.parametrize(
    "more",  # in bfloat16 the two forms of attention round differently: there both write the softmax out
    [[], ["--packing=False"], ["--lora_rank=2"], ["--lora_rank=2", "--dtype=bfloat16", "--attention=math"]],
    ids=" ".join,
)
def test_fine_tuning_gives_the_cpus_losses_and_answers(pretrain, tune, compared, more):  # noqa: F811
    pretrain("base")
    compared(lambda device: losses(tune("a", "base", *TUNE, *more, f"--device={device}")))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize(
    "options",
    [["--temperature=0"], ["--seed=3", "--top_k=9", "--top_p=0.9", "--min_p=0.01"], ["--num_samples=3"],
     ["--num_beams=3", "--num_samples=2"], ["--repetition_penalty=1.2", "--top_k=5"],
     ["--temperature=0", "--dtype=bfloat16"]], ids=" ".join,
)  # fmt: skip
def test_samples_are_the_cpus(pretrain, call, compared, options):  # noqa: F811
    pretrain("a")
    arguments = ["--out_dir=a", "--prompt=the ", "--max_new_tokens=60", "--dtype=float32", *options]
    compared(lambda device: call(sample.main, *arguments, f"--device={device}", config=None) or [])


def test_scores_and_chats_are_the_cpus(pretrain, tune, call, compared, monkeypatch):  # noqa: F811
    tune("a", pretrain("base"), "--max_iters=4")
    Path("text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 5)

    def run(device):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nfox\n/quit\n"))
        common = ["--out_dir=a", f"--device={device}", "--dtype=float32"]
        call(sample.main, "--score=text.txt", *common, config=None)
        for run in ("a", "base"):
            call(sample.main, "--chat", "--max_new_tokens=20", *common, f"--out_dir={run}", config=None)
        return []

    compared(run)


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_recorded_steps_give_the_tokens_of_plain_steps_across_refills_of_the_context(tiny_gpt, position):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]

    def run(model):
        texts = [generate(model, prompts, 50, temperature=temperature, seed=2) for temperature in (0, 1)]
        return texts, [[beam.tokens for beam in row] for row in beam_search(model, prompts, 30, num_beams=3)]

    model = tiny_gpt(block_size=32, position=position)  # in float64
    expected = run(model)
    with emulated("cuda") as gpu:
        assert run(model.to("cuda")) == expected
    replays = [graph.replays for graph in gpu.graphs]
    assert len(replays) >= 4 and min(replays) > 1  # one for each reading of the context, and its steps


# ---------------------------------------------------------------------------------------------------------------------
# Apple's GPU


def test_apples_gpu_has_no_float64():
    with emulated("mps"):
        x = torch.ones(2, device="mps")
        for convert in (lambda: x.double(), lambda: torch.ones(2).double().to("mps"),
                        lambda: torch.zeros(2, dtype=torch.float64, device="mps")):  # fmt: skip
            with pytest.raises(TypeError, match="doesn't support float64"):
                convert()


def test_on_apples_gpu_every_command_gives_the_cpus_losses_and_texts(pretrain, tune, call, compared):  # noqa: F811
    def run(device):
        trained = pretrain("a", *TRAIN, *PREVIEW, f"--device={device}")
        tuned = tune("b", trained, *TUNE, "--lora_rank=2", f"--device={device}")
        for more in (["--num_samples=2", "--repetition_penalty=1.1"], ["--num_beams=3"], ["--temperature=0"]):
            arguments = ["--out_dir=a", "--prompt=the ", "--max_new_tokens=20", *more, f"--device={device}"]
            call(sample.main, *arguments, config=None)
        return losses(trained) + losses(tuned)

    compared(run, "mps", ["mps"])
