"""What a run survives: kills, signals in the middle of an evaluation, failing processes, damage, broken gradients."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from runs import checkpoint, verify
from runs.run import Run
from tests import test_train
from tests.test_train import ROOT, RUN, final_files, log
from text.conversations import write_conversations
from text.pairs import write_pairs
from text.tokenizer import CharTokenizer
from training.device import Process
from training.interrupt import Interrupted, until_interrupted

command = test_train.command  # the fixture

# --- signals in an evaluation ----------------------------------------------------------------------------------------


def interrupt_evaluation(patch: pytest.MonkeyPatch, at_step: int) -> None:
    """Send SIGTERM after the second batch of the evaluation of that step."""
    evaluate = train.evaluate

    def watched(network, task, process, watch=iter):
        def signalling(batches):
            for number, batch in enumerate(batches):
                if number == 2 and trainers[-1].state["step"] == at_step:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return evaluate(network, task, process, lambda batches: watch(signalling(batches)))

    trainers, init = [], train.Trainer.__init__
    patch.setattr(train.Trainer, "__init__", lambda self, *given: (trainers.append(self), init(self, *given))[1])
    patch.setattr(train, "evaluate", watched)


@pytest.mark.parametrize("step, option", [(0, "True"), (4, "False"), (12, "False"), (12, "True")])
def test_a_signal_in_an_evaluation_saves_at_once_and_resuming_is_never_having_stopped(
    command, monkeypatch, capsys, step, option
):
    option = f"--always_save_checkpoint={option}"
    whole = command("whole", option)
    for option_now in (option, "--init_from=resume"):  # stopped twice, in the same evaluation
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            interrupt_evaluation(patch, step)
            command("stopped", option_now)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert f"stopped at step {step}; continue with --init_from=resume" in capsys.readouterr().out
    if step:  # a run that was stopped in its first evaluation has no log yet
        assert [e["step"] for e in log(whole.with_name("stopped"), "val_loss")] == list(range(0, step, 4))
    run = command("stopped", "--init_from=resume")
    assert log(run) == log(whole) and final_files(run) == final_files(whole)


def test_processes_agree_to_stop_though_one_has_fewer_batches_than_the_other():
    agreed = {"signals": 0, "going": 2}  # over all processes

    class Both(Process):
        def total(self, caught, going):
            return [caught + agreed["signals"], going + agreed["going"]]

    process, seen = Both(0, 2, torch.device("cpu"), "float32"), []
    with pytest.raises(Interrupted):
        for batch in until_interrupted("abc", process, []):
            seen.append(batch)
            agreed["signals"] = len(seen) == 2  # the other process catches a signal
    assert seen == ["a", "b"]
    agreed.update(signals=0, going=0)
    assert list(until_interrupted("abc", process, [])) == ["a", "b", "c"]


# --- torchrun --------------------------------------------------------------------------------------------------------

WORKER = """
import os, time
from common import cli
cli.PATIENCE = 1.0

def main():
    if os.environ["RANK"] == "1":
        raise ValueError("the GPU is on fire")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

cli.run_command(main)
"""


def torchrun(script: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_message_of_the_process_that_failed_is_the_last_on_the_screen(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    _, errors = torchrun(tmp_path / "worker.py").communicate(timeout=60)
    *_, last, rule = errors.splitlines()
    assert last.endswith("error in process 1: the GPU is on fire") and set(rule) == {"="}
    assert "Connection closed" not in errors  # what the others meet then is no news


def test_sigterm_to_torchrun_in_an_evaluation_saves_and_another_number_of_processes_goes_on(
    command, corpus_folder, tmp_path
):
    """The evaluation of step 4 would take minutes; then 1 process and 2 go on alike, and as one that never stopped."""
    options = ["--batch_size=4", "--gradient_accumulation_steps=2", "--dropout=0.1"]
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, train\n"
        "from common import cli\n"
        "batches = train.until_interrupted\n"
        "def slowly(given, process, caught):\n"
        "    for batch in batches(given, process, caught):\n"
        "        if TRAINER.state['step'] == 4:\n"
        "            print('evaluating', flush=True)\n"
        "            time.sleep(0.5)\n"
        "        yield batch\n"
        "def init(self, *given, start=train.Trainer.__init__):\n"
        "    global TRAINER\n"
        "    TRAINER = self\n"
        "    start(self, *given)\n"
        "train.Trainer.__init__, train.until_interrupted = init, slowly\n"
        "cli.run_command(train.main)\n"
    )
    (tmp_path / "empty.py").write_text("")
    run = tmp_path / "two"
    process = torchrun(
        slow, str(tmp_path / "empty.py"), f"--dataset={corpus_folder}", *RUN, *options, f"--out_dir={run}",
        "--batch_size=1", "--gradient_accumulation_steps=8",
    )  # fmt: skip
    while (line := process.stdout.readline()) and line != "evaluating\n":
        pass
    process.terminate()
    out, errors = process.communicate(timeout=30)
    assert "stopped at step 4; continue with" in out, errors
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step_00000004"]
    assert checkpoint.read_state(checkpoint.list_checkpoints(run)[0])["evaluation_due"]
    whole = command("whole", *options, "--batch_size=1", "--gradient_accumulation_steps=8")
    run = command("two", "--init_from=resume")  # as one process now
    assert [e["step"] for e in log(run)] == [e["step"] for e in log(whole)]
    for a, b in zip(log(run), log(whole), strict=True):
        key = "train_loss" if "train_loss" in a else "val_loss"
        assert a[key] == pytest.approx(b[key], abs=1e-5)
    assert not checkpoint.read_state(checkpoint.list_checkpoints(run)[-1])["evaluation_due"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_as_many_checkpoints_are_kept_as_asked_besides_the_best(command):
    run = command("a", "--keep_checkpoints=1", "--eval_interval=2", "--learning_rate=0.3", "--lr_schedule=constant")
    best = min(log(run, "val_loss")[1:], key=lambda e: e["val_loss"])["step"]
    assert 0 < best < 12, "this run should first get better, then worse"
    assert [path.name for path in checkpoint.list_checkpoints(run)] == [f"step_{best:08d}", "step_00000012"]
    run = command("b", "--keep_checkpoints=9", "--eval_interval=2")
    assert len(checkpoint.list_checkpoints(run)) == 6
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 1"):
        command("c", "--keep_checkpoints=0")


@pytest.mark.parametrize("file", ["state.json", "model.safetensors"])
def test_a_damaged_newest_checkpoint_is_set_aside_told_and_stands_in_no_way(command, capsys, monkeypatch, file):
    whole, run = command("whole"), command("a", "--max_iters=8", "--lr_schedule=constant")
    damaged = run / "checkpoints" / "step_00000008" / file
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with pytest.raises(ValueError, match=f"step_00000008/{file} is damaged"):
        Run.open(run).load_model("latest")
    monkeypatch.setattr(train.Trainer, "next_batches", stopping_at(6))
    with pytest.raises(SystemExit):
        command("a", "--init_from=resume", "--max_iters=12")
    told = capsys.readouterr().out
    assert f"{damaged} is damaged" in told and "going on from the one before it" in told
    assert f"the damaged checkpoint is kept as {damaged.parent}.damaged" in told
    names = [path.name for path in checkpoint.list_checkpoints(run)]
    assert names == ["step_00000004", "step_00000007"] and Path(f"{damaged.parent}.damaged").is_dir()
    monkeypatch.undo()
    assert len(log(whole)) > 0 and verify.problems_of_run(run) == []


def stopping_at(step: int):
    next_batches = train.Trainer.next_batches

    def stopping(trainer, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batches(trainer, now)

    return stopping


def test_a_damaged_log_is_told_and_kept_and_training_goes_on(command, capsys):
    run = command("a", "--max_iters=8")
    path = run / "log.jsonl"
    before = path.read_text()
    path.write_text(re.sub(r'"train_loss": \d', '"train_loss": 9', before, count=1))
    assert f"{path} is damaged" in verify.problems_of_run(run)[0]
    command("a", "--init_from=resume", "--max_iters=12")
    assert f"{path} is damaged, or was changed" in capsys.readouterr().out
    assert (run / "log.damaged.jsonl").read_text() != before and log(run)[-1]["step"] == 12
    assert verify.problems_of_run(run) == []


def test_one_changed_byte_anywhere_in_a_run_or_a_corpus_is_named(command, corpus_folder, tmp_path):
    from bench import chaos

    command("whole1")
    place = chaos.Place(tmp_path, seed=1)
    (row,) = chaos.flips(place, 40)
    assert row.endswith("| 0 |"), row


def test_verify_knows_every_kind_of_prepared_data(tmp_path, capsys):
    talk, pairs = tmp_path / "talk", tmp_path / "pairs"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_conversations(talk, [("train", messages), ("val", messages)])
    write_pairs(pairs, {"train": [("a", "b")], "val": [("b", "a")]}, CharTokenizer("ab", eot=True))
    for folder in (talk, pairs):
        assert verify.problems_of_data(folder) == []
        path = folder / "val.jsonl"
        path.write_bytes(path.read_bytes().replace(b"b", b"c", 1))
        (problem,) = verify.problems_of_data(folder)
        assert str(path) in problem and "damaged" in problem


def test_verify_misses_checkpoints_and_meta(command, tmp_path, capsys, monkeypatch):
    run = command("a")
    shutil.rmtree(run / "checkpoints")
    (problem,) = verify.problems_of_run(run)
    assert "has no checkpoint, and its log.jsonl tells of" in problem
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["verify", str(tmp_path / "texts")])
    with pytest.raises(SystemExit) as ending:
        verify.main()
    assert ending.value.code == 1 and "has no meta.json, and so no checksums" in capsys.readouterr().err


def test_verify_says_that_all_is_well(command, capsys, monkeypatch, corpus_folder):
    run = command("a")
    monkeypatch.setattr(sys, "argv", ["verify", str(run), str(corpus_folder)])
    with pytest.raises(SystemExit) as ending:
        verify.main()
    assert not ending.value.code
    assert capsys.readouterr().out.endswith(f"{run}: intact\n{corpus_folder}: intact\n")


# --- gradients that are not finite -----------------------------------------------------------------------------------


def broken_at(*steps: int):
    """A Trainer whose gradient is not finite in these steps."""

    class Broken(train.Trainer):
        def clip_gradients(self):
            if self.state["step"] in steps:
                self.model.blocks[0].mlp.down.weight.grad[0, 0] = float("inf")
            return super().clip_gradients()

        def update_weights(self, step, grad_norm):
            before = [x.clone() for x in self.everything()]
            super().update_weights(step, grad_norm)
            if step in steps and self.config.skip_nonfinite:
                assert all(torch.equal(a, b) for a, b in zip(before, self.everything(), strict=True))

        def everything(self):
            return [*self.model.parameters(), *checkpoint.optimizer_tensors(self.model, self.optimizers).values()]

    return Broken


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_whose_gradient_is_not_finite_is_skipped_logged_and_counted(command, monkeypatch, capsys, optimizer):
    monkeypatch.setattr(train, "Trainer", broken_at(2, 3, 9))
    whole = command("whole", "--skip_nonfinite=2", f"--optimizer={optimizer}")
    assert log(whole, "skipped") == [{"step": step, "skipped": n} for n, step in enumerate((3, 4, 10), start=1)]
    trained = [e["step"] for e in log(whole, "train_loss")]
    assert trained == [1, 2, 5, 6, 7, 8, 9, 11, 12]
    told = capsys.readouterr().out
    assert "step 3/12: skipped, as its gradient norm is inf; 1 in all" in told
    assert told.splitlines()[-1].endswith(", 3 steps skipped")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, "next_batches", stopping_at(2))
        command("stopped", "--skip_nonfinite=2", f"--optimizer={optimizer}")
    run = command("stopped", "--init_from=resume")
    assert log(run) == log(whole) and final_files(run) == final_files(whole)


def test_more_skips_in_a_row_than_allowed_end_the_run_also_across_resuming(command, monkeypatch):
    monkeypatch.setattr(train, "Trainer", broken_at(5, 6, 7))
    message = "step 8: loss .*, gradient norm inf, after 2 skipped steps in a row; the last good checkpoint is "
    with pytest.raises(ValueError, match=message):
        command("a", "--skip_nonfinite=2", "--log_interval=5")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, "next_batches", stopping_at(6))
        command("b", "--skip_nonfinite=2", "--log_interval=5")
    with pytest.raises(ValueError, match=message):
        command("b", "--init_from=resume")
    with pytest.raises(ValueError, match="step 6: loss .*, gradient norm inf; the last good"):
        command("c")
