"""The training loop, through its command line: what must not change the result, and what must stop a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from common.config import build, read_arguments, read_config_file
from common.files import locked
from model import GPTConfig
from runs import checkpoint
from runs.run import Run
from tasks.sft import FinetuneConfig
from tests.test_checkpoint import full_disk
from training.config import TrainConfig

ROOT = Path(__file__).parent.parent
SMALL = ["--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32", "--mlp_dim=32", "--block_size=16", "--device=cpu"]
RUN = [*SMALL, "--batch_size=8", "--max_iters=12", "--eval_interval=4", "--log_interval=1", "--learning_rate=0.01",
       "--dtype=float32"]  # fmt: skip


@pytest.fixture
def command(corpus_folder, tmp_path, monkeypatch):
    """Run train.py's command in this process; options given later win. Returns the run's folder."""
    empty = tmp_path / "empty.py"
    empty.write_text("")

    def run(name: str, *options: str) -> Path:
        arguments = [str(empty), f"--dataset={corpus_folder}", *RUN, f"--out_dir={tmp_path / name}", *options]
        if "--init_from=resume" in options:
            arguments = [f"--out_dir={tmp_path / name}", *options]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
        return tmp_path / name

    return run


def log(run: Path, *keys: str) -> list[dict]:
    """The events of log.jsonl, without what the clock decides."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "mfu")
    return [
        {k: v for k, v in event.items() if k not in timed} for event in events if not keys or set(keys) & event.keys()
    ]


def final_files(run: Path) -> dict[str, bytes]:
    folder = checkpoint.find_checkpoint(run, "latest")
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([e.get("train_loss", e.get("val_loss")) for e in log(run)], dtype=torch.float64)


def test_training_learns_and_leaves_a_complete_run(command):
    run = command("a", "--max_iters=60", "--eval_interval=30", "--log_interval=10", "--learning_rate=0.02")
    events = log(run, "val_loss")
    assert [e["step"] for e in events] == [0, 30, 60]
    assert events[0]["val_loss"] > 2.8 and events[-1]["val_loss"] < 1.8
    training = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if "train_loss" in line]
    keys = {"step", "train_loss", "lr", "tokens", "seconds", "tokens_per_second", "mfu", "grad_norm"}
    assert [e["step"] for e in training] == [10, 20, 30, 40, 50, 60] and training[0].keys() == keys
    assert training[-1]["tokens"] == 60 * 8 * 16
    opened = Run.open(run)
    assert opened.tokenizer.vocab_size == opened.load_model().config.vocab_size


def test_the_same_seed_gives_the_same_run_and_another_seed_another(command):
    a, b, c = command("a"), command("b"), command("c", "--seed=1")
    assert log(a) == log(b) and final_files(a) == final_files(b)
    assert log(a) != log(c)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_8_micro_steps_of_1_are_1_of_8(command, optimizer):
    one = command("one", f"--optimizer={optimizer}")
    eight = command("eight", f"--optimizer={optimizer}", "--batch_size=1", "--gradient_accumulation_steps=8")
    assert torch.allclose(losses(one), losses(eight), atol=2e-4)
    assert (losses(one)[1:3] - losses(eight)[1:3]).abs().max() < 1e-6  # before rounding had time to grow


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [0, 1, 4, 7, 8, 11])
def test_killed_at_any_step_and_resumed_is_never_stopped(command, monkeypatch, step):
    options = ["--dropout=0.1"]  # so that its random numbers must be the same too
    whole = command("whole", *options)
    next_batches = train.Trainer.next_batches

    def deadly(trainer, now):
        if now == step:
            raise Killed
        return next_batches(trainer, now)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Trainer, "next_batches", deadly)
        command("killed", *options)
    run = command("killed", "--init_from=resume")
    assert log(run) == log(whole) and final_files(run) == final_files(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(command, monkeypatch, capsys, number):
    whole, handler = command("whole"), signal.getsignal(signal.SIGINT)
    next_batches = train.Trainer.next_batches

    def interrupted(trainer, step):
        if step == 5:
            os.kill(os.getpid(), number)
        return next_batches(trainer, step)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train.Trainer, "next_batches", interrupted)
        command("stopped")
    assert stopped.value.code == 128 + number
    assert "stopped at step 6; continue with --init_from=resume --out_dir=" in capsys.readouterr().out
    run = command("stopped", "--init_from=resume")
    assert log(run) == log(whole) and final_files(run) == final_files(whole)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_process_shot_dead_resumes_to_the_same_run(command, corpus_folder, tmp_path):
    whole = command("whole", "--max_iters=400", "--eval_interval=40", "--log_interval=1")
    arguments = [*RUN, f"--dataset={corpus_folder}", "--max_iters=400", "--eval_interval=40"]
    (tmp_path / "empty.py").write_text("")
    process = subprocess.Popen(
        [sys.executable, "train.py", str(tmp_path / "empty.py"), *arguments, f"--out_dir={tmp_path / 'shot'}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    journal = tmp_path / "shot" / "log.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 90):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run = command("shot", "--init_from=resume")
    assert log(run) == log(whole) and final_files(run) == final_files(whole)


def torchrun(processes: int, out_dir: Path, corpus_folder: Path, *options: str) -> subprocess.CompletedProcess:
    empty = out_dir.with_suffix(".py")
    empty.write_text("")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py",
         str(empty), f"--dataset={corpus_folder}", f"--out_dir={out_dir}", *RUN, *options],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_are_one(command, corpus_folder, tmp_path):
    options = ["--batch_size=2", "--gradient_accumulation_steps=4", "--dropout=0.1"]
    one = command("one", *options)
    result = torchrun(2, tmp_path / "two", corpus_folder, *options)
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    assert torch.allclose(losses(one), losses(tmp_path / "two"), atol=2e-4)
    assert (losses(one)[1:3] - losses(tmp_path / "two")[1:3]).abs().max() < 1e-6
    assert result.stdout.count("step 12/12: val_loss") == 1  # one process talks


def test_micro_steps_that_do_not_divide_among_processes_are_refused(corpus_folder, tmp_path):
    result = torchrun(2, tmp_path / "two", corpus_folder, "--gradient_accumulation_steps=3")
    assert result.returncode != 0
    message = "error: gradient_accumulation_steps (3) counts the micro-steps of all 2 processes"
    assert result.stderr.count(message) == 2  # by one process, and at the end of torchrun's report
    assert message in result.stderr.splitlines()[-2] and "====" in result.stderr.splitlines()[-1]


def test_evaluation_reads_the_whole_split_whatever_the_batch(command, capsys):
    run = command("a")
    capsys.readouterr()
    for batch_size in (1, 7):
        command("a", f"--init_from={run}", "--eval_only=True", f"--batch_size={batch_size}", "--out_dir=unused")
        loss, bpb = (float(part.split()[1]) for part in capsys.readouterr().out.split(","))
        best = min(log(run, "val_loss"), key=lambda e: e["val_loss"])
        assert loss == pytest.approx(best["val_loss"], abs=1e-4) and bpb == pytest.approx(best["val_bpb"], abs=1e-4)
    assert not Path("unused").exists()


def test_bits_per_byte_counts_the_bytes_of_the_text(command, corpus_folder):
    meta = json.loads((corpus_folder / "meta.json").read_text())["splits"]["val"]
    event = log(command("a", "--max_iters=1"), "val_loss")[-1]
    assert event["val_bpb"] == pytest.approx(event["val_loss"] / 0.6931471805599453 * meta["tokens"] / meta["bytes"])


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(command, monkeypatch, tmp_path):
    update = train.Trainer.update_weights

    def broken(trainer, step, grad_norm):
        update(trainer, step, grad_norm)
        if step == 5:
            with torch.no_grad():
                trainer.model.norm.weight[0] = float("nan")

    monkeypatch.setattr(train.Trainer, "update_weights", broken)
    with pytest.raises(ValueError, match="step 7: loss nan.*last good checkpoint is .*step_00000004.*learning_rate"):
        command("a", "--log_interval=100")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "a")] == ["step_00000004"]


@pytest.mark.parametrize("ends_by", ["the next save", "the last step", "a signal", "a loss that is not finite"])
def test_a_disk_that_is_full_when_a_thread_writes_ends_the_run_with_one_error(command, monkeypatch, tmp_path, ends_by):
    next_batches, message = train.Trainer.next_batches, "cannot write .*step_00000004: .*make room"

    def ending(trainer, step):
        if step == 5 and ends_by == "a signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 5 and ends_by == "a loss that is not finite":
            trainer.model.norm.weight.data[0] = float("nan")
        return next_batches(trainer, step)

    monkeypatch.setattr(train.Trainer, "next_batches", ending)
    if ends_by == "a loss that is not finite":
        message = f"step 6: loss nan.*{message}.*nothing was saved yet"
    with full_disk(20_000), pytest.raises(ValueError, match=message):
        command("a", "--max_iters=4" if ends_by == "the last step" else "--max_iters=12")
    assert not list((tmp_path / "a" / "checkpoints").iterdir())


def test_starting_from_another_run_takes_its_best_weights_and_shape(command):
    a = command("a")
    b = command("b", f"--init_from={a}", "--n_layer=2", "--max_iters=1")
    best = min(e["val_loss"] for e in log(a, "val_loss") if e["step"])
    assert log(b, "val_loss")[0]["val_loss"] == pytest.approx(best, abs=1e-6)
    with pytest.raises(ValueError, match="n_layer is 2 in .* cannot become 3"):
        command("c", f"--init_from={a}", "--n_layer=3")


def test_resuming_refuses_another_model_or_optimizer_and_goes_on_with_more_steps(command):
    run = command("a")
    for option in ("--n_embd=64", "--optimizer=adamw", "--position=none"):
        with pytest.raises(ValueError, match="cannot become"):
            command("a", "--init_from=resume", option)
    command("a", "--init_from=resume", "--max_iters=16")
    assert [e["step"] for e in log(run, "val_loss")] == [0, 4, 8, 12, 16]


def test_resuming_nothing_is_refused(command):
    with pytest.raises(ValueError, match="no run in"):
        command("nowhere", "--init_from=resume")


def test_only_the_best_is_saved_if_asked(command):
    run = command("a", "--always_save_checkpoint=False", "--learning_rate=0.5", "--lr_schedule=constant")
    losses = {e["step"]: e["val_loss"] for e in log(run, "val_loss")}
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 12, "this run should first get better, then worse"
    assert checkpoint.list_checkpoints(run)[-1].name == f"step_{best:08d}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(command, dtype):
    full, half = command("full"), command("half", f"--dtype={dtype}")
    assert (losses(full) - losses(half)).abs().max() < 0.05


def test_float16_resumes_with_its_loss_scale(command, monkeypatch):
    whole = command("whole", "--dtype=float16")
    next_batches = train.Trainer.next_batches

    def deadly(trainer, now):
        if now == 6:
            raise Killed
        return next_batches(trainer, now)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Trainer, "next_batches", deadly)
        command("killed", "--dtype=float16")
    run = command("killed", "--init_from=resume")
    assert log(run) == log(whole) and final_files(run) == final_files(whole)
    assert checkpoint.read_state(checkpoint.find_checkpoint(run, "latest"))["scaler"]["scale"] == 65536


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_float16_overflow_in_one_weight_skips_the_step_for_all(command, monkeypatch, value):
    class Overflow(train.Trainer):
        def clip_gradients(self):
            weight = self.model.blocks[0].mlp.down.weight
            if self.state["step"] == 3:
                weight.grad[0, 0] = value
            return super().clip_gradients()

        def update_weights(self, step, grad_norm):
            before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            super().update_weights(step, grad_norm)
            if step == 3:
                assert all(torch.equal(p, before[name]) for name, p in self.model.named_parameters())
                assert self.scaler.get_scale() == 32768

    monkeypatch.setattr(train, "Trainer", Overflow)
    assert checkpoint.list_checkpoints(command("a", "--dtype=float16"))


def test_a_padded_vocabulary_is_never_sampled_beyond_the_tokenizer(command, capsys):
    run = command("a", "--vocab_size=128", "--sample_interval=4", "--max_iters=4")
    assert Run.open(run).load_model().config.vocab_size == 128


def test_a_step_that_breaks_the_model_is_not_saved(command, monkeypatch, tmp_path):
    update = train.Trainer.update_weights

    def breaking(trainer, step, grad_norm):
        update(trainer, step, grad_norm)
        if step == 7:  # the loss of step 8 is fine still; the evaluation that follows is not
            trainer.model.norm.weight.data[0] = float("nan")

    monkeypatch.setattr(train.Trainer, "update_weights", breaking)
    with pytest.raises(ValueError, match="step 8: val_loss nan; the last good checkpoint is .*step_00000004"):
        command("a")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "a")] == ["step_00000004"]


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_the_same_weights(command, monkeypatch):
    source = command("source")
    whole = command("whole", f"--init_from={source}", "--seed=5")

    def deadly(trainer, step):
        raise Killed

    for number in range(2):  # killed twice
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train.Trainer, "next_batches", deadly)
            command("tuned", *(["--init_from=resume"] if number else [f"--init_from={source}", "--seed=5"]))
    assert log(command("tuned", "--init_from=resume")) == log(whole)


def test_two_runs_in_one_folder_are_refused_and_the_first_is_unharmed(command, tmp_path):
    run = command("a")
    before = log(run)
    with locked(run, "x"):
        for options in ([], ["--init_from=resume", "--max_iters=20"]):
            with pytest.raises(ValueError, match="is in use by process .* choose another --out_dir"):
                command("a", *options)
    assert log(run) == before and not (tmp_path / "a.1").exists()


@pytest.mark.parametrize("rubbish", ["[]\n", "{}\n", "\0\0\0\n", '{"step": "x"}\n', '{"step": 12, "train_l'])
def test_rubbish_in_the_log_does_not_stop_a_resumption(command, rubbish):
    whole, run = command("whole", "--max_iters=16"), command("a")
    with open(run / "log.jsonl", "a") as file:
        file.write(rubbish)
    command("a", "--init_from=resume", "--max_iters=16")
    assert [e["step"] for e in log(run)] == [e["step"] for e in log(whole)]


def test_a_corpus_or_a_file_is_no_place_for_a_run(command, corpus_folder, tmp_path):
    before = sorted(path.name for path in corpus_folder.iterdir())
    (tmp_path / "file").write_text("x")
    for place in (corpus_folder, tmp_path / "file", ""):
        with pytest.raises(ValueError, match="no place for a run"):
            command("a", f"--out_dir={place}")
    assert sorted(path.name for path in corpus_folder.iterdir()) == before


def test_a_run_that_only_gets_worse_still_leaves_a_checkpoint(command):
    options = ["--learning_rate=50", "--warmup_iters=0", "--lr_schedule=constant", "--always_save_checkpoint=False"]
    assert checkpoint.list_checkpoints(command("a", *options))


def test_resuming_a_finished_run_says_so_and_changes_nothing(command, capsys):
    run = command("a")
    config = (run / "config.json").read_text()
    command("a", "--init_from=resume", "--max_iters=5")
    assert "has done 12 of 5 steps" in capsys.readouterr().out and (run / "config.json").read_text() == config


def test_another_run_s_shape_needs_no_config_file(command, corpus_folder, tmp_path, monkeypatch):
    source = command("a")
    arguments = [f"--init_from={source}", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'b'}", "--max_iters=1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    assert Run.open(tmp_path / "b").model_config == Run.open(source).model_config


def test_a_sample_is_printed_when_asked(command, capsys):
    command("a", "--sample_interval=8")
    lines = capsys.readouterr().out.splitlines()
    after = [not lines[i + 1].startswith("step") for i, line in enumerate(lines[:-1]) if "val_loss" in line]
    assert after == [True, False, True, True]  # at steps 0 and 8, not at 4; and at the last one


def test_wandb_gets_the_same_numbers_offline(command, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = command("a", "--wandb_log=True", "--max_iters=2", "--eval_interval=2")
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_builds(path):
    given = read_config_file(str(path))
    if "init_from" in given:  # of its model, the run that it starts from knows the rest
        classes = TrainConfig, FinetuneConfig, GPTConfig
        configs = build(read_arguments([str(path)], *classes), *classes)
        assert given["init_from"].startswith("out/")
    else:
        _, *configs = train.configure([str(path)])
    assert configs[0].out_dir.startswith("out/") and set(given) <= {key for config in configs for key in vars(config)}


@pytest.mark.parametrize(
    ("option", "message"),
    [("--learning_rate=0", "learning_rate must be above 0"), ("--batch_size=0", "batch_size must be at least 1"),
     ("--optimizer=sgd", "muon, adamw"), ("--lr_schedule=x", "cosine, wsd, constant"), ("--beta1=1", "below 1"),
     ("--compile=maybe", "compile must be"), ("--learning_rate=1e999", "learning"), ("--device=tpu", "device must"),
     ("--device=cuda:99", "CUDA GPUs"), ("--dtype=int8", "dtype must be"), ("--block_size=100000", "block_size"),
     ("--vocab_size=3", "vocab_size=3 is less"), ("--dataset=nothing", "no prepared corpus"),
     ("--init_from=nowhere", "no run in"), ("--causal=False", "sees its future")],
)  # fmt: skip
def test_bad_settings_are_refused_before_a_run_is_made(command, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        command("a", option)
    assert not (tmp_path / "a").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cuda_compiled_follows_the_cpu(command, dtype):
    cpu, gpu = command("cpu"), command("gpu", "--device=cuda", f"--dtype={dtype}")
    assert (losses(cpu) - losses(gpu)).abs().max() < (1e-3 if dtype == "float32" else 0.05)
