"""Checkpoints are whole or absent, verified, and run no code."""

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import GPT, GPTConfig
from runs import checkpoint
from runs.run import Run
from runs.start import RunFolder, Start
from text.tokenizer import CharTokenizer
from training.config import TrainConfig
from training.optim import make_optimizers

SHAPE = {"vocab_size": 4, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "mlp_dim": 16}


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, steps 1 (the better) and 2, after a step of training."""
    torch.manual_seed(0)
    model, out_dir = GPT(GPTConfig(**SHAPE)), tmp_path / "run"
    optimizers = make_optimizers(model, TrainConfig())
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    record = Run(out_dir, model.config, {"seed": 1337}, "pretrain", False)
    with RunFolder(record, Start(), CharTokenizer("abc", eot=True), TrainConfig(), active=True):
        pass
    for step, val_loss in ((1, 1.0), (2, 2.0)):
        checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": step, "val_loss": val_loss})
    return out_dir, model, optimizers


def names(out_dir) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(out_dir)]


def test_what_was_saved_comes_back(run):
    out_dir, model, optimizers = run
    opened = Run.open(out_dir)
    loaded, tokenizer, path = opened.load_model("latest"), opened.tokenizer, opened.checkpoint("latest")
    assert path.name == "step_00000002" and tokenizer.encode("cab") == [2, 0, 1]
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = make_optimizers(loaded, TrainConfig())
    checkpoint.load_optimizers(loaded, fresh, path)
    old, new = checkpoint.optimizer_tensors(model, optimizers), checkpoint.optimizer_tensors(loaded, fresh)
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_the_best_and_the_last_two_are_kept(run):
    out_dir, model, optimizers = run
    for step in (3, 4):
        checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": step, "val_loss": None})
    assert names(out_dir) == ["step_00000001", "step_00000003", "step_00000004"]
    assert checkpoint.find_checkpoint(out_dir, "best").name == "step_00000001"
    assert checkpoint.find_checkpoint(out_dir, "latest").name == "step_00000004"
    with pytest.raises(ValueError, match="step_7.*step_00000001"):
        checkpoint.find_checkpoint(out_dir, "step_7")


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.98])
def test_one_flipped_byte_is_refused_by_name(run, name, where):
    out_dir, _, _ = run
    path = out_dir / "checkpoints" / "step_00000001" / name
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="step_00000001"):
        checkpoint.verify(path.parent)


def test_a_missing_file_is_refused_by_name(run):
    out_dir, _, _ = run
    (out_dir / "checkpoints" / "step_00000002" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="step_00000002/model.safetensors is damaged"):
        Run.open(out_dir).load_model("latest")


def test_a_pickle_is_refused_even_with_the_right_checksum(run, tmp_path):
    out_dir, _, _ = run

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    folder = out_dir / "checkpoints" / "step_00000001"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checkpoint.sha256(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Run.open(out_dir).load_model("best")
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt is a file; give the folder of a run"):
        Run.open(tmp_path / "ckpt.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_save_that_was_killed_leaves_no_checkpoint_and_is_cleaned_up(run):
    out_dir, model, optimizers = run
    parent = out_dir / "checkpoints"
    shutil.copytree(parent / "step_00000002", parent / ".step_00000003.tmp")
    assert names(out_dir) == ["step_00000001", "step_00000002"]
    checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": 4, "val_loss": 3.0})
    assert sorted(path.name for path in parent.iterdir()) == ["step_00000001", "step_00000002", "step_00000004"]


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_one(run, monkeypatch):
    out_dir, model, optimizers = run

    def killed(path):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": 3, "val_loss": 3.0})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": 4, "val_loss": 3.0})
    assert names(out_dir) == ["step_00000001", "step_00000003", "step_00000004"]
    checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": 5, "val_loss": 3.0})
    assert sorted(path.name for path in (out_dir / "checkpoints").iterdir()) == [
        "step_00000001", "step_00000004", "step_00000005",
    ]  # fmt: skip


@contextmanager
def full_disk(room: int):
    """In this context, no file can grow beyond `room` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)


def test_a_disk_that_is_full_leaves_no_debris_and_is_told_plainly(run):
    out_dir, model, optimizers = run
    with full_disk(1000), pytest.raises(ValueError, match="cannot write .*step_00000003: .*make room"):
        checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": 3, "val_loss": 3.0})
    entries = sorted(path.name for path in (out_dir / "checkpoints").iterdir())
    assert entries == ["step_00000001", "step_00000002"]


def test_what_a_thread_saves_is_what_was_there_when_save_was_called(run):
    out_dir, model, optimizers = run
    saver, state = checkpoint.Saver(out_dir), {"step": 3, "val_loss": 3.0}
    checkpoint.save_checkpoint(out_dir.with_name("plain"), model, optimizers, state)
    saver.save(model, optimizers, state)
    with torch.no_grad():  # training goes on
        for tensor in [*model.parameters(), *checkpoint.optimizer_tensors(model, optimizers).values()]:
            tensor.fill_(-1)
    state["step"] = 4
    saver.close()
    plain, saved = (folder / "checkpoints" / "step_00000003" for folder in (out_dir.with_name("plain"), out_dir))
    for name in [*checkpoint.FILES, "manifest.json"]:
        assert (plain / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_an_error_of_the_thread_comes_up_in_whatever_waits_for_it_and_once(run, then):
    out_dir, model, optimizers = run
    saver = checkpoint.Saver(out_dir)
    with full_disk(1000), pytest.raises(ValueError, match="cannot write .*step_00000003: .*make room"):
        saver.save(model, optimizers, {"step": 3, "val_loss": 3.0})
        saver.save(model, optimizers, {"step": 4, "val_loss": 3.0}) if then == "save" else getattr(saver, then)()
    saver.close()
    assert names(out_dir) == ["step_00000001", "step_00000002"]


KILLS = """
import itertools, os, resource, signal, sys
import torch
from safetensors.torch import load_file
from model import GPT, GPTConfig
from runs import checkpoint
from training.config import TrainConfig
from training.optim import make_optimizers

out_dir = sys.argv[1]
os.fsync = lambda descriptor: None  # that is for a loss of power; what a killed process has written stays
torch.set_num_threads(1)
model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=32, mlp_dim=32))
optimizers = make_optimizers(model, TrainConfig())
model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
for optimizer in optimizers:
    optimizer.step()

def set_all(value):
    with torch.no_grad():
        for tensor in [*model.parameters(), *checkpoint.optimizer_tensors(model, optimizers).values()]:
            tensor.fill_(value)

def train(first, operation=None, room=None):
    if operation is not None:  # die at that operation on the run's files
        counter = itertools.count()
        def die(event, arguments):
            if event == "open" or event.startswith(("os.", "shutil.")):
                if any(out_dir in str(argument) for argument in arguments) and next(counter) == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
    if room is not None:  # die when a file reaches that size: in the middle of writing it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    saver = checkpoint.Saver(out_dir)
    for step in range(first, first + 3):
        set_all(step)
        saver.save(model, optimizers, {"step": step, "val_loss": 1.0 / step})
        set_all(-1.0)  # training goes on
    saver.close()
    os._exit(0)

def newest():
    found = checkpoint.list_checkpoints(out_dir)
    for folder in found:
        checkpoint.verify(folder)
        step = checkpoint.read_state(folder)["step"]
        assert folder.name == f"step_{step:08d}"
        for name in checkpoint.FILES[:2]:
            assert all((x == step).all() for x in load_file(folder / name).values()), (folder, name)
    return checkpoint.read_state(found[-1])["step"] if found else 0

def fork(**moment):
    before = newest()
    child = os.fork()
    if not child:
        train(before + 1, **moment)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    after = newest()
    assert before <= after <= before + 3
    return code, after - before

assert fork() == (0, 3)
died, gained = set(), set()
for operation in range(2, 82, 4):
    code, steps = fork(operation=operation)
    died.add(code)
    gained.add(steps)
assert died == {-signal.SIGKILL} and gained >= {0, 1, 2}, (died, gained)
for name in checkpoint.FILES[:2]:
    size = os.path.getsize(checkpoint.list_checkpoints(out_dir)[-1] / name)
    for part in (0.1, 0.9):
        code, steps = fork(room=int(part * size))
        assert code == -signal.SIGXFSZ and steps == 0, (code, steps)
assert fork() == (0, 3)
print(sorted(os.listdir(f"{out_dir}/checkpoints")))
"""


def test_checkpoints_survive_24_kills_at_all_moments_of_saving(tmp_path):
    """Killed at every fourth operation on files, and inside files; what is left is whole, and the next save tidies."""
    command, root = [sys.executable, "-c", KILLS, str(tmp_path / "run")], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step_") == 2 and ".tmp" not in done.stdout  # the newest is the best, too


def test_a_swapped_tokenizer_is_refused(run):
    out_dir, _, _ = run
    CharTokenizer("abcdefgh", eot=True).save(out_dir)
    with pytest.raises(ValueError, match="tokenizer.json is not the one the model was trained with"):
        Run.open(out_dir).load_model()


def test_a_user_s_own_copy_of_a_checkpoint_is_left_alone(run):
    out_dir, model, optimizers = run
    parent = out_dir / "checkpoints"
    shutil.copytree(parent / "step_00000002", parent / "step_00000002_keep")
    checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": 3, "val_loss": 3.0})
    assert (parent / "step_00000002_keep").exists() and len(names(out_dir)) == 3


def test_weights_of_another_shape_are_refused_by_name(run):
    out_dir, _, _ = run
    other = GPT(GPTConfig(**SHAPE | {"n_embd": 32}))
    with pytest.raises(ValueError, match="does not fit the config: blocks.0.*shape"):
        checkpoint.load_weights(other, checkpoint.find_checkpoint(out_dir, "best"))


def test_a_new_run_moves_the_old_one_aside(run):
    out_dir, _, _ = run
    record = Run.open(out_dir)
    with RunFolder(record, Start(), CharTokenizer("abc", eot=True), TrainConfig(), active=True) as folder:
        assert folder.notes == [f"{out_dir} held a run already: it is now {out_dir}.1"]
    assert names(out_dir.with_name("run.1")) == ["step_00000001", "step_00000002"] and names(out_dir) == []


def test_somebody_else_s_config_is_not_moved_aside(run, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "llama"}')
    record = replace(Run.open(run[0]), folder=tmp_path / "theirs")
    with pytest.raises(ValueError, match="holds a config.json that is not a run's"):
        RunFolder(record, Start(), CharTokenizer("abc", eot=True), TrainConfig(), active=True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]


def test_every_file_of_a_checkpoint_has_the_same_permissions(run):
    modes = {path.stat().st_mode for path in (run[0] / "checkpoints" / "step_00000001").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    "path", ["model/rope_theta", "model/norm_eps", "model/n_layer", "train/seed", "origin/checkpoint", "task"]
)
def test_any_change_of_config_json_is_told(run, path):
    content = json.loads((run[0] / "config.json").read_text())
    *parents, key = path.split("/")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[key] = inner[key] + 1 if isinstance(inner[key], int | float) else inner[key] + "x"
    (run[0] / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="config.json is damaged: its checksum differs"):
        Run.open(run[0])


@pytest.mark.parametrize("absurd", [{"n_layer": 10**9}, {"n_embd": 10**9, "head_dim": 8}, {"vocab_size": 10**12}])
def test_absurd_sizes_are_refused_before_memory_is_taken(run, absurd):
    content = json.loads((run[0] / "config.json").read_text())
    del content["sha256"]  # as somebody would who edits it by hand
    content["model"] |= absurd
    (run[0] / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="describes a model of .* weights, and step_00000001 holds"):
        Run.open(run[0]).load_model()


def test_a_checkpoint_that_goes_while_it_is_read_is_looked_for_once_more(run, monkeypatch):
    out_dir, model, optimizers = run
    verify = checkpoint.verify

    def slow(path):
        if path.name == "step_00000002":  # the run beside us saves twice meanwhile
            for step in (3, 4):
                checkpoint.save_checkpoint(out_dir, model, optimizers, {"step": step, "val_loss": None})
        verify(path)

    monkeypatch.setattr("runs.run.verify", slow)
    Run.open(out_dir).load_model("latest")
    assert names(out_dir) == ["step_00000001", "step_00000003", "step_00000004"]


@pytest.mark.parametrize(
    "state", ["[]", "{}", '{"step": "1"}', '{"step": -1}', '{"step": 1, "scaler": []}', '{"step": 1, "seconds": "x"}',
              '{"step": 1, "val_loss": "low"}', '{"step": 1, "best_val_loss": []}', '{"step": 1, "scaler": {"a": "b"}}']
)  # fmt: skip
def test_a_state_with_fields_of_wrong_types_is_told_in_one_line(run, state):
    path = run[0] / "checkpoints" / "step_00000001" / "state.json"
    path.write_text(state)
    with pytest.raises(ValueError, match="state.json is damaged, or missing"):
        checkpoint.read_state(path.parent)


@pytest.mark.parametrize("name", ["nothing/exp_avg", "exp_avg", "norm.weight/exp_avg", "norm.weight/"])
def test_an_optimizer_file_of_another_model_is_told_in_one_line(run, name):
    out_dir, model, optimizers = run
    folder = out_dir / "checkpoints" / "step_00000001"
    save_file({name: torch.zeros(3)}, folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="its optimizer state is not of this model"):
        checkpoint.load_optimizers(model, optimizers, folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"n_layer": 1}}', '{"model": {"x": 1}, "train": {}}'])
def test_a_damaged_config_is_told_plainly(run, content):
    out_dir, _, _ = run
    (out_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        Run.open(out_dir).load_model()


def test_no_run_and_no_checkpoint_are_told_apart(run, tmp_path):
    out_dir, _, _ = run
    with pytest.raises(ValueError, match="no run in"):
        Run.open(tmp_path / "nowhere")
    shutil.rmtree(out_dir / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint in"):
        Run.open(out_dir).load_model()
