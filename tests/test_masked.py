"""Masked training: which tokens are hidden, that a run of it learns and resumes, and that such a model is BERT."""

import json

import numpy as np
import pytest
import torch

import train
from model import GPT, IGNORE, GPTConfig
from runs.run import Run
from tasks.masked import Hiding, masked_task
from tasks.plan import plan_pretraining
from tests.helpers import POSITIONS, assert_close, make_run
from text.corpus import Corpus
from text.tokenizer import MASK, CharTokenizer, ExtendedTokenizer, load_tokenizer, with_special_tokens
from training.config import TrainConfig

SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--device=cpu", "--batch_size=8"]
MASKED = [*SHAPE, "--objective=masked", "--causal=False", "--learning_rate=0.02", "--log_interval=1"]


@pytest.fixture
def make(corpus_folder, tmp_path):
    """A run of train.py's command, in this process."""

    def run(name, *options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if "--init_from=resume" in options:
            return make_run(train.main, "train.py", folder, *options)
        return make_run(train.main, "train.py", folder, f"--dataset={corpus_folder}", *MASKED, *options)

    return run


@pytest.fixture
def task_of(corpus_folder):
    """The masked task of the small corpus."""

    def make(block_size=32, **options):
        corpus = Corpus(corpus_folder)
        config = TrainConfig(batch_size=8, objective="masked", **options)
        tokenizer = with_special_tokens(corpus.tokenizer, [MASK])
        return masked_task(corpus, tokenizer, config, GPTConfig(block_size=block_size, vocab_size=99, causal=False))

    return make


# ---------------------------------------------------------------------------------------------------------------------
# What is hidden


def test_15_percent_are_hidden_80_percent_of_them_by_the_mask_and_10_by_another_token():
    tokenizer = ExtendedTokenizer(CharTokenizer("abcdefgh", eot=True), [MASK])
    hiding, row = Hiding.of(tokenizer), np.arange(40_000) % 9  # a ninth of it is the end-of-text token, 8
    idx, targets = hiding.hide(row, np.random.SeedSequence(0))
    chosen = targets != IGNORE
    assert (targets[chosen] == row[chosen]).all() and (idx[~chosen] == row[~chosen]).all()
    assert chosen.sum() == round(0.15 * (row != 8).sum()) and not (row[chosen] == 8).any()
    masked, kept = (idx == 9)[chosen].mean(), (idx == row)[chosen].mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 8, abs=0.02)  # one of 8 random tokens is the token itself
    swapped = idx[chosen & (idx != 9) & (idx != row)]
    assert swapped.max() < 8 and np.bincount(swapped).min() > 30
    assert (hiding.hide(np.array([8, 3]), np.random.SeedSequence(1))[1] == [IGNORE, 3]).all()  # at least one
    assert (hiding.hide(np.array([8, 8]), np.random.SeedSequence(1))[1] == IGNORE).all()


def test_a_batch_is_a_function_of_seed_step_and_row_whatever_the_slices(task_of):
    task = task_of(gradient_accumulation_steps=2)
    whole = task.batch(3, slice(0, 16))
    for size in (1, 5, 16):
        parts = [task.batch(3, slice(i, i + size)) for i in range(0, 16, size)]
        assert all(torch.equal(torch.cat([part[name] for part in parts]), whole[name]) for name in whole)
    for other in (task.batch(4, slice(0, 16)), task_of(gradient_accumulation_steps=2, seed=1).batch(3, slice(0, 16))):
        assert not torch.equal(other["targets"], whole["targets"])
    again = task_of(gradient_accumulation_steps=2).batch(3, slice(0, 16))
    assert torch.equal(again["idx"], whole["idx"]) and ((whole["targets"] != IGNORE).sum(1) >= 1).all()


def test_validation_hides_the_same_tokens_whatever_the_seed_the_batch_and_the_processes(task_of):
    def rows(task, world_size=1):
        batches = [list(task.validation(rank, world_size)) for rank in range(world_size)]
        order = [batches[i % world_size][i // world_size] for i in range(sum(map(len, batches)))]
        found = [torch.stack((b["idx"], b["targets"]), 1) for b in order]
        return torch.cat([pair[(pair[:, 1] != IGNORE).any(1)] for pair in found])

    base = rows(task_of())
    assert torch.equal(base, rows(task_of(seed=5))) and torch.equal(base, rows(task_of(), world_size=2))
    few = list(task_of(eval_iters=2).validation(0, 1))
    assert len(few) == 2 and all(
        any(torch.equal(row, other) for other in base[:, 0]) for batch in few for row in batch["idx"]
    )


@torch.no_grad()
def test_the_unused_rest_of_the_last_validation_batch_changes_nothing(task_of, tiny_gpt):
    model = tiny_gpt(causal=False, block_size=32, vocab_size=40)
    *_, last = task_of().validation(0, 1)
    real = last["padding"]
    assert not real.all() and (last["targets"][~real] == IGNORE).all()
    count, n = int((last["targets"] != IGNORE).sum()), real.sum(1)
    alone = sum(
        model(idx[None, :k], targets[None, :k], target_count=count)[1]
        for idx, targets, k in zip(last["idx"], last["targets"], n, strict=True) if k
    )  # fmt: skip
    assert_close(model(**last, target_count=count)[1], alone)


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_rows_are_padded_rows_are_texts_alone_for_a_masked_model_too(tiny_gpt, position):
    model, lengths, rng = tiny_gpt(causal=False, position=position), [7, 4, 5], np.random.default_rng(0)
    hiding = Hiding(22, np.arange(22))
    texts = [hiding.hide(rng.integers(22, size=n), np.random.SeedSequence(n)) for n in lengths]
    alone = [(torch.from_numpy(idx)[None], torch.from_numpy(targets)[None]) for idx, targets in texts]
    idx, targets = (torch.cat(part, dim=1) for part in zip(*alone, strict=True))
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([x[0] for x in part], batch_first=True, padding_value=fill)
        for name, part, fill in zip(("idx", "targets"), zip(*alone, strict=True), (0, IGNORE), strict=True)
    }
    padding = torch.arange(7) < torch.tensor(lengths)[:, None]

    def of(loss):
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    expected, slopes = of(sum(model(x, y, target_count=3)[1] for x, y in alone))
    for batch in ({"idx": idx, "targets": targets, "documents": documents, "positions": positions},
                  padded | {"padding": padding}):  # fmt: skip
        loss, gradients = of(model(**batch, target_count=3)[1])
        assert_close(loss, expected)
        for mine, theirs in zip(gradients, slopes, strict=True):
            assert_close(mine, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def log(run):
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second", "mfu")} for e in events]


def test_a_masked_run_learns_adds_its_token_and_reports_no_bits_per_byte(make, corpus_folder, capsys):
    run = make("a", "--max_iters=60", "--eval_interval=30", "--sample_interval=60")
    printed = capsys.readouterr().out
    first, *_, last = [event for event in log(run) if "val_loss" in event]
    assert first["val_loss"] > 3 and last["val_loss"] < 2.9 and first.keys() == {"step", "val_loss"}
    assert "val_bpb" not in printed and "hidden tokens found; above, as [guess]" in printed
    corpus, opened = load_tokenizer(corpus_folder), Run.open(run)
    assert MASK not in corpus.special_tokens and opened.tokenizer.special_tokens[MASK] == corpus.vocab_size
    assert opened.load_model().config.vocab_size == corpus.vocab_size + 1


def test_a_stopped_masked_run_goes_on_as_if_it_never_had(make):
    options = ["--eval_interval=2", "--dropout=0.1", "--lr_schedule=constant"]
    whole, stopped = make("whole", "--max_iters=4", *options), make("stopped", "--max_iters=2", *options)
    make("stopped", "--init_from=resume", "--max_iters=4")
    assert log(whole) == log(stopped)
    weights = [Run.open(run).load_model("latest").state_dict() for run in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_run_can_start_from_a_masked_one(make):
    run = make("a", "--max_iters=1")
    more = make("b", f"--init_from={run}", "--max_iters=1")
    assert Run.open(more).tokenizer.content() == Run.open(run).tokenizer.content()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--causal=True"], "objective=masked .* needs --causal=False"),
        (["--objective=pretrain"], "causal=False: objective=pretrain predicts the next token"),
        (["--block_size=100000"], "choose a smaller block_size"),
        (["--vocab_size=3"], "vocab_size=3 is less than"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line_before_there_is_a_run(make, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make("a", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "a" / "run").exists()


def test_a_plan_counts_the_mask_token(corpus_folder):
    config = TrainConfig(dataset=str(corpus_folder), objective="masked", device="cpu")
    model_config = GPTConfig(n_layer=1, n_embd=32, n_head=2, block_size=32, causal=False)
    plan = plan_pretraining(train.Start(), config, model_config, train.PlanOptions())
    assert f"vocabulary {load_tokenizer(corpus_folder).vocab_size + 1}" in plan


def test_special_tokens_are_added_once_and_after_those_that_are_there(tmp_path):
    base = CharTokenizer("ab", eot=True)
    chat = ExtendedTokenizer(base, ["<|user|>"])
    both = with_special_tokens(chat, [MASK, "<|user|>"])
    both.save(tmp_path)
    assert load_tokenizer(tmp_path).special_tokens == chat.special_tokens | {MASK: 4} == both.special_tokens
    assert with_special_tokens(both, [MASK]) is both


# ---------------------------------------------------------------------------------------------------------------------
# BERT itself


@pytest.fixture
def berts():
    """BertModel of transformers with random weights, and a GPT with the same: a function that returns both.

    BERT adds three embeddings to a token: its own, its position's and its segment's. Ours adds two, so each pair of
    position t and segment s gets a row of its own in the learned table, t + s·block.
    """
    transformers = pytest.importorskip("transformers")
    block = 12

    def make(**options):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=23, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=block, type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12,
        )  # fmt: skip
        theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
        for weight in theirs.parameters():
            weight.data.normal_(std=0.3)
        ours = GPT(GPTConfig(
            block_size=2 * block, vocab_size=23, n_layer=3, n_head=4, n_embd=32, mlp_dim=48, position="learned",
            norm="layernorm", norm_eps=1e-12, post_norm=True, bias=True, qk_norm=False, mlp="gelu_exact", causal=False,
            **options,
        )).eval()  # fmt: skip
        weights = theirs.state_dict()
        tables = [weights[f"embeddings.{name}_embeddings.weight"] for name in ("position", "token_type")]
        renamed = {
            "tok_emb.weight": weights["embeddings.word_embeddings.weight"],
            "pos_emb.weight": (tables[0][None] + tables[1][:, None]).flatten(0, 1),
        }
        names = {"norm": "embeddings.LayerNorm"}
        for i in range(3):
            there, here = f"encoder.layer.{i}", f"blocks.{i}"
            names |= {
                f"{here}.attention.out": f"{there}.attention.output.dense",
                f"{here}.norm_attention": f"{there}.attention.output.LayerNorm",
                f"{here}.mlp.up": f"{there}.intermediate.dense", f"{here}.mlp.down": f"{there}.output.dense",
                f"{here}.norm_mlp": f"{there}.output.LayerNorm",
            }  # fmt: skip
            for kind in ("weight", "bias"):
                qkv = [weights[f"{there}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
                renamed[f"{here}.attention.qkv.{kind}"] = torch.cat(qkv)
        renamed |= {f"{a}.{kind}": weights[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
        left = ours.load_state_dict(renamed, strict=False)
        assert left.missing_keys == ["head.weight"] and not left.unexpected_keys
        return ours, theirs, block

    return make


@pytest.mark.parametrize("kind", ["flash", "math"])
@torch.no_grad()
def test_hidden_states_of_every_layer_equal_transformers_bert(berts, kind):
    ours, theirs, block = berts(attention=kind)
    rng = torch.Generator().manual_seed(1)
    idx, segments = (torch.randint(n, (3, 10), generator=rng) for n in (23, 2))
    padding = torch.arange(10) < torch.tensor([10, 4, 7])[:, None]
    states = []
    for module in (ours.norm, *ours.blocks):
        module.register_forward_hook(lambda _module, _inputs, x: states.append(x))
    ours(idx, positions=torch.arange(10) + block * segments, padding=padding)
    expected = theirs(
        input_ids=idx, token_type_ids=segments, attention_mask=padding.long(), output_hidden_states=True
    ).hidden_states
    assert len(states) == len(expected) == 4
    for mine, state in zip(states, expected, strict=True):
        assert_close(mine[padding], state[padding], 1e-5)
    assert not torch.allclose(states[-1], expected[0], atol=0.1)
