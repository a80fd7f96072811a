"""sample.py --chat: what is said, remembered, forgotten and saved."""

import io
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.helpers import json_lines
from text.conversations import read_conversations

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.sample_runs",)


def test_a_chat_remembers_resets_saves_and_says_what_it_cannot_do(sample, tmp_path, monkeypatch):
    said = ["the quick", " fox", f"/save {tmp_path / 'a'}", "/reset", "a dog", f"/save {tmp_path / 'b'}",
            f"/save {tmp_path / 'b'}", "/save", "Ünknown", "", "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said)))
    done = sample("--chat", "--max_new_tokens=12")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / name).read_text() for name in "ab")
    assert first.startswith("the quick") and " fox" in first[21:] and second.startswith("a dog")
    alone = sample("--prompt=the quick", "--max_new_tokens=12").stdout  # the same seed, the same answer
    assert first.startswith(alone.removesuffix("\n"))
    assert "cannot write" in done.stderr and "it is there already" in done.stderr and "'Ü' (U+00DC)" in done.stderr


def test_ctrl_c_in_a_chat_stops_the_answer_only(trained, tmp_path):
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "sample.py", f"--out_dir={trained}", "--chat", "--max_new_tokens=1000000"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, preexec_fn=heeding, **pipes) as process:
        process.stdin.write("the quick\n")
        seen = process.stdout.read(20)  # the answer has begun
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(f"/save {tmp_path / 'said'}\n", timeout=60)
    assert process.returncode == 0, errors
    answer = (seen + rest).split("> ")[1].removesuffix("\n")
    assert (tmp_path / "said").read_text() == "the quick" + answer + "\n" and len(answer) > 15


def test_a_line_that_is_not_utf_8_is_told_in_a_chat(sample):
    latin = "caf\udce9"  # as it arrives from a terminal in Latin-1
    done = sample("--chat", typed=[latin, "the", "/quit"])
    assert done.returncode == 0 and "error: this line is not UTF-8 text" in done.stderr
    assert len(done.stdout) > 10  # and the chat goes on


def test_a_chat_with_a_system_message_is_the_conversation_that_it_saves(sample, talker, tmp_path):
    said = ["the fox", f"/save {tmp_path}/a.json", "/system a dog", "a dog", f"/save {tmp_path}/b.jsonl", "/reset",
            "a dog", "/system", f"/save {tmp_path}/c.JSON", "/quit"]  # fmt: skip
    options = ["--temperature=0", "--max_new_tokens=8"]
    done = sample("--chat", "--system=fox", *options, run=talker, typed=said)
    assert done.returncode == 0, done.stderr
    a, b, c = ([*read_conversations(tmp_path / name)][0] for name in ("a.json", "b.jsonl", "c.JSON"))
    assert [m["role"] for m in b] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in (a[0], b[0], b[1], b[3])] == ["fox", "a dog", "the fox", "a dog"]
    assert isinstance(json.loads((tmp_path / "a.json").read_text()), list) and len(c) == 2
    questions = [a[:2], b[:4], [b[0], c[0]]]  # what the model had before it at each answer
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in questions))
    answers = json_lines(sample(f"--prompts={tmp_path}/p.jsonl", "--json", *options, run=talker))
    assert [line["text"] for line in answers] == [a[2]["content"], b[4]["content"], c[1]["content"]]
    shown = [line["text"] + "\n" + "> " * n for line, n in zip(answers, (3, 3, 3), strict=True)]
    assert done.stdout == "> " + "".join(shown)
    assert "the system message is set" in done.stderr and "there is no system message now" in done.stderr


def test_a_message_may_begin_with_a_slash_and_commands_are_told(sample, wild, tmp_path):
    said = ["/help", "/hlep", "/reset all of it", "/save", f"/save {tmp_path}/nothing", "/system x", "//[é",
            f"/save {tmp_path}/said", "/quit"]  # fmt: skip
    done = sample("--chat", "--max_new_tokens=3", run=wild, typed=said)
    assert "/save FILE" in done.stderr and "there is no command /hlep" in done.stderr
    assert "/reset stands alone" in done.stderr and "give the name of a file" in done.stderr
    assert "nothing was said yet" in done.stderr and "which knows no system message" in done.stderr
    assert not (tmp_path / "nothing").exists() and (tmp_path / "said").read_text().startswith("/[é")


def test_the_text_of_a_base_model_is_saved_as_text_or_as_json(sample, tmp_path):
    said = ["the quick", *(f"/save {tmp_path}/{name}" for name in ("a.txt", "a.json", "a.jsonl")), "/quit"]
    assert sample("--chat", "--max_new_tokens=12", typed=said).returncode == 0
    text = (tmp_path / "a.txt").read_text().removesuffix("\n")
    assert text.startswith("the quick") and len(text) > 9
    assert json.loads((tmp_path / "a.json").read_text()) == [{"text": text}]
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": text}


def test_turns_that_are_forgotten_are_told_and_the_others_stay(sample, talker, tmp_path):
    said = ["the fox and", "a dog", "over", f"/save {tmp_path}/all.json", "/quit"]
    options = ["--temperature=0", "--max_new_tokens=5"]
    done = sample("--chat", *options, run=talker, typed=said)
    assert "note: the model sees 48 tokens at most: the first turn is forgotten" in done.stderr
    ((*messages, answer),) = read_conversations(tmp_path / "all.json")
    assert len(messages) == 5  # what is forgotten is saved all the same
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages[2:]}))
    (line,) = json_lines(sample(f"--prompts={tmp_path}/p.jsonl", "--json", *options, run=talker))
    assert answer["content"] == line["text"]


def test_a_message_that_does_not_fit_and_an_answer_that_outgrows_the_context_are_told(sample, talker):
    long, fits = "the fox " * 8, "the fox " * 4
    noted = sample("--chat", run=talker, typed=[long]).stderr
    assert "this message does not fit: the model reads 68 tokens for it, and sees 48 at most" in noted
    noted = sample("--chat", "--temperature=3", "--seed=3", run=talker, typed=[fits]).stderr
    assert "does not fit" not in noted and "the answer's end was written without the beginning in sight" in noted
    noted = sample("--chat", "--max_new_tokens=30", typed=["the quick brown fox", "jumps", "over"]).stderr
    assert noted.count("from now on it does not see the beginning") == 1


def test_a_question_without_an_answer_is_told_and_not_kept(sample, talker, tmp_path):
    stops = json.dumps([*"abcdefghijklmnopqrstuvwxyz. <"])
    done = sample("--chat", f"--stop={stops}", run=talker, typed=["the fox", f"/save {tmp_path}/a.json"])
    assert "there was no answer, so this message is not remembered" in done.stderr
    assert "nothing was said yet" in done.stderr and not (tmp_path / "a.json").exists()
