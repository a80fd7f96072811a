"""Muon for the hidden matrices, AdamW for everything else, and the learning-rate schedules.

Notable:
- the matrices of queries, keys, values, gate and up are orthogonalised one by one, even where the model stacks them in
  one weight;
- matrices of one shape, from all layers, go through Newton-Schulz as one batch, which can be compiled;
- of the processes that train together, one orthogonalises each matrix, and one all-gather brings the updates to all;
  if the weights are sharded, their rows travel to it, and the rows of the updates back (training/shard.py);
- Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both;
- nothing here is a torch.optim.Optimizer, which would bring PyTorch's compiler: two seconds of every start.
"""

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from model import GATED, GPT
from training.device import Process
from training.shard import Exchange, in_rounds, is_sharded, local, stacked_counts


def learning_rate_at(step: int, config) -> float:
    """The learning rate of step `step` (counted from 0), by config.lr_schedule.

    cosine: linear warmup, then half a cosine from learning_rate to min_lr [Loshchilov & Hutter 2017, eq. 5].
    wsd: warmup, stable, then a straight line to min_lr over the last decay_fraction of the run [Hu et al. 2024].
    constant: warmup, then learning_rate.
    """
    peak, floor, warmup = config.learning_rate, config.min_lr, config.warmup_iters
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return peak
    decay = config.max_iters - warmup if config.lr_schedule == "cosine" else config.decay_fraction * config.max_iters
    done = 1 - min(1.0, max(0.0, config.max_iters - step) / max(1.0, decay))  # share of the decay that is over
    return floor + (peak - floor) * (
        0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    )


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Bring each matrix UΣVᵀ of G (..., r, c), r <= c, close to UVᵀ, with all singular values from about 0.7 to 1.2.

    A quintic Newton-Schulz iteration, X ← aX + (bA + cA²)X with A = XXᵀ: products only, no decomposition.
    [Jordan et al. 2024, Muon: an optimizer for hidden layers]
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def assign_owners(costs: list[float], world_size: int) -> list[int]:
    """Share pieces of work out: the rank that does each piece. The dearest piece goes first, to the least busy process.

    No process gets more than 4/3 of the work that the busiest one has in the best assignment [Graham 1969].

        assign_owners([3, 5, 2, 4], world_size=2) → [1, 0, 0, 1]
    """
    owners, load = [0] * len(costs), [0.0] * world_size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(world_size), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def pieces(stacks: list[Tensor], rows: list[list[int]]) -> list[Tensor]:
    """Views of the matrices that are stacked in each 2-d tensor; rows: the number of rows of each."""
    return [piece for stack, counts in zip(stacks, rows, strict=True) for piece in stack.split(counts)]


class Optimizer:
    """Weights, in groups that share settings, and what is remembered of each between steps.

    groups: dicts of "params", "lr" and other settings, which may change between steps. state: weight → name → tensor.
    torch.amp.GradScaler takes it for one of torch.optim's.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.param_groups = groups
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        """One update of every weight. Processes that train together call this together."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None


class AdamW(Optimizer):
    """Adam with decoupled weight decay λ [Loshchilov & Hutter 2019, algorithm 2], by PyTorch's kernel for it.

    w ← (1-ηλ)·w - η·m̂/(√v̂+ε), with the running means m of the gradients and v of their squares, m̂ = m/(1-β₁ᵗ) and
    v̂ = v/(1-β₂ᵗ) after t steps, η the learning rate, and ε = 1e-8.
    groups: as `Optimizer` takes them, with "weight_decay". A weight without a gradient stays as it is.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__([{"lr": lr, **group} for group in groups])
        self.betas = betas

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    step = torch.zeros((), device=weight.device)
                    mean, mean_square = torch.zeros_like(weight), torch.zeros_like(weight)
                    self.state[weight] |= {"step": step, "exp_avg": mean, "exp_avg_sq": mean_square}
            means, mean_squares, steps = (
                [local(self.state[weight][key]) for weight in weights] for key in ("exp_avg", "exp_avg_sq", "step")
            )
            gradients = [local(weight.grad) for weight in weights]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local(weight) for weight in weights], gradients, means, mean_squares, [], steps,
                lr=group["lr"], beta1=self.betas[0], beta2=self.betas[1], weight_decay=group["weight_decay"],
                eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip


class Muon(Optimizer):
    """Orthogonalised momentum: every direction of a weight matrix moves by about the same amount.

    params: 2-d weights. rows: for each of them, the numbers of rows of the matrices stacked in it. The update of an
    (r, c) matrix is scaled by 0.2·√max(r, c), which gives it the root mean square of AdamW's [Liu et al. 2025, section
    2.2]. process: one of those that train together, None for a single one. All of them hold the same weights, gradients
    and momentum, or if the weights are sharded, each its own rows. Newton-Schulz runs in bfloat16 if the process trains
    in it: the iteration forgives the rounding. compiled: whether to compile Newton-Schulz, once for each shape.
    """

    def __init__(
        self, params: list[nn.Parameter], rows: list[list[int]], lr: float, momentum=0.95, weight_decay=0.0,
        process: Process | None = None, compiled: bool = False,
    ):  # fmt: skip
        super().__init__([{"params": params, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}])
        self.rank, world_size = (process.rank, process.world_size) if process else (0, 1)
        self.dtype = torch.bfloat16 if process and process.dtype == "bfloat16" else None  # None: the weights' own
        self.shapes = [(n, p.size(1)) for p, counts in zip(params, rows, strict=True) for n in counts]
        sides = [(min(shape), max(shape)) for shape in self.shapes]
        owners = assign_owners([r * r * (2 * c + r) for r, c in sides], world_size)  # products of Newton-Schulz
        # The numbers of the matrices that each process orthogonalises, in one round or, if they must travel, in several
        owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(world_size)]
        self.rows, self.rounds, self.rows_travel = rows, [owned], is_sharded(params[0])
        if self.rows_travel:
            held = [[stacked_counts(counts, rank, world_size) for counts in rows] for rank in range(world_size)]
            self.rows, self.rounds = held[self.rank], in_rounds(owned, [r * c for r, c in sides])
            self.exchange = Exchange(self.shapes, [sum(counts, []) for counts in held], self.rank)
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight; each must have a gradient."""
        (group,) = self.param_groups
        for weight in group["params"]:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        weights = [local(weight) for weight in group["params"]]
        gradients = [local(weight.grad) for weight in group["params"]]
        momenta = [local(self.state[weight]["momentum"]) for weight in group["params"]]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])

        W, M, G = (pieces(stacks, self.rows) for stacks in (weights, momenta, gradients))
        dtype = self.dtype or W[0].dtype
        like = W[0].new_empty(0, dtype=dtype)
        for owned in self.rounds:
            mine = [i for numbers in owned for i in numbers] if self.rows_travel else owned[self.rank]
            # Nesterov: where the momentum is going
            ahead = {i: G[i].lerp(M[i], group["momentum"]).to(dtype) for i in mine}
            if self.rows_travel:
                ahead = self.exchange.to_owners(ahead, owned)
            updates = self.orthogonalized(ahead)
            if self.rows_travel:
                updates = self.exchange.to_holders(updates, owned, like)
            elif len(owned) > 1:
                updates = self.share(updates, owned, like)
            for i, update in updates.items():
                W[i].sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(self.shapes[i])))

    def orthogonalized(self, matrices: dict[int, Tensor]) -> dict[int, Tensor]:
        """Each matrix (r, c) orthogonalised, those of one shape together; the dict is emptied, to free their memory."""
        by_shape = defaultdict(list)  # (r, c), r <= c → numbers of the matrices of that shape, tall ones transposed
        for i, x in matrices.items():
            by_shape[min(x.shape), max(x.shape)].append(i)
        found: dict[int, Tensor] = {}
        for numbers in by_shape.values():
            tall = [matrices[i].size(0) > matrices[i].size(1) for i in numbers]
            taken = [matrices.pop(i) for i in numbers]
            stack = torch.stack([x.mT if flip else x for x, flip in zip(taken, tall, strict=True)])
            del taken
            for i, update, flip in zip(numbers, self.orthogonalize(stack), tall, strict=True):
                found[i] = update.mT if flip else update
        return found

    def share(self, updates: dict[int, Tensor], owned: list[list[int]], like: Tensor) -> dict[int, Tensor]:
        """The updates of all matrices, from each process's own: one all-gather, of parts that are equally long.

        like: a tensor with the updates' dtype and device.
        """
        lengths = [[math.prod(self.shapes[i]) for i in numbers] for numbers in owned]
        parts = like.new_empty(len(lengths), max(map(sum, lengths)))  # each process's updates, and unused room
        slots: dict[int, Tensor] = {}
        for part, numbers, sizes in zip(parts, owned, lengths, strict=True):
            room = part[: sum(sizes)].split(sizes) if sizes else ()
            slots |= {i: slot.view(self.shapes[i]) for i, slot in zip(numbers, room, strict=True)}
        for i, update in updates.items():
            slots[i].copy_(update)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before PyTorch 2.13
        gather(parts.view(-1), parts[self.rank])
        return slots


def stacked_rows(model: GPT) -> dict[str, list[int]]:
    """The weights that hold several matrices on top of each other, with each matrix's number of rows."""
    config = model.config
    H, K, D = config.n_head, config.n_kv_head, config.head_dim
    stacks = {"qkv.weight": [H * D, K * D, K * D], "keys_values.weight": [K * D, K * D]}
    if config.mlp in GATED:
        stacks["up.weight"] = [config.mlp_dim, config.mlp_dim]
    return {n: rows for n, _ in model.named_parameters() for end, rows in stacks.items() if n.endswith(end)}


def make_optimizers(model: GPT, config, process: Process | None = None) -> list[Optimizer]:
    """Make the optimizers of all weights that train: [Muon, AdamW], or [AdamW] for optimizer='adamw'.

    Muon takes the 2-d weights inside the blocks, AdamW all others. Weight decay applies to 2-d weights only: it is to
    limit the size of matrices, and biases and norm weights, which are few, do not need that.
    process: one of those that train together, None for a single one, whose Newton-Schulz keeps the weights' precision.
    If config.compile is True, Newton-Schulz is compiled.
    """
    rows = stacked_rows(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = {
        n: p for n, p in named if config.optimizer == "muon" and p.dim() == 2 and n.startswith(("blocks.", "encoder."))
    }
    rest = [p for n, p in named if n not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = []
    if hidden:
        stacks = [rows.get(n, [p.size(0)]) for n, p in hidden.items()]
        settings = (config.learning_rate, config.muon_momentum, config.weight_decay)
        optimizers.append(Muon(list(hidden.values()), stacks, *settings, process, compiled=config.compile is True))
    if rest:
        groups = [g for g in groups if g["params"]]
        optimizers.append(AdamW(groups, config.learning_rate, (config.beta1, config.beta2)))
    return optimizers
