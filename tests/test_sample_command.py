"""sample.py's whole command lines: what a user types, what comes out, in a terminal, a pipe or a file."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import sample as sample_module
from common import cli
from runs.run import Run
from tests.helpers import error_of, json_lines

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.sample_runs",)


def test_sampling_continues_the_prompt_and_repeats_itself_by_seed(sample):
    first, again, other = (sample("--prompt=the quick", f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick") and first.stdout == again.stdout != other.stdout


def test_several_samples_are_those_of_the_seeds_that_follow(sample):
    both = sample("--num_samples=2", "--seed=5").stdout.split("\n" + "-" * 20 + "\n")
    alone = [sample(f"--seed={seed}").stdout for seed in (5, 6)]
    assert [text.strip() for text in both] == [text.strip() for text in alone]


def test_the_command_prints_what_it_samples(trained, sample):
    options = ["--prompt=the", "--seed=3", "--max_new_tokens=40"]
    command = [sys.executable, "sample.py", f"--out_dir={trained}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout == sample(*options).stdout


def test_greedy_needs_no_seed(sample):
    assert len({sample("--temperature=0", f"--seed={seed}").stdout for seed in (1, 2)}) == 1


def test_a_prompt_can_be_a_file(sample, tmp_path):
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    assert sample(f"--prompt=FILE:{tmp_path / 'prompt.txt'}").stdout.startswith("the lazy dog")


def test_text_and_prompt_may_be_longer_than_the_context(sample):
    done = sample("--prompt=" + "the quick brown fox " * 5, "--max_new_tokens=200")
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "note: the prompt has 101 tokens, and the model sees 48 at most: it does not see the beginning\n"
    )


def test_json_tells_tokens_log_probabilities_and_why_a_text_ended(sample, trained):
    options = ["--prompt=the ", "--num_samples=3", "--temperature=0.5"]
    lines = [json.loads(line) for line in sample(*options, "--json").stdout.splitlines()]
    texts = sample(*options).stdout.split("\n" + "-" * 20 + "\n")
    assert [line["prompt"] + line["text"] for line in lines] == [text.removesuffix("\n") for text in texts]
    for line in lines:
        assert len(line["tokens"]) == len(line["logprobs"]) and max(line["logprobs"]) <= 0
        assert line["logprob"] == pytest.approx(sum(line["logprobs"]))
        assert line["finish"] == ("length" if len(line["tokens"]) == 40 else "eos")
        assert len(line["text"]) == len(line["tokens"]) - (line["finish"] == "eos")


def test_a_stop_string_ends_each_text_where_it_comes(sample):
    options = ["--prompt=the ", "--num_samples=4", "--json"]
    free = [json.loads(line)["text"] for line in sample(*options).stdout.splitlines()]
    stopped = [json.loads(line) for line in sample(*options, '--stop=["o", "e "]').stdout.splitlines()]
    for text, line in zip(free, stopped, strict=True):
        assert line["text"] == text[: min([len(text), *(text.find(stop) for stop in ("o", "e ") if stop in text)])]
        assert line["finish"] == "stop" or line["text"] == text
    assert sample("--prompt=the ", "--stop=o").stdout.count("o") == 0


def test_beams_come_best_first_with_their_scores_as_text_and_as_json(sample):
    options = ["--prompt=the quick", "--num_beams=5", "--num_samples=3"]
    lines = [json.loads(line) for line in sample(*options, "--json").stdout.splitlines()]
    scores = [line["score"] for line in lines]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    greedy = json.loads(sample("--prompt=the quick", "--temperature=0", "--json").stdout)
    rounding = 1e-5  # beams and one row add in different orders, so that the same text may differ in its last digits
    assert lines[0]["score"] >= greedy["logprob"] / len(greedy["tokens"]) - rounding
    for line in lines:
        assert line["score"] == pytest.approx(line["logprob"] / len(line["tokens"]))
    headers = [text for text in sample(*options).stdout.splitlines() if text.startswith("--- ")]
    assert headers == [
        f"--- {i}: score {line['score']:.4f}, log-probability {line['logprob']:.4f}, {len(line['tokens'])} tokens"
        for i, line in enumerate(lines, start=1)
    ]
    assert sample("--prompt=the quick", "--num_beams=5").stdout == lines[0]["prompt"] + lines[0]["text"] + "\n"


def test_the_score_of_a_text_is_its_likelihood_in_bits_per_byte(sample, tmp_path):
    (tmp_path / "text").write_text("the lazy dog sleeps and a quick brown fox jumps over the")
    (tmp_path / "noise").write_text("xzkq wvvb jjx")
    score = {name: json.loads(sample(f"--score={tmp_path / name}", "--json").stdout) for name in ("text", "noise")}
    assert score["text"]["tokens"] == score["text"]["bytes"] == 56
    assert score["text"]["bits_per_byte"] == pytest.approx(-score["text"]["log_likelihood"] / 56 / math.log(2))
    assert score["text"]["perplexity"] == pytest.approx(2 ** score["text"]["bits_per_byte"])  # a character per token
    assert score["text"]["bits_per_byte"] < 4.5 < score["noise"]["bits_per_byte"]
    shown = sample(f"--score={tmp_path / 'text'}", "--quantize=int8").stdout
    assert "56 tokens, 56 bytes" in shown and f"bits per byte {score['text']['bits_per_byte']:.4f}" in shown
    assert f"perplexity {score['text']['perplexity']:.4f} per token" in shown
    assert re.search(r"int8: bits per byte \d\.\d{4} \([+-]0\.0", shown)


def test_generating_in_bytes_is_nearly_generating_in_floats(sample):
    options = ["--prompt=the quick", "--temperature=0", "--max_new_tokens=10", "--json"]
    plain, rounded = (json.loads(sample(*options, *more).stdout) for more in ([], ["--quantize=int8"]))
    assert plain["logprobs"] != rounded["logprobs"] == pytest.approx(plain["logprobs"], abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--prompt=Zebra"], "'Z' (U+005A) at position 0"), (["--prompt=FILE:none"], "cannot read the file of the"),
     (["--temperature=-1"], "temperature must be at least 0"), (["--top_p=0"], "top_p must be above 0"),
     (["--max_new_tokens=0"], "max_new_tokens must be at least 1"), (["--checkpoint=x"], "choose best, latest or"),
     (["--tempreature=1"], "did you mean temperature?"), (["--seed=x"], "seed must be of type int"),
     (["--num_beams=2", "--num_samples=3"], "cannot come from"),
     (["--prompts=none.txt"], "cannot read the file of prompts none.txt"),
     (["--system=x"], "this is a base model"), (["--chat", "--system=x"], "this is a base model"),
     (["--prompt=x", "--num_beams=2", "--temperature=0.8"], "--temperature has no effect with --num_beams above 1"),
     (["--score=none"], "cannot read the text none"), (["--fill="], "--fill is empty: give it a text"),
     (["--dtype=bfloat16", "--quantize=int8"], "--quantize=int8 is for a CPU in float32"),
     (["--out_dir=nowhere"], "no run in nowhere"), (["--device=cuda:9"], "CUDA GPUs"), (["prompt"], "cannot read")],
)  # fmt: skip
def test_a_mistake_in_sampling_is_one_clear_line(sample, options, message):
    assert message in error_of(sample(*options))


def test_a_damaged_run_is_one_clear_line(trained, sample, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error_of(sample(f"--out_dir={copy}"))
    weights = next(copy.glob("checkpoints/*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors is damaged" in error_of(sample(f"--out_dir={copy}"))


# ---------------------------------------------------------------------------------------------------------------------
# Files of prompts


def test_a_file_of_prompts_gives_a_file_of_answers_in_order(sample, tmp_path):
    prompts = ["the quick brown", "a", "the lazy dog and sleeps", "fox", "over a"]
    rows = [{"prompt": prompt, "id": i} for i, prompt in enumerate(prompts)]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    lines = json_lines(sample(f"--prompts={tmp_path}/p.jsonl", "--json", "--seed=5"))
    assert [(line["prompt"], line["id"]) for line in lines] == [(row["prompt"], row["id"]) for row in rows]
    for i, line in enumerate(lines):  # each is what its prompt gets alone
        (alone,) = json_lines(sample(f"--prompt={prompts[i]}", f"--seed={5 + i}", "--json"))
        assert (alone["text"], alone["finish"], alone["tokens"]) == (line["text"], line["finish"], line["tokens"])
    for size in (1, 2, 3):
        again = json_lines(sample(f"--prompts={tmp_path}/p.txt", "--json", "--seed=5", f"--batch_size={size}"))
        assert [line["text"] for line in again] == [line["text"] for line in lines]
    shown = sample(f"--prompts={tmp_path}/p.txt", "--seed=5").stdout
    blocks = [f"--- {tmp_path}/p.txt, line {i}\n{line['prompt']}{line['text']}\n" for i, line in enumerate(lines, 1)]
    assert shown == "".join(blocks)


def test_each_prompt_of_a_file_may_get_several_texts_or_beams(sample, tmp_path):
    (tmp_path / "p.txt").write_text("the quick\na\nfox\n")
    options = [f"--prompts={tmp_path}/p.txt", "--num_samples=2"]
    drawn = json_lines(sample(*options, "--json", "--batch_size=5"))
    assert [line["prompt"] for line in drawn] == ["the quick"] * 2 + ["a"] * 2 + ["fox"] * 2
    assert len({line["text"] for line in drawn}) == 6
    assert f"--- {tmp_path}/p.txt, line 2, text 2\na{drawn[3]['text']}\n" in sample(*options).stdout
    beams = json_lines(sample(*options, "--num_beams=3", "--json"))
    for i, prompt in enumerate(("the quick", "a", "fox")):
        alone = json_lines(sample(f"--prompt={prompt}", "--num_samples=2", "--num_beams=3", "--json"))
        assert [line["tokens"] for line in alone] == [line["tokens"] for line in beams[2 * i : 2 * i + 2]]
    assert f"p.txt, line 3, text 1: score {beams[4]['score']:.4f}, " in sample(*options, "--num_beams=3").stdout


def test_conversations_and_system_messages_of_a_file_reach_the_model(sample, talker, tmp_path):
    talk = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "fox the"},
            {"role": "user", "content": "a dog"}]  # fmt: skip
    own = {"role": "system", "content": "a fox"}
    rows = [{"prompt": "a dog"}, {"messages": talk[2:]}, {"messages": talk}, {"prompt": "a dog", "system": "a fox"},
            {"messages": [own, talk[2]]}]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def answers(*options: str) -> list[tuple]:
        lines = json_lines(sample(f"--prompts={tmp_path}/p.jsonl", "--json", "--temperature=0", *options, run=talker))
        assert [{key: line[key] for key in row} for row, line in zip(rows, lines, strict=True)] == rows
        return [(line["text"], round(line["logprob"], 3)) for line in lines]

    plain, with_system = answers(), answers("--system=lazy")
    assert plain[0] == plain[1] != plain[2] and plain[3] == plain[4] != plain[0]
    assert with_system[0] == with_system[1] != plain[0] and with_system[2] != plain[2]
    assert with_system[3:] == plain[3:]  # the line's own system message stands in the place of the option's
    (alone,) = json_lines(sample("--prompt=a dog", "--system=lazy", "--temperature=0", "--json", run=talker))
    assert (alone["text"], round(alone["logprob"], 3)) == with_system[0]


@pytest.mark.parametrize(
    "run, line, sentence",
    [
        ("trained", '{"messages": [{"role": "user", "content": "a"}]}', "line 2: this is a base model"),
        ("trained", '{"prompt": "Zebra"}', "line 2: character 'Z' (U+005A)"),
        ("talker", '{"prompt": "Zebra"}', "line 2: character 'Z' (U+005A)"),
        ("talker", '{"prompt": ""}', "line 2: this model was fine-tuned to answer"),
        ("talker", '{"messages": [{"role": "assistant", "content": "a"}]}', "p.jsonl, line 2: "),
        ("talker", '{"messages": "a"}', "p.jsonl, line 2: "),
        ("talker", '{"messages": [{"role": "system", "content": "a"}], "system": "b"}', "two system messages"),
        ("talker", '{"prompt"', "line 2: not valid JSON"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_told_before_any_answer(sample, request, tmp_path, run, line, sentence):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog"}\n' + line)
    options = [f"--prompts={tmp_path}/p.jsonl", "--json", "--batch_size=1"]
    done = sample(*options, run=request.getfixturevalue(run))
    assert sentence in error_of(done) and done.stdout == ""


def test_prompts_longer_than_the_context_are_told_once(sample, tmp_path):
    (tmp_path / "p.txt").write_text("the\n" + "the quick brown fox " * 5 + "\n" + "fox " * 20)
    notes = sample(f"--prompts={tmp_path}/p.txt", "--max_new_tokens=2").stderr
    assert notes == (f"note: {tmp_path}/p.txt, line 2: the prompt has 101 tokens, and the model sees 48 at most: "
                     "it does not see the beginning (and 1 more)\n")  # fmt: skip


def test_the_last_line_break_of_a_file_is_no_part_of_a_question(sample, talker, wild, tmp_path):
    for name, ending in {"a": "", "b": "\n", "c": "\r\n"}.items():
        (tmp_path / name).write_bytes(f"a dog{ending}".encode())
    answers = [sample(f"--prompt=FILE:{tmp_path}/{name}", "--json", run=talker).stdout for name in "abc"]
    options = ["--prompt=fox", "--json"]
    systems = [sample(f"--system=FILE:{tmp_path}/{name}", *options, run=talker).stdout for name in "abc"]
    assert len(set(answers)) == len(set(systems)) == 1 and json.loads(answers[0])["prompt"] == "a dog"
    (tmp_path / "wild").write_text("[\n")  # a text goes on where its file ends
    assert json.loads(sample(f"--prompt=FILE:{tmp_path}/wild", "--json", run=wild).stdout)["prompt"] == "[\n"


# ---------------------------------------------------------------------------------------------------------------------
# Terminals, pipes, signals


def test_a_stop_string_may_be_a_line_break(sample, wild):
    (free,) = json_lines(sample("--prompt=[", "--json", run=wild))
    (line,) = json_lines(sample("--prompt=[", "--json", r"--stop=\n", run=wild))
    (tab,) = json_lines(sample("--prompt=[", "--json", r"--stop=\t", run=wild))
    assert "\n" in free["text"] and line["text"] == free["text"].split("\n")[0] and line["finish"] == "stop"
    assert tab["text"] == free["text"].split("\t")[0]


def read_screen(screen: io.FileIO) -> bytes:
    """What a terminal got, piece by piece; nothing once all is read."""
    try:
        return screen.read(4096)
    except OSError:  # Linux's way to say that its other end is closed
        return b""


def test_control_characters_reach_a_pipe_but_not_a_terminal(sample, wild, monkeypatch):
    piped = sample("--prompt=[\x1b", "--num_samples=2", run=wild).stdout
    assert piped.count("\x1b") > 5
    ours, theirs = os.openpty()
    with open(theirs, "w", encoding="utf-8", newline="") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        cli.run_command(sample_module.main)
    with open(ours, "rb", buffering=0) as screen:
        shown = b"".join(iter(partial(read_screen, screen), b"")).decode().replace("\r\n", "\n")
    assert "\x1b" not in shown and shown == piped.replace("\x1b", r"\x1b")


def test_a_terminal_that_lacks_a_character_shows_another(sample, wild, monkeypatch):
    piped = sample("--prompt=[é", run=wild).stdout
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    cli.run_command(sample_module.main)
    assert narrow.buffer.getvalue().decode() == piped.replace("é", "?")


def test_a_reader_that_leaves_ends_the_command_quietly(sample, monkeypatch, capsys):
    sample("--num_samples=2")
    theirs, ours = os.pipe()
    os.close(theirs)
    with open(ours, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            cli.run_command(sample_module.main)
    assert stopped.value.code == 1 and capsys.readouterr().err == ""


class Impatient(io.StringIO):
    """An output whose reader presses Ctrl-C at a certain text."""

    def __init__(self, at: str):
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.at and self.at in text:
            self.at = ""
            os.kill(os.getpid(), signal.SIGINT)
        return written


def test_ctrl_c_keeps_the_answers_that_are_finished(sample, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("the quick\nfox\na\n")
    lines = sample(f"--prompts={tmp_path}/p.txt", "--json", "--batch_size=1").stdout.splitlines()
    output, handler = Impatient('"fox"'), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", output)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run_command(sample_module.main)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert output.getvalue().splitlines() == lines[:2]  # each was printed when its batch was done


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def deleting():
    """Have a folder deleted at the moment at which a file in it is about to be opened, as a training may do it."""
    doomed = []

    def hook(event: str, arguments: tuple) -> None:
        if doomed and event == "open" and str(arguments[0]).startswith(f"{doomed[0]}/"):
            shutil.rmtree(doomed.pop())

    sys.addaudithook(hook)  # it cannot be removed again, but does nothing once the folder is gone
    yield doomed.append
    doomed.clear()


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_looked_for_again(trained, sample, tmp_path, deleting):
    run = shutil.copytree(trained, tmp_path / "run")
    (old,) = run.glob("checkpoints/step_*")
    new = shutil.copytree(old, old.with_name("step_00000099"))
    deleting(old)
    assert sample("--prompt=the", run=run).stdout == sample("--prompt=the").stdout
    assert not old.exists()
    deleting(new)
    assert "no checkpoint in" in error_of(sample("--prompt=the", run=run))


def test_a_fine_tuned_run_with_the_tokenizer_of_another_is_refused(talker, trained, sample, tmp_path):
    run = shutil.copytree(talker, tmp_path / "run")
    shutil.copy(trained / "tokenizer.json", run)
    assert "tokenizer" in error_of(sample("--prompt=the", run=run))


def test_a_model_that_sees_its_future_is_refused(trained, sample, tmp_path):
    run = Run.open(shutil.copytree(trained, tmp_path / "run"))
    replace(run, model_config=replace(run.model_config, causal=False)).save()
    (tmp_path / "text").write_text("the fox")
    for way in ("--prompt=the", "--chat", f"--score={tmp_path}/text"):
        assert "this model (causal=False) sees the tokens" in error_of(sample(way, run=run.folder))
