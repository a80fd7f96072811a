"""Evaluate a network on a task's validation batches, over all processes that train together."""

from collections.abc import Callable

import numpy as np
import torch

from model import IGNORE
from tasks.task import Task
from training.device import Process, autocast, float64_device
from training.prefetch import pin, to_device
from training.shard import drop_gathered, in_step, is_sharded


@torch.no_grad()
def evaluate(network, task: Task, process: Process, watch: Callable = iter) -> dict[str, float]:
    """The metrics of the validation batches of all processes: val_loss, in nats per counted token, and what fits.

    That is val_bpb, bits per byte, if the task gives every token of a text a probability, and val_accuracy for a
    classifier. watch(batches) yields the batches, and may show how far it is.
    """
    network.eval()
    loss, count, right = torch.zeros((), dtype=torch.float64, device=float64_device(process.device)), 0, None
    batches = task.validation(process.rank, process.world_size)
    for batch in watch(in_step(batches, process) if is_sharded(network) else batches):
        count += int((batch["targets"] != IGNORE).sum())
        batch = to_device(pin(batch, process.device), process.device)
        with autocast(process.device, process.dtype):
            answers, batch_loss = network(**batch, target_count=1)
        loss += batch_loss.to(loss.device)
        if answers is not None:  # a classifier's; the logits of a language model are never all in memory
            right = (right or 0) + int((answers.argmax(-1) == batch["targets"]).sum())
    network.train()
    drop_gathered(network)
    total, counted, correct = process.total(loss.item(), count, right or 0)
    mean = total / max(counted, 1)
    metrics = {"val_loss": mean}
    if task.tokens_per_byte is not None:
        metrics["val_bpb"] = mean * task.tokens_per_byte / np.log(2)
    if right is not None:
        metrics["val_accuracy"] = correct / max(counted, 1)
    return metrics
