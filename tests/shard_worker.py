"""Groups of processes, each started once, that run many commands: what tests/test_shard.py compares.

python tests/shard_worker.py FOLDER      FOLDER/jobs.json: [[processes, precision, [[command, argument, …], …]], …]
"""

import json
import os
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (DTensors import these: once, before all processes are forked)
import torch.distributed as dist  # noqa: E402
import torch.distributed.fsdp  # noqa: E402

import finetune  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runs.start import Start  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.device import Process  # noqa: E402
from training.shard import held_rows, is_sharded, local, whole  # noqa: E402

FORMS = [
    {},
    {"tie_embeddings": False, "bias": True, "norm": "layernorm", "position": "learned", "mlp": "gelu"},
    {"position": "sinusoidal", "qk_norm": False, "n_kv_head": 1},
]


def check_building(process: Process) -> None:
    """Each process holds its own rows only, and together they are the weights of a model that one process makes."""
    for form in FORMS:
        config = GPTConfig(**{"block_size": 7, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 20} | form)
        torch.manual_seed(5)
        expected = GPT(replace(config))
        model = Start().model(config, TrainConfig(seed=5, parallel="fsdp"), process)
        weights = dict(model.named_parameters())
        assert all(map(is_sharded, weights.values())) and (model.head.weight is model.tok_emb.weight) != (
            "bias" in form
        )
        for name, p in expected.named_parameters():
            assert torch.equal(local(weights[name]), p[held_rows(weights[name])]), name
            assert torch.equal(whole(weights[name]), p), name
        held = sum(local(p).untyped_storage().nbytes() for p in weights.values())
        most = sum(-(-len(p) // process.world_size) * p[0].numel() * p.itemsize for p in weights.values())
        assert held <= most < (1 / process.world_size + 0.05) * sum(p.nbytes for p in expected.parameters())
        for name, table in expected.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], table), name


def work(folder: str, rank: int, world_size: int, dtype: str, commands: list[list[str]]) -> None:
    """One process of a group runs the commands, one after the other."""
    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
    process = Process(rank, world_size, torch.device("cpu"), "bfloat16" if dtype == "bfloat16" else "float32")
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    for module in (train, finetune):
        module.start_process, module.stop_process = lambda *_: process, lambda _: None
    for command in commands:
        sys.argv = command
        if command[0] == "building":
            check_building(process)
        elif command[0] == "cut":  # a copy of a run, without its last checkpoint
            shutil.copytree(*command[1:])
            shutil.rmtree(Path(command[2], "checkpoints", "step_00000003"))
        else:
            {"train.py": train, "finetune.py": finetune}[command[0]].main()
    if world_size > 1:
        dist.barrier()


def main() -> None:
    folder = sys.argv[1]
    torch.set_num_threads(1)
    for number, (world_size, dtype, commands) in enumerate(json.loads(Path(folder, "jobs.json").read_text())):
        meeting = f"{folder}/{number}"
        os.mkdir(meeting)
        children = []
        for rank in range(world_size):  # importing torch once is enough
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    work(meeting, rank, world_size, dtype, commands)
                    sys.stdout.flush()
                except BaseException:
                    print(f"process {rank} of {world_size}: {sys.argv}", file=sys.stderr)
                    traceback.print_exc()
                    os._exit(1)
                os._exit(7)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [7] * world_size, (world_size, codes)


if __name__ == "__main__":
    main()
