"""Fine-tune a base model into one that answers (SFT): the training loop of train.py, with conversations for batches.

    python finetune.py                                            the demo's model on config/sft_pydocs.py
    python finetune.py config/sft_alpaca.py --init_from=out/x

Notable: the loss counts what the assistant says and nothing else, as one mean over all response tokens of a step;
several conversations are packed into a row without seeing each other; LoRA (lora_rank > 0) trains a small correction
and leaves the base model as it is.
"""

import sys
from pathlib import Path

import torch

from common import cli
from common.config import help_text, read_arguments
from model import GPT, GPTConfig
from runs import checkpoint
from tasks.sft import FinetuneConfig, conversation_task, load_splits
from text.chat import Template
from text.tokenizer import load_tokenizer
from train import MAY_CHANGE, first_init_from, on_top_of, run, set_up, weights_from
from training.config import TrainConfig
from training.device import Process, start_process, stop_process
from training.lora import add_lora

DEFAULT_CONFIG = str(Path(__file__).parent / "config" / "sft_pydocs.py")
USAGE = """usage: python finetune.py [config/sft_x.py] [--key=value ...]        (no config: config/sft_pydocs.py)
       torchrun --nproc_per_node=N finetune.py config/sft_x.py [--key=value ...]

Trains the model of the run in init_from on conversations. The keys, with the values that hold where neither the config
file nor the command line says otherwise:"""

# What fine-tuning wants otherwise than pretraining: a base model is to be changed a little, not made anew.
DEFAULTS = {"learning_rate": 1e-4, "optimizer": "adamw", "lr_schedule": "cosine", "dataset": "pydocs_sft",
            "out_dir": "out/sft_pydocs", "init_from": "out/pydocs"}  # fmt: skip


def configure(argv: list[str]) -> tuple[TrainConfig, FinetuneConfig, GPTConfig]:
    """The configs that the arguments ask for, on top of those of the run that they start from or resume."""
    given = read_arguments(argv)
    resuming = given.get("init_from", ("",))[0] == "resume"
    if not resuming:
        if not any(not argument.startswith("--") for argument in argv):
            given = read_arguments([DEFAULT_CONFIG, *argv])
        given = {key: (value, "the defaults of finetune.py") for key, value in DEFAULTS.items()} | given
    source = given.get("out_dir", (DEFAULTS["out_dir"],))[0] if resuming else given["init_from"][0]
    if not isinstance(source, str) or source == "scratch":
        raise ValueError("--init_from must be the folder of a trained run: fine-tuning begins with a model that knows")
    config, more, model_config = on_top_of(source, resuming, given, TrainConfig, FinetuneConfig, GPTConfig)
    if resuming and checkpoint.load_config(source)["chat"] is None:
        raise ValueError(f"{source} is no fine-tuned run: go on with train.py")
    if resuming:
        check_lora(source, more)
    elif more.lora_rank and Path(source).resolve() == Path(config.out_dir).resolve():
        raise ValueError(f"--out_dir={config.out_dir} is the base model's own folder: name another one")
    if more.lora_rank and config.optimizer == "muon":
        raise ValueError("Muon is for whole matrices, not for LoRA's thin ones: use --optimizer=adamw")
    return config, more, model_config


def check_lora(out_dir: str, more: FinetuneConfig) -> None:
    """ValueError if a resumed run's corrections would have to become others."""
    lora = checkpoint.load_config(out_dir)["chat"]["lora"] or {"rank": 0}
    asked = {"rank": more.lora_rank, "alpha": more.lora_alpha, "targets": more.targets()}
    for name, was in lora.items():
        if name in asked and asked[name] != was:
            raise ValueError(f"lora_{name} is {was} in {out_dir} and cannot become {asked[name]}")


def start(
    config: TrainConfig, more: FinetuneConfig, model_config: GPTConfig, template: Template, process: Process
) -> tuple[GPT, list, dict | None, dict]:
    """The model on its device, its optimizers, the state to go on from or None, and what config.json is to remember."""
    torch.manual_seed(config.seed)
    source, path = weights_from(config)
    resuming = path.is_relative_to(config.out_dir) and config.init_from == "resume"
    lora = (checkpoint.load_config(config.out_dir)["chat"] or {}).get("lora") if resuming else None
    if resuming and not lora:
        model = checkpoint.new_model(source, vars(model_config))
    else:
        base = (str(Path(config.out_dir, "base")), lora["checkpoint"]) if lora else (source, path.name)
        model, _ = checkpoint.load_base(*base, template.tokenizer)
        for name in MAY_CHANGE:
            setattr(model.config, name, getattr(model_config, name))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = model_config.dropout
        lora = {"checkpoint": base[1], "rank": more.lora_rank, "alpha": more.lora_alpha,
                "targets": more.targets()} if more.lora_rank else None  # fmt: skip
        if lora:
            add_lora(model, more.lora_rank, more.lora_alpha, more.targets())
    if resuming:
        checkpoint.verify(path)
        checkpoint.load_weights(model, path)
    model.train()
    return model, *set_up(model, config, process, path), {"lora": lora}


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, TrainConfig, FinetuneConfig, GPTConfig, defaults=DEFAULTS))
        return
    config, more, model_config = configure(sys.argv[1:])
    base = first_init_from(config) if config.init_from == "resume" else config.init_from
    template = Template(load_tokenizer(config.out_dir if config.init_from == "resume" else base))
    splits, questions = load_splits(config, template, model_config.block_size)
    process = start_process(config.device, config.dtype, config.gradient_accumulation_steps)
    try:
        model, optimizers, state, chat = start(config, more, model_config, template, process)
        task = conversation_task(splits, questions, template, config, more, model_config.block_size)
        about = [f"{config.dataset}, {split}: {found.summary()}" for split, found in splits.items()]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        about.append(f"{trained:,} weights to train, from {base}")
        kept = Path(config.out_dir, "base")
        lora = chat["lora"]

        def opened() -> None:
            """A run with LoRA keeps what it corrects: nobody can take its base away."""
            if lora and not kept.exists():
                checkpoint.keep_run(base, lora["checkpoint"], kept)

        run(config, model, optimizers, task, state, process, "\n".join(about), vars(more), chat, opened)
    finally:
        stop_process(process)


if __name__ == "__main__":
    cli.run(main)
