"""Train a GPT: config → data → model → loop.

    python train.py config/shakespeare_char_cpu.py --max_iters=500
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

Notable: the step's batch and its dropout are pure functions of (seed, step), so a run that was killed and resumed is
the run that never stopped; the loss of a step is one mean over all its counted tokens, so neither gradient accumulation
nor the number of processes changes the gradient; compilation and data parallelism wrap the model from outside.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import cli
from common.config import build, help_text, read_arguments
from model import GPT, IGNORE, GPTConfig
from runs import checkpoint
from tasks.pretrain import open_corpus, pretraining_task
from tasks.task import Task
from text.corpus import Corpus
from text.tokenizer import FILE_NAME as TOKENIZER_FILE
from text.tokenizer import Tokenizer
from training.config import TrainConfig
from training.device import Process, autocast, peak_flops, start_process, stop_process
from training.interrupt import interruptible
from training.log import Log, rewind_log
from training.optim import learning_rate_at, make_optimizers

DEFAULT_CONFIG = str(Path(__file__).parent / "config" / "pydocs.py")
USAGE = """usage: python train.py [config/x.py] [--key=value ...]          (no config: config/pydocs.py)
       torchrun --nproc_per_node=N train.py config/x.py [--key=value ...]

The keys, with the values that hold where neither the config file nor the command line says otherwise:"""

# What a run that goes on from another's weights may change of its model; any other field would make it another model.
MAY_CHANGE = ("dropout", "label_smoothing", "max_z_loss", "attention")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Trainer:
    """A model, its optimizers and a task, carried from step to step.

    model is the GPT itself; network the same, wrapped for speed and data parallelism. state is what a checkpoint
    remembers besides weights and optimizers; None: a run that begins.
    """

    def __init__(
        self, model: GPT, optimizers: list, task: Task, config: TrainConfig, process: Process, state: dict | None = None
    ):
        self.model, self.optimizers, self.task, self.config, self.process = model, optimizers, task, config, process
        self.state = state or {"step": 0, "val_loss": None, "best_val_loss": None, "seconds": 0.0, "scaler": {}}
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == "float16")
        if self.state["scaler"]:
            self.scaler.load_state_dict(self.state["scaler"])
        compiled = config.compile is True or config.compile == "auto" and process.device.type == "cuda"
        self.evaluator = torch.compile(model) if compiled else model
        self.network = self.evaluator
        if process.world_size > 1:
            self.network = DistributedDataParallel(self.evaluator, broadcast_buffers=False)  # they are constants
        self.saved_step = self.state["step"]  # nothing to save or evaluate there
        self.pending: list[Tensor] = []  # loss and gradient norm of steps that nobody has waited for
        self.tokens_per_step = task.tokens_per_step
        self.peak_flops = peak_flops(process.device, process.dtype)

    def train(self) -> None:
        """Run to max_iters, evaluating, logging and saving on the way.

        SIGINT and SIGTERM finish the step, save, and exit with a line that says how to go on.
        """
        config, state = self.config, self.state
        self.begin = time.perf_counter() - state["seconds"]
        self.clock = time.perf_counter()
        settings = vars(config) | asdict(self.model.config)
        self.log = Log(config, settings, self.process.rank == 0, state["step"])
        with closing(self.log), closing(self), interruptible(self.process.world_size == 1) as caught:
            while True:
                step = state["step"]
                due = step % config.eval_interval == 0 or step >= config.max_iters
                if due and (step != self.saved_step or step == 0):
                    self.evaluate_and_save()
                if step >= config.max_iters:
                    return
                (signals,) = self.process.total(len(caught))
                if signals:
                    self.flush()
                    if step != self.saved_step:
                        self.save(val_loss=None)
                    self.log.say(f"stopped at step {step}; continue with --init_from=resume --out_dir={config.out_dir}")
                    raise SystemExit(128 + max(caught, default=signal.SIGTERM))
                self.update()
                if state["step"] % config.log_interval == 0:
                    self.flush()

    def close(self) -> None:
        """Let go of the wrapped model, whatever ends the run: see `stop_process`."""
        del self.network, self.evaluator

    def update(self) -> None:
        """One step: gradients of all its micro-batches, one update of the weights."""
        config, process, step = self.config, self.process, self.state["step"]
        B, micro_steps = config.batch_size, config.gradient_accumulation_steps // process.world_size
        mine = range(process.rank * micro_steps, (process.rank + 1) * micro_steps)
        batches = [self.task.batch(step, slice(i * B, (i + 1) * B)) for i in mine]
        (count,) = process.total(sum(int((batch["targets"] != IGNORE).sum()) for batch in batches))
        # DDP averages the gradients over processes, and we want their sum: hence the division by world_size here.
        count = torch.full((), max(count, 1.0) / process.world_size, device=process.device)
        step_loss = torch.zeros((), device=process.device)
        for i, batch in zip(mine, batches, strict=True):
            torch.manual_seed(int(np.random.default_rng([config.seed, step, i]).integers(2**63)))  # dropout
            waits = process.world_size > 1 and i < mine[-1]
            with self.network.no_sync() if waits else nullcontext():  # exchange gradients once per step
                with autocast(process.device, process.dtype):
                    _, loss = self.network(**to_device(batch, process.device), target_count=count)
                self.scaler.scale(loss).backward()
            step_loss += loss.detach()
        if process.world_size > 1:
            dist.all_reduce(step_loss)
            step_loss /= process.world_size
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or float("inf"))
        # A float16 gradient may overflow in the weights of one optimizer: then all of them skip the step.
        skip = process.dtype == "float16" and not grad_norm.isfinite()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            if not skip:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.pending.append(torch.stack((step_loss, grad_norm)))
        self.state["step"] += 1

    def flush(self) -> None:
        """Wait for the pending steps, refuse to go on if one was not finite, and log the last if log_interval says so.

        Waiting seldom keeps the GPU busy. With float16 an infinite gradient is normal: GradScaler skips that step.
        """
        if self.pending:
            config, last = self.config, self.state["step"]
            losses = torch.stack(self.pending).tolist()
            for step, (loss, norm) in enumerate(losses, start=last - len(losses) + 1):
                if not (math.isfinite(loss) and (math.isfinite(norm) or self.process.dtype == "float16")):
                    raise ValueError(broken_down(f"step {step}: loss {loss}, gradient norm {norm}", config.out_dir))
            now = time.perf_counter()
            speed = self.tokens_per_step * len(losses) / (now - self.clock)
            if last % config.log_interval == 0 or last == config.max_iters:
                peak = (self.peak_flops or math.inf) * self.process.world_size
                self.log.training(
                    step=last, train_loss=loss, lr=learning_rate_at(last - 1, config), grad_norm=norm,
                    tokens=last * self.tokens_per_step, seconds=now - self.begin, tokens_per_second=speed,
                    mfu=speed * self.model.flops_per_token() / peak,
                )  # fmt: skip
            self.pending.clear()
        self.clock = time.perf_counter()

    def evaluate_and_save(self) -> None:
        """Evaluate, log it, print a sample if it is time to, and save (step 0 has nothing to save)."""
        self.flush()
        config, state = self.config, self.state
        metrics = evaluate(self.evaluator, self.task, self.process)
        if not math.isfinite(metrics["val_loss"]):
            raise ValueError(broken_down(f"step {state['step']}: val_loss {metrics['val_loss']}", config.out_dir))
        event = {"step": state["step"], **metrics, "seconds": time.perf_counter() - self.begin}
        self.log.event(event)
        if state["step"]:
            best = state["best_val_loss"] is None or metrics["val_loss"] < state["best_val_loss"]
            if best:
                state["best_val_loss"] = metrics["val_loss"]
            if best or config.always_save_checkpoint:
                self.save(metrics["val_loss"])
        self.log.show_evaluation(event)  # after saving: a terminal that is gone costs nothing
        if config.sample_interval and state["step"] % config.sample_interval == 0 and self.process.rank == 0:
            self.model.eval()
            self.log.say(self.task.preview(self.model))
            self.model.train()
        self.clock = time.perf_counter()  # evaluation does not count in tokens per second

    def save(self, val_loss: float | None) -> None:
        """Write a checkpoint of this step; val_loss is None where it was not evaluated."""
        self.saved_step = self.state["step"]
        seconds = time.perf_counter() - self.begin
        self.state.update(val_loss=val_loss, seconds=seconds, scaler=self.scaler.state_dict())
        if self.process.rank == 0:
            checkpoint.save_checkpoint(self.config.out_dir, self.model, self.optimizers, self.state)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device; from pinned memory the copy overlaps with what the GPU is doing."""
    if device.type == "cpu":
        return batch
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}


@torch.no_grad()
def evaluate(network, task: Task, process: Process) -> dict[str, float]:
    """val_loss (nats per counted token) and val_bpb (bits per byte) over the validation batches of all processes."""
    network.eval()
    loss, count = torch.zeros((), dtype=torch.float64, device=process.device), 0
    for batch in task.validation(process.rank, process.world_size):
        count += int((batch["targets"] != IGNORE).sum())
        with autocast(process.device, process.dtype):
            loss += network(**to_device(batch, process.device), target_count=1)[1]
    network.train()
    loss, count = process.total(loss.item(), count)
    mean = loss / max(count, 1)
    return {"val_loss": mean, "val_bpb": mean * task.tokens_per_byte / np.log(2)}


def broken_down(what: str, out_dir: str) -> str:
    """What to say when a number is not finite."""
    saved = checkpoint.list_checkpoints(out_dir)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
    return f"{what}; {last}. Try a lower learning_rate, more warmup_iters, a smaller grad_clip or dtype=float32" + (
        ", with --init_from=resume" if saved else ""
    )


# ---------------------------------------------------------------------------------------------------------------------
# The pretraining command


def configure(argv: list[str]) -> tuple[TrainConfig, GPTConfig]:
    """The configs that the arguments ask for, on top of those of the run they resume or start from."""
    given = read_arguments(argv)
    init_from = given.get("init_from", ("scratch",))[0]
    if init_from == "scratch" and not any(not argument.startswith("--") for argument in argv):
        given = read_arguments([DEFAULT_CONFIG, *argv])
    if init_from == "scratch":
        return tuple(build(given, TrainConfig, GPTConfig))
    source = given.get("out_dir", (TrainConfig.out_dir,))[0] if init_from == "resume" else init_from
    if not isinstance(source, str):
        raise ValueError("init_from and out_dir are written --key=value: scratch, resume or the folder of a run")
    if init_from == "resume" and checkpoint.load_config(source)["chat"] is not None:
        raise ValueError(f"{source} is a fine-tuned run: go on with finetune.py")
    if (checkpoint.load_config(source)["chat"] or {}).get("lora"):
        raise ValueError(f"{source} holds LoRA's corrections only: start from its base, or go on with finetune.py")
    return tuple(on_top_of(source, init_from == "resume", given, TrainConfig, GPTConfig))


def on_top_of(source: str, resuming: bool, given: dict, *classes: type) -> list:
    """The configs, with what the run in source says where nothing was given; ValueError if another model is asked for.

    given: as `read_arguments` returns it. classes: of TrainConfig's kind, the last one is GPTConfig.
    """
    run = checkpoint.load_config(source)
    base = run["model"] | (run["train"] if resuming else {})
    values = {key: (value, f"{source}/config.json") for key, value in base.items()} | given
    config, *others, model_config = build(values, *classes)
    for key, now in asdict(model_config).items() | {("optimizer", config.optimizer)}:
        if key not in MAY_CHANGE and now != base.get(key, now) and (key, now) != ("vocab_size", 0):
            raise ValueError(f"{key} is {base[key]} in {source} and cannot become {now}: train a new model for that")
    return [config, *others, model_config]


def check_tokenizers(corpus: Corpus, out_dir: str) -> None:
    """ValueError unless the run in out_dir was trained with the corpus's tokenizer."""
    path = Path(out_dir) / TOKENIZER_FILE
    if not path.is_file() or path.read_bytes() != (corpus.folder / TOKENIZER_FILE).read_bytes():
        raise ValueError(
            f"{out_dir} was trained with another tokenizer than that of {corpus.folder}: prepare the text again"
        )


def start(
    config: TrainConfig, model_config: GPTConfig, corpus: Corpus, process: Process
) -> tuple[GPT, list, dict | None]:
    """The model on its device, its optimizers, and the state to go on from (None for a new run)."""
    model_config.vocab_size = model_config.vocab_size or corpus.vocab_size
    if model_config.vocab_size < corpus.vocab_size:
        raise ValueError(
            f"vocab_size={model_config.vocab_size} is less than the corpus's {corpus.vocab_size} token ids"
        )
    torch.manual_seed(config.seed)
    model = GPT(model_config)
    if config.init_from == "resume":
        check_tokenizers(corpus, config.out_dir)
    source, path = weights_from(config)
    if path:
        check_tokenizers(corpus, source)
        checkpoint.verify(path)
        checkpoint.load_weights(model, path)
    return model, *set_up(model, config, process, path)


def weights_from(config: TrainConfig) -> tuple[str, Path | None]:
    """The run that the weights come from, and its checkpoint: None for "scratch"."""
    source, resuming = config.init_from, False
    if source == "resume":
        resuming = bool(checkpoint.list_checkpoints(config.out_dir))
        source = config.out_dir if resuming else first_init_from(config)  # killed before it saved: start over
    if source == "scratch":
        return source, None
    return source, checkpoint.find_checkpoint(source, "latest" if resuming else "best")


def set_up(model: GPT, config: TrainConfig, process: Process, path: Path | None) -> tuple[list, dict | None]:
    """Move the model to its device; its optimizers, and the state to go on from if path is of the run itself."""
    model.to(process.device)
    optimizers, state = make_optimizers(model, config), None
    if config.init_from == "resume" and path and path.is_relative_to(config.out_dir):
        state = checkpoint.read_state(path)
        checkpoint.load_optimizers(model, optimizers, path)
    return optimizers, state


def first_init_from(config: TrainConfig) -> str:
    """What the run in out_dir began from, however often it was resumed."""
    return checkpoint.load_config(config.out_dir)["train"].get("init_from", "scratch")


def open_run(
    config: TrainConfig,
    model_config: GPTConfig,
    tokenizer: Tokenizer,
    state: dict | None,
    more: dict,
    chat: dict | None,
) -> TextIO:
    """Make the run's folder, or rewind its log to the checkpoint that it goes on from; returns the lock on it."""
    init_from = config.init_from
    lock = checkpoint.lock_run(config.out_dir) if Path(config.out_dir, ".lock").exists() else None
    if init_from == "resume":
        init_from = first_init_from(config)
        rewind_log(config.out_dir, state["step"] if state else -1)
    elif aside := checkpoint.start_run(config.out_dir, tokenizer):
        print(f"{config.out_dir} held a run already: it is now {aside}")
        lock = None  # it went with the folder
    settings = asdict(config) | more | {"init_from": init_from}
    checkpoint.save_config(config.out_dir, asdict(model_config), settings, chat)
    return lock or checkpoint.lock_run(config.out_dir)


def run(
    config: TrainConfig, model: GPT, optimizers: list, task: Task, state: dict | None, process: Process, about: str,
    more: dict | None = None, chat: dict | None = None, opened: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Only evaluate, if the config says so; else open the run's folder, tell what it is about, and train.

    more, chat: what config.json is to hold besides the two configs; opened(): what else is to be done with the folder
    (see finetune.py).
    """
    if config.eval_only:
        metrics = evaluate(model, task, process)
        if process.rank == 0:
            print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return
    if state and state["step"] >= config.max_iters:
        if process.rank == 0:
            print(f"{config.out_dir} has done {state['step']} of {config.max_iters} steps: --max_iters=N goes on")
        return
    process.total(0)  # all have read what open_run may move
    lock = None
    try:
        if process.rank == 0:
            lock = open_run(config, model.config, task.tokenizer, state, more or {}, chat)
            opened()
            print(about)
            print(f"{model.num_params():,} parameters, {process.dtype} on {process.world_size} x {process.device}")
        Trainer(model, optimizers, task, config, process, state).train()
    finally:
        if lock:
            lock.close()


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, TrainConfig, GPTConfig))
        return
    config, model_config = configure(sys.argv[1:])
    corpus = open_corpus(config.dataset)
    process = start_process(config.device, config.dtype, config.gradient_accumulation_steps)
    try:
        model, optimizers, state = start(config, model_config, corpus, process)
        task = pretraining_task(corpus, config, model_config.block_size, model_config.causal)
        counts = [f"{corpus.num_tokens(split):,} {split} tokens" for split in ("train", "val")]
        about = f"{corpus.folder}: {', '.join(counts)}, vocabulary {corpus.vocab_size:,}"
        run(config, model, optimizers, task, state, process, about)
    finally:
        stop_process(process)


if __name__ == "__main__":
    cli.run(main)
