"""How a run starts (from scratch, from another run's weights, or resumed), and the folder that it trains in.

`decide` chooses one of the three ways. Its result, a `Start`, is passed to everything that depends on the choice.
"""

import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.config import build
from common.files import locked
from common.layers import shapes_only
from common.picture import can_draw
from formats.source import is_hub_name
from model import GPT, GPTConfig
from runs.checkpoint import FILES, Saver, load_optimizers, load_weights, read_state, take_snapshot, verify
from runs.curves import draw_loss, read_curves
from runs.importing import imported
from runs.run import CONFIG, IMPORT, SCRATCH, Origin, Run, add_tables, model_to_fine_tune
from seq2seq import model_of
from text.tokenizer import FILE_NAME as TOKENIZER_FILE
from text.tokenizer import Tokenizer
from training.config import TrainConfig
from training.device import Process
from training.log import Log, check_log, check_wandb, rewind_log, seal_log
from training.lora import LoraConfig, add_lora
from training.optim import learning_rate_at, make_optimizers
from training.shard import draw_sharded, is_sharded, receive, shard, shards

RESUME = "resume"
COMMANDS = {"pretrain": "train.py", "sft": "finetune.py"}

# Model settings that may differ from those of the run whose weights are used; any other would need other weights.
MAY_CHANGE = ("dropout", "label_smoothing", "max_z_loss", "attention", "pool")
# Training settings that a resumed run may not change, since its optimizer state or weights would not fit.
FIXED = ("objective", "optimizer", "lora_rank", "lora_alpha", "lora_targets")


# ---------------------------------------------------------------------------------------------------------------------
# The decision


@dataclass(frozen=True)
class Start:
    """How a run starts.

    resumes: the run to resume, None for a new run. source, checkpoint: the run and the checkpoint that the weights come
    from, None for random weights. state: the state.json of the checkpoint to resume, None if training starts at step 0.
    notes: messages for the user. damaged: checkpoints that are newer than the one to resume, and damaged.
    """

    resumes: Run | None = None
    source: Run | None = None
    checkpoint: Path | None = None
    state: dict | None = None
    notes: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()

    @property
    def known(self) -> Run | None:
        """The run whose config and tokenizer go on: the one resumed, or else the one that the weights come from."""
        return self.resumes or self.source

    def configs(self, given: dict, *classes: type) -> list:
        """Return one instance of each config class: the given values, else those of the run resumed or started from.

        given: from `read_arguments`. Raises ValueError if a value does not fit the weights or the optimizer state.
        """
        known = self.known
        if known is None:
            return build(given, *classes)
        base = asdict(known.model_config) | (known.settings if self.resumes else {})
        configs = build({key: (value, f"{known.folder}/{CONFIG}") for key, value in base.items()} | given, *classes)
        for config in configs:
            for key, now in asdict(config).items():
                if isinstance(config, GPTConfig) or (self.resumes and key in FIXED):
                    self._check_change(key, base.get(key, now), now, known)
        return configs

    def _check_change(self, key: str, before: Any, now: Any, known: Run) -> None:
        """Raise ValueError if the setting `key` changes and must not."""
        if now == before or key in MAY_CHANGE or (key, now) == ("vocab_size", 0):
            return
        if key == "block_size" and not self.resumes:
            if known.model_config.position != "learned" or now < before:
                return  # only learned positions have weights; these can be cut off, not extended
            raise ValueError(
                f"block_size is {before} in {known.folder}, whose positions are learned: it can only become smaller"
            )
        raise ValueError(f"{key} is {before} in {known.folder} and cannot become {now}: train a new model for that")

    def is_finished(self, config: TrainConfig) -> bool:
        """Return whether the run that is resumed has done all its steps."""
        return self.state is not None and self.state["step"] >= config.max_iters and not self.state["evaluation_due"]

    def schedule_note(self, config: TrainConfig) -> list[str]:
        """Return a warning if a larger max_iters makes the learning rate of the resumed run jump up; else []."""
        if not self.state or config.max_iters <= self.resumes.settings.get("max_iters", config.max_iters):
            return []
        step = self.state["step"]
        planned = replace(config, max_iters=self.resumes.settings["max_iters"])
        before, now = learning_rate_at(step - 1, planned), learning_rate_at(step, config)
        if now <= 1.1 * before or step < config.warmup_iters:
            return []
        return [
            f"note: the run was planned for {planned.max_iters} steps: its learning rate now jumps from {before:.1e} "
            f"back to {now:.1e}. To go on without a jump, begin a new run with these weights and a smaller learning "
            f"rate: --init_from={config.out_dir} --out_dir=out/more --learning_rate={max(before, now / 10):.1e}"
        ]

    def model(self, model_config: GPTConfig, config: TrainConfig, process: Process) -> GPT:
        """Return the model to pretrain: random weights, another run's, or those of the resumed run.

        It is on the CPU, or if it is sharded, on its device.
        """
        torch.manual_seed(config.seed)
        if shards(config, process):
            return self._sharded_model(model_config, process)
        if self.state:
            model = model_of(replace(model_config))
            load_weights(model, self.checkpoint)
            return model
        if self.source is None:
            return model_of(replace(model_config))
        return adapt(self.source.load_model(self.checkpoint.name), model_config)

    def _sharded_model(self, model_config: GPTConfig, process: Process) -> GPT:
        """`model`, of which each process draws or reads its own rows; another run's weights are sent by the first."""
        if self.source is None:
            model = draw_sharded(lambda: model_of(replace(model_config)), process)
            add_tables(model, process.device)
            return model
        model = without_numbers(model_config, None, process)
        if self.state:
            load_weights(model, self.checkpoint)
        else:
            first = process.rank == 0
            receive(
                model, adapt(self.source.load_model(self.checkpoint.name), model_config) if first else None, process
            )
        return model

    def model_to_fine_tune(self, run: Run, tokenizer: Tokenizer, config: TrainConfig, process: Process) -> GPT:
        """Return the model to fine-tune, with LoRA if `run` has it; on the CPU, or if it is sharded, on its device."""
        torch.manual_seed(config.seed)
        if self.state and not run.lora:
            return self.model(run.model_config, config, process)
        if shards(config, process):  # the first process makes all of it, and sends it to the others
            vocab_size = max(run.model_config.vocab_size, tokenizer.vocab_size)
            model = without_numbers(replace(run.model_config, vocab_size=vocab_size), run.lora, process)
            source = self._whole_model_to_fine_tune(run, tokenizer) if process.rank == 0 else None
            receive(model, source, process)
        else:
            model = self._whole_model_to_fine_tune(run, tokenizer)
        if self.state:
            load_weights(model, self.checkpoint)
        return model

    def _whole_model_to_fine_tune(self, run: Run, tokenizer: Tokenizer) -> GPT:
        """The model that fine-tuning begins with, on the CPU, with corrections that are still zero."""
        source, which = (self.resumes.base, run.base_checkpoint) if self.state else (self.source, self.checkpoint.name)
        model = adapt(model_to_fine_tune(source, which, tokenizer), run.model_config)
        if run.lora:
            add_lora(model, run.lora)
        return model

    def optimizers(self, model: GPT, config: TrainConfig, process: Process | None = None) -> list:
        """The optimizers of a model that is on its device already, as they were if the run is resumed.

        process: as in `make_optimizers`.
        """
        optimizers = make_optimizers(model, config, process)
        if self.state:
            load_optimizers(model, optimizers, self.checkpoint)
        return optimizers


def without_numbers(model_config: GPTConfig, lora: LoraConfig | None, process: Process) -> GPT:
    """Return a sharded model on its device whose weights are not filled yet."""
    with shapes_only():
        model = model_of(replace(model_config))
        if lora:
            add_lora(model, lora)
    shard(model, process)
    add_tables(model, process.device)
    return model


def adapt(model: GPT, model_config: GPTConfig) -> GPT:
    """Return a model with the same weights and the settings of `model_config` (see MAY_CHANGE)."""
    model_config = replace(model_config, vocab_size=model.config.vocab_size)
    adapted, weights = model_of(model_config), model.state_dict()
    if "pos_emb.weight" in weights:
        weights["pos_emb.weight"] = weights["pos_emb.weight"][: model_config.block_size]
    if model_config.classes and not model.config.classes:  # a new classifier has a layer of its own in the head's place
        new = {name: weight for name, weight in adapted.state_dict().items() if name.startswith("classes.")}
        weights = {name: weight for name, weight in weights.items() if not name.startswith("head.")} | new
    adapted.load_state_dict(weights)
    return adapted


def decide(given: dict, defaults: dict, task: str) -> Start:
    """Decide by init_from and out_dir whether a run starts from scratch, from another run, or resumed.

    given: from `read_arguments`; defaults: for keys that are not given; task: the command's task.
    Raises ValueError if the run does not exist, or if it belongs to the other command.
    """
    init_from, out_dir = (given[key][0] if key in given else defaults[key] for key in ("init_from", "out_dir"))
    if not isinstance(init_from, str) or not isinstance(out_dir, str):
        raise ValueError("init_from and out_dir are written --key=value: scratch, resume or the folder of a run")
    if init_from == SCRATCH:
        return Start()
    if is_hub_name(init_from):
        source, made = imported(init_from)
        return Start(source=source, checkpoint=source.checkpoint("best"), notes=tuple(made))
    if init_from != RESUME:
        return Start(source=(source := Run.open(init_from)), checkpoint=source.checkpoint("best"))
    run = Run.open(out_dir)
    if run.task == IMPORT:
        raise ValueError(f"{out_dir} is an imported model, which has no training to resume: start from it, by "
                         f"--init_from={out_dir} and another --out_dir")  # fmt: skip
    if run.task != task:
        kind = "a fine-tuned run" if run.task == "sft" else "no fine-tuned run"
        raise ValueError(f"{out_dir} is {kind}: go on with {COMMANDS[run.task]}")
    checkpoint, damaged = newest_intact(run)
    if checkpoint:
        notes = [f"{why.split(';')[0]}: going on from the one before it" for why in damaged.values()]
        return Start(run, run, checkpoint, read_state(checkpoint), tuple(notes), tuple(damaged))
    notes = [f"{out_dir} holds no checkpoint: it begins again at step 0"]
    if run.origin.source == SCRATCH:
        return Start(run, notes=tuple(notes))
    source, which = Run.open(run.origin.source), run.origin.checkpoint
    return Start(run, source, source.checkpoint(which), notes=tuple(notes))


def newest_intact(run: Run) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest intact checkpoint, None for a run without any, and newer ones with what is wrong with each.

    Raises ValueError if all are damaged.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(run.checkpoints()):
        try:
            verify(checkpoint)
            read_state(checkpoint)
            return checkpoint, damaged
        except ValueError as error:
            damaged[checkpoint] = str(error)
    if damaged:
        first = next(iter(damaged.values()))
        raise ValueError(
            f"every checkpoint in {run.folder} is damaged ({first.split(';')[0]}): start a new run, with another "
            f"--init_from; this one is then moved to another folder"
        )
    return None, damaged


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def check_place(folder: Path) -> None:
    """Raise ValueError if the folder holds something other than a run, which must not be moved or overwritten."""
    taken = folder.is_file() or any((folder / name).exists() for name in ("meta.json", "prepare.py", "train.jsonl"))
    if not folder.name or taken:
        raise ValueError(f"out_dir={str(folder)!r} is no place for a run: name a new folder, such as out/mine")
    if (folder / CONFIG).exists() and not (folder / "checkpoints").is_dir():
        try:
            Run.open(folder)
        except ValueError:
            place = f"out_dir={str(folder)!r}"
            raise ValueError(f"{place} holds a {CONFIG} that is not a run's: name another folder") from None


def move_aside(folder: Path) -> Path | None:
    """Move a run in the folder to folder.1, .2, …; returns its new folder, None if there was no run."""
    if not (folder / CONFIG).exists() and not (folder / "checkpoints").exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


class RunFolder:
    """The folder that a run trains in, with its lock, config.json, log and checkpoints.

    active: whether this process writes; of the processes that train together, only the first one does.
    """

    def __init__(self, run: Run, start: Start, tokenizer: Tokenizer, config: TrainConfig, active: bool):
        self.run, self.start, self.active = run, start, active
        self.lock = ExitStack()
        self.saver = Saver(run.folder, config.keep_checkpoints)
        self.notes = [*start.notes, *start.schedule_note(config)]
        if active:
            check_wandb(config)
            self._open(tokenizer)
        try:
            settings = self.run.settings | asdict(self.run.model_config)
            self.log = Log(config, settings, active, start.state["step"] if start.state else 0)
        except BaseException:
            self.lock.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _kind: type | None, ending: BaseException | None, _traceback: object) -> None:
        try:
            self.saver.close()
            if ending is None and self.active:
                self._draw_loss()
        except ValueError as error:
            if ending is None:
                raise
            self.log.say(f"note: {error}")  # what ended the run is told by the command
        finally:
            self.log.close()
            self.lock.close()

    def _open(self, tokenizer: Tokenizer) -> None:
        """Make the folder of a new run, or cut the log of a resumed one at its checkpoint; then write config.json."""
        folder, start = self.run.folder, self.start
        check_place(folder)
        if folder.exists():
            self._hold(folder)
        if start.resumes:
            self._set_damaged_aside()
            self._rewind_log()
            origin = start.resumes.origin
        else:
            self.lock.close()  # Windows cannot move a folder with an open file in it
            aside = move_aside(folder)
            self._hold(folder)
            (folder / "checkpoints").mkdir(exist_ok=True)
            tokenizer.save(folder)
            source = start.source.folder if start.source else None
            if aside:
                self.notes.append(f"{folder} held a run already: it is now {aside}")
                source = aside if source and source.resolve() == folder.resolve() else source
            origin = Origin(str(source), start.checkpoint.name) if source else Origin()
        if self.run.lora and not (folder / "base").exists():
            keep_run(Path(origin.source), self.run.base_checkpoint, folder / "base")
        self.run = replace(self.run, origin=origin, settings=self.run.settings | {"init_from": origin.source})
        self.run.save()

    def _hold(self, folder: Path) -> None:
        """Lock the folder. Raises ValueError if another process is training there."""
        self.lock.enter_context(locked(folder, "choose another --out_dir"))

    def _set_damaged_aside(self) -> None:
        """Rename the damaged checkpoints, so that they are no longer the run's; one of that name before is deleted."""
        for checkpoint in self.start.damaged:
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            self.notes.append(f"the damaged checkpoint is kept as {aside}")

    def _rewind_log(self) -> None:
        """Delete the log after the checkpoint; keep the old one under another name if it is damaged.

        It is kept too if all checkpoints are missing.
        """
        folder, path, state = self.run.folder, self.run.folder / "log.jsonl", self.start.state
        if state:
            try:
                check_log(folder, state["log"])
            except ValueError as error:
                if path.exists():
                    shutil.copy2(path, folder / "log.damaged.jsonl")
                self.notes.append(f"note: {error}; the run goes on, and log.damaged.jsonl keeps the log as it was")
            rewind_log(folder, state["step"], state["evaluation_due"])
        elif path.exists():
            evaluations = [line for line in path.read_text(errors="replace").splitlines() if '"val_loss"' in line]
            if any('"step": 0,' not in line for line in evaluations):  # somebody deleted the checkpoints
                path.replace(folder / "log.before.jsonl")
                self.notes.append(f"the log of the steps that are lost is kept as {folder / 'log.before.jsonl'}")
            else:
                path.unlink()

    def _draw_loss(self) -> None:
        """Draw loss.svg if matplotlib is there. The run is complete: whatever fails here is told, and ends nothing."""
        if not can_draw():
            return
        try:
            draw_loss(read_curves(self.run.folder, self.run.folder.resolve().name), self.run.folder / "loss.svg")
        except Exception as error:  # such as a full disk, or a matplotlib that does not fit this Python
            self.log.say(f"note: there is no new loss.svg: {error}")

    def save(self, model: GPT, optimizers: list, state: dict) -> None:
        """Save a checkpoint of step state["step"]; a thread writes it, see `wait`.

        All processes call this together: those that do not write give their rows of a sharded model.
        """
        if self.active:
            self.saver.save(model, optimizers, state | {"log": seal_log(self.run.folder)})
        elif is_sharded(model):
            take_snapshot(model, optimizers, state, keep=False)

    def wait(self) -> None:
        """Wait until the last save is on the disk. ValueError if it could not be written."""
        self.saver.wait()


def keep_run(source: Path, which: str, target: Path) -> None:
    """Copy a run with one of its checkpoints to the folder target, as hard links where the disk allows them."""

    def link(original: Path, copy: Path) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original, copy)
        except OSError:  # another disk
            shutil.copy2(original, copy)

    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    chosen = Path("checkpoints", which)
    parts = [Path(CONFIG), Path(TOKENIZER_FILE), *(chosen / name for name in (*FILES, "manifest.json"))]
    if (source / "base").is_dir():  # the source is a run with LoRA itself
        parts += [path.relative_to(source) for path in (source / "base").rglob("*") if path.is_file()]
    for part in parts:
        link(source / part, temporary / part)
    temporary.rename(target)
