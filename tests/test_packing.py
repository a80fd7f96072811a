"""Packed rows = padded rows = conversations one by one; the loss is on responses only; nobody sees a neighbour."""

import numpy as np
import pytest
import torch

from model import IGNORE
from tasks.packing import Example, Rows, make_examples, pack
from tests.helpers import POSITIONS, assert_close, label
from text.chat import Template
from text.tokenizer import CharTokenizer
from training.lora import LoraConfig, LoRALinear, add_lora, merge_lora

T = 16


def examples(count=12, seed=0):
    """Conversations of 3 to 12 tokens, each with some of the assistant's."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        n = int(rng.integers(3, 13))
        mask = rng.random(n) < 0.4
        mask[0], mask[-1] = False, True
        found.append(Example(rng.integers(23, size=n), mask))
    return found


def gradients(model, batches, count):
    """The mean loss over `count` counted tokens of all batches, and its gradient."""
    loss = sum(model(**batch, target_count=count)[1] for batch in batches)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_rows_are_padded_rows_are_conversations_one_by_one(tiny_gpt, position, train_on_prompt):
    model, found = tiny_gpt(position=position, n_kv_head=2, label_smoothing=0.1).train(), examples()
    results = []
    for packing, size in ((True, 2), (True, 99), (False, 3), (False, 99), (False, 1)):
        batches = list(Rows(found, T, packing, train_on_prompt).all_batches(size))
        count = sum(int((batch["targets"] != IGNORE).sum()) for batch in batches)
        assert count == sum(len(e.tokens) - 1 if train_on_prompt else e.mask[1:].sum() for e in found)
        results.append(gradients(model, batches, count))
    one_by_one = []
    for e in found:  # without any of the code above
        targets = [t if on or train_on_prompt else IGNORE for t, on in zip(e.tokens[1:], e.mask[1:], strict=True)]
        one_by_one.append({"idx": torch.tensor(e.tokens[None, :-1]), "targets": torch.tensor([targets])})
    loss, slopes = gradients(model, one_by_one, count)
    for other_loss, other_slopes in results:
        assert_close(other_loss, loss, 1e-5)
        for mine, theirs in zip(other_slopes, slopes, strict=True):
            assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_the_gradient_of_what_predicts_a_prompts_tokens_is_exactly_zero(tiny_gpt, packing):
    model, found = tiny_gpt(), examples()
    for batch in Rows(found, T, packing).all_batches(4):
        x = model.tok_emb(batch["idx"]).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(model.loss(x, batch["targets"]), x)
        counted = batch["targets"] != IGNORE
        assert (slopes[~counted] == 0).all() and (slopes[counted] != 0).any(-1).all()


@pytest.mark.parametrize("kind", ["flash", "math"])
@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_a_conversation_cannot_influence_its_neighbour_in_a_row(tiny_gpt, position, kind):
    model, found = tiny_gpt(position=position, attention=kind), examples(40)
    rows = Rows(found, T, packing=True)
    shared = next(row for row in rows.rows if len(row) >= 3)
    before = rows.collate([shared])
    i = shared[1]  # in the middle: one before it, one behind it
    found[i] = Example((found[i].tokens + 7) % 23, found[i].mask)
    after = rows.collate([shared])
    others = before["documents"] != 1
    assert (before["idx"] != after["idx"]).any() and torch.equal(before["idx"][others], after["idx"][others])
    logits = [model(**{**batch, "targets": None})[0] for batch in (before, after)]
    assert torch.equal(logits[0][others], logits[1][others])  # bit for bit
    assert not torch.equal(logits[0][~others], logits[1][~others])


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_repeats_nothing_and_leaves_little_room(seed):
    lengths = np.random.default_rng(seed).integers(1, 41, 500).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert sum(lengths) > 0.97 * 64 * len(rows)
    assert pack([], 64) == [] and pack([64, 64, 1], 64) == [[0], [1], [2]]


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_a_pure_function_and_slices_of_a_step_make_it_up(packing):
    rows = Rows(examples(50), T, packing)
    for step in (0, 3, 17, 100):
        whole = rows.batch(step, 5, 8, slice(0, 8))
        again = Rows(examples(50), T, packing).batch(step, 5, 8, slice(0, 8))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        for part in (slice(0, 4), slice(4, 8), slice(3, 4)):
            mine = rows.batch(step, 5, 8, part)
            n = mine["idx"].size(1)
            assert torch.equal(mine["idx"], whole["idx"][part, :n])  # a shorter padding, perhaps
            assert torch.equal(mine["targets"], whole["targets"][part, :n])
            assert (whole["targets"][part, n:] == IGNORE).all()


@pytest.mark.parametrize("packing", [True, False])
def test_another_seed_and_another_epoch_have_another_order(packing):
    rows = Rows(examples(200), T, packing)
    epoch = -(-len(rows.rows) // 8)
    first, other_seed, next_epoch = (
        [rows.batch(step + start, seed, 8, slice(0, 8))["idx"].tolist() for step in range(8)]
        for start, seed in ((0, 5), (0, 6), (epoch, 5))
    )
    assert first != other_seed and first != next_epoch


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_shows_every_conversation(packing):
    found = examples(50)
    rows = Rows(found, T, packing)
    steps = -(-len(rows.rows) // 4)
    counted = sum(int((rows.batch(step, 0, 4, slice(0, 4))["targets"] != IGNORE).sum()) for step in range(steps))
    assert counted >= sum(e.mask[1:].sum() for e in found)
    once = sum(int((batch["targets"] != IGNORE).sum()) for batch in rows.all_batches(4))
    assert once == sum(e.mask[1:].sum() for e in found)
    shares = [list(rows.all_batches(4, rank, 3)) for rank in range(3)]
    assert sum(int((b["targets"] != IGNORE).sum()) for share in shares for b in share) == once
    assert len(list(rows.all_batches(4, limit=2))) == 2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [3, 50])  # less than a batch, and a last batch that is not full
def test_all_validation_batches_have_one_number_of_rows_and_packed_ones_one_shape(packing, count):
    rows = Rows(examples(count), T, packing)
    shapes = [{name: tuple(x.shape) for name, x in batch.items()} for batch in rows.all_batches(7)]
    assert len(rows.rows) % 7 and {shape["idx"][0] for shape in shapes} == {min(7, len(rows.rows))}
    assert all(len(set(shape.values())) == 1 for shape in shapes)
    assert not packing or {shape["idx"][1] for shape in shapes} == {T}


@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_empty_rows_change_no_loss(tiny_gpt, packing):
    model, rows = tiny_gpt(), Rows(examples(), T, packing)
    plain, filled = rows.collate(rows.rows[:2]), rows.collate(rows.rows[:2] + [[]] * 3)
    assert len(filled["idx"]) == 5 and (filled["targets"][2:] == IGNORE).all()
    losses = [model(**batch, target_count=1)[1] for batch in (plain, filled)]
    assert losses[0] > 0
    assert_close(*losses)


def test_padded_batches_are_of_like_length():
    lengths = np.random.default_rng(0).integers(2, 65, 200)
    found = [Example(np.ones(n, int), np.arange(n) > 0) for n in lengths]
    rows, widths = Rows(found, 64, packing=False), set()
    for step in range(20):
        batch = rows.batch(step, 0, 10, slice(0, 10))
        used = (batch["idx"] != 0).sum(1)
        assert used.max() - used.min() < 12 and batch["idx"].size(1) - used.max() < 16
        widths.add(batch["idx"].size(1))
    assert widths == {16, 32, 48, 64}


def test_what_does_not_fit_is_cut_off_and_counted_and_what_has_no_answer_left_is_dropped():
    template = Template(CharTokenizer("abc", eot=True))

    def talk(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    # eot, user, …, end, assistant, …, end: 5 tokens besides the words
    found = make_examples([talk("a", "b"), talk("a", "b" * 9), talk("a" * 7, "b"), talk("a" * 5, "bb")], template, 9)
    assert [len(e.tokens) for e in found.examples] == [7, 10, 10] and found.truncated == 2 and found.dropped == 1
    assert [int(e.mask.sum()) for e in found.examples] == [2, 5, 1] and found.response_tokens == 8
    assert found.tokens == 27 and found.response_bytes == 1 + 5 + 1
    summary = found.summary()
    assert summary.startswith("3 conversations, 27 tokens, 8 of them in responses")
    assert "2 cut off at block_size" in summary and "1 left out, for no word of the answer fits" in summary


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.fixture
def corrected(tiny_gpt):
    """A function that gives a model with LoRA; its corrections are not 0 if random."""

    def build(random=True, targets=("qkv", "out", "up", "down"), new_rows=(), **options):
        model = tiny_gpt(n_kv_head=2, **options)
        torch.manual_seed(1)
        add_lora(model, LoraConfig(3, 6.0, targets, new_rows))
        for name, weight in model.named_parameters():
            if random and "lora" in name:
                weight.data.normal_(std=0.3)
        return model

    return build


def test_lora_begins_as_the_base_model(tiny_gpt, corrected):
    idx = torch.arange(12)[None]
    assert torch.equal(corrected(random=False)(idx)[0], tiny_gpt(n_kv_head=2)(idx)[0])
    assert not torch.equal(corrected()(idx)[0], tiny_gpt(n_kv_head=2)(idx)[0])


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"new_rows": (3, 7)}, {"new_rows": (0, 22), "tie_embeddings": False},
                {"new_rows": (5,), "norm_head": True}], ids=label
)  # fmt: skip
def test_a_merged_correction_is_the_correction(corrected, options):
    model, idx = corrected(**options), torch.arange(12)[None]
    expected = model(idx)[0]
    merge_lora(model)
    assert_close(model(idx)[0], expected)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and not any(
        "lora" in n for n, _ in model.named_parameters()
    )


@pytest.mark.parametrize("targets", [("qkv",), ("out", "down"), ("qkv", "out", "up", "down")], ids=str)
def test_only_the_corrections_have_gradients_and_optimizer_state(corrected, targets):
    from training.config import TrainConfig
    from training.optim import make_optimizers

    model = corrected(targets=targets)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ends = {f"{part}.{target}.lora_{m}" for target in targets for m in "AB"
            for part in ("attention" if target in ("qkv", "out") else "mlp",)}  # fmt: skip
    assert trained == {f"blocks.{i}.{end}" for i in range(2) for end in ends}
    optimizers = make_optimizers(model, TrainConfig(optimizer="adamw"))
    idx = torch.arange(12)[None]
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with_state = {p for optimizer in optimizers for p in optimizer.state}
    assert with_state == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_have_the_gradient_that_they_would_have_in_the_whole_matrix(tiny_gpt, tie):
    ids, idx = (2, 9), torch.arange(12)[None]
    whole, model = tiny_gpt(tie_embeddings=tie), tiny_gpt(tie_embeddings=tie)
    add_lora(model, LoraConfig(2, 4.0, (), ids))
    for network in (whole, model):
        network(idx, (idx + 1) % 12)[1].backward()
    for layer in ("tok_emb", "head"):
        expected = whole.get_submodule(layer).weight.grad[list(ids)]
        assert_close(model.get_submodule(layer).lora_rows.grad, expected)
    assert model.tok_emb.weight.grad is None and (model.head.lora_rows is model.tok_emb.lora_rows) == tie


def test_the_correction_is_scaled_by_alpha_over_rank(tiny_gpt):
    model = tiny_gpt()
    layer = model.blocks[0].mlp.down
    weight = layer.weight.clone()
    add_lora(model, LoraConfig(2, 10.0, ("down",)))
    layer = model.blocks[0].mlp.down
    layer.lora_B.data.normal_()
    assert_close(layer.merge().weight, weight + 5.0 * layer.lora_B @ layer.lora_A)


def test_a_layer_that_is_none_is_refused(tiny_gpt):
    with pytest.raises(ValueError, match="no layer is called 'query'; choose among qkv,out,up,down"):
        add_lora(tiny_gpt(), LoraConfig(2, 1.0, ("qkv", "query")))
