"""What the compiler sees of a run: how many graphs, of which shapes, and the gradients that they are given.

The graphs are counted by a backend that runs them as they are, so no C++ compiler is needed.
"""

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition

from tests.test_runs import SHAPE, SHORT, call, pretrain, talk, tune  # noqa: F401

VOCABULARY = 29  # of the test corpus; no other size of the tests' models is equal to it, nor to it with chat tokens


class Graphs(list):
    """The graphs that were compiled: for each, the shapes of its int64 inputs, in which a symbolic size is a SymInt.

    symbolic: whether any graph has a symbolic size among its inputs (PyTorch lists a shape's sizes there too).
    tangents: the shapes of the gradients that backward graphs are given.
    """

    def __init__(self):
        super().__init__()
        self.tangents, self.symbolic = [], False

    def forward(self, graph, inputs):
        tokens = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64]
        if not tokens:  # Muon's: see tests/test_optim.py
            return graph.forward
        self.append(tokens)
        self.symbolic |= any(isinstance(x, torch.SymInt) for x in inputs)
        return aot_autograd(
            fw_compiler=lambda g, _: make_boxed_func(g.forward),
            bw_compiler=self.backward,
            partition_fn=default_partition,
        )(graph, inputs)

    def backward(self, graph, inputs):
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        self.tangents += [tuple(x.shape) for name, x in zip(names, inputs, strict=True) if name.startswith("tangents")]
        return make_boxed_func(graph.forward)


@pytest.fixture
def graphs(monkeypatch):
    """Compile with a backend that counts; every recompilation limit is an error."""
    torch._dynamo.reset()
    found, compile_ = Graphs(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=found.forward, **options))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield found
    torch._dynamo.reset()


COMPILED = ["--compile=True", "--sample_interval=4", "--max_iters=8"]  # evaluated and shown at 0, 4 and 8
TUNED = ["--eval_interval=4", "--eval_questions=2", "--eval_tokens=4"]


def sizes(graphs):
    """All sizes of the batches that the graphs were compiled for."""
    return {n for shapes in graphs for shape in shapes for n in shape}


def check(graphs):
    """One graph to evaluate and one to train, of fixed shapes, and no gradient of the logits' size."""
    assert len(graphs) == 2 and not graphs.symbolic and all(type(n) is int for n in sizes(graphs)), list(graphs)
    assert graphs.tangents and not any(VOCABULARY <= n <= VOCABULARY + 4 for shape in graphs.tangents for n in shape)


def test_pretraining_compiles_two_graphs_of_fixed_shape_and_no_gradient_of_the_logits(pretrain, graphs):  # noqa: F811
    pretrain("a", *COMPILED, "--batch_size=7")
    check(graphs)
    assert {shape for shapes in graphs for shape in shapes} == {(7, 48)}


@pytest.mark.parametrize("more", [[], ["--lora_rank=2"], ["--lora_rank=2", "--dropout=0.1"]], ids=str)
def test_packed_fine_tuning_compiles_two_graphs_of_fixed_shape(pretrain, tune, graphs, more):  # noqa: F811
    pretrain("base")
    tune("a", "base", *COMPILED, *TUNED, *more)
    check(graphs)


def test_validation_of_fewer_rows_than_a_batch_makes_no_size_symbolic(pretrain, tune, graphs):  # noqa: F811
    pretrain("base")
    tune("a", "base", *COMPILED, *TUNED, "--batch_size=11")  # validation has 12 conversations, in fewer rows
    check(graphs)
    assert {shape[0] for shapes in graphs for shape in shapes} > {11}


def test_padded_fine_tuning_compiles_few_graphs_in_which_the_length_alone_is_symbolic(pretrain, tune, graphs):  # noqa: F811
    pretrain("base")
    tune("a", "base", *COMPILED, *TUNED, "--packing=False", "--batch_size=5")  # the last validation batch lacks rows
    assert 2 <= len(graphs) <= 4
    assert {shape[0] for shapes in graphs for shape in shapes if len(shape) == 2} == {5}


def test_the_guard_against_gradients_of_the_logits_size_can_see_them(tiny_gpt, graphs):
    model = torch.compile(tiny_gpt(vocab_size=VOCABULARY))
    logits, _ = model(torch.randint(VOCABULARY, (2, 9)))
    logits.sum().backward()
    assert (2, 9, VOCABULARY) in graphs.tangents
