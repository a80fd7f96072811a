"""What training can be told: one dataclass, whose fields are the keys of configs and command lines."""

from dataclasses import dataclass

from training.optim import SCHEDULES


@dataclass
class TrainConfig:
    out_dir: str = "out/pydocs"  # the run's folder: config, tokenizer, log, checkpoints
    dataset: str = "pydocs"  # a prepared corpus: a folder under data/, or any path
    init_from: str = "scratch"  # scratch | resume (continue out_dir) | another run's folder (start from its weights)
    seed: int = 1337  # decides initial weights, batches and dropout
    batch_size: int = 16  # sequences per micro-step
    gradient_accumulation_steps: int = 1  # micro-steps per step, over all processes together
    max_iters: int = 1000  # steps in all
    optimizer: str = "muon"  # muon (hidden matrices; AdamW for the rest) | adamw (everything)
    learning_rate: float = 3e-3  # the highest learning rate
    min_lr: float = 0.0  # the learning rate at the end
    lr_schedule: str = "wsd"  # cosine | wsd (warmup, stable, linear decay) | constant
    warmup_iters: int = 10  # steps of linear warmup
    decay_fraction: float = 0.6  # wsd: the share of the run that decays
    weight_decay: float = 0.0  # pulls matrices towards 0, by this share of the learning rate per step
    beta1: float = 0.9  # AdamW: memory of the gradient
    beta2: float = 0.95  # AdamW: memory of its square
    muon_momentum: float = 0.95  # Muon: memory of the gradient
    grad_clip: float = 1.0  # longest gradient; 0 = no limit
    eval_interval: int = 250  # steps between evaluations (one more at the end)
    eval_iters: int = 0  # validation batches per evaluation; 0 = the whole split
    eval_only: bool = False  # evaluate once and exit
    log_interval: int = 10  # steps between lines of log.jsonl
    sample_interval: int = 0  # print a sample at evaluations whose step this divides, and at the last; 0 = never
    always_save_checkpoint: bool = True  # save at every evaluation; False: only when val_loss is the best so far
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    compile: bool | str = "auto"  # torch.compile; auto = on CUDA
    wandb_log: bool = False  # log to Weights & Biases as well
    wandb_project: str = "plaingpt"  # its project
    wandb_run_name: str = ""  # its name there; empty = out_dir's

    def __post_init__(self):
        positive = ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval")
        lowest = dict.fromkeys(positive, 1)
        lowest |= dict.fromkeys(
            ("seed", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "eval_iters", "sample_interval"), 0
        )
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1000:
            raise ValueError(f"learning_rate must be positive and at most 1000, not {self.learning_rate}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate})")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be between 0 and 1, not {self.decay_fraction}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name, allowed in {"optimizer": ("muon", "adamw"), "lr_schedule": SCHEDULES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or auto, not {self.compile!r}")
