"""Speed and memory of fine-tuning: packing against three ways of padding, and LoRA against training all weights.

    python bench/sft.py [--init_from=out/pydocs] [--steps=80]

The data are the embedded conversations (data/pydocs_sft), the model is the demo's, trained with AdamW. All ways take
about as many conversations per step, and their losses are measured after the same number of response tokens. Memory is
the peak of a process that takes three steps with GPT-2's 124M shape and a row of 256 tokens.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, IGNORE, GPTConfig  # noqa: E402
from runs.run import Run, model_to_fine_tune  # noqa: E402
from tasks.packing import Rows, make_examples  # noqa: E402
from text.conversations import read_conversations  # noqa: E402
from training.lora import TARGETS, LoraConfig, add_lora  # noqa: E402

ROWS = 16  # packed rows per step


class Padded(Rows):
    """Padding without length buckets: conversations in random order, padded to the batch's longest or the context."""

    def __init__(self, examples, block_size, whole_context):
        super().__init__(examples, block_size, packing=False)
        order = np.random.default_rng(0).permutation(len(self.rows))
        self.rows, self.whole_context = [self.rows[i] for i in order], whole_context

    def collate(self, rows):
        """The batch of these rows, padded as the class says."""
        batch = super().collate(rows)
        if not self.whole_context:
            return batch
        missing = self.block_size - batch["idx"].size(1)
        fill = {"idx": 0, "targets": IGNORE}
        return {name: torch.nn.functional.pad(x, (0, missing), value=fill[name]) for name, x in batch.items()}


def counted(batch: dict) -> int:
    """Number of targets that count in the loss."""
    return int((batch["targets"] != IGNORE).sum())


def train(model: GPT, rows: Rows, batch_size: int, steps: int = 0, responses: int = 0) -> tuple[int, float]:
    """Take `steps` steps, or steps until `responses` response tokens are used; returns these tokens and the seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seen, step, begin = 0, 0, time.perf_counter()
    while step < steps or seen < responses:
        batch = rows.batch(step, 0, batch_size, slice(0, batch_size))
        model(**batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen, step = seen + counted(batch), step + 1
    return seen, time.perf_counter() - begin


@torch.no_grad()
def val_loss(model: GPT, rows: Rows) -> float:
    """Mean loss per counted token of all rows."""
    losses = [(model(**batch, target_count=1)[1].item(), counted(batch)) for batch in rows.all_batches(16)]
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def measure_memory(rank: int) -> None:
    """Take three steps with all weights (rank 0) or LoRA; print the trained weights and the peak memory in MiB."""
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=12, n_head=12, n_embd=768))
    if rank:
        add_lora(model, LoraConfig(rank, 16.0, TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    idx = torch.randint(50304, (1, 256))
    for _ in range(3):
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", default="out/pydocs")
    parser.add_argument("--dataset", default=str(ROOT / "data" / "pydocs_sft"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory is not None:
        return measure_memory(args.memory)
    run = Run.open(args.init_from)
    template = run.template()
    T = run.model_config.block_size
    train_set, val_set = (
        make_examples(list(read_conversations(Path(args.dataset) / f"{split}.jsonl")), template, T).examples
        for split in ("train", "val")
    )
    validation = Rows(val_set, T, packing=True)
    ways = {
        "packed": Rows(train_set, T, packing=True),
        "padded, length buckets": Rows(train_set, T, packing=False),
        "padded to the longest of a batch": Padded(train_set, T, whole_context=False),
        "padded to the context": Padded(train_set, T, whole_context=True),
    }
    print("| | response tokens/s | packed / this | val loss after as many response tokens |\n|---|---|---|---|")
    base = None
    for name, rows in ways.items():
        batch_size = round(ROWS * len(rows.rows) / len(ways["packed"].rows))
        model = model_to_fine_tune(run, "best", template.tokenizer)
        seen, seconds = train(model.train(), rows, batch_size, steps=args.steps)
        speed = seen / seconds
        base = base or speed
        model = model_to_fine_tune(run, "best", template.tokenizer)
        train(model.train(), rows, batch_size, responses=100_000)
        print(f"| {name} | {speed:,.0f} | {base / speed:.2f}x | {val_loss(model.eval(), validation):.4f} |", flush=True)
    print("\n| | weights to train | highest memory, MiB |\n|---|---|---|")
    for name, rank in (("all weights", 0), ("LoRA, rank 8", 8)):
        command = [sys.executable, __file__, f"--memory={rank}"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {name} | {result.stdout.strip()} |", flush=True)


if __name__ == "__main__":
    main()
