"""config/baichuan2_*.py: the report's shapes, and what their plan says; bench/baichuan2.py runs, and counts right."""

import ast
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import bpe
from bench import baichuan2
from common.config import read_config_file
from model import GPT, IGNORE, GPTConfig
from tasks.plan import job_of, memory_lines
from text.corpus import Corpus
from training.config import TrainConfig
from training.plan import count_memory, count_weights

ROOT = Path(__file__).parent.parent
NAMES = ("7b", "13b", "tiny")


def configs(name: str) -> tuple[GPTConfig, TrainConfig]:
    given = read_config_file(str(ROOT / "config" / f"baichuan2_{name}.py"))
    kinds = [{field.name for field in fields(kind)} for kind in (GPTConfig, TrainConfig)]
    assert set(given) == set(given) & (kinds[0] | kinds[1])
    model, training = ({key: value for key, value in given.items() if key in names} for names in kinds)
    return GPTConfig(**model), TrainConfig(**training)


# ---------------------------------------------------------------------------------------------------------------------
# The configs


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_have_baichuan_2s_parts(name):
    model, training = configs(name)
    assert (model.norm, model.mlp, model.bias, model.qk_norm, model.tie_embeddings) == (
        "rmsnorm", "swiglu", False, False, False
    )  # fmt: skip
    assert model.norm_head and model.max_z_loss == 2e-4 and model.n_kv_head == model.n_head
    assert model.mlp_dim == 128 * math.ceil(model.n_embd * 8 / 3 / 128)
    assert (training.beta1, training.beta2, training.weight_decay, training.grad_clip) == (0.9, 0.95, 0.1, 0.5)
    assert (training.optimizer, training.lr_schedule) == ("adamw", "cosine")


@pytest.mark.parametrize("name, weights", [("7b", 7_505_973_248), ("13b", 13_896_668_160)])
def test_the_configs_have_the_published_numbers_of_weights_and_the_memory_that_they_tell(name, weights):
    model, training = configs(name)
    assert count_weights(model) == weights
    assert (model.block_size, model.vocab_size, training.warmup_iters) == (4096, 125_696, 2000)
    said = ast.get_docstring(ast.parse((ROOT / "config" / f"baichuan2_{name}.py").read_text()))
    job = job_of(training, model)
    assert f"{weights:,} weights" in said and said.count(f"{model.n_layer} layers, {model.n_embd} wide") == 1
    counted = memory_lines(job, count_memory(job))
    assert len(counted) == 7 and not [line for line in counted if line.strip() not in said]


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_the_benchmark_prints_its_tables(corpus_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["baichuan2.py", "--tiny", "--seeds=2", f"--corpus={corpus_folder}"])
    threads = torch.get_num_threads()
    baichuan2.main()
    torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines if "±" in line] == [
        *[f"| {label}" for label, _ in baichuan2.LOGITS], "| RoPE", "| RoPE, YaRN", "| ALiBi", "| one by one",
        "| merged, 300 tokens",
    ]  # fmt: skip


def test_an_unknown_part_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["baichuan2.py", "--parts=logits,heads"])
    with pytest.raises(ValueError, match="--parts takes some of logits, positions, digits, not heads"):
        baichuan2.main()


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_the_loss_in_a_longer_window_is_that_of_a_model_with_this_context(corpus_folder, position):
    corpus = Corpus(corpus_folder)
    options = {"vocab_size": corpus.vocab_size, "n_layer": 1, "n_head": 2, "n_embd": 16, "position": position}
    torch.manual_seed(0)
    model, longer = (GPT(GPTConfig(block_size=T, **options)).eval() for T in (8, 32))
    longer.load_state_dict(model.state_dict())
    total = count = 0
    with torch.no_grad():
        for idx, targets in corpus.windows("val", 32, 1):
            logits = longer(idx)[0].log_softmax(-1)
            for place in (targets[0] != IGNORE).nonzero()[:, 0].tolist():
                total, count = total - logits[0, place, targets[0, place]].item(), count + 1
    assert baichuan2.loss_at(model, corpus, 32) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("pattern", ["digits", "gpt2"])
def test_only_answers_are_learned_and_the_whole_answer_must_be_right(pattern):
    pairs = np.array([[7, 8], [99, 1], [40, 2]])
    texts = ["".join(baichuan2.equation(a, b)) for a, b in pairs.tolist()]
    vocabulary = bpe.train(texts, 256 if pattern == "digits" else 260, pattern, ())
    idx, targets = baichuan2.encode_sums(pairs, vocabulary)
    for row, answer in zip(targets, ["15\n", "100\n", "42\n"], strict=True):
        assert vocabulary.decode(row[row != IGNORE].tolist()) == answer
    for row, text in zip(idx, texts, strict=True):
        assert vocabulary.decode(row.tolist()).rstrip("\0") == text

    def oracle(idx):
        z = torch.nn.functional.one_hot(targets.clamp(min=0), vocabulary.vocab_size) * 100.0
        z[1, (targets[1] != IGNORE).nonzero()[-1]] = 0.0  # one wrong token: 0, as all are as likely
        return z, None

    loss, right = baichuan2.answers(oracle, idx, targets)
    assert right == pytest.approx(2 / 3) and loss == pytest.approx(math.log(vocabulary.vocab_size) / 3, rel=1e-4)


def test_single_digits_are_cut_in_one_way_and_merged_ones_in_several():
    texts = ["12+12=24\n", "12+13=25\n"]
    assert set(baichuan2.cuts(bpe.train(texts, 256, "digits", ()))) == {(1, 1)}
    assert set(baichuan2.cuts(bpe.train(texts, 257, "gpt2", ()))) == {(2,), (1, 1)}
