"""Muon for the hidden matrices, AdamW for everything else, and the learning-rate schedules.

Notable:
- the matrices of queries, keys, values, gate and up are orthogonalised one by one, even where the model stacks them in
  one weight;
- matrices of one shape, from all layers, go through Newton-Schulz as one batch;
- Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
"""

import math
from collections import defaultdict

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT
from training.device import has_bfloat16


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
    X = G.bfloat16() if G.is_cuda and has_bfloat16(G.device) else G  # the iteration forgives rounding
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum: every direction of a weight matrix moves by about the same amount.

    params: 2-d weights. rows: for each of them, the numbers of rows of the matrices stacked in it. The update of an
    (r, c) matrix is scaled by 0.2·√max(r, c), which gives it the root mean square of AdamW's [Liu et al. 2025, section
    2.2].
    """

    def __init__(self, params: list[nn.Parameter], rows: list[list[int]], lr: float, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rows = rows

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight; each must have a gradient."""
        (group,) = self.param_groups
        by_shape = defaultdict(list)  # (r, c) with r <= c → pairs of a weight matrix and its momentum, both (r, c)
        for weight, rows in zip(group["params"], self.rows, strict=True):
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum"]
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            ahead = weight.grad.lerp(momentum, group["momentum"])  # Nesterov: where the momentum is going
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            for w, m in zip(weight.split(rows), ahead.split(rows), strict=True):
                w, m = (w, m) if w.size(0) <= w.size(1) else (w.mT, m.mT)
                by_shape[w.shape].append((w, m))
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.stack([m for _, m in pairs]))
            for (w, _), update in zip(pairs, updates, strict=True):
                w.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(shape)))


def stacked_rows(model: GPT) -> dict[str, list[int]]:
    """The weights that hold several matrices on top of each other, with each matrix's number of rows."""
    config = model.config
    stacks = {"qkv.weight": [config.head_dim * n for n in (config.n_head, config.n_kv_head, config.n_kv_head)]}
    if config.mlp == "swiglu":
        stacks["up.weight"] = [config.mlp_dim, config.mlp_dim]
    return {n: rows for n, _ in model.named_parameters() for end, rows in stacks.items() if n.endswith(end)}


def make_optimizers(model: GPT, config) -> list[torch.optim.Optimizer]:
    """Make the optimizers of all weights that train: [Muon, AdamW], or [AdamW] for optimizer='adamw'.

    Muon takes the 2-d weights inside the blocks, AdamW all others. Weight decay applies to 2-d weights only: it is to
    limit the size of matrices, and biases and norm weights, which are few, do not need that.
    """
    rows = stacked_rows(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = {n: p for n, p in named if config.optimizer == "muon" and p.dim() == 2 and n.startswith("blocks.")}
    rest = [p for n, p in named if n not in hidden]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        stacks = [rows.get(n, [p.size(0)]) for n, p in hidden.items()]
        muon = Muon(list(hidden.values()), stacks, config.learning_rate, config.muon_momentum, config.weight_decay)
        optimizers.append(muon)
    if rest:
        betas, groups = (config.beta1, config.beta2), [g for g in groups if g["params"]]
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))
    return optimizers
