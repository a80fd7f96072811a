"""What training can be told: one dataclass, whose fields are the keys of configs and command lines."""

from dataclasses import dataclass
from typing import Literal

from common.config import UserPath, above, at_least, check_ranges


@dataclass
class TrainConfig:
    """The settings of training, in a config file or on the command line."""

    out_dir: UserPath = "out/pydocs"  # the run's folder: config, tokenizer, log, checkpoints
    dataset: UserPath = "pydocs"  # a prepared corpus: a folder under data/, or any path
    init_from: UserPath = "scratch"  # scratch | resume (continue out_dir) | a run's folder (start from its weights)
    objective: Literal["pretrain", "masked", "translate", "classify"] = "pretrain"  # what is learned: see tasks/
    seed: int = 1337  # decides initial weights, batches and dropout
    batch_size: int = 16  # sequences per micro-step
    gradient_accumulation_steps: int = 1  # micro-steps per step, over all processes together
    max_iters: int = 1000  # steps in all
    optimizer: Literal["muon", "adamw"] = "muon"  # muon is for the hidden matrices, with AdamW for the rest
    learning_rate: float = 3e-3  # the highest learning rate
    min_lr: float = 0.0  # the learning rate at the end
    lr_schedule: Literal["cosine", "wsd", "constant"] = "wsd"  # wsd: warmup, stable, linear decay
    warmup_iters: int = 10  # steps of linear warmup
    decay_fraction: float = 0.6  # wsd: the share of the run that decays
    weight_decay: float = 0.0  # decoupled: each step multiplies matrices by 1 - learning_rate * weight_decay
    beta1: float = 0.9  # AdamW: decay rate of the running mean of gradients
    beta2: float = 0.95  # AdamW: decay rate of the running mean of squared gradients
    muon_momentum: float = 0.95  # Muon: decay rate of the running mean of gradients
    grad_clip: float = 1.0  # clip the gradient's global norm to this; 0 = do not clip
    skip_nonfinite: int = 0  # most steps in a row to skip because their gradient is not finite, before training stops
    eval_interval: int = 250  # steps between evaluations (one more at the end)
    eval_iters: int = 0  # validation batches per evaluation; 0 = the whole split
    eval_only: bool = False  # evaluate once and exit
    log_interval: int = 10  # steps between lines of log.jsonl
    sample_interval: int = 0  # print a sample at evaluations whose step this divides, and at the last; 0 = never
    always_save_checkpoint: bool = True  # save at every evaluation; False: only when val_loss is the best so far
    keep_checkpoints: int = 2  # number of newest checkpoints to keep, besides the best one
    device: str = "auto"  # auto (CUDA if there is a GPU, else CPU) | cpu | cuda | cuda:1 | mps (an Apple GPU)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what the device is fast at
    parallel: Literal["ddp", "fsdp"] = "ddp"  # several processes: each holds the whole model, or a part (fsdp)
    activation_checkpointing: bool = False  # keep only the blocks' inputs, and compute the rest once more going back
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on CUDA, where it saves more time than it takes
    wandb_log: bool = False  # log to Weights & Biases as well
    wandb_project: str = "plaingpt"  # its project
    wandb_run_name: str = ""  # its name there; empty = out_dir's

    def __post_init__(self):
        many = at_least(1).at_most(1_000_000)
        share, below_one = at_least(0).at_most(1), at_least(0).below(1)
        check_ranges(
            self, batch_size=many, gradient_accumulation_steps=many, max_iters=at_least(1), eval_interval=at_least(1),
            log_interval=at_least(1), seed=at_least(0), min_lr=at_least(0), warmup_iters=at_least(0),
            weight_decay=at_least(0), grad_clip=at_least(0), eval_iters=at_least(0), sample_interval=at_least(0),
            learning_rate=above(0).at_most(1000), decay_fraction=share, beta1=below_one, beta2=below_one,
            muon_momentum=below_one, keep_checkpoints=at_least(1), skip_nonfinite=at_least(0),
        )  # fmt: skip
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate})")
