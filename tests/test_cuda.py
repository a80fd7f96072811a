"""The commands on a real CUDA GPU (`pytest -m cuda`): its kernels, precisions, graphs and waits, against the CPU.

A GPU rounds differently from a CPU, and their texts may differ where two tokens are almost equally likely. So a text
from the GPU is judged by its log-probabilities: the GPU must report those that the CPU gives the same tokens.

The tolerances of losses and log-probabilities are at least four times what the same tests show on a CPU under autocast,
whose bfloat16 rounds alike and whose float16 has the precision of TF32. What takes time here is compiling.
"""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from bench.attention_memory import BATCHES, measure
from decoding.beam import beam_search
from decoding.score import log_likelihood
from decoding.stream import prompt_tokens
from model import GPT, GPTConfig
from runs.run import Run
from tests.test_runs import call, events, pretrain, talk, tune  # noqa: F401

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.08, "float16": 0.02}  # of losses and log-probabilities; float32 is TF32
STEPS = ["--max_iters=6", "--eval_interval=3", "--log_interval=3", "--optimizer=adamw"]
PLAIN = [*STEPS, "--compile=False"]


@pytest.fixture(autouse=True)
def precise_products():
    """Multiply float32 numbers in float32, unless a command asks for TF32, as training does; no test leaves it on."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def losses(run: Path) -> list[float]:
    return [event.get("train_loss", event.get("val_loss")) for event in events(run, "step")]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_training_resuming_evaluating_and_previews_follow_the_cpu(pretrain, call, capsys, dtype):  # noqa: F811
    cpu = pretrain("on_cpu", *PLAIN, "--max_iters=9")
    gpu = pretrain("on_gpu", *PLAIN, "--device=cuda", f"--dtype={dtype}", "--sample_interval=3")
    call(train.main, "--init_from=resume", "--out_dir=on_gpu", "--max_iters=9", config=None)
    assert losses(gpu) == pytest.approx(losses(cpu), abs=TOLERANCE[dtype])
    capsys.readouterr()
    call(train.main, "--init_from=resume", "--out_dir=on_gpu", "--eval_only", config=None)
    (evaluated,) = re.findall(r"val_loss ([\d.]+)", capsys.readouterr().out)
    assert float(evaluated) == pytest.approx(events(gpu, "val_loss")[-1]["val_loss"], abs=TOLERANCE[dtype] / 10)


@pytest.mark.parametrize("more", [[], ["--packing=False"], ["--lora_rank=2"]], ids=["packed", "padded", "lora"])
@pytest.mark.parametrize(
    "dtype, compiled", [("float32", False), ("bfloat16", False), ("bfloat16", True)],
    ids=["float32", "bfloat16", "compiled"],
)  # fmt: skip
def test_fine_tuning_follows_the_cpu(pretrain, tune, capsys, more, dtype, compiled):  # noqa: F811
    pretrain("base", *STEPS)
    options = [*STEPS, *more, "--learning_rate=0.01", "--sample_interval=3", "--eval_questions=3", "--eval_tokens=5"]
    cpu = tune("on_cpu", "base", *options)
    gpu = tune("on_gpu", "base", *options, "--device=cuda", f"--dtype={dtype}", f"--compile={compiled}")
    assert losses(gpu) == pytest.approx(losses(cpu), abs=TOLERANCE[dtype])
    assert capsys.readouterr().out.count("of 3 answers end by themselves") >= 4


def test_training_in_bfloat16_compiled_stays_near_float32(pretrain):  # noqa: F811
    options = ["--device=cuda", "--n_layer=3", "--n_embd=128", "--max_iters=60", "--eval_interval=30"]
    exact = torch.tensor(losses(pretrain("exact", *options, "--dtype=float32", "--compile=False")))
    found = torch.tensor(losses(pretrain("found", *options, "--dtype=bfloat16", "--compile=True")))
    assert exact[-1] < exact[0] / 2  # they have learned
    assert (found - exact).abs().mean() < 0.05 and (found[-1] - exact[-1]).abs() < 0.02, (found - exact).tolist()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuned", [False, True], ids=["pretraining", "fine-tuning"])
def test_a_step_never_waits_for_the_gpu(pretrain, tune, monkeypatch, tuned, dtype, optimizer):  # noqa: F811
    pretrain("base", *PLAIN)
    marks = []

    def watch(name, mode):
        method = getattr(train.Trainer, name)

        def watched(trainer, *arguments):
            torch.cuda.set_sync_debug_mode(mode)
            marks.append(name)
            return method(trainer, *arguments)

        monkeypatch.setattr(train.Trainer, name, watched)

    watch("next_batches", "error")  # from here on, a wait is an error
    watch("flush", "default")
    options = ["--device=cuda", f"--dtype={dtype}", *PLAIN, f"--optimizer={optimizer}"]
    try:
        tune("a", "base", *options) if tuned else pretrain("a", *options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert marks.count("next_batches") == 6 and "flush" in marks


# ---------------------------------------------------------------------------------------------------------------------
# Attention as it is trained, compiled


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_flash_attention_equals_the_softmax_written_out(dtype, position, window, packed):
    T = 200  # no multiple of a kernel's block
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=T, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=128, head_dim=64, position=position,
        sliding_window=window,
    )  # fmt: skip
    model = GPT(config).cuda()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    idx, targets = (torch.randint(101, (3, T), device="cuda") for _ in range(2))
    packing = {}
    if packed:  # documents that end anywhere, one of a single token, and a row that is one document
        starts = torch.tensor([[0, 1, 77, 128], [0, 100, 150, 199], [0, 0, 0, 0]], device="cuda")
        at = torch.arange(T, device="cuda")
        documents = (at >= starts[:, :, None]).sum(1) - 1
        packing = {"documents": documents, "positions": at - starts.gather(1, documents)}

    def run(network, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
        config.attention = kind
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            loss = network(idx, targets, **packing)[1]
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))

    torch._dynamo.reset()  # the cases before this one count towards the limit of recompilations
    flash = run(torch.compile(model, dynamic=False), "flash", dtype)
    written_out = run(model, "math", dtype)
    exact = run(model.double(), "math", torch.float64)
    # A wrong mask shows as an error near 1. In bfloat16 the kernel may be twice as far off as the formula is.
    assert error(flash, exact) < (2e-3 if dtype == torch.float32 else 2 * error(written_out, exact) + 1e-3)


@pytest.mark.parametrize("batch", BATCHES)
def test_memory_of_a_compiled_training_step_is_linear_in_the_context(tmp_path, batch):
    (small, *_), (large, *_) = measure(batch, "flash", [4096, 8192], "cuda", tmp_path)
    assert 0 < large < 2.4 * small, (small, large)  # scores of (T, T) numbers would make it 4 times as large


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def assert_likely(model, prompt: list[int], tokens: list[int], logprobs: list[float], tolerance: float) -> None:
    """The log-probabilities that were reported for the tokens after the prompt are the ones that the model gives."""
    expected = log_likelihood(model, prompt + tokens)[len(prompt) - 1 :]
    assert logprobs == pytest.approx(expected.tolist(), abs=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_samples_have_the_log_probabilities_of_the_cpu(pretrain, call, capsys, dtype):  # noqa: F811
    run = Run.open(pretrain("a", "--max_iters=40", "--eval_interval=40"))
    model, prompt = run.load_model(), prompt_tokens(run.tokenizer, "the ")
    for count, options in [
        (1, ["--temperature=0"]), (1, ["--seed=3", "--top_k=9", "--top_p=0.9", "--min_p=0.01"]),
        (3, ["--num_samples=3"]), (1, ["--repetition_penalty=1.2"]), (2, ["--num_beams=3", "--num_samples=2"]),
    ]:  # fmt: skip
        capsys.readouterr()
        arguments = ["--out_dir=a", "--prompt=the ", "--max_new_tokens=100", "--json", *options]
        call(sample.main, *arguments, "--device=cuda", f"--dtype={dtype}", config=None)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == count, options
        for line in lines:
            assert_likely(model, prompt, line["tokens"], line["logprobs"], TOLERANCE[dtype])


def test_scores_are_the_cpus_and_a_chat_answers(pretrain, tune, call, capsys, monkeypatch):  # noqa: F811
    tune("a", pretrain("base"), "--max_iters=4")
    Path("text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 20)
    scores = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        options = ["--out_dir=a", f"--device={device}", "--dtype=float32"]
        call(sample.main, "--score=text.txt", "--json", *options, config=None)
        scores.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert scores[0] == pytest.approx(scores[1], rel=2e-3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nfox\n/quit\n"))
    call(sample.main, "--chat", "--max_new_tokens=60", "--out_dir=a", "--device=cuda", config=None)
    assert sum(line.startswith("> ") for line in capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_beams_over_prompts_of_ever_new_lengths_have_the_log_probabilities_of_the_cpu(tiny_gpt, dtype, kv_heads):
    options = {"block_size": 96, "n_embd": 64, "head_dim": 64, "n_kv_head": kv_heads}
    cpu, gpu = tiny_gpt(**options).to(dtype).float(), tiny_gpt(**options).to(dtype).cuda()
    for n in range(1, 70, 3):  # every call has shapes that no call before it had, and some outgrow the context
        prompts = [[(7 * i + n) % 23 for i in range(length)] for length in (n, n + 1, 2 * n)]
        found = beam_search(gpu, prompts, 30, num_beams=3, num_return=2)
        for prompt, beams in zip(prompts, found, strict=True):
            for beam in beams:
                tolerance = 1e-3 if dtype == torch.float32 else 0.4
                assert_likely(cpu, prompt, beam.tokens, beam.logprobs, tolerance)
