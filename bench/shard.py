"""Peak memory of each process that trains a model of 350M weights, sharded (fsdp) beside not (ddp), on CPUs with gloo.

    python bench/shard.py [--processes=2] [--optimizer=muon] [--n_layer=24] [--tokens=64]

Each way trains two steps in processes of its own, in float32, by the loop of train.py. The peak is Linux's VmHWM, which
counts the program itself as well (about 0.4 GB); the goal is that fsdp's is at most 60% of ddp's with two processes.
The C library gives freed memory back at once (MALLOC_MMAP_THRESHOLD_), unless the environment says otherwise: it would
count what is kept for later use. The losses of the two ways must agree. Both processes of ddp together take 16 GB.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GOAL = 0.6


def train(args: argparse.Namespace) -> None:
    """Be one of the processes: train two steps and print the peak, the losses and the seconds."""
    import torch

    from model import GPTConfig
    from runs.start import Start
    from tasks.task import Task
    from train import Trainer
    from training.config import TrainConfig
    from training.device import start_process, stop_process

    torch.set_num_threads(1)
    T, V = args.tokens, args.vocab_size
    process = start_process("cpu", "float32", args.processes, args.train)
    config = TrainConfig(
        batch_size=1, gradient_accumulation_steps=args.processes, max_iters=2, optimizer=args.optimizer, compile=False,
        parallel=args.train,
    )  # fmt: skip
    shape = GPTConfig(block_size=T, vocab_size=V, n_layer=args.n_layer, n_head=args.n_embd // 64, n_embd=args.n_embd)
    start = Start()
    model = start.model(shape, config, process)

    def batch(step: int, rows: slice) -> dict:
        idx = torch.randint(V, (args.processes, T + 1), generator=torch.Generator().manual_seed(step))[rows]
        return {"idx": idx[:, :-1], "targets": idx[:, 1:]}

    task = Task(batch, None, 1.0, args.processes * T, 1.0, True, None, None)
    trainer = Trainer(model, start.optimizers(model, config, process), task, config, process)
    del model
    losses, begin = [], time.perf_counter()
    for step in range(2):
        losses.append(trainer.forward_backward(step, *trainer.next_batches(step)).item())
        trainer.update_weights(step, trainer.clip_gradients())
    seconds = time.perf_counter() - begin
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    weights = trainer.model.num_params()
    trainer.close()
    stop_process(process)
    print(json.dumps({"rank": process.rank, "peak": peak, "losses": losses, "seconds": seconds, "weights": weights}))


def measure(parallel: str, args: argparse.Namespace) -> list[dict]:
    """What each process of one way prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    freeing = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(args.processes)}
    command = [sys.executable, __file__, *sys.argv[1:], f"--train={parallel}"]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                         env=freeing | os.environ | known | {"RANK": str(rank)})
        for rank in range(args.processes)
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process of {parallel} failed: see above")
    return [json.loads(text) for text in printed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"processes": 2, "n_layer": 24, "n_embd": 1024, "vocab_size": 50304, "tokens": 64}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--train", choices=("ddp", "fsdp"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(args)
    peaks, losses = {}, {}
    for parallel in ("ddp", "fsdp"):
        found = measure(parallel, args)
        peaks[parallel], losses[parallel] = max(one["peak"] for one in found), found[0]["losses"]
        each = ", ".join(f"{one['peak'] / 1e9:.2f}" for one in found)
        print(f"{parallel:<5}{found[0]['weights']:,} weights, {args.optimizer}: peak of each process {each} GB, "
              f"two steps in {found[0]['seconds']:.0f} s, losses {losses[parallel]}", flush=True)  # fmt: skip
    share = peaks["fsdp"] / peaks["ddp"]
    print(f"fsdp takes {share:.0%} of ddp's memory per process; the goal is {GOAL:.0%}")
    if max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) > 1e-4:
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
