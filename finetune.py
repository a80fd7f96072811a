"""Supervised fine-tuning (SFT) on conversations: the training loop of train.py with another task.

    python finetune.py                                            the demo's model, by config/sft_pydocs.py
    python finetune.py config/sft_alpaca.py --init_from=out/x
    python finetune.py --dataset=mine --init_from=out/x           your own conversations, by config/sft.py

Notable: the loss is the mean over the assistants' tokens of a step, and ignores all others; several conversations are
packed into a row, and attention keeps them apart; LoRA (lora_rank > 0) trains a small correction and leaves the base
model unchanged.
"""

from common import cli  # first: it makes Ctrl-C one line even while the modules below are imported

# isort: split

import sys
from dataclasses import asdict, replace
from pathlib import Path

from common.config import help_text, read_arguments
from model import GPTConfig
from runs.run import SCRATCH, Run, unseen_tokens
from runs.start import RESUME, Start, decide
from tasks.plan import PlanOptions, plan_finetuning, take_options
from tasks.sft import Conversations, FinetuneConfig, conversation_task, load_conversations, set_length
from tasks.task import check_model
from text.chat import Template
from train import OUT_OF_MEMORY, say_finished, train_or_evaluate
from training.config import TrainConfig
from training.device import start_process, stop_process
from training.lora import LoraConfig
from training.plan import Job, check_memory

CONFIGS = Path(__file__).parent / "config"
DEMO, OWN_DATA = str(CONFIGS / "sft_pydocs.py"), str(CONFIGS / "sft.py")
USAGE = """usage: python finetune.py [config/sft_x.py] [--key=value ...]
       torchrun --nproc_per_node=N finetune.py config/sft_x.py [--key=value ...]

Trains the model of the run in init_from on conversations. The default config file is config/sft_pydocs.py, or
config/sft.py with a --dataset of your own. The keys and their defaults, which the config file and the command line
replace:"""

# The defaults that differ from pretraining, because fine-tuning changes a trained model only a little.
DEFAULTS: dict[str, object] = {
    "optimizer": "adamw", "lr_schedule": "cosine", "dataset": "pydocs_sft", "out_dir": "out/sft_pydocs",
    "init_from": "out/pydocs",
}  # fmt: skip
LEARNING_RATE = "3e-3 * (128 / n_embd) ** 1.5, and 5 times that for LoRA"  # 2e-4 for a width of 768, 2e-5 for 4096
OWN_EPOCHS = 3.0  # passes over a --dataset of your own, as a config's max_iters suit its own data set only
COMMAND_LINE = "the command line"


def configure(argv: list[str]) -> tuple[Start, TrainConfig, FinetuneConfig, GPTConfig]:
    """Return the start of the run and its configs. Raises ValueError for arguments that do not go together."""
    classes = (TrainConfig, FinetuneConfig, GPTConfig)
    given = read_arguments(argv, *classes)
    resuming = given.get("init_from", ("",))[0] == RESUME
    if not resuming:
        own_data = given.get("dataset", (DEFAULTS["dataset"],))[0] != DEFAULTS["dataset"]
        given = read_arguments(argv, *classes, default=OWN_DATA if own_data else DEMO)
        given = {key: (value, "the defaults of finetune.py") for key, value in DEFAULTS.items()} | given
    if given.get("init_from", ("",))[0] == SCRATCH:
        raise ValueError("--init_from must be the folder of a trained run: fine-tuning starts from trained weights")
    start = decide(given, DEFAULTS, "sft")
    config, sft, model_config = start.configs(given, *classes)
    check_model("sft", model_config)
    if config.objective != "pretrain":
        raise ValueError(f"objective={config.objective} is train.py's: finetune.py teaches conversations, leave it out")
    sources = {key: source for key, (_, source) in given.items()}
    if sources.get("max_iters") == COMMAND_LINE or resuming and "num_epochs" not in given:
        sft.num_epochs = 0.0
    elif sources.get("dataset") == COMMAND_LINE and "num_epochs" not in given:
        sft.num_epochs = OWN_EPOCHS
    if not resuming and "learning_rate" not in given:
        config.learning_rate = (5 if sft.lora_rank else 1) * 3e-3 * (128 / model_config.n_embd) ** 1.5
        told = f"learning_rate {config.learning_rate:.1e}, for n_embd={model_config.n_embd}"
        start = replace(start, notes=(*start.notes, f"{told}; --learning_rate sets another one"))
    if sft.lora_rank and config.optimizer == "muon":
        if sources.get("optimizer") == COMMAND_LINE:
            raise ValueError("Muon does not suit LoRA's low-rank matrices: use --optimizer=adamw")
        config.optimizer = "adamw"
        start = replace(
            start, notes=(*start.notes, "LoRA trains with AdamW, because Muon does not suit low-rank matrices")
        )
    return start, config, sft, model_config


def new_run(start: Start, config: TrainConfig, sft: FinetuneConfig, model_config: GPTConfig, template: Template) -> Run:
    """Return the run to record in config.json."""
    lora, base_checkpoint = None, start.checkpoint.name
    if sft.lora_rank:
        rows = unseen_tokens(start.source, template.tokenizer)
        lora = LoraConfig(sft.lora_rank, sft.lora_alpha, tuple(sft.targets()), rows)
    if start.resumes:
        lora, base_checkpoint = start.resumes.lora, start.resumes.base_checkpoint
    settings = asdict(config) | asdict(sft)
    run = Run(Path(config.out_dir), model_config, settings, "sft", True, lora, base_checkpoint)
    return run.with_template_of(start.known)


def about(data: Conversations, config: TrainConfig, trained: int, source: Path) -> list[str]:
    """Return lines that describe the data and the trained weights; trained: their number."""
    lines = [f"{config.dataset}, {split}: {getattr(data, split).summary()}" for split in ("train", "val")]
    return [*lines, f"{trained:,} weights to train, from {source}"]


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        defaults = DEFAULTS | {"learning_rate": LEARNING_RATE}
        print(help_text(USAGE, TrainConfig, FinetuneConfig, GPTConfig, PlanOptions, defaults=defaults))
        return
    options, argv = take_options(sys.argv[1:])
    start, config, sft, model_config = configure(argv)
    if options.plan:
        return print(plan_finetuning(start, config, sft, model_config, options))
    template = start.known.template()
    data = load_conversations(config.dataset, template, model_config.block_size)
    process = start_process(config.device, config.dtype, config.gradient_accumulation_steps, config.parallel)
    try:
        task = conversation_task(data, config, sft, model_config.block_size)
        set_length(config, sft, task)
        if start.is_finished(config) and not config.eval_only:
            return say_finished(start, config, process)
        run = new_run(start, config, sft, model_config, template)
        warnings = check_memory(Job.on(process, model_config, config, run.lora), process.device, "fine-tuning")
        model = start.model_to_fine_tune(run, template.tokenizer, config, process)
        run = replace(run, model_config=model.config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines = warnings + about(data, config, trained, start.source.folder)
        train_or_evaluate(run, start, model, task, config, process, lines)
    finally:
        stop_process(process)


if __name__ == "__main__":
    cli.run_command(main, if_out_of_memory=OUT_OF_MEMORY)
