"""A model over many processes: each holds some rows of every weight, of its gradient and of its optimizer state.

PyTorch's FSDP2 (`fully_shard`) gathers a block's weights before the block computes, drops them after it, and adds each
gradient up where its rows are held. All that knows of it is in this file; weights that are not sharded pass through.

Notable:
- process r of n holds rows r·⌈R/n⌉ to (r+1)·⌈R/n⌉ of a weight of R rows, as torch.chunk cuts them; some may hold none;
- no process needs the whole model to begin: one weight at a time is drawn, or read, and all but its own rows dropped;
- the token embedding and the head, which may be tied, belong to the root, whose weights are there for the whole step;
- Muon's matrices travel: their rows to the process that orthogonalises them, and the rows of the update back.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, IGNORE
from training.config import TrainConfig
from training.device import Process

AT_ONCE = 2**24  # numbers of Muon's matrices that a process orthogonalises in one round; a larger matrix goes alone


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def rows_of(count: int, rank: int, world_size: int) -> slice:
    """The rows of `count` that a process holds:  rows_of(5, 1, 2) → slice(3, 5)."""
    size = -(-count // world_size)
    return slice(min(count, rank * size), min(count, (rank + 1) * size))


def stacked_counts(rows: list[int], rank: int, world_size: int) -> list[int]:
    """How many rows of each of the matrices that are stacked in a weight a process holds.

    stacked_counts([4, 2], 0, 2) → [3, 0];  stacked_counts([4, 2], 1, 2) → [1, 2]
    """
    held, ends = rows_of(sum(rows), rank, world_size), list(accumulate(rows))
    return [max(0, min(held.stop, end) - max(held.start, end - n)) for n, end in zip(rows, ends, strict=True)]


def is_sharded(x: object) -> bool:
    """Whether a model or a tensor is sharded."""
    return hasattr(x, "reshard" if isinstance(x, nn.Module) else "to_local")


def held_rows(x: Tensor) -> slice:
    """The rows of the whole tensor that this process holds: all of them if it is not sharded."""
    if not is_sharded(x):
        return slice(None)
    return rows_of(len(x), x.device_mesh.get_local_rank(), x.device_mesh.size())


def local(x: Tensor) -> Tensor:
    """The rows that this process holds, as a plain tensor with the same memory."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """The whole tensor; for a sharded one all processes call this together."""
    return x.full_tensor() if is_sharded(x) else x


# ---------------------------------------------------------------------------------------------------------------------
# Building


def shards(config: TrainConfig, process: Process) -> bool:
    """Whether the model is to be sharded: a single process holds all of it anyway."""
    return config.parallel == "fsdp" and process.world_size > 1


def shard(model: GPT, process: Process) -> None:
    """Shard a model without numbers over all processes: afterwards it has memory on its device, yet to be filled.

    In bfloat16, the weights of the blocks travel as such, to which autocast would round those of the matrix products
    anyway; what is summed up and stepped stays float32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second to import, which most runs can do without
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(process.device.type, (process.world_size,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if process.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=process.device)


class Drawing(TorchDispatchMode):
    """Within it, tensors on the meta device get numbers nevertheless, of which this process keeps its rows.

    Each is drawn whole on the CPU, one after the other. So a network uses up as many random numbers as one that is made
    there, and gets the same ones, whatever the number of processes.
    """

    def __init__(self, process: Process):
        super().__init__()
        self.process, self.kept = process, {}  # a storage's address → the rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in ("ones", "zeros"):
            made = func(*args, **kwargs)
        elif name in ("normal_", "uniform_", "zero_"):
            made = args[0]
        else:
            return func(*args, **kwargs)
        if made.is_meta and made.dim():
            drawn = torch.empty(made.shape, dtype=made.dtype, device="cpu")
            drawn = drawn.fill_(name == "ones") if name in ("ones", "zeros") else func(drawn, *args[1:], **kwargs)
            rows = rows_of(len(drawn), self.process.rank, self.process.world_size)
            self.kept[made.untyped_storage()._cdata] = drawn[rows].clone()
        return made


def draw_sharded(make: Callable[[], GPT], process: Process) -> GPT:
    """The model that make() draws, sharded: the same weights, without ever having it whole."""
    with Drawing(process) as drawing, torch.device("meta"):
        model = make()
    rows = {name: drawing.kept[p.untyped_storage()._cdata] for name, p in model.named_parameters()}
    shard(model, process)
    with torch.no_grad():
        for name, p in model.named_parameters():
            local(p).copy_(rows[name])
    return model


@torch.no_grad()
def receive(model: GPT, source: GPT | None, process: Process) -> None:
    """Fill a sharded model and its tables from the first process's whole one, source, which is None on all others.

    One tensor at a time is sent, whole, and each process keeps its rows.
    """
    for kind in ("named_parameters", "named_buffers"):
        given = dict(getattr(source, kind)()) if source else {}
        for name, x in getattr(model, kind)():
            like = {"dtype": x.dtype, "device": process.device}
            sent = given[name].detach().to(**like) if source else torch.empty(x.shape, **like)
            dist.broadcast(sent.contiguous(), 0)
            local(x).copy_(sent[held_rows(x)])


# ---------------------------------------------------------------------------------------------------------------------
# A step, and an evaluation


@torch.no_grad()
def clip_gradients(model: GPT, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for all weights of the model: the norm is that of the whole gradient."""
    if not is_sharded(model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    squared = torch.nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(squared)
    norm = squared.sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def drop_gathered(model: nn.Module) -> None:
    """After a sharded model has run without a backward pass: let the root's weights be this process's rows again."""
    if is_sharded(model):
        model.reshard()


def in_step(batches: Iterator[dict[str, Tensor]], process: Process) -> Iterator[dict[str, Tensor]]:
    """Yield equally many batches on every process, as each forward pass of a sharded model needs all of them.

    A process that has no more goes on with its last batch, in which no target counts; without one, with one token.
    """
    batch = {"idx": torch.zeros(1, 1, dtype=torch.long), "targets": torch.full((1, 1), IGNORE)}
    while True:
        found = next(batches, None)
        if not process.total(found is not None)[0]:
            return
        batch = found or batch | {"targets": torch.full_like(batch["targets"], IGNORE)}
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Matrices to their owners, and back


def in_rounds(owned: list[list[int]], sizes: list[int], limit: int = AT_ONCE) -> list[list[list[int]]]:
    """Cut what each process owns into rounds: the numbers of its matrices in each, with at most `limit` numbers in all.

    in_rounds([[0, 2], [1]], sizes=[5, 5, 5], limit=8) → [[[0], [1]], [[2], []]]
    """
    rounds: list[list[list[int]]] = []
    for rank, numbers in enumerate(owned):
        turn, filled = 0, 0
        for i in numbers:
            if filled and filled + sizes[i] > limit:
                turn, filled = turn + 1, 0
            filled += sizes[i]
            if turn == len(rounds):
                rounds.append([[] for _ in owned])
            rounds[turn][rank].append(i)
    return rounds


class Exchange:
    """Brings matrices whose rows lie on several processes to the process that owns each, and rows of it back.

    shapes: (rows, columns) of each matrix; counts: for each process, how many rows of each matrix it holds.
    """

    def __init__(self, shapes: list[tuple[int, int]], counts: list[list[int]], rank: int):
        self.shapes, self.counts, self.rank = shapes, counts, rank

    def sizes(self, holder: int, numbers: list[int]) -> list[int]:
        """How many numbers of each of these matrices a process holds."""
        return [self.counts[holder][i] * self.shapes[i][1] for i in numbers]

    def to_owners(self, rows: dict[int, Tensor], owned: list[list[int]]) -> dict[int, Tensor]:
        """The whole matrices that this process owns, from all processes' rows of the matrices in `owned`."""
        mine, holders = owned[self.rank], range(len(owned))
        sent = torch.cat([rows[i].flatten() for numbers in owned for i in numbers])
        given = [sum(self.sizes(self.rank, numbers)) for numbers in owned]
        taken = [self.sizes(holder, mine) for holder in holders]
        got = sent.new_empty(sum(map(sum, taken)))
        dist.all_to_all_single(got, sent, list(map(sum, taken)), given)
        parts = [part.split(sizes) for part, sizes in zip(got.split(list(map(sum, taken))), taken, strict=True)]
        return {i: torch.cat([part[k] for part in parts]).view(self.shapes[i]) for k, i in enumerate(mine)}

    def to_holders(self, matrices: dict[int, Tensor], owned: list[list[int]], like: Tensor) -> dict[int, Tensor]:
        """This process's rows of all matrices in `owned`, from their owners' whole ones.

        like: a tensor with the matrices' dtype and device.
        """
        mine, parts = owned[self.rank], []
        cut = {i: matrices[i].split([counts[i] for counts in self.counts]) for i in mine}
        parts = [cut[i][holder].flatten() for holder in range(len(owned)) for i in mine]
        sent = torch.cat(parts) if parts else like.new_empty(0)
        given = [sum(self.sizes(holder, mine)) for holder in range(len(owned))]
        taken = [self.sizes(self.rank, numbers) for numbers in owned]
        got = like.new_empty(sum(map(sum, taken)))
        dist.all_to_all_single(got, sent, list(map(sum, taken)), given)
        order = [i for numbers in owned for i in numbers]
        pieces = got.split([size for sizes in taken for size in sizes])
        return {i: piece.view(-1, self.shapes[i][1]) for i, piece in zip(order, pieces, strict=True)}
