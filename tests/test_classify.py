"""Classification: pooled features, a run on top of a pretrained one, its data, and sample.py --classify."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import train
from bench import classify as bench
from classifier import Classifier, class_names
from data.pydocs.prepare import pydocs
from data.pydocs_kinds.prepare import MIN_WORDS, kinds
from formats.gpt2 import obstacles
from formats.llama import type_of
from model import IGNORE, GPTConfig
from runs.run import Run
from runs.start import decide
from tasks.classify import classify_task
from tasks.plan import PlanOptions, plan_pretraining
from tests.helpers import POSITIONS, SIZES, assert_close, error_of, json_lines, make_run, tokens
from text.documents import split_of
from text.labelled import Labelled, read_labelled, write_labelled
from training.config import TrainConfig
from training.plan import Job, count_memory

pytest_plugins = ("tests.sample_runs",)
WORDS = "the quick brown fox jumps over a lazy dog and sleeps".split()
OPTIONS = ["--objective=classify", "--batch_size=16", "--learning_rate=0.02", "--log_interval=1"]


@pytest.fixture(scope="module")
def masked(corpus_folder, tmp_path_factory):
    """A masked model, trained for a moment."""
    folder = tmp_path_factory.mktemp("masked")
    options = ["--objective=masked", "--causal=False", "--max_iters=20", "--learning_rate=0.02"]
    return make_run(train.main, "train.py", folder, f"--dataset={corpus_folder}", *SIZES, *options)


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Texts with a fox, with a dog, and with neither."""
    folder, rng = tmp_path_factory.mktemp("animals"), np.random.default_rng(0)
    rows = []
    for i in range(180):
        words = rng.choice([word for word in WORDS if word not in ("fox", "dog")], 5).tolist()
        label = ("fox", "dog", "neither")[i % 3]
        words[i % 5] = label if label != "neither" else words[i % 5]
        rows.append({"text": " ".join(words), "label": label, "id": i})
    for split, part in {"train": rows[:140], "val": rows[140:]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


@pytest.fixture(scope="module")
def make(animals, masked, tmp_path_factory):
    """A run of a classifier, by train.py's command in this process."""
    top = tmp_path_factory.mktemp("classifiers")

    def run(name, *options):
        folder = top / name
        folder.mkdir(exist_ok=True)
        if "--init_from=resume" in options:
            return make_run(train.main, "train.py", folder, *options)
        given = [f"--dataset={animals}", f"--init_from={masked}", *OPTIONS, *options]
        return make_run(train.main, "train.py", folder, *given)

    return run


@pytest.fixture(scope="module")
def finder(make):
    """A classifier that has learned its classes."""
    return make("finder", "--max_iters=60", "--eval_interval=20", "--sample_interval=60")


def log(run):
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second", "mfu")} for e in events]


# ---------------------------------------------------------------------------------------------------------------------
# The network


def classifier(**options):
    torch.manual_seed(0)
    shape = {"block_size": 16, "vocab_size": 23, "n_layer": 2, "n_head": 4, "n_embd": 16, "mlp_dim": 24}
    model = Classifier(GPTConfig(**shape, classes="a,b,c", **{"causal": False} | options)).double().eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("options", [{"pool": "mean"}, {"pool": "first"}, {"pool": "mean", "causal": True}])
@pytest.mark.parametrize("position", POSITIONS)
def test_padded_texts_have_the_features_classes_and_gradients_of_each_text_alone(position, options):
    model, lengths, idx, labels = classifier(position=position, **options), [9, 4, 7], tokens(3, 9), [2, 0, 1]
    padding = torch.arange(9) < torch.tensor(lengths)[:, None]
    logits, loss = model(idx, torch.tensor(labels), padding=padding)
    alone = [model(row[None, :n], torch.tensor([label]), target_count=3)
             for row, n, label in zip(idx, lengths, labels, strict=True)]  # fmt: skip
    assert_close(logits, torch.cat([answer for answer, _ in alone]), 1e-6)  # logits are in float32
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(loss, weights, allow_unused=True),
                            torch.autograd.grad(sum(part for _, part in alone), weights, allow_unused=True),
                            strict=True):  # fmt: skip
        assert mine is theirs is None or torch.allclose(mine, theirs, atol=1e-6)


@torch.no_grad()
def test_features_are_the_mean_or_the_first_of_the_hidden_states():
    model, idx = classifier(), tokens(2, 9)
    hidden = []
    model.norm.register_forward_hook(lambda _module, _inputs, x: hidden.append(x))
    assert_close(model.features(idx, torch.arange(9) < 5 * torch.ones(2, 1)), hidden[0][:, :5].mean(1))
    model.config.pool = "first"
    assert_close(model.features(idx), hidden[0][:, 0] if len(hidden) == 1 else hidden[1][:, 0])
    logits, _ = model(idx)
    assert_close(logits, (model.features(idx) @ model.classes.weight.T + model.classes.bias).float(), 1e-6)


def test_the_first_token_of_a_causal_model_is_refused():
    with pytest.raises(ValueError, match="pool=first needs causal=False"):
        classifier(causal=True, pool="first")


# ---------------------------------------------------------------------------------------------------------------------
# Its data


def test_a_batch_is_a_function_of_seed_step_and_row_and_an_epoch_reads_every_text_once(animals, masked):
    start = decide({"init_from": (str(masked), "")}, vars(TrainConfig()), "pretrain")
    config = TrainConfig(dataset=str(animals), objective="classify", batch_size=10, gradient_accumulation_steps=2)
    task, about = classify_task(start, config, GPTConfig(block_size=48, vocab_size=40, causal=False))
    assert "140 train texts" in about and "fields that are not read: id" in about

    def rows(step, size):
        found = []
        for i in range(0, 20, size):
            batch = task.batch(step, slice(i, i + size))
            found += [(tuple(row[real].tolist()), int(label)) for row, real, label in zip(*batch.values(), strict=True)]
        return found

    assert rows(3, 20) == rows(3, 7) == rows(3, 1) != rows(4, 20)
    epoch = [row for step in range(7) for row in rows(step, 20)]
    assert len(set(epoch)) == len({text.text for text in read_labelled(animals).splits["train"]})
    validation = [list(task.validation(rank, 2)) for rank in (0, 1)]
    assert sum(len(batch["targets"]) for part in validation for batch in part) == 40
    assert not any((batch["targets"] == IGNORE).any() for part in validation for batch in part)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"text": "a"}', 'train.jsonl, line 2: an object with "text" and "label"'),
        ('{"text": "", "label": "x"}', "line 2: an object with"),
        ('{"text": "a", "label": 1}', "line 2: an object with"),
        ('{"text": "a", "label": "x,y"}', "line 2: the label 'x,y' holds a comma"),
        ('{"text": "a", "label": "\\u001b[31mred"}', "line 2: the label .* holds what cannot be printed"),
        ('{"text": "a\\ud800", "label": "y"}', "train.jsonl, line 2: .* is half a surrogate pair"),
        ('{"text"', "line 2: not valid JSON"),
        ('{"text": "a", "label": "x"}', "all texts have the label 'x'"),
        ('{"text": "a", "label": "z"}', "no text of train.jsonl has the label 'y'"),
    ],
)
def test_texts_that_cannot_be_learned_from_are_told_with_their_place(tmp_path, line, sentence):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n' + line + "\n")
    (tmp_path / "val.jsonl").write_text('{"text": "a", "label": "y"}\n')
    with pytest.raises(ValueError, match=sentence) as error:
        read_labelled(tmp_path)
    assert "\n" not in str(error.value)


def test_the_embedded_docstrings_are_in_one_split_each_and_unseen_by_the_corpus(tmp_path, capsys):
    documents = pydocs(MIN_WORDS)
    found = list(kinds(documents, 0.05))
    write_labelled(tmp_path / "kinds", found)
    texts = read_labelled(tmp_path / "kinds")
    assert texts.labels == ["class", "function", "module"] and sum(map(len, texts.splits.values())) == len(found)
    assert len({row.text for _, row in found}) == len(found) > 3000
    bodies = {document.partition("\n\n")[2].strip(): split_of(document, 0.05) for document in documents}
    assert all(bodies[row.text] == split for split, row in found)  # as in data/pydocs
    (json_module,) = [row.label for _, row in found if row.text.startswith("JSON (JavaScript Object Notation)")]
    assert json_module == "module"


def test_labelled_texts_do_not_replace_other_data(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a meta.json, and so other data"):
        write_labelled(tmp_path, [])
    with pytest.raises(ValueError, match="no text is left for val"):
        write_labelled(tmp_path / "new", [("train", Labelled("a", "x"))])
    assert not (tmp_path / "new").exists()
    rows = [(split, Labelled("a", "x")) for split in ("train", "val")]
    for _ in range(2):
        write_labelled(tmp_path / "new", rows)  # the same texts once more are no other data
    (tmp_path / "new" / "val.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="val.jsonl holds other texts: delete it"):
        write_labelled(tmp_path / "new", rows)
    assert (tmp_path / "new" / "val.jsonl").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_classifier_learns_and_its_run_knows_the_classes(finder, animals, capsys):
    evaluations = [event for event in log(finder) if "val_loss" in event]
    assert evaluations[0].keys() == {"step", "val_loss", "val_accuracy"}
    assert evaluations[0]["val_accuracy"] < 0.5 and evaluations[-1]["val_accuracy"] > 0.9
    run = Run.open(finder)
    assert class_names(run.model_config) == ["dog", "fox", "neither"]
    model, texts = run.load_model("latest"), read_labelled(animals)
    right = 0
    for text, label in texts.splits["val"]:
        row = [run.tokenizer.eot_id, *run.tokenizer.encode(text), run.tokenizer.eot_id]
        with torch.no_grad():
            right += texts.labels[int(model(torch.tensor([row]))[0].argmax())] == label
    assert right / 40 == pytest.approx(evaluations[-1]["val_accuracy"])


def test_sample_tells_the_class_of_a_text(sample, finder, tmp_path):
    (tmp_path / "text").write_text("over the lazy dog\n")
    (found,) = json_lines(sample(f"--classify=FILE:{tmp_path}/text", "--json", run=finder))
    assert found["label"] == "dog" == next(iter(found["probabilities"])) and found["text"] == "over the lazy dog"
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    lines = sample("--classify=over the lazy dog", run=finder).stdout.splitlines()
    assert lines[0] == f"{found['probabilities']['dog']:6.1%} dog" and len(lines) == 3
    long = sample(f"--classify=dog {'the ' * 20}", run=finder)
    assert long.returncode == 0 and long.stderr == "note: the text is cut off after 48 tokens: the model sees no more\n"


def test_a_stopped_classifier_goes_on_as_if_it_never_had(make):
    options = ["--eval_interval=2", "--lr_schedule=constant", "--pool=first"]
    whole, stopped = make("whole", "--max_iters=4", *options), make("stopped", "--max_iters=2", *options)
    make("stopped", "--init_from=resume", "--max_iters=4")
    assert log(whole) == log(stopped) and Run.open(stopped).model_config.pool == "first"


def test_any_pretrained_model_can_begin_one_and_keeps_its_weights(make, trained):
    run = Run.open(make("causal", f"--init_from={trained}", "--max_iters=1", "--learning_rate=1e-9"))
    before, after = Run.open(trained).load_model().state_dict(), run.load_model().state_dict()
    assert {name for name in after if name not in before} == {"classes.weight", "classes.bias"}
    kept = [name for name in before if name in after]
    assert len(kept) > 5 and all(torch.allclose(before[name], after[name], atol=1e-6) for name in kept)


def test_what_cannot_begin_is_refused_in_one_line(make, finder, masked, animals, tmp_path, trained):
    other = shutil.copytree(animals, tmp_path / "other")
    (other / "train.jsonl").write_text((other / "train.jsonl").read_text().replace("neither", "none"))
    (other / "val.jsonl").write_text((other / "val.jsonl").read_text().replace("neither", "none"))
    for options, sentence in (
        (["--init_from=scratch"], "objective=classify begins with a trained model"),
        (["--dataset=nothing"], "no labelled texts in 'nothing'"),
        ([f"--init_from={finder}", f"--dataset={other}"], "tells apart dog,fox,neither, and .* has dog,fox,none"),
        ([f"--init_from={finder}", "--objective=masked"], "objective=masked needs a model with a head"),
        ([f"--init_from={trained}", "--pool=first"], "pool=first needs causal=False"),
    ):
        with pytest.raises(ValueError, match=sentence) as error:
            make("refused", *options)
        assert "\n" not in str(error.value)


def test_a_classifier_does_nothing_else_and_nothing_else_classifies(sample, finder, masked):
    for option in ("--prompt=the", "--fill=the <|mask|>", "--chat"):
        assert "this model is a classifier: give it a text by --classify" in error_of(sample(option, run=finder))
    assert "--classify needs a classifier" in error_of(sample("--classify=the fox", run=masked))
    assert "there is nothing in this one" in error_of(sample("--classify= ", run=finder))
    assert "--seed has no effect with --classify" in error_of(sample("--classify=fox", "--seed=1", run=finder))
    config = Run.open(finder).model_config
    assert "classes=dog,fox,neither" in type_of(config)[1] and "classes=dog,fox,neither" in obstacles(config)


def test_the_benchmark_compares_with_a_bag_of_words(finder, animals, corpus_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(finder), f"--dataset={animals}", f"--corpus={corpus_folder}"])
    bench.main()
    header, _, commonest, bag, run = capsys.readouterr().out.splitlines()
    assert "| all 40 | balanced |" in header and "| 35.0% | 33.3% |" in commonest  # 14 of 40, one class of three
    assert bag.startswith("| bag of words: ") and "| 100.0% | 100.0% |" in bag  # a word tells
    assert f"| {log(finder)[-1]['val_accuracy']:.1%} | " in run


def test_a_plan_counts_the_classifiers_weights_and_steps(masked, animals):
    start = decide({"init_from": (str(masked), "")}, vars(TrainConfig()), "pretrain")
    config = TrainConfig(dataset=str(animals), objective="classify", device="cpu", batch_size=14, max_iters=20)
    model_config = start.configs({}, GPTConfig)[0]
    plan = plan_pretraining(start, config, model_config, PlanOptions())
    assert f"{Classifier(model_config).num_params():,} weights" in plan and "2.0 passes over the texts" in plan


def test_memory_is_counted_for_the_original_order_of_norms_too():
    shape = {"block_size": 64, "vocab_size": 99, "n_layer": 2, "n_head": 2, "n_embd": 32, "norm": "layernorm"}
    pre, post = (
        count_memory(Job(GPTConfig(**shape, post_norm=post), TrainConfig(batch_size=4), "float32", False))
        for post in (False, True)
    )
    assert post.activations == pytest.approx(pre.activations, rel=0.2) and post.logits == pre.logits
