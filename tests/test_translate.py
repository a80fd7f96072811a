"""Translation: pairs from files to a data set, from there to batches, a run, and translated text."""

import datetime
import json
import random

import pytest
import torch

import finetune
import sample
import train
from data.dates import prepare as dates
from data.pairs import prepare as pairs_command
from model import GPTConfig
from tasks.translate import load_translations, translation_task
from tests.foreign_folders import command
from tests.helpers import error_of, json_lines
from text.pairs import open_pairs, read_pairs
from training.config import TrainConfig

SIZES = ["--n_layer=1", "--n_encoder_layer=1", "--n_head=2", "--n_embd=32", "--block_size=24", "--batch_size=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data set whose targets are their sources backwards."""
    folder, rng = tmp_path_factory.mktemp("backwards"), random.Random(0)
    words = ["".join(rng.choices("abcde", k=rng.randint(2, 6))) for _ in range(1500)]
    (folder / "words").write_text("\n".join(words) + "\n")
    (folder / "backwards").write_text("\n".join(word[::-1] for word in words) + "\n")
    options = ["--output", folder / "data", "--tokenizer", "char", "--val_fraction", "0.1"]
    done = command(pairs_command.main, "--input", folder / "words", folder / "backwards", *options)
    assert done.returncode == 0 and "repeated pairs left out" in done.stdout
    return folder / "data"


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A model that was trained on them."""
    out_dir = tmp_path_factory.mktemp("run") / "run"
    settings = ["--max_iters=250", "--eval_interval=250", "--learning_rate=0.02", "--sample_interval=250"]
    places = [f"--dataset={folder}", f"--out_dir={out_dir}"]
    done = command(train.main, "--objective=translate", *places, *SIZES, *settings)
    assert done.returncode == 0, done.stderr
    assert "held-out sources translated exactly" in done.stdout
    return out_dir


def task_of(folder, **settings):
    model = GPTConfig(block_size=24, n_encoder_layer=1)
    return translation_task(load_translations(folder, 24), TrainConfig(batch_size=4, **settings), model)


# --- pairs -------------------------------------------------------------------------------------------------------


def test_the_three_forms_of_a_file_hold_the_same_pairs(tmp_path):
    expected = [("a b", "x"), ("c", "y z")]
    (tmp_path / "s").write_text("a b\nc\n")
    (tmp_path / "t").write_text("x\r\ny z\r\n")
    (tmp_path / "both.tsv").write_text("a b\tx\nc\ty z\n")
    rows = [{"source": s, "target": t} for s, t in expected]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for names in (["s", "t"], ["both.tsv"], ["both.jsonl"]):
        assert [pair for _, pair in read_pairs([str(tmp_path / name) for name in names])] == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"s": "a\nb\n", "t": "x\n"}, "t ends after 1 lines"),
        ({"s": "a\n\n", "t": "x\ny\n"}, "line 2: a side is empty"),
        ({"one.tsv": "a\tb\nc\n"}, "line 2: a source, one tab and a target are needed, and there are 0 tabs"),
        ({"one.tsv": "a\tb\tc\n"}, "there are 2 tabs"),
        ({"one.jsonl": '{"source": "a"}\n'}, 'a pair is {"source": "...", "target": "..."}'),
        ({"s": "a", "t": "b", "u": "c"}, "one file of pairs, or two files"),
        ({"s": "a\n", "t": "x\n"}, "no pair is left for"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused_with_its_place(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = command(pairs_command.main, "--input", *(tmp_path / name for name in files), "--output", tmp_path / "out",
                   "--tokenizer", "char")  # fmt: skip
    assert message in error_of(done) and not list(tmp_path.glob("out/*.jsonl"))


def test_pairs_with_an_empty_side_are_left_out_and_counted(tmp_path):
    (tmp_path / "one.tsv").write_text("".join(f"a{i}\tb{i}\n" for i in range(200)) + "\tx\n")
    done = command(pairs_command.main, "--input", tmp_path / "one.tsv", "--output", tmp_path / "out", "--skip_bad",
                   "--vocab_size", "270")  # fmt: skip
    assert done.returncode == 0 and "because a side is empty: 1, first" in done.stdout
    data = open_pairs(tmp_path / "out")
    assert len(data.train) + len(data.val) == 200 and data.tokenizer.vocab_size <= 270


def test_nothing_else_is_overwritten(folder, tmp_path):
    source = folder / "train.jsonl"
    done = command(pairs_command.main, "--input", source, "--output", folder)
    assert "would replace" in error_of(done)
    (tmp_path / "config.json").write_text("{}")
    done = command(pairs_command.main, "--input", source, "--output", tmp_path)
    assert "holds something other than pairs" in error_of(done)
    for name in ("train.jsonl", "tokenizer.json"):  # without a meta.json, it is somebody else's
        own = tmp_path / name.removesuffix("l")
        own.mkdir()
        (own / name).write_text("mine")
        done = command(pairs_command.main, "--input", source, "--output", own)
        assert f"(a {name})" in error_of(done) and (own / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "tokenizer.json", "meta.json"])
def test_damage_is_found_by_name(name, folder, tmp_path):
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content.replace(b"a", b"b", 1))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        open_pairs(tmp_path)


# --- dates -------------------------------------------------------------------------------------------------------


def test_a_date_is_said_in_chinese():
    day = datetime.date(2026, 11, 25)
    assert dates.chinese(day, True, (16, 5)) == "2026年11月25日星期三下午4:05"
    assert dates.chinese(day, False, None) == "2026年11月25日"
    hours = {
        0: "凌晨12:00",
        4: "凌晨4:00",
        5: "上午5:00",
        12: "中午12:00",
        13: "下午1:00",
        18: "晚上6:00",
        23: "晚上11:00",
    }
    for hour, said in hours.items():
        assert dates.chinese(day, False, (hour, 0)).endswith(said)


def test_english_times_say_what_they_mean():
    """Whatever form is drawn, hour and minute can be read back from it by other rules."""
    words = {word: i for i, word in enumerate(dates.HOURS)} | {"twelve": 12}
    minutes = {"a quarter": 15, "half": 30, "five": 5, "ten": 10, "twenty": 20, "twenty-five": 25}

    def read(text):
        if text in ("noon", "midnight"):
            return (12 if text == "noon" else 0), 0
        clock, _, part = text.partition(" in the ")
        late = part in ("afternoon", "evening") or clock.lower().endswith("pm")
        early = part == "morning" or clock.lower().endswith("am")
        clock = clock.lower().removesuffix("am").removesuffix("pm").strip().removesuffix(" o'clock")
        if " past " in clock or " to " in clock:
            amount, _, hour = clock.partition(" past " if " past " in clock else " to ")
            total = words[hour] % 12 * 60 + minutes[amount] * (1 if " past " in clock else -1)
        else:
            hour, _, minute = clock.replace(".", ":").partition(":")
            number = words.get(hour, 0) or int(hour)
            total = (number % 12 if late or early else number) * 60 + int(minute or 0)
        total = total % 720 + 720 * late if late or early else total
        return total // 60, total % 60

    rng = random.Random(1)
    for _ in range(5000):
        hour, minute = rng.randrange(24), rng.choice([*range(0, 60, 5), 7, 59])
        text = dates.english_time(hour, minute, rng)
        assert read(text) == (hour, minute), text


def test_no_validation_date_occurs_in_training():
    found = dates.all_pairs(0.05)
    days = {split: {target.partition("日")[0] for _, target in found[split]} for split in found}
    assert len(found["val"]) > 2500 and not days["train"] & days["val"]


# --- the task ----------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_and_holds_whole_pairs(folder):
    task, tokenizer = task_of(folder, gradient_accumulation_steps=2), open_pairs(folder).tokenizer
    whole, halves = task.batch(3, slice(0, 8)), [task.batch(3, slice(0, 4)), task.batch(3, slice(4, 8))]
    for key in ("idx", "source"):
        rows = [row[row != 0].tolist() for row in whole[key]]
        assert rows == [row[row != 0].tolist() for half in halves for row in half[key]]
    for source, real, targets in zip(whole["source"], whole["source_padding"], whole["targets"], strict=True):
        said = tokenizer.decode(targets[(targets >= 0) & (targets != tokenizer.eot_id)])
        assert said == tokenizer.decode(source[real])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), task.batch(3, slice(0, 8)).values(), strict=True))


def test_every_pair_is_used_once_per_pass_and_every_validation_pair_once(folder):
    task, data = task_of(folder), open_pairs(folder)
    count = len(data.train)
    seen = [data.tokenizer.decode(row[real]) for step in range(-(-count // 4))
            for batch in [task.batch(step, slice(0, 4))]
            for row, real in zip(batch["source"], batch["source_padding"], strict=True)]  # fmt: skip
    assert sorted(seen[:count]) == sorted(source for source, _ in data.train)
    shares = [sum(len(batch["idx"]) for batch in task.validation(rank, 3)) for rank in range(3)]
    assert sum(shares) == len(data.val) and min(shares) > 0


def test_it_learns_to_translate_and_beams_are_no_worse(run, folder):
    rows = [{"prompt": source, "expected": target} for source, target in open_pairs(folder).val]
    questions = run.parent / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    exact = {}
    for name, options in {"greedy": ["--temperature=0"], "beams": ["--num_beams=3"]}.items():
        done = command(sample.main, f"--out_dir={run}", f"--prompts={questions}", "--json", *options)
        answers = json_lines(done)
        assert len(answers) == len(rows) and {answer["finish"] for answer in answers} == {"eos"}
        exact[name] = sum(answer["text"] == answer["expected"] for answer in answers)
    assert min(exact.values()) > 0.6 * len(rows) and exact["beams"] >= exact["greedy"] - 2


def test_a_source_in_a_file_ends_without_the_line_break(run, folder, tmp_path):
    source = open_pairs(folder).val[0][0]
    (tmp_path / "source.txt").write_text(f"{source}\n")
    prompts = source, f"FILE:{tmp_path / 'source.txt'}"
    texts = [command(sample.main, f"--out_dir={run}", f"--prompt={p}", "--temperature=0").stdout for p in prompts]
    assert texts[0] == texts[1] != ""


def test_it_resumes(run, folder, tmp_path):
    done = command(train.main, "--init_from=resume", f"--out_dir={run}", "--max_iters=260")
    assert done.returncode == 0, done.stderr
    done = command(train.main, "--init_from=resume", f"--out_dir={run}", "--objective=pretrain", "--max_iters=270")
    assert "objective" in error_of(done)


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (train.main, ["--objective=translate", "--dataset={folder}", "--n_encoder_layer=0"], "do not go together"),
        (train.main, ["--objective=translate", "--dataset={folder}", "--block_size=2"], "no train pair fits into"),
        (train.main, ["--objective=translate", "--dataset={folder}", "--parallel=fsdp"], "not for parallel=fsdp"),
        (train.main, ["--objective=translate", "--dataset={folder}", "--plan"], "leave it out for objective=translate"),
        (train.main, ["--objective=translate", "--dataset=none"], "no prepared pairs in"),
        (train.main, ["--dataset={folder}", "--n_encoder_layer=0"], "plaingpt-pairs, no corpus of text: name another"),
        (sample.main, ["--out_dir={run}", "--chat"], "this model translates"),
        (sample.main, ["--out_dir={run}", "--score=x"], "cannot read"),
        (sample.main, ["--out_dir={run}"], "of 1 to 24 tokens, not of 0"),
        (sample.main, ["--out_dir={run}", "--prompt=" + "a" * 25], "of 1 to 24 tokens, not of 25"),
        (finetune.main, ["--init_from={run}"], "do not go together"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(main, options, message, run, folder, tmp_path):
    options = [option.format(run=run, folder=folder) for option in options]
    if main is train.main:
        options = [f"--out_dir={tmp_path / 'out'}", *SIZES, *options]
    assert message in error_of(command(main, *options))
