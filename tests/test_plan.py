"""training/plan.py and --plan: what is counted is what a process takes, and nothing is written or started."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finetune
import fused
import train
from model import GPT
from tasks.plan import job_flops
from tests.helpers import label
from tests.plan_helpers import job, train_steps
from tests.test_runs import call, pretrain, talk, tune  # noqa: F401
from training import plan
from training.device import PEAK_FLOPS
from training.lora import TARGETS, LoraConfig
from training.plan import (
    at_most,
    count_memory,
    count_passes,
    count_weights,
    largest_batch,
    need,
    parse_memory,
    sharded_peaks,
)

ROOT = Path(__file__).parent.parent
LORA = LoraConfig(4, 16.0, TARGETS, (0, 1))
KINDS = [
    {}, {"attention": "math"}, {"position": "alibi"}, {"dropout": 0.1}, {"n_kv_head": 1}, {"tie_embeddings": False},
    {"mlp": "gelu", "norm": "layernorm", "bias": True, "position": "learned", "qk_norm": False},
    {"mlp": "relu2", "position": "sinusoidal", "label_smoothing": 0.1, "max_z_loss": 0.1},
    {"mlp": "geglu", "qkv_bias": True, "nope_every": 2, "sliding_window": 5},
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize("micro_steps, optimizer, usual_heap", [(1, "muon", False), (2, "adamw", True)])
def test_the_counted_peak_is_the_measured_one(micro_steps, optimizer, usual_heap):
    options = {
        "n_layer": 2, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "block_size": 128, "batch_size": 16,
        "micro_steps": micro_steps, "optimizer": optimizer,
    }  # fmt: skip
    counted = count_memory(job(**options))
    heap = {} if usual_heap else {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, "-m", "tests.plan_helpers", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | heap, capture_output=True, text=True, check=True)
    if usual_heap:
        assert need(counted, gpu=False) - counted.saved == pytest.approx(int(done.stdout), rel=0.15)
    else:
        # The libraries' own buffers depend on the processor: 2% here, 6% on others
        assert counted.peak == pytest.approx(int(done.stdout), rel=0.1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_steps, optimizer, more", [(1, "muon", {}), (2, "adamw", {"dropout": 0.1})])
def test_the_counted_peak_is_that_of_a_gpu(dtype, micro_steps, optimizer, more):
    shape = {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 32768, "block_size": 1024, "batch_size": 8}
    planned = job(dtype, True, micro_steps=micro_steps, optimizer=optimizer, **shape, **more)
    train_steps(job(dtype, True, optimizer=optimizer), [1], "cuda")  # the workspaces of the libraries
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_steps(planned, [1, 8], "cuda")
    assert count_memory(planned).peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


@pytest.mark.parametrize("optimizer, numbers", [("adamw", 2), ("muon", 1)])
def test_weights_gradients_and_state_are_four_bytes_a_number(optimizer, numbers):
    asked = job(optimizer=optimizer, tie_embeddings=False)
    model, memory = GPT(asked.model), count_memory(asked)
    small = 4 * sum(p.numel() for p in model.parameters() if p.dim() < 2) + 4 * len(list(model.parameters()))
    embeddings = 4 * (model.tok_emb.weight.numel() + model.head.weight.numel())
    assert memory.weights == 4 * (model.num_params() + model.cos.numel() + model.sin.numel())
    assert memory.gradients == 4 * model.num_params()
    state = 4 * numbers * model.num_params() + (embeddings if optimizer == "muon" else 0)
    assert state <= memory.optimizer <= state + 2 * small
    assert memory.saved == memory.gradients + memory.optimizer


def test_sharded_processes_need_their_part_of_the_weights_and_two_blocks_more():
    asked = job(n_layer=12, n_embd=256, vocab_size=512)
    whole = count_memory(asked)
    held, blocks = whole.weights + whole.gradients + whole.optimizer, 12
    two, many = sharded_peaks(asked, whole, [2, 1000])
    assert two - many == pytest.approx(held * (1 / 2 - 1 / 1000))
    gathered = 2 * 4 * (512 * 256 + 2 * (whole.weights / 4 - 512 * 256) / blocks)  # with their gradients
    assert gathered < many - held / 1000 < 1.3 * gathered + whole.activations + whole.logits
    assert many < whole.peak / 3


@pytest.mark.parametrize("gpu", [False, True])
def test_checkpointed_blocks_keep_little_but_their_input(gpu):
    asked = job(gpu=gpu, n_layer=4, batch_size=8, dropout=0.1)
    less = replace(asked, config=replace(asked.config, activation_checkpointing=True))
    usual, checkpointed = count_memory(asked), count_memory(less)
    stream = 4 * 8 * 32 * 32  # bytes of the residual stream
    assert 4 * stream <= checkpointed.activations < 9 * stream < usual.activations / 3
    assert checkpointed.peak < usual.peak and checkpointed.weights == usual.weights


def test_activations_are_what_autograd_saves_and_the_residual_stream():
    asked = job()
    model, kept = GPT(asked.model), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def save(x):
        if not torch.is_tensor(kept.get("end")):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    model.norm.register_forward_pre_hook(lambda _module, inputs: kept.update(end=inputs[0]))
    idx = torch.zeros(2, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        _, loss = model(idx, targets=idx, target_count=1)
    tables = {x.untyped_storage().data_ptr() for x in (model.cos, model.sin)}
    sizes = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights | tables]
    assert count_memory(asked).activations == pytest.approx(sum(sizes), rel=0.1)


@pytest.mark.parametrize("options, micro_steps", [(KINDS[3], 1), (KINDS[6], 2)])
def test_a_deep_model_follows_from_two_shallow_ones(options, micro_steps):
    deep = job(n_layer=4, micro_steps=micro_steps, **options)
    memory = count_memory(deep)
    assert count_passes(deep, 4) == (memory.activations, memory.logits, memory.passes - memory.optimizer)


def test_a_large_batch_follows_from_two_smaller_ones(monkeypatch):
    large = job(batch_size=24)
    expected = count_passes(large, 2)
    monkeypatch.setattr(plan, "TOKENS", 4 * large.model.block_size)
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cuda", large.model.vocab_size * large.model.block_size)
    ran, run_passes = [], plan.run_passes
    monkeypatch.setattr(plan, "run_passes", lambda *args: ran.append(args[0].config.batch_size) or run_passes(*args))
    assert count_passes(large, 2) == pytest.approx(expected, rel=0.02) and ran == [4, 8]


@pytest.mark.parametrize("options", KINDS, ids=label)
@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_the_quick_bound_is_never_below_the_count(options, lora):
    for gpu, T in ((True, 128), (False, 8)):
        asked = job(gpu=gpu, lora=lora, micro_steps=2, **options | {"block_size": T})
        assert at_most(asked, count_weights(asked.model)) - 2**28 > need(count_memory(asked), gpu)


def test_lora_keeps_no_gradient_or_state_of_frozen_weights():
    asked = job(lora=LORA)
    corrected, model = count_memory(asked), asked.build(1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < model.num_params() / 3
    assert corrected.gradients == 4 * trained
    assert corrected.optimizer == pytest.approx(8 * trained, rel=0.01)
    assert corrected.saved == corrected.gradients + corrected.optimizer
    assert corrected.weights > 4 * model.num_params()


def test_bfloat16_halves_what_is_kept_and_a_gpu_keeps_no_scores_for_dropout():
    shape = {"n_embd": 128, "block_size": 256, "vocab_size": 32}
    full, half = (count_memory(job(dtype, True, **shape)).activations for dtype in ("float32", "bfloat16"))
    assert half < 0.8 * full
    on_cpu, on_gpu = (count_memory(job(gpu=gpu, dropout=0.1, **shape)).activations for gpu in (False, True))
    assert on_cpu - on_gpu > 4 * 2 * 4 * 256**2  # float32 scores (B, H, T, T)


@pytest.mark.parametrize("dtype, gpu", [("float32", False), ("bfloat16", True)])
def test_the_largest_batch_fits_and_one_more_row_does_not(dtype, gpu):
    asked = job(dtype, gpu, optimizer="muon", micro_steps=2)
    small, large = largest_batch(asked, [2e6, 5e6])
    assert 1 < small < large
    for room, B in ((2e6, small), (5e6, large)):
        assert need(count_memory(asked.with_batch(B)), gpu) <= room < need(count_memory(asked.with_batch(B + 1)), gpu)
    assert largest_batch(asked, [1e3]) == [0]


def test_a_batch_of_one_row_that_is_too_large_already_is_told_as_none():
    asked = job("bfloat16", True, vocab_size=2**17, block_size=4096)  # one row has several chunks of logits
    assert largest_batch(asked, [1e6]) == [0]


@pytest.mark.parametrize(
    "text, size", [("24GB", 24e9), ("24GiB", 24 * 2**30), ("24000MB", 24e9), ("1.5 gib", 1.5 * 2**30)]
)
def test_a_memory_is_a_number_and_a_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "GB", "-1GB", "0GB", "24 GBs", "1e3GB", ""])
def test_another_memory_is_refused(text):
    with pytest.raises(ValueError, match="memory must be a size such as 24GB, 24GiB or 24000MB, not "):
        parse_memory(text)


def test_what_will_hardly_fit_is_warned_of_and_what_cannot_is_refused(pretrain, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(plan, "at_most", lambda *_: float("inf"))  # the quick bound is for real sizes
    monkeypatch.setattr(plan, "available_memory", lambda device: 600e3)
    pretrain("a", "--batch_size=64", "--max_iters=1")
    assert "warning: a step of training with batch_size=64 needs about " in capsys.readouterr().out
    monkeypatch.setattr(plan, "available_memory", lambda device: 1e9)
    pretrain("b", "--max_iters=1")
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(plan, "available_memory", lambda device: 50e3)
    with pytest.raises(ValueError, match="weights: training takes at least 0 GiB, and cpu has 0 GiB: choose a smaller"):
        pretrain("c")
    assert not Path("c").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def plan_of(call, capsys, command, *arguments) -> str:  # noqa: F811
    capsys.readouterr()
    call(command.main, *arguments, "--plan", config=None)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_124m_24gb", "llama_1b"])
def test_a_configs_docstring_says_what_its_plan_says(call, capsys, name):  # noqa: F811
    path = ROOT / "config" / f"{name}.py"
    said = ast.get_docstring(ast.parse(path.read_text())).split("--plan:\n\n")[1].splitlines()
    printed = plan_of(call, capsys, train, str(path), "--dataset=nothing_prepared").splitlines()
    said = [line.strip() for line in said if line.strip()]
    assert len(said) > 8
    assert [line for line in printed if line.strip() in said] and set(said) <= {line.strip() for line in printed}
    assert not Path("out").exists()


def test_a_plan_tells_the_passes_over_the_corpus_that_is_there(call, capsys, corpus_folder):  # noqa: F811
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=48", "--batch_size=8", "--max_iters=10"]
    text = plan_of(call, capsys, train, *shape, f"--dataset={corpus_folder}", "--out_dir=a", "--device=cpu",
                   "--dtype=float32")  # fmt: skip
    tokens = json.loads((corpus_folder / "meta.json").read_text())["splits"]["train"]["tokens"]
    assert f"{10 * 8 * 48 / tokens:,.1f} passes over the {tokens:,} of " in text
    assert "step             384 tokens: batch_size 8 in 1 micro-steps" in text
    assert "memory of one process in float32" in text and "on this cpu at 40% MFU" in text
    assert not Path("a").exists()


def test_without_a_corpus_the_vocabulary_must_be_given(call, capsys):  # noqa: F811
    with pytest.raises(ValueError, match="^vocab_size is not known, for there is no prepared corpus in 'nothing': "):
        plan_of(call, capsys, train, "--dataset=nothing")
    text = plan_of(call, capsys, train, "--dataset=nothing", "--vocab_size=96", "--n_layer=1", "--device=cpu")
    assert "passes unknown: there is no prepared corpus in nothing" in text


def test_flops_and_hours_are_those_of_the_weights():
    text = (ROOT / "config" / "gpt2_124m.py").read_text()  # what the plan says, as the test above shows
    tokens = 19_073 * 2**19
    flops = 6 * 123_532_032 * tokens + 12 * 12 * 768 * 1024 * tokens  # the matrices, without the norms' weights
    assert float(re.search(r"compute +(\S+) FLOPs", text)[1]) == pytest.approx(flops, rel=0.01)
    row = re.search(r"H100 +80 GB +(\d+) +([\d.]+) +([\d.]+)", text)
    assert float(row[2]) == pytest.approx(flops / (0.4 * PEAK_FLOPS["H100"][0]) / 3600, rel=0.02)
    assert float(row[3]) == pytest.approx(float(row[2]) / 8, abs=0.1)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}], ids=label)
def test_lora_takes_two_thirds_of_the_operations_with_weights_and_all_of_attentions(options):
    keys = options.get("sliding_window", 32)
    whole, corrected = (job_flops(job(lora=lora, n_layer=3, **options)) for lora in (None, LORA))
    attention = 3 * 3 * 2 * 2 * 32 * keys  # layers × (forward and backward) × (QKᵀ and ·V) × a multiply and an add × HD
    assert corrected == pytest.approx((whole - attention) * 2 / 3 + attention)


def test_memory_names_the_batch_that_fits_and_how_to_keep_the_step(call, capsys):  # noqa: F811
    options = ["--dataset=nothing", "--vocab_size=96", "--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=32",
               "--batch_size=12", "--gradient_accumulation_steps=3", "--device=cpu"]  # fmt: skip
    text = plan_of(call, capsys, train, *options, "--memory=2MB")
    found = re.search(
        r"2MB holds a batch_size of (\d+); the same step: --batch_size=(\d+) \S+steps=(\d+)$", text.strip()
    )
    assert int(found[2]) * int(found[3]) == 36 and int(found[2]) <= int(found[1])
    assert "0.01MB is too little: batch_size=1 needs 0.00 GiB" in plan_of(
        call, capsys, train, *options, "--memory=0.01MB"
    )
    for wrong, message in (
        (["--plan", "--memory=24"], "memory must be a size"),
        (["--memory=24GB"], "belongs to --plan"),
    ):
        with pytest.raises(ValueError, match=message):
            call(train.main, *options, *wrong, config=None)


def test_fine_tuning_has_a_plan_too_with_lora_or_without_conversations(pretrain, talk, call, capsys):  # noqa: F811
    pretrain("base")
    options = ["--init_from=base", "--out_dir=tuned", "--device=cpu"]
    whole = plan_of(call, capsys, finetune, *options, f"--dataset={talk}")
    assert re.search(r"3\.\d passes over the conversations of ", whole)
    corrected = plan_of(call, capsys, finetune, *options, f"--dataset={talk}", "--lora_rank=2")
    assert "trained ones of LoRA" in corrected and "trained" not in whole
    unknown = plan_of(call, capsys, finetune, *options, "--dataset=nothing", "--max_iters=7")
    assert "run              7 steps" in unknown and "passes unknown" in unknown
    assert not Path("tuned").exists()


def test_help_lists_the_options_of_the_plan(call, capsys):  # noqa: F811
    for command in (train, finetune):
        call(command.main, "--help", config=None)
        text = capsys.readouterr().out
        assert "  --plan=False" in text and "  --memory=" in text
