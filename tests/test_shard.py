"""Sharded training: any number of processes is the same run, sharded or not, and any number resumes what another saved.

Each group of processes is started once, by tests/shard_worker.py, and trains all the runs that are compared here.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runs import checkpoint
from runs.run import Run
from tests.test_finetune import conversations  # noqa: F401
from tests.test_train import log, losses
from training.device import start_process
from training.shard import in_rounds, rows_of, stacked_counts

ROOT = Path(__file__).parent.parent
SIZE = ["--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=20", "--mlp_dim=28", "--block_size=8", "--dropout=0.1"]
STEPS = ["--batch_size=1", "--gradient_accumulation_steps=12", "--max_iters=3", "--eval_interval=2", "--log_interval=1",
         "--learning_rate=0.01", "--weight_decay=0.1", "--grad_clip=0.5", "--eval_iters=5", "--device=cpu"]  # fmt: skip
CLASSIC = ["--position=learned", "--norm=layernorm", "--bias=True", "--mlp=gelu", "--tie_embeddings=False"]
KINDS = {
    "muon": ["train.py", *SIZE, *STEPS],
    "adamw": ["train.py", *SIZE, *STEPS, "--optimizer=adamw", "--activation_checkpointing=True"],
    "classic": ["train.py", *SIZE, *STEPS, *CLASSIC],
    "lora": ["finetune.py", *STEPS, "--lora_rank=2", "--block_size=48", "--dropout=0.1"],
    "preview": ["train.py", *SIZE, *STEPS, "--max_iters=1", "--sample_interval=1"],
}
# Precision, number of processes, kinds of runs under ddp, and under fsdp
GROUPS = [
    ("float64", 1, ["muon", "adamw", "classic", "lora", "preview"], []),
    ("float64", 2, ["muon", "lora"], ["muon", "adamw", "classic", "lora", "preview"]),
    ("float64", 3, ["adamw"], ["muon", "adamw", "classic", "lora"]),
    ("float64", 4, [], ["muon"]),
    ("float32", 1, ["muon"], []),
    ("float32", 2, [], ["muon"]),
    ("bfloat16", 2, ["preview"], ["preview"]),
]
RESUMED = {
    (1, "ddp"): ["muon"],
    (3, "fsdp"): ["muon", "lora"],
    (4, "fsdp"): ["muon"],
}  # by whom: what 2 sharded processes saved


def commands(folder: Path, sources: dict[str, Path], dtype: str, world: int, kinds: list[str], parallel: str):
    """The commands that train these kinds of runs."""
    for kind in kinds:
        data = [f"--dataset={sources['lora' if kind == 'lora' else 'text']}"]
        data += [f"--init_from={folder / 'float64-1-ddp-muon'}"] if kind == "lora" else []
        name, *options = KINDS[kind]
        out_dir = f"--out_dir={folder / f'{dtype}-{world}-{parallel}-{kind}'}"
        yield [name, str(folder / "empty.py"), *options, *data, f"--parallel={parallel}", out_dir]


@pytest.fixture(scope="module")
def trained(corpus_folder, conversations, tmp_path_factory):  # noqa: F811
    """The folder with all runs, and what was printed."""
    folder, sources = tmp_path_factory.mktemp("shard"), {"text": corpus_folder, "lora": conversations}
    (folder / "empty.py").write_text("")

    jobs, cuts = [], []
    for dtype, world, ddp, fsdp in GROUPS:
        both = [(ddp, "ddp"), (fsdp, "fsdp")]
        job = [c for kinds, parallel in both for c in commands(folder, sources, dtype, world, kinds, parallel)]
        jobs.append([world, dtype, job + ([["building"]] if dtype == "float64" and world > 1 else [])])
    for (world, parallel), kinds in RESUMED.items():
        resumed = {kind: f"{folder}/resumed-{world}-{kind}" for kind in kinds}
        cuts += [["cut", f"{folder}/float64-2-fsdp-{kind}", run] for kind, run in resumed.items()]
        options = ["--init_from=resume", f"--parallel={parallel}"]
        jobs.append(
            [world, "float64", [[KINDS[kind][0], f"--out_dir={run}", *options] for kind, run in resumed.items()]]
        )
    jobs.insert(len(GROUPS), [1, "float64", cuts])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, "tests/shard_worker.py", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return folder, done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.find_checkpoint(run, "latest")
    files = [load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors")]
    assert folder.name == "step_00000003" and len(files[1]) >= len(files[0])
    return files[0] | files[1]


def assert_same_run(a: Path, b: Path, tolerance: float) -> None:
    """Losses, evaluations and gradient norms of all steps, and the final weights and optimizer state."""
    A, B = weights(a), weights(b)
    assert A.keys() == B.keys()
    for name in A:
        torch.testing.assert_close(A[name], B[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert [event.keys() for event in log(a)] == [event.keys() for event in log(b)] and len(log(a)) == 6
    for one, other in zip(log(a), log(b), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


CASES = [
    (dtype, world, parallel, kind)
    for dtype, world, ddp, fsdp in GROUPS
    for parallel, kinds in (("ddp", ddp), ("fsdp", fsdp))
    for kind in kinds
    if world > 1 and kind != "preview"
]


@pytest.mark.parametrize("dtype, world, parallel, kind", CASES)
def test_any_number_of_processes_is_the_same_run(trained, dtype, world, parallel, kind):
    one, many = trained[0] / f"{dtype}-1-ddp-{kind}", trained[0] / f"{dtype}-{world}-{parallel}-{kind}"
    assert_same_run(one, many, 1e-10 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("world, kind", [(world, kind) for (world, _), kinds in RESUMED.items() for kind in kinds])
def test_what_two_processes_saved_any_number_resumes(trained, world, kind):
    assert_same_run(trained[0] / f"float64-1-ddp-{kind}", trained[0] / f"resumed-{world}-{kind}", 1e-10)


def test_all_processes_compute_the_preview_and_one_prints_it(trained):
    lines = [line for line in trained[1].splitlines() if line.startswith("before training: ")]
    assert (
        len(lines) == 4 and len(lines[0]) > 40
    )  # of four runs, in this order: of one process, of two, and in bfloat16
    assert lines[0] == lines[1]


def test_in_bfloat16_a_sharded_run_is_close_to_one_that_is_not(trained):
    sharded, plain = (losses(trained[0] / f"bfloat16-2-{parallel}-preview") for parallel in ("fsdp", "ddp"))
    assert 0 < (sharded - plain).abs().max() < 0.01


def test_a_sharded_run_opens_as_any_other(trained):
    run = Run.open(trained[0] / "float64-3-fsdp-lora")
    assert run.load_model().config.vocab_size == run.tokenizer.vocab_size


def test_two_machines_are_one(trained, corpus_folder):
    """Two agents of torchrun, each with one process of train.py's own command line, sharded."""
    folder, run = trained[0], trained[0] / "machines"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1",
             "--master_addr=127.0.0.1", f"--master_port={port}", *KINDS["muon"], str(folder / "empty.py"),
             f"--dataset={corpus_folder}", f"--out_dir={run}", "--parallel=fsdp", "--dtype=float32"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]  # fmt: skip
    printed = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert sum(text.count("step 3/3: val_loss") for text in printed) == 1 and "2 x cpu, sharded" in "".join(printed)
    assert_same_run(folder / "float32-1-ddp-muon", run, 1e-5)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="parallel=fsdp knows no scaling of float16's gradients: use bfloat16"):
        start_process("cpu", "float16", 1, "fsdp")


# ---------------------------------------------------------------------------------------------------------------------
# Who holds what


@pytest.mark.parametrize("count, world_size", [(1, 4), (5, 4), (8, 3), (12, 4), (0, 2)])
def test_each_row_is_held_once_as_torch_cuts_chunks(count, world_size):
    rows, chunks = torch.arange(count), torch.arange(count).chunk(world_size)
    held = [rows[rows_of(count, rank, world_size)].tolist() for rank in range(world_size)]
    assert sum(held, []) == rows.tolist()
    assert [part for part in held if part] == [chunk.tolist() for chunk in chunks if len(chunk)]


def test_the_rows_of_stacked_matrices_are_counted_one_by_one():
    assert [stacked_counts([4, 2], rank, 2) for rank in (0, 1)] == [[3, 0], [1, 2]]
    assert [stacked_counts([4, 1, 1], rank, 4) for rank in range(4)] == [[2, 0, 0], [2, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_rounds_hold_every_matrix_once_and_no_more_than_their_limit():
    assert in_rounds([[0, 2], [1]], [5, 5, 5], 8) == [[[0], [1]], [[2], []]]
    sizes, owned = [7, 1, 9, 2, 2, 30, 1], [[0, 1, 3], [2, 4], [5, 6]]
    rounds = in_rounds(owned, sizes, 9)
    assert [sum((turn[rank] for turn in rounds), []) for rank in range(3)] == owned
    parts = [numbers for turn in rounds for numbers in turn]
    assert all(len(numbers) < 2 or sum(sizes[i] for i in numbers) <= 9 for numbers in parts) and len(rounds) == 2
