"""Train a GPT: config → data → model → loop.

    python train.py config/shakespeare_char_cpu.py --max_iters=500
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

Notable: the step's batch and its dropout are pure functions of (seed, step), so a run that was killed and resumed is
the run that never stopped; the loss of a step is one mean over all its counted tokens, so neither gradient accumulation
nor the number of processes changes the gradient; compilation, data parallelism and sharding are applied from outside.
"""

from common import cli  # first: it makes Ctrl-C one line even while the modules below are imported

# isort: split

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common.config import help_text, read_arguments
from model import GPT, IGNORE, GPTConfig
from runs.checkpoint import INITIAL_STATE, list_checkpoints
from runs.run import Run
from runs.start import RunFolder, Start, decide
from tasks.evaluate import evaluate
from tasks.objective import open_task
from tasks.plan import PlanOptions, plan_pretraining, take_options
from tasks.task import Task
from training.compiling import decide_to_compile, prepare
from training.config import TrainConfig
from training.device import (
    Peak,
    Process,
    autocast,
    flops_per_token,
    seed_random,
    start_process,
    stop_process,
)
from training.interrupt import Interrupted, interruptible, until_interrupted
from training.optim import learning_rate_at
from training.plan import Job, check_memory
from training.prefetch import Prefetcher, pin, to_device
from training.shard import clip_gradients, drop_gathered, is_sharded
from training.skips import told, was_skipped

DEFAULT_CONFIG = str(Path(__file__).parent / "config" / "pydocs.py")
USAGE = """usage: python train.py [config/x.py] [--key=value ...]          (no config: config/pydocs.py)
       torchrun --nproc_per_node=N train.py config/x.py [--key=value ...]

The keys, with the values that hold where neither the config file nor the command line says otherwise:"""

OUT_OF_MEMORY = "lower batch_size (and raise gradient_accumulation_steps), block_size, n_embd or n_layer, or try \
--dtype=bfloat16"


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Trainer:
    """A model, its optimizers and a task, carried from step to step.

    model is the GPT itself; network is the same, wrapped for speed and data parallelism. config.compile is True or
    False here: `decide_to_compile` has decided what "auto" means. state is what a checkpoint remembers besides weights
    and optimizers; None for a run that begins.
    """

    def __init__(
        self, model: GPT, optimizers: list, task: Task, config: TrainConfig, process: Process, state: dict | None = None
    ):
        self.model, self.optimizers, self.task, self.config, self.process = model, optimizers, task, config, process
        self.state = state or dict(INITIAL_STATE)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == "float16")
        if self.state["scaler"]:
            self.scaler.load_state_dict(self.state["scaler"])
        self.evaluator: Any = prepare(model, config, task.fixed_shapes)
        self.network: Any = self.evaluator  # has no_sync if it is data-parallel
        if process.world_size > 1 and not is_sharded(model):
            # The gradients are views of the buckets that are exchanged, not copies
            self.network = DistributedDataParallel(self.evaluator, gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False  # they are constants
        self.prefetch = Prefetcher(self.read_batches, config.max_iters, process.device)
        self.saved_step = self.state["step"]  # the step of the newest checkpoint
        self.pending: list[Tensor] = []  # losses and gradient norms still on the device, read together at the next log
        self.peak = Peak(process)

    def train(self, folder: RunFolder) -> None:
        """Run to max_iters, evaluating, logging and saving on the way.

        A signal to stop finishes the step, saves, and exits with a line that says how to go on.
        """
        config, state, self.folder, self.log = self.config, self.state, folder, folder.log
        self.begin, self.clock = time.perf_counter() - state["seconds"], time.perf_counter()
        with closing(self), interruptible(self.process.world_size == 1) as caught:
            while True:
                # Evaluate, save, and show what the model has learned
                step = state["step"]
                last = step >= config.max_iters
                known = step == self.saved_step and step > 0 and not state["evaluation_due"]
                if (step % config.eval_interval == 0 or last) and not known:
                    self.evaluate_and_save(caught)
                if last:
                    return
                self.stop_if_asked(caught)

                # One step: its micro-batches, their gradients, one update of the weights
                batches, target_count = self.next_batches(step)
                loss = self.forward_backward(step, batches, target_count)
                grad_norm = self.clip_gradients()
                self.update_weights(step, grad_norm)

                # Log
                self.pending.append(torch.stack((loss, grad_norm)))
                state["step"] += 1
                if state["step"] % config.log_interval == 0:
                    self.flush()

    def close(self) -> None:
        """Let go of the wrapped model, whatever ends the run (see `stop_process`), and end the reading thread."""
        del self.network, self.evaluator
        self.prefetch.close()

    def next_batches(self, step: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """This process's micro-batches of the step, and what to divide their summed losses by.

        DDP averages the gradients over processes where their sum is wanted: hence the division by world_size.
        """
        process = self.process
        batches, counted = self.prefetch(step)
        (count,) = process.total(counted)
        return batches, torch.full((), max(count, 1.0) / process.world_size, device=process.device)

    def read_batches(self, step: int) -> tuple[list[dict[str, Tensor]], int]:
        """This process's micro-batches of the step, ready for the device, and the number of their counted targets."""
        B = self.config.batch_size
        batches = [self.task.batch(step, slice(i * B, (i + 1) * B)) for i in self.micro_steps()]
        counted = sum(int((batch["targets"] != IGNORE).sum()) for batch in batches)
        return [pin(batch, self.process.device) for batch in batches], counted

    def micro_steps(self) -> range:
        """The numbers, within a step, of the micro-steps that this process does."""
        n = self.config.gradient_accumulation_steps // self.process.world_size
        return range(self.process.rank * n, (self.process.rank + 1) * n)

    def forward_backward(self, step: int, batches: list[dict[str, Tensor]], target_count: Tensor) -> Tensor:
        """Accumulate the gradients of all micro-batches; returns the step's loss, the mean over all its targets."""
        process, mine = self.process, self.micro_steps()
        step_loss = torch.zeros((), device=process.device)
        for i, batch in zip(mine, batches, strict=True):
            seed = int(np.random.default_rng([self.config.seed, step, i]).integers(2**63))
            seed_random(seed, process.device)  # dropout
            waits = i < mine[-1] and hasattr(self.network, "no_sync")
            with self.network.no_sync() if waits else nullcontext():  # exchange gradients once per step, unless sharded
                with autocast(process.device, process.dtype):
                    _, loss = self.network(**to_device(batch, process.device), target_count=target_count)
                self.scaler.scale(loss).backward()
            step_loss += loss.detach()
        if process.world_size > 1:
            dist.all_reduce(step_loss)
            step_loss /= process.world_size
        return step_loss

    def clip_gradients(self) -> Tensor:
        """Clip the gradient's global norm to grad_clip; returns the norm before that."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return clip_gradients(self.model, self.config.grad_clip or math.inf)

    def update_weights(self, step: int, grad_norm: Tensor) -> None:
        """One step of every optimizer, at the schedule's learning rate.

        A float16 gradient may overflow in the weights of one optimizer: then all of them skip the step. With
        skip_nonfinite, so they do for any gradient that is not finite; weights and optimizers stay as they were.
        """
        may_skip = self.process.dtype == "float16" or self.config.skip_nonfinite > 0
        skip = may_skip and not grad_norm.isfinite()  # waits for the device
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, self.config)
            if not skip:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()

    def flush(self) -> None:
        """Wait for the pending steps, refuse to go on if one was not finite, and log the last if log_interval says so.

        Waiting seldom keeps the GPU busy. A step that was skipped is logged as that: see `was_skipped`.
        """
        if self.pending:
            config, last, tokens_per_step = self.config, self.state["step"], self.task.tokens_per_step
            losses = torch.stack(self.pending).tolist()
            for step, (loss, norm) in enumerate(losses, start=last - len(losses) + 1):
                try:
                    skipped = was_skipped(loss, norm, self.process.dtype, config, self.state)
                except ValueError as error:
                    raise ValueError(self.broken_down(f"step {step}: {error}")) from None
                if skipped:
                    self.log.skipped(step, norm, self.state["skipped"])
            now = time.perf_counter()
            speed = tokens_per_step * len(losses) / (now - self.clock)
            if not skipped and (last % config.log_interval == 0 or last == config.max_iters):
                self.log.training(
                    step=last, train_loss=loss, lr=learning_rate_at(last - 1, config), grad_norm=norm,
                    tokens=last * tokens_per_step, seconds=now - self.begin, tokens_per_second=speed,
                    mfu=self.peak.mfu(speed * flops_per_token(self.model)),
                )  # fmt: skip
            self.pending.clear()
        self.clock = time.perf_counter()

    def evaluate_and_save(self, caught: list[int]) -> None:
        """Evaluate, log it, save (step 0 has nothing to save), and show a sample if it is time to.

        A signal to stop ends the evaluation, which resuming does again from its beginning.
        """
        self.flush()
        config, state = self.config, self.state

        def watch(batches: Iterable) -> Iterator:
            return self.log.evaluating(until_interrupted(batches, self.process, caught))

        try:
            metrics = evaluate(self.evaluator, self.task, self.process, watch)
        except Interrupted:
            self.stop(caught, evaluation_due=True)
        if not math.isfinite(metrics["val_loss"]):
            raise ValueError(self.broken_down(f"step {state['step']}: val_loss {metrics['val_loss']}"))
        event = {"step": state["step"], **metrics, "seconds": time.perf_counter() - self.begin}
        self.log.event(event)
        state["evaluation_due"] = False
        if state["step"]:
            best = state["best_val_loss"] is None or metrics["val_loss"] < state["best_val_loss"]
            if best:
                state["best_val_loss"] = metrics["val_loss"]
            if best or config.always_save_checkpoint:
                self.save(metrics["val_loss"])
        self.log.show_evaluation(event, told(state))  # after saving: a terminal that is gone costs nothing
        last = state["step"] >= config.max_iters
        if config.sample_interval and (last or state["step"] % config.sample_interval == 0):
            self.show_preview()
        self.clock = time.perf_counter()  # evaluation does not count in tokens per second

    def show_preview(self) -> None:
        """Print what the model makes now. It takes all processes to run a sharded one, and one prints."""
        process, sharded = self.process, is_sharded(self.model)
        if process.rank == 0 or sharded:
            self.model.eval()
            # A sharded model's blocks need autocast, and may be compiled, which is for training's shapes
            plainly = torch.compiler.set_stance("force_eager") if self.config.compile is True else nullcontext()
            with autocast(process.device, process.dtype if sharded else "float32"), plainly:
                self.log.show_preview(self.task.preview(self.model), self.state["step"])
            self.model.train()
            drop_gathered(self.model)

    def broken_down(self, what: str) -> str:
        """What to say when a number is not finite."""
        try:
            self.folder.wait()
        except ValueError as error:
            what = f"{what}; {error}"
        saved = list_checkpoints(self.config.out_dir)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
        clip = "a smaller grad_clip" if self.config.grad_clip else "grad_clip=1.0"
        remedy = f"Try a lower learning_rate, more warmup_iters, {clip} or dtype=float32"
        return f"{what}; {last}. {remedy}" + (", with --init_from=resume" if saved else "")

    def save(self, val_loss: float | None) -> None:
        """Save this step, and go on while a thread writes it; val_loss is None where it was not evaluated."""
        self.saved_step = self.state["step"]
        seconds = time.perf_counter() - self.begin
        self.state.update(val_loss=val_loss, seconds=seconds, scaler=self.scaler.state_dict())
        self.folder.save(self.model, self.optimizers, self.state)

    def stop_if_asked(self, caught: list[int]) -> None:
        """`stop` if any process has caught a signal to stop."""
        (signals,) = self.process.total(len(caught))
        if signals:
            self.stop(caught)

    def stop(self, caught: list[int], evaluation_due: bool = False) -> NoReturn:
        """Save this step, if it is not saved yet, and exit. evaluation_due: whether resuming is to evaluate it."""
        self.flush()
        step = self.state["step"]
        if step != self.saved_step:
            self.state["evaluation_due"] = evaluation_due
            self.save(val_loss=None)
        self.folder.wait()
        remedy = f"continue with --init_from=resume --out_dir={self.config.out_dir}"
        self.log.say(f"stopped at step {step}{told(self.state)}; {remedy}")
        raise SystemExit(128 + max(caught, default=signal.SIGTERM))


# ---------------------------------------------------------------------------------------------------------------------
# What both training commands do


def train_or_evaluate(
    run: Run, start: Start, model: GPT, task: Task, config: TrainConfig, process: Process, about: list[str]
) -> None:
    """Evaluate only, if the config says so; else train in the run's folder, beginning with the lines about the run."""
    model.to(process.device)
    done = start.state["step"] if start.state and not config.eval_only else 0
    flops = (config.max_iters - done) * task.tokens_per_step * flops_per_token(model)
    compiles, notes = decide_to_compile(config, process, flops)
    config = replace(config, compile=compiles)
    if config.eval_only:  # by the network that training would use
        metrics = evaluate(prepare(model, config, task.fixed_shapes), task, process)
        if process.rank == 0:
            print(*notes, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), sep="\n")
        return
    optimizers = start.optimizers(model, config, process)
    trainer = Trainer(model, optimizers, task, config, process, start.state)
    process.total(0)  # wait until all processes have read the files that opening the folder may move
    opened = RunFolder(run, start, task.tokenizer, config, active=process.rank == 0)
    with cli.lasting("stdout"), opened as folder:  # `train.py | head` goes on
        for line in [
            *folder.notes, *notes, *about,
            f"{model.num_params():,} parameters, {process.dtype} on {process.world_size} x {process.device}"
            + (", sharded" if is_sharded(model) else "")
            + (", compiled" if compiles else ""),
            f"{config.max_iters:,} steps: {config.max_iters / task.steps_per_pass:,.1f} passes over the training data, "
            f"{task.steps_per_pass:,.1f} steps each",
        ]:  # fmt: skip
            folder.log.say(line)
        trainer.train(folder)


def say_finished(start: Start, config: TrainConfig, process: Process) -> None:
    """Say that a resumed run has nothing left to do."""
    if process.rank == 0:
        print(f"{config.out_dir} has done {start.state['step']} of {config.max_iters} steps: --max_iters=N goes on")


# ---------------------------------------------------------------------------------------------------------------------
# The pretraining command


def configure(argv: list[str]) -> tuple[Start, TrainConfig, GPTConfig]:
    """Where the run begins, and the configs that the arguments ask for."""
    given = read_arguments(argv, TrainConfig, GPTConfig)
    start = decide(given, vars(TrainConfig()), "pretrain")
    if start == Start():
        given = read_arguments(argv, TrainConfig, GPTConfig, default=DEFAULT_CONFIG)
    return start, *start.configs(given, TrainConfig, GPTConfig)


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, TrainConfig, GPTConfig, PlanOptions))
        return
    options, argv = take_options(sys.argv[1:])
    start, config, model_config = configure(argv)
    if options.plan:
        return print(plan_pretraining(start, config, model_config, options))
    task, about = open_task(start, config, model_config)
    process = start_process(config.device, config.dtype, config.gradient_accumulation_steps, config.parallel)
    try:
        if start.is_finished(config) and not config.eval_only:
            return say_finished(start, config, process)
        warnings = check_memory(Job.on(process, model_config, config), process.device, "training")
        model = start.model(model_config, config, process)
        fine_tuned = start.source is not None and start.source.fine_tuned
        run = Run(Path(config.out_dir), model.config, asdict(config), "pretrain", fine_tuned)
        run = run.with_template_of(start.source)
        train_or_evaluate(run, start, model, task, config, process, [*warnings, about])
    finally:
        stop_process(process)


if __name__ == "__main__":
    cli.run_command(main, if_out_of_memory=OUT_OF_MEMORY)
