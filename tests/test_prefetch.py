"""Reading ahead changes when a batch is read, and nothing else."""

import threading

import pytest
import torch

import train
from runs.checkpoint import list_checkpoints
from tests.test_runs import call, events, pretrain, talk, tune  # noqa: F401
from text.corpus import Corpus
from training.prefetch import Prefetcher

CPU = torch.device("cpu")


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_each_step_is_read_once_in_order_one_step_ahead_and_none_beyond_the_last():
    reads, ready = [], threading.Semaphore(0)

    def read(step):
        reads.append((step, threading.current_thread().name))
        ready.release()
        return step * step

    prefetch = Prefetcher(read, 7, CPU)
    for step in range(3, 7):  # a run that goes on at step 3
        assert prefetch(step) == step * step
        for _ in range(2 if step == 3 else 1 if step < 6 else 0):
            assert ready.acquire(timeout=10)  # the next step is read without being asked for
        assert [number for number, _ in reads] == list(range(3, min(step + 2, 7)))
    assert len({name for _, name in reads}) == 1 and reads[0][1].startswith("prefetch")
    prefetch.close()
    assert not reading_threads()


def test_an_error_comes_up_in_the_step_that_it_belongs_to():
    def read(step):
        if step == 2:
            raise ValueError("step 2 is damaged")
        return step

    prefetch = Prefetcher(read, 10, CPU)
    assert prefetch(0) == 0 and prefetch(1) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="step 2 is damaged"):
            prefetch(2)
    assert prefetch(3) == 3
    prefetch.close()


def test_a_prefetcher_that_is_closed_waits_for_nothing_but_the_read_it_is_in():
    begun, go_on, reads = threading.Event(), threading.Event(), []

    def read(step):
        reads.append(step)
        if step == 1:
            begun.set()
            assert go_on.wait(timeout=10)
        return step

    prefetch = Prefetcher(read, 10, CPU)
    prefetch(0)
    assert begun.wait(timeout=10)
    threading.Timer(0.05, go_on.set).start()
    prefetch.close()
    assert reads == [0, 1] and not reading_threads()


@pytest.mark.parametrize("kind", ["pretraining", "packed", "padded"])
def test_a_run_trains_on_the_batches_that_it_would_read_without_a_thread(pretrain, tune, monkeypatch, kind):  # noqa: F811
    pretrain("base", "--max_iters=1")
    next_batches, steps = train.Trainer.next_batches, []

    def compared(trainer, step):
        batches, count = next_batches(trainer, step)
        plain, counted = trainer.read_batches(step)
        assert counted == count.item() and len(plain) == len(batches) == 2
        for a, b in zip(plain, batches, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        steps.append(step)
        return batches, count

    monkeypatch.setattr(train.Trainer, "next_batches", compared)
    options = ["--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=3"]
    if kind == "pretraining":
        pretrain("a", *options)
    else:
        tune("a", "base", *options, f"--packing={kind == 'packed'}")
    assert steps == list(range(6)) and not reading_threads()


def test_an_error_while_reading_ahead_ends_the_run_in_its_own_step_after_what_came_before_is_saved(
    pretrain,  # noqa: F811
    monkeypatch,
):
    read = Corpus.batch

    def damaged(corpus, split, step, **options):
        if step == 5:
            raise ValueError("the corpus is damaged")
        return read(corpus, split, step, **options)

    monkeypatch.setattr(Corpus, "batch", damaged)
    with pytest.raises(ValueError, match="the corpus is damaged"):
        pretrain("a", "--max_iters=8", "--eval_interval=5", "--log_interval=1")
    assert [path.name for path in list_checkpoints("a")] == ["step_00000005"]
    assert len(events(train.Path("a"), "train_loss")) == 5 and not reading_threads()
