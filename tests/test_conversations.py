"""Conversations: their splits, the commands that prepare them, and the folders that these write."""

import hashlib
import importlib.util
import json
import os
import re
import resource
import runpy
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from common import cli
from tasks.sft import load_conversations
from tests.conversation_helpers import BAD, HELLO, as_line, lines, talk
from text import conversations as module
from text.chat import Template
from text.conversations import by_question, open_conversations, write_conversations
from text.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "val")


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_no_question_is_in_both_splits():
    found = [talk(f"u: {i % 50}", f"a: {i}") for i in range(200)]
    splits = list(by_question(iter(found), 0.2))
    assert [messages for _, messages in splits] == found
    asked = {split: {messages[0]["content"] for name, messages in splits if name == split} for split in SPLITS}
    assert not asked["train"] & asked["val"] and 3 <= len(asked["val"]) <= 20


def test_a_handful_of_conversations_gives_one_to_each_split():
    for count in range(2, 12):
        for share in (0.001, 0.05, 0.999):
            found = [talk(f"u: {count} {i}", f"a: {i}") for i in range(count)]
            one, other = (
                dict(Counter(split for split, _ in by_question(rows, share))) for rows in (found, found[::-1])
            )
            assert set(one) == set(SPLITS) and one == other
    where = [
        {messages[0]["content"]: split for split, messages in by_question(rows, 0.001)} for rows in (found, found[::-1])
    ]
    assert where[0] == where[1]  # whatever their order
    with pytest.raises(ValueError, match="all conversations begin with the same question"):
        list(by_question([talk("u: a", "a: b"), talk("u: a", "a: c")], 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Run data/<name>/prepare.py's command line in this process: (exit status, what it printed, its errors)."""

    def run(name, *options):
        script = ROOT / "data" / name / "prepare.py"
        spec = importlib.util.spec_from_file_location(f"prepare_{name}", script)
        command = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(command)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
        status = 0
        try:
            cli.run_command(command.main)
        except SystemExit as stopped:
            status = stopped.code
        return (status, *capsys.readouterr())

    return run


def test_your_own_conversations_are_prepared(tmp_path, prepare):
    rows = [{"instruction": f"Say {i % 90}.", "output": f"{i % 90}!"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    status, shown, _ = prepare(
        "chat", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--val_fraction=0.2"
    )
    assert status == 0 and "10 repeated conversations left out" in shown
    before = open_conversations(tmp_path / "out")
    assert len(before["train"]) + len(before["val"]) == 90 and 5 < len(before["val"]) < 40
    (tmp_path / "b.jsonl").write_text(lines(rows[0], {"messages": talk("u: a")}))
    status, _, errors = prepare("chat", "--input", tmp_path / "b.jsonl", "--output", tmp_path / "out")
    assert status == 1 and "b.jsonl, line 2: there is no assistant message" in errors and errors.count("\n") == 1
    assert "(--skip_bad leaves such conversations out and counts them)" in errors
    assert open_conversations(tmp_path / "out") == before  # the old data set stays
    for share in (0, 1, "nan"):
        status, _, errors = prepare(
            "chat", "--input", tmp_path / "a.jsonl", "--output", tmp_path, "--val_fraction", share
        )
        assert status == 1 and "give a share between 0 and 1" in errors


def test_skip_bad_goes_on_and_ends_with_counts_by_reason(tmp_path, prepare):
    good = [{"messages": talk(f"u: {i}", "a: b"), "id": i} for i in range(1, 9)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(as_line, [*(bad for bad, _, _ in BAD), *good])))
    parsed = [bad for bad, _, _ in BAD if not isinstance(bad, str | bytes)]
    (tmp_path / "b.json").write_text(json.dumps(parsed))
    files = ["--input", tmp_path / "a.jsonl", tmp_path / "b.json", "--output", tmp_path / "out"]
    assert prepare("chat", *files)[0] == 1 and not (tmp_path / "out").exists()
    status, shown, errors = prepare("chat", *files, "--skip_bad")
    assert status == 0 and not errors and sum(map(len, open_conversations(tmp_path / "out").values())) == 8
    assert f"conversations left out ({len(BAD) + len(parsed)}): " in shown
    for reason, count in Counter(reason for _, reason, _ in BAD).items():
        of_files = count if reason in ("broken JSON", "text that is not UTF-8") else 2 * count
        assert f"{reason} ({of_files}, first in {tmp_path / 'a.jsonl'}, line " in shown
    assert "fields left out, because conversations do not use them: id (8)" in shown
    status, _, errors = prepare("chat", "--input", tmp_path / "b.json", "--output", tmp_path / "none", "--skip_bad")
    assert status == 1 and "no conversation is left for train: give more. conversations left out" in errors


def test_files_for_validation_are_named_by_val(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_text(lines(*[{"prompt": f"{i}", "completion": "a"} for i in range(20)]))
    (tmp_path / "b.jsonl").write_text(lines(*[{"prompt": f"{i}", "completion": "b"} for i in range(18, 24)]))
    files = ["--input", tmp_path / "a.jsonl", "--val", tmp_path / "b.jsonl", "--output", tmp_path / "out"]
    status, shown, _ = prepare("chat", *files)
    assert status == 0 and "note: 2 first questions are in both splits" in shown
    found = open_conversations(tmp_path / "out")
    assert [m[0]["content"] for m in found["train"]] == [str(i) for i in range(20)]
    assert [m[0]["content"] for m in found["val"]] == [str(i) for i in range(18, 24)]
    status, _, errors = prepare("chat", *files, "--val_fraction=0.1")
    assert status == 2 and "not allowed with argument" in errors


def test_standard_input_and_pipes_are_read(tmp_path):
    text = lines(*[{"prompt": f"{i}", "completion": "a"} for i in range(9)])
    command = [sys.executable, str(ROOT / "data/chat/prepare.py"), "--output", str(tmp_path), "--input"]
    for source in ("-", "/dev/stdin"):
        subprocess.run([*command, source], input=text, text=True, check=True, capture_output=True)
        assert sum(map(len, open_conversations(tmp_path).values())) == 9


def test_preparing_and_opening_conversations_needs_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import text.conversations; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, ROOT], check=True)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path, prepare):
    source = tmp_path / "a.jsonl"
    source.write_text(lines(*[{"prompt": f"{i}", "completion": "a"} for i in range(9)]))
    kinds = {"config.json": "holds a run", "checkpoints": "holds a run", "train.bin": "holds a corpus of text",
             "tokenizer.json": "holds a corpus", "meta.json": "holds the meta.json of something else",
             "train.jsonl": "holds a train.jsonl and no meta.json", "val.jsonl": "holds a val.jsonl"}  # fmt: skip
    for name, sentence in kinds.items():
        folder = tmp_path / f"with_{name}"
        folder.mkdir()
        (folder / name).write_text('{"format": "plaingpt-corpus"}')
        status, _, errors = prepare("chat", "--input", source, "--output", folder)
        assert status == 1 and sentence in errors and os.listdir(folder) == [name]
    (tmp_path / "with_meta.json" / "meta.json").write_text("{")  # nor is it a damaged one of ours: we leave a lock file
    assert "something else" in prepare("chat", "--input", source, "--output", tmp_path / "with_meta.json")[2]
    assert "is a file" in prepare("chat", "--input", source, "--output", source)[2]
    (tmp_path / "mine").mkdir()
    source = source.rename(tmp_path / "mine" / "train.jsonl")
    before = source.read_bytes()
    for option in ("--input", "--val"):
        files = {"--input": tmp_path / "x.jsonl", "--val": tmp_path / "x.jsonl"} | {option: source}
        arguments = [str(part) for pair in files.items() for part in pair]
        status, _, errors = prepare("chat", *arguments, "--output", tmp_path / "mine")
        assert status == 1 and "would replace" in errors and source.read_bytes() == before


def test_alpaca_is_prepared_from_a_local_copy_without_its_empty_answers(tmp_path, prepare):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}!" if i % 10 else ""} for i in range(100)]
    source = tmp_path / "alpaca_data.json"
    source.write_text(json.dumps(rows))
    status, shown, _ = prepare("alpaca", "--input", source, "--output", tmp_path, "--val_fraction=0.2")
    assert status == 0 and "conversations left out (10): an empty answer (10, first in" in shown
    assert sum(map(len, open_conversations(tmp_path).values())) == 90
    source.write_text(json.dumps([{"instruction": "a", "input": ""}] * 3))
    status, _, errors = prepare("alpaca", "--input", source, "--output", tmp_path)
    assert status == 1 and 'alpaca_data.json, item 1: there is no "output" beside "instruction"' in errors


def test_alpacas_download_is_kept_only_if_it_is_whole(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_alpaca", ROOT / "data/alpaca/prepare.py")
    alpaca = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alpaca)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "Ä"} for i in range(alpaca.INSTRUCTIONS)]
    whole, kept = json.dumps(rows, ensure_ascii=False).encode(), tmp_path / "alpaca_data.json"
    monkeypatch.setattr(alpaca, "HERE", tmp_path)
    for cut in (whole[: len(whole) // 2], json.dumps(rows[:-1]).encode(), b"<html>Not found</html>", b""):
        monkeypatch.setattr(alpaca, "URL", address := f"file://{tmp_path / 'served'}")
        (tmp_path / "served").write_bytes(cut)
        with pytest.raises(ValueError, match="the download of file://.* instead of 52,002 instructions"):
            alpaca.alpaca_data()
        assert not kept.exists()
        kept.write_bytes(cut)  # as an earlier version left it
        with pytest.raises(ValueError, match="alpaca_data.json .* delete it if it is on your disk"):
            alpaca.alpaca_data()
        kept.unlink()
    (tmp_path / "served").write_bytes(whole)
    assert alpaca.URL == address and json.loads(alpaca.alpaca_data().read_bytes()) == rows
    (tmp_path / "served").unlink()
    assert alpaca.alpaca_data() == kept


def test_the_number_of_processes_that_alpaca_recommends_divides_the_micro_steps():
    (processes,) = re.findall(r"--nproc_per_node=(\d+)", (ROOT / "data/alpaca/prepare.py").read_text())
    assert runpy.run_path(ROOT / "config/sft_alpaca.py")["gradient_accumulation_steps"] % int(processes) == 0


def test_the_home_folder_is_found(tmp_path, prepare, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(lines(*[{"prompt": f"{i}", "completion": "a"} for i in range(9)]))
    assert prepare("chat", "--input=~/a.jsonl", "--output=~/out")[0] == 0
    assert sum(map(len, open_conversations(tmp_path / "out").values())) == 9


def test_the_embedded_conversations_ask_about_objects_of_one_split_only(tmp_path, prepare):
    status, shown, _ = prepare("pydocs_sft", "--output", tmp_path)
    assert status == 0 and "note:" not in shown and "fields left out" not in shown
    found = open_conversations(tmp_path)
    train, val = found["train"], found["val"]
    assert len(train) > 10_000 and len(val) > 500
    asked = {json.dumps(messages[0]["content"]) for messages in train}
    assert not asked & {json.dumps(messages[0]["content"]) for messages in val}
    answers = {messages[0]["content"]: messages[1]["content"] for messages in train + val}
    taken = next(q for q in answers if "textwrap.fill" in q and ("take" in q or "arguments" in q or "pass" in q))
    assert answers[taken] == "It takes text, width=70 and **kwargs."
    called = next(q for q in answers if "textwrap.fill" in q and "call" in q)
    assert answers[called] == "textwrap.fill(text, width=70, **kwargs)"
    asked = ("What does textwrap.fill do?", "What is textwrap.fill for?", "Explain textwrap.fill.")
    (about,) = {answers[question] for question in asked if question in answers}
    assert about == "Fill a single paragraph of text, returning a new string."
    assert about in " ".join(textwrap.fill.__doc__.split())


# ---------------------------------------------------------------------------------------------------------------------
# Prepared folders

OLD = {"train": [talk("u: old 1", "a: 你好")], "val": [talk("u: old 2", "a0: b", "u: c", "a: d")]}
NEW = {"train": [talk("u: new 1", "a: b"), talk("s: 1", "u: 2", "a: 3")], "val": [talk("u: new 2", "a: b")]}


def write(folder, splits):
    write_conversations(folder, [(split, messages) for split in SPLITS for messages in splits[split]])


def test_a_prepared_folder_opens_as_it_was_written_with_a_manifest(tmp_path, capsys):
    write(tmp_path, OLD)
    assert open_conversations(tmp_path) == OLD
    meta = json.loads((tmp_path / "meta.json").read_text())
    for split in SPLITS:
        content = (tmp_path / f"{split}.jsonl").read_bytes()
        assert [json.loads(line) for line in content.decode().splitlines()] == [{"messages": m} for m in OLD[split]]
        assert meta["splits"][split]["sha256"] == hashlib.sha256(content).hexdigest()
        assert meta["splits"][split]["conversations"] == 1
    assert [meta["splits"][split]["bytes"] for split in SPLITS] == [5 + 6, 5 + 3]
    write(tmp_path, NEW)
    assert open_conversations(tmp_path) == NEW
    assert sorted(os.listdir(tmp_path)) == [".lock", "meta.json", "train.jsonl", "val.jsonl"]


def test_every_flipped_bit_is_told(tmp_path):
    write(tmp_path, OLD)
    for name in ("train.jsonl", "val.jsonl", "meta.json"):
        content = (tmp_path / name).read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 7
            (tmp_path / name).write_bytes(flipped)
            try:
                assert (
                    open_conversations(tmp_path) == OLD and flipped[place : place + 1].isspace()
                )  # only JSON's layout
            except ValueError as error:
                assert name in str(error) or name == "meta.json"
        (tmp_path / name).write_bytes(content)


def test_damage_is_told_with_the_file_and_what_to_do(tmp_path):
    write(tmp_path, OLD)
    content = (tmp_path / "val.jsonl").read_bytes()
    (tmp_path / "val.jsonl").write_bytes(content.replace(b"old", b"odd"))
    with pytest.raises(
        ValueError, match=r"val.jsonl is damaged or half replaced .*prepare it again.*if you have edited it"
    ):
        open_conversations(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot read .*val.jsonl: No such file.*; prepare it again"):
        open_conversations(tmp_path)
    (tmp_path / "val.jsonl").write_bytes(content)
    meta = (tmp_path / "meta.json").read_text()
    for broken in ("", "{}", "[]", "[" * 100_000, meta.replace("val", "vol"), meta.replace('"bytes": 8', '"bytes": 9')):
        (tmp_path / "meta.json").write_text(broken)
        with pytest.raises(ValueError, match="meta.json is damaged"):
            open_conversations(tmp_path)
    (tmp_path / "meta.json").write_text(meta.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="meta.json has format version 2, this code reads 1"):
        open_conversations(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    write(tmp_path, OLD)  # preparing again mends it
    assert open_conversations(tmp_path) == OLD


def test_folders_of_the_previous_version_and_made_by_hand_open(tmp_path, capsys):
    for split in SPLITS:  # what the previous version wrote, a line break at the end or none
        (tmp_path / f"{split}.jsonl").write_text(lines({"messages": OLD[split][0]}).rstrip("\n"))
    assert open_conversations(tmp_path) == OLD and not capsys.readouterr().err
    (tmp_path / "meta.json").write_text('{"format": "plaingpt-corpus", "version": 1}')  # it allowed this
    assert open_conversations(tmp_path) == OLD
    (tmp_path / "meta.json").unlink()
    (tmp_path / "val.jsonl").write_text(lines({"prompt": "Hi", "completion": "Ho", "id": 3}))
    assert open_conversations(tmp_path) == {"train": OLD["train"], "val": [HELLO]}
    assert "val.jsonl: fields left out, because conversations do not use them: id (1)" in capsys.readouterr().err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_kill_between_two_renames_leaves_no_mixture(tmp_path, monkeypatch, renames):
    write(tmp_path, OLD)
    replace, done = os.replace, []

    def deadly(source, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deadly)
        with pytest.raises(Killed) if renames < 3 else nullcontext():
            write(tmp_path, NEW)
    if renames in (0, 3):
        assert open_conversations(tmp_path) == (NEW if renames else OLD)
    else:
        with pytest.raises(ValueError, match="train.jsonl is damaged or half|val.jsonl is damaged or half"):
            open_conversations(tmp_path)
        with pytest.raises(ValueError, match="half replaced"):  # what finetune.py calls
            load_conversations(str(tmp_path), Template(CharTokenizer("abcdenow123 ", eot=True)), 64)
    write(tmp_path, NEW)
    assert open_conversations(tmp_path) == NEW


def test_a_full_disk_keeps_the_old_data_set_and_is_told(tmp_path):
    write(tmp_path, OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"train": NEW["train"], "val": [talk("u: x", "a: " + "y" * 100_000)]}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as if there were no more room
        with pytest.raises(ValueError, match=f"cannot write to {tmp_path}: File too large; free some space"):
            write(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_conversations(tmp_path) == OLD
    assert sorted(os.listdir(tmp_path)) == [".lock", "meta.json", "train.jsonl", "val.jsonl"]


WRITER = """
import sys
from text.conversations import write_conversations
who, folder = sys.argv[1:]
turn = lambda i: [{"role": "user", "content": f"{who} {i}"}, {"role": "assistant", "content": who}]
for _ in range(20):
    write_conversations(folder, [("val" if i % 10 == 0 else "train", turn(i)) for i in range(200)])
"""


def test_several_prepares_into_one_folder_leave_one_whole_data_set(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, who, tmp_path / "x"], env=environment,
                                stdout=subprocess.DEVNULL) for who in "abc"]  # fmt: skip
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = open_conversations(tmp_path / "x")
    assert (len(found["train"]), len(found["val"])) == (180, 20)
    assert len({messages[1]["content"] for split in SPLITS for messages in found[split]}) == 1


def test_a_folder_that_another_prepare_is_writing_to_is_told_after_a_while(tmp_path, monkeypatch):
    from filelock import FileLock

    write(tmp_path, OLD)
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.01)
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(ValueError, match="another prepare.py has been writing to"):
            write(tmp_path, NEW)
    assert open_conversations(tmp_path) == OLD


def test_answers_of_weight_0_survive_until_the_mask_that_is_trained_on(tmp_path, prepare):
    rows = [{"messages": talk(f"u: {i}", "a0: bad", "u: c", "a: good")} for i in range(9)]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    assert prepare("chat", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out")[0] == 0
    template = Template(CharTokenizer("abcdgo0123456789", eot=True))
    data = load_conversations(str(tmp_path / "out"), template, 64)
    examples = data.train.examples + data.val.examples
    assert len(examples) == 9 and data.questions == open_conversations(tmp_path / "out")["val"]
    assert {template.tokenizer.decode(e.tokens[e.mask].tolist()) for e in examples} == {"good<|end|>"}
