import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo

from model import GPT, GPTConfig
from training.config import TrainConfig
from training.device import Process
from training.optim import AdamW, Muon, assign_owners, learning_rate_at, make_optimizers, orthogonalize, stacked_rows

ROOT = Path(__file__).parent.parent

LR = 0.01
CONFIG = TrainConfig(learning_rate=LR, weight_decay=0.1)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def muon_steps(weights, gradients, rows=None, **options):
    """The weights after Muon's steps; gradients: one list per step, rows: one whole matrix each by default."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = Muon(params, rows or [[w.size(0)] for w in weights], **{"lr": LR} | options)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    return [param.detach() for param in params]


def with_singular_values(r, c, values, seed=1):
    U, _, V = torch.linalg.svd(random(r, c, seed=seed), full_matrices=False)
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V


# ---------------------------------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("r, c", [(1, 1), (1, 9), (8, 8), (8, 24), (32, 33)])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_all_singular_values_close_to_one(r, c):
    G = with_singular_values(r, c, torch.linspace(1, 0.1, r).tolist())
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    seen_from_the_vectors = U.mT @ orthogonalize(G[None])[0] @ Vh.mT
    values = seen_from_the_vectors.diagonal()
    assert_close(seen_from_the_vectors, values.diag())  # nothing outside the diagonal: no other directions
    assert 0.6 < values.min() and values.max() < 1.3


def test_orthogonalize_does_not_see_how_long_the_gradient_is():
    G = random(1, 8, 16)
    for scale in (1e-3, 1e4):
        assert_close(orthogonalize(scale * G), orthogonalize(G), 1e-2)
    assert (orthogonalize(torch.zeros(2, 4, 8)) == 0).all()


def test_orthogonalize_treats_a_batch_of_matrices_one_by_one():
    G = random(3, 8, 16) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    assert_close(orthogonalize(G), torch.cat([orthogonalize(g[None]) for g in G]))


# ---------------------------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("r, c", [(8, 8), (8, 32), (32, 8)])
def test_muon_moves_a_matrix_against_the_orthogonal_factor_of_its_gradient(r, c):
    w, G = random(r, c), with_singular_values(r, c, torch.linspace(1, 0.1, 8).tolist(), seed=2)
    (after,) = muon_steps([w], [[G]])
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    ideal = -LR * 0.2 * math.sqrt(max(r, c)) * U @ Vh
    cosine = torch.cosine_similarity((after - w).flatten(), ideal.flatten(), dim=0)
    assert cosine > 0.97 and 0.6 < (after - w).norm() / ideal.norm() < 1.3


def test_muons_updates_are_as_large_as_adamws_for_matrices_of_every_shape():
    """Measured as the root mean square of their entries, which for AdamW is around 0.2 lr [Liu et al. 2025]."""
    for r, c in [(16, 16), (16, 64), (64, 16), (48, 40)]:
        for lr in (0.01, 0.1):
            (after,) = muon_steps([torch.zeros(r, c).double()], [[random(r, c)]], lr=lr)
            assert 0.1 < after.square().mean().sqrt() / lr < 0.3


def test_muon_follows_nesterov_momentum_written_out():
    w, gradients, mu = random(8, 12), [random(8, 12, seed=s) for s in (2, 3, 4)], 0.8
    before, momentum = w, torch.zeros_like(w)
    for step, g in enumerate(gradients):
        momentum = mu * momentum + (1 - mu) * g
        ahead = mu * momentum + (1 - mu) * g
        (expected,) = muon_steps([before], [[ahead]], momentum=0.0)
        (after,) = muon_steps([w], [[g] for g in gradients[: step + 1]], momentum=mu)
        assert_close(after - before, expected - before, 1e-6)
        before = after


@pytest.mark.parametrize("rows", [[8, 4, 4], [24, 24], [16, 8, 8]], ids=str)
def test_matrices_stacked_in_one_weight_are_updated_exactly_as_separate_ones(rows):
    w, steps = random(sum(rows), 12), [random(sum(rows), 12, seed=s) for s in (2, 3)]
    options = {"weight_decay": 0.1, "momentum": 0.9}
    (stacked,) = muon_steps([w], [[g] for g in steps], rows=[rows], **options)
    separate = muon_steps(w.split(rows), [g.split(rows) for g in steps], **options)
    assert_close(stacked, torch.cat(separate))
    (as_one,) = muon_steps([w], [[g] for g in steps], **options)
    assert (as_one - stacked).abs().max() > 0.1 * LR


def test_updating_many_matrices_together_equals_updating_them_one_by_one():
    shapes = [(8, 12), (12, 8), (8, 12), (8, 8), (12, 8), (16, 12)]
    weights = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    steps = [[random(*shape, seed=10 * s + i) for i, shape in enumerate(shapes)] for s in (1, 2)]
    together = muon_steps(weights, steps)
    for i, after in enumerate(together):
        (alone,) = muon_steps([weights[i]], [[step[i]] for step in steps])
        assert_close(after, alone)


def test_a_tall_matrix_is_updated_like_its_transpose():
    w, g = random(8, 20), random(8, 20, seed=2)
    assert_close(muon_steps([w.mT], [[g.mT]])[0].mT, muon_steps([w], [[g]])[0])


def test_muons_weight_decay_is_decoupled_from_the_gradient():
    w, g = random(8, 12), random(8, 12, seed=2)
    (plain,), (decayed,) = muon_steps([w], [[g]]), muon_steps([w], [[g]], weight_decay=0.3)
    assert_close(decayed - plain, -LR * 0.3 * w)


def test_muon_continues_from_its_saved_state():
    w, (first, second) = random(8, 12), (random(8, 12, seed=2), random(8, 12, seed=3))
    (expected,) = muon_steps([w], [[first], [second]])
    param = torch.nn.Parameter(w.clone())
    optimizer = Muon([param], [[8]], LR)
    for g in (first, second):
        saved, optimizer = optimizer.state, Muon([param], [[8]], LR)
        optimizer.state = saved
        param.grad = g.clone()
        optimizer.step()
    assert_close(param.detach(), expected)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)])
def test_adamw_is_pytorchs(betas):
    """The groups have their own weight decays; two weights have no gradient at first; the learning rate changes."""
    found, expected = ([torch.nn.Parameter(random(*shape, seed=7)) for shape in ((6, 4), (5, 3), (4,))] for _ in "ab")

    def groups(a, b, c):
        return [{"params": [a, b], "weight_decay": 0.3}, {"params": [c], "weight_decay": 0.0}]

    ours = AdamW(groups(*found), LR, betas)
    theirs = torch.optim.AdamW(groups(*expected), lr=LR, betas=betas, foreach=False)  # written out, tensor by tensor
    for step in range(6):
        for optimizer, weights in ((ours, found), (theirs, expected)):
            for i, weight in enumerate(weights):
                weight.grad = None if i > 0 and step < 2 else random(*weight.shape, seed=10 * step + i)
            for group in optimizer.param_groups:
                group["lr"] = LR / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
            assert all(weight.grad is None for weight in weights)
        for mine, other in zip(found, expected, strict=True):
            assert_close(mine, other)


def test_training_without_compiling_does_not_import_the_compiler(tmp_path, corpus_folder):
    """It would take two seconds of every start."""
    code = "import sys, train; train.main(); print('compiler:', 'torch._dynamo' in sys.modules)"
    options = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--max_iters=2"]
    command = [sys.executable, "-c", code, f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'run'}", *options]
    done = subprocess.run([*command, "--device=cpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "compiler: False"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_muon_takes_bfloat16_where_training_does(dtype):
    def updated(process):
        model = tiny()
        muon, _ = make_optimizers(model, CONFIG, process)
        weights = muon.param_groups[0]["params"]
        for i, weight in enumerate(weights):
            weight.grad = random(*weight.shape, seed=i).float()
        before = [weight.detach().clone() for weight in weights]
        muon.step()
        return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]

    for found, plain in zip(updated(Process(0, 1, torch.device("cpu"), dtype)), updated(None), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, plain) == (dtype != "bfloat16")
        assert (found - plain).abs().max() < 0.05 * plain.abs().max()


def test_newton_schulz_compiles_one_graph_per_shape_however_many_steps_and_learning_rates(monkeypatch):
    shapes, graphs, compile_ = [(8, 12), (12, 8), (8, 8), (8, 12)], [], torch.compile

    def count(graph, inputs):
        graphs.append([tuple(x.shape) for x in inputs])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=count, **options))
    weights = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    steps = [[random(*shape, seed=10 * s + i) for i, shape in enumerate(shapes)] for s in (1, 2, 3)]
    torch._dynamo.reset()
    after, plain = muon_steps(weights, steps, compiled=True), muon_steps(weights, steps)
    assert sorted(graphs) == [[(1, 8, 8)], [(3, 8, 12)]]
    assert_close(after, plain)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

PROCESSES = """
import os, sys, torch
import torch.distributed as dist
from model import GPT, GPTConfig
from tasks.task import Task
from train import Trainer
from training.config import TrainConfig
from training.device import Process
from training.optim import make_optimizers

def build():
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=51, n_layer=2, n_head=3, n_kv_head=1, n_embd=24, mlp_dim=20)
    model = GPT(GPTConfig(**shape)).double()
    model.blocks[0].mlp.up.weight.requires_grad = False
    return model

def trained(process):
    model, config = build(), TrainConfig(learning_rate=0.01, weight_decay=0.1)
    muon, adamw = make_optimizers(model, config, process)
    plain, done = muon.orthogonalize, []
    muon.orthogonalize = lambda G: done.append(len(G)) or plain(G)
    for step in range(3):
        for i, weight in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        muon.step()
        adamw.step()
    return sum(done) // 3, [weight.detach() for weight in model.parameters()]

def check_buckets(process):
    def batch(step, rows):
        idx = torch.arange(3 * 17).view(3, 17)[rows]
        return {"idx": idx[:, :-1], "targets": idx[:, 1:]}

    model, n = build(), process.world_size
    config = TrainConfig(batch_size=1, gradient_accumulation_steps=n, max_iters=1, compile=False)
    trainer = Trainer(model, [], Task(batch, None, 1.0, 16 * n, 1.0, True, None, None), config, process)
    trainer.forward_backward(0, *trainer.next_batches(0))
    trainer.close()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    buckets = {weight.grad.untyped_storage().data_ptr() for weight in weights}
    assert len(buckets) < len(weights) / 4, (len(buckets), len(weights))

torch.set_num_threads(1)
total, expected = trained(None)
for world in 2, 3:
    children = []
    for rank in range(world):  # importing torch once is enough
        children.append(os.fork())
        if children[-1] == 0:
            dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{world}", rank=rank, world_size=world)
            process = Process(rank, world, torch.device("cpu"), "float32")
            done, weights = trained(process)
            counts = [torch.zeros(1) for _ in range(world)]
            dist.all_gather(counts, torch.tensor([float(done)]))
            counts = [int(count) for count in counts]
            assert sum(counts) == total == 12 and 0 < min(counts) <= max(counts) < total, counts
            difference = max((a - b).abs().max().item() for a, b in zip(weights, expected))
            assert difference < 1e-10, difference
            check_buckets(process)
            dist.barrier()
            os._exit(7)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [7] * world
"""


def test_2_and_3_processes_share_the_matrices_out_and_end_with_the_weights_of_one(tmp_path):
    """Each matrix is orthogonalised by one of them; and their gradients are views of the buckets they exchange."""
    command = [sys.executable, "-c", PROCESSES, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_owners_share_the_work_fairly(world_size, seed):
    """No process has more than the average and one piece; that is so for any list, if each goes to the least busy."""
    costs = torch.rand(40, generator=torch.Generator().manual_seed(seed)).pow(3).tolist()
    owners = assign_owners(costs, world_size)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world_size)]
    assert len(owners) == 40 and max(load) <= sum(costs) / world_size + max(costs)
    assert max(load) <= 4 / 3 * max(sum(costs) / world_size, max(costs)) or world_size == 1


def test_owners_of_the_example_and_of_fewer_pieces_than_processes():
    assert assign_owners([3, 5, 2, 4], 2) == [1, 0, 0, 1]
    assert sorted(assign_owners([1, 1, 1], 8)) == [0, 1, 2] and assign_owners([], 4) == []


# ---------------------------------------------------------------------------------------------------------------------
# Who owns what

MODELS = [
    {},
    {"tie_embeddings": False, "n_kv_head": 2},
    {"position": "learned", "norm": "layernorm", "bias": True, "mlp": "gelu", "qk_norm": False},
    {"mlp": "relu2", "norm_head": True},
]


def tiny(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 23, "n_layer": 2, "n_head": 4, "n_embd": 16} | options))


def owners(model, config):
    """For each of the model's weights by name: the (optimizer, group) pairs that own it."""
    return {
        name: [
            (optimizer, group)
            for optimizer in make_optimizers(model, config)
            for group in optimizer.param_groups
            if any(weight is param for param in group["params"])
        ]
        for name, weight in model.named_parameters()
    }


@pytest.mark.parametrize("frozen", ["nothing", "blocks.0", "tok_emb", "norm"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_every_weight_that_trains_has_exactly_one_owner_and_a_frozen_one_none(options, optimizer, frozen):
    model = tiny(**options)
    for name, weight in model.named_parameters():
        weight.requires_grad = frozen not in name
    found = owners(model, replace(CONFIG, optimizer=optimizer))
    assert {name: len(pairs) for name, pairs in found.items()} == {
        name: int(weight.requires_grad) for name, weight in model.named_parameters()
    }


def test_a_model_whose_matrices_alone_train_needs_no_adamw():
    model = tiny()
    for name, weight in model.named_parameters():
        weight.requires_grad = name.endswith("qkv.weight")
    assert [type(optimizer) for optimizer in make_optimizers(model, CONFIG)] == [Muon]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_muon_owns_the_matrices_of_the_blocks_and_adamw_the_rest(options):
    model = tiny(**options)
    for name, ((optimizer, _),) in owners(model, CONFIG).items():
        is_hidden = name.startswith("blocks.") and name.endswith(
            ("qkv.weight", "out.weight", "up.weight", "down.weight")
        )
        assert isinstance(optimizer, Muon if is_hidden else AdamW), name
    for ((optimizer, _),) in owners(model, replace(CONFIG, optimizer="adamw")).values():
        assert isinstance(optimizer, AdamW)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_weight_decay_acts_on_matrices_only(options, optimizer):
    model = tiny(**options)
    for name, ((_, group),) in owners(model, replace(CONFIG, optimizer=optimizer)).items():
        assert group["weight_decay"] == (CONFIG.weight_decay if model.get_parameter(name).dim() == 2 else 0), name


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_muon_knows_which_weights_are_stacks(options):
    model = tiny(**options)
    muon, _ = make_optimizers(model, CONFIG)
    names = {weight: name for name, weight in model.named_parameters()}
    for weight, rows in zip(muon.param_groups[0]["params"], muon.rows, strict=True):
        assert rows == stacked_rows(model).get(names[weight], [weight.size(0)])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_a_model_learns_a_batch_by_heart_and_every_weight_moves(options, optimizer):
    model = tiny(**options)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    idx = torch.randint(23, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizers = make_optimizers(model, replace(CONFIG, optimizer=optimizer))
    for _ in range(60):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert loss < 0.5
    assert all((weight != before[name]).any() for name, weight in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def rates(**options):
    """The learning rates of all updates of a run, and one more."""
    config = replace(CONFIG, **{"learning_rate": 0.5, "max_iters": 100} | options)
    return [learning_rate_at(step, config) for step in range(config.max_iters + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_the_warmup_climbs_in_equal_steps_to_the_peak_and_never_past_it(schedule, warmup):
    lr = rates(lr_schedule=schedule, warmup_iters=warmup, decay_fraction=0.5)
    assert lr[:warmup] == pytest.approx([0.5 * (i + 1) / warmup for i in range(warmup)])
    assert lr[warmup] == 0.5 == max(lr)  # the warmup's last update is at the peak already, and the next one still
    assert sorted(lr[warmup:], reverse=True) == lr[warmup:]


def test_cosine_is_half_a_wave_from_the_peak_to_min_lr():
    lr = rates(lr_schedule="cosine", warmup_iters=20, min_lr=0.1)
    for step in range(20, 101):
        assert lr[step] == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2)
    assert (lr[20], lr[60], lr[100]) == pytest.approx((0.5, 0.3, 0.1))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
def test_wsd_is_stable_and_then_falls_in_a_straight_line_to_min_lr(fraction):
    lr = rates(lr_schedule="wsd", warmup_iters=10, decay_fraction=fraction, min_lr=0.1)
    start = round(100 * (1 - fraction))
    assert lr[10 : start + 1] == [0.5] * (start - 9)
    for step in range(start, 101):
        assert lr[step] == pytest.approx(0.5 - 0.4 * (step - start) / (100 - start))


def test_constant_stays_at_the_peak():
    assert rates(lr_schedule="constant", warmup_iters=10, min_lr=0.1)[10:] == [0.5] * 91


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("options", [{"max_iters": 1}, {"max_iters": 5, "warmup_iters": 10}, {"decay_fraction": 0.0}])
def test_short_runs_and_empty_phases_have_a_learning_rate_too(schedule, options):
    lr = rates(lr_schedule=schedule, **options)
    assert all(0 < rate <= 0.5 for rate in lr[:-1])
