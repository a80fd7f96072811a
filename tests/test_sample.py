"""Text from tokens as they come, stop strings, what a terminal may see; prompts and their files; options that clash."""

import json

import pytest

import sample
from common.cli import visible
from decoding import beam, stream
from decoding.prompt import read_questions, text_or_file
from decoding.stream import prompt_tokens
from decoding.text import Text, read_stops
from sample import SampleConfig, read_options
from text.tokenizer import CharTokenizer, TiktokenTokenizer


def test_characters_that_take_several_tokens_are_shown_whole(tiny_encoding):
    tokenizer, text = TiktokenTokenizer(tiny_encoding), "Grüße, 世界! 🙂"
    new = Text(tokenizer, [])
    shown = [new.add(token) for token in tokenizer.encode(text)]
    assert "".join(shown) + new.end() == new.text == text
    assert "\ufffd" not in "".join(shown) and sum(map(bool, shown)) > 8  # as it comes, not all at the end


def test_a_character_that_is_never_finished_is_shown_in_the_end(tiny_encoding):
    tokenizer = TiktokenTokenizer(tiny_encoding)
    new = Text(tokenizer, [])
    assert [new.add(token) for token in tokenizer.encode("aü")[:2]] == ["a", ""]
    assert new.end() == "\ufffd" and new.text == "a\ufffd"


@pytest.mark.parametrize(
    "stops, text, expected",
    [
        (["the end"], "this is the end of it", "this is "),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["aab"], "aaab", "a"),  # begins again while it seemed to go on
        (["abab", "c"], "xabaabab", "xaba"),
        (["her", "the"], "in the heron", "in "),  # the first one to appear wins
        (["theatre", "he"], "in theatre", "in t"),  # the first one to be complete does
        (["世界"], "Grüße, 世界!", "Grüße, "),
        (["界"], "世世", "世世"),
        (["t"], "the", ""),
        ([" "], "a 世", "a"),
        (["the end."], "at the end", "at the end"),
        ([], "the end", "the end"),
    ],
)
def test_stop_strings_are_found_across_tokens_and_never_shown_in_part(tiny_encoding, stops, text, expected):
    tokenizer = TiktokenTokenizer(tiny_encoding)
    new, shown = Text(tokenizer, stops), ""
    for token in tokenizer.encode(text):
        shown += new.add(token)
        assert expected.startswith(shown)
        if new.stopped:
            break
    assert new.stopped == any(stop in text for stop in stops)
    assert shown + new.end() == new.text == expected


class BytePairs:
    """A tokenizer whose tokens end within characters."""

    adds_space = False

    def bytes_of(self, token):
        return [b"a", b" \xe4", b"\xb8\x96", b"\x80", b"\xc3", b"\xa9"][token]


def test_a_stop_string_before_half_a_character_is_found_and_wrong_bytes_harm_none_that_follow():
    new = Text(BytePairs(), [" "])
    assert [new.add(token) for token in (0, 1, 2)] == ["a", "", ""] and new.stopped and new.end() == ""
    new = Text(BytePairs(), [" "])
    assert new.add(0) == "a" and new.add(1) == "" and new.end() == "" and new.stopped and new.text == "a"
    new = Text(BytePairs(), [])
    assert "".join(new.add(token) for token in [3] * 9 + [4, 5]) == "\ufffd" * 9 + "é"


def test_a_stop_string_may_hold_escapes_or_be_a_json_list():
    assert read_stops("") == [] and read_stops("Q: [") == ["Q: ["] and read_stops("[end]") == ["[end]"]
    assert read_stops(r"\n") == ["\n"] and read_stops(r"a\tb\r\n") == ["a\tb\r\n"]
    assert read_stops(r"\\n") == [r"\n"] and read_stops(r"\\\n") == ["\\\n"]  # an escaped backslash is one
    assert read_stops(r"\end{x}") == [r"\end{x}"] and read_stops("\\") == ["\\"]  # what is no escape stays
    assert read_stops('["\\n\\n", "Q:"]') == ["\n\n", "Q:"]
    assert SampleConfig(stop=r"\n").stops() == ["\n"]


def test_control_characters_are_spelled_out_but_line_breaks_and_tabs():
    assert visible("a\tb\nGrüße, 世界 🙂") == "a\tb\nGrüße, 世界 🙂"
    assert visible("\x1b[2J\r\x00\x7f\x9b1m") == r"\x1b[2J\r\x00\x7f\x9b1m"


def test_the_searches_are_exported():
    assert (sample.generate, sample.stream) == (stream.generate, stream.stream)
    assert (sample.beam_search, sample.Hypothesis) == (beam.beam_search, beam.Hypothesis)


def test_a_prompt_can_be_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Grüße\r\n".encode())
    (tmp_path / "bytes").write_bytes(b"one\n\xff\xfe\xff")
    assert text_or_file("text: FILE", "the prompt") == "text: FILE"
    assert text_or_file(f"FILE:{tmp_path}/prompt.txt", "the prompt") == "Grüße\r\n"
    for name, reason in {"missing": "No such file", "bytes": r"not UTF-8 text \(line 2\)"}.items():
        with pytest.raises(ValueError, match=f"cannot read the file of the prompt .*{name}: .*{reason}"):
            text_or_file(f"FILE:{tmp_path}/{name}", "the prompt")


def test_what_is_typed_must_be_utf_8_whatever_the_locale():
    latin, utf = ("é".encode(code).decode("ascii", "surrogateescape") for code in ("latin-1", "utf-8"))
    assert text_or_file(utf, "the prompt") == text_or_file("é", "the prompt") == "é"
    with pytest.raises(ValueError, match="the prompt is not UTF-8 text"):
        text_or_file(latin, "the prompt")
    with pytest.raises(ValueError, match="stop is not UTF-8 text"):
        SampleConfig(stop=latin)


def test_a_file_of_prompts_has_one_per_line_or_is_a_list(tmp_path):
    rows = [{"prompt": "é", "id": 7}, {"messages": [{"role": "user", "content": "b"}], "system": "s"}]
    (tmp_path / "a.jsonl").write_text("\ufeff\n" + json.dumps(rows[0]) + "\r\n\n" + json.dumps(rows[1]), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_bytes("é\u2028 b\r\n\n {c\n".encode())
    for name, place in {"a.jsonl": "line {}", "a.json": "item {}"}.items():
        found = read_questions(f"{tmp_path}/{name}")
        assert [question.fields for question in found] == rows
        numbers = (2, 4) if name == "a.jsonl" else (1, 2)
        assert [q.place for q in found] == [f"{tmp_path}/{name}, {place.format(n)}" for n in numbers]
    assert [q.fields for q in read_questions(f"{tmp_path}/a.txt")] == [{"prompt": "é\u2028 b"}, {"prompt": " {c"}]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"', r"a.jsonl, line 2: not valid JSON \(.*column 15\)"),
        ("a.jsonl", '"a"', 'line 1: an object with either "prompt" or "messages" is needed'),
        ("a.jsonl", '{"text": "a"}', 'line 1: an object with either "prompt" or "messages" is needed'),
        ("a.jsonl", '{"prompt": "a", "messages": []}', 'line 1: an object with either "prompt" or "messages"'),
        ("a.jsonl", '\n{"prompt": 3}', 'line 2: "prompt" must be a string'),
        ("a.jsonl", '{"prompt": "a", "system": 3}', 'line 1: "system" must be a string'),
        ("a.jsonl", '{"prompt": "\\ud800"}', 'line 1: "prompt" holds half a surrogate pair'),
        ("a.jsonl", '{"prompt": "a", "tokens": 3}', 'line 1: the answer has a field "tokens" of its own'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a", "weight": 0}]}', "message 0 has the field 'weight"),
        ("a.jsonl", '{"prompt": "a", "n": ' + "1" * 5000 + "}", "line 1: not valid JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": 1}', 'line 2: not valid JSON ."prompt" occurs twice'),
        ("a.jsonl", "\n\n", "a.jsonl holds no prompts"),
        ("a.json", '{"prompt": "a"}', "a .json file must hold a list of prompts"),
        ("a.json", '[{"prompt": "a"},\n 3, }', r"a.json: not valid JSON \(.*line 2, column"),
        ("a.json", '[{"prompt": "a"}, 3]', "a.json, item 2: an object"),
        ("a.csv", "a", "prompts are read from a .jsonl, .json or .txt file"),
    ],
)  # fmt: skip
def test_a_bad_line_of_prompts_is_told_with_file_and_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_questions(f"{tmp_path}/{name}")


def test_a_prompt_begins_a_document_or_a_line():
    assert prompt_tokens(CharTokenizer("ab", eot=True), "ba") == [2, 1, 0]
    assert prompt_tokens(CharTokenizer("ab", eot=True), "") == [2]
    assert prompt_tokens(CharTokenizer("ab\n", eot=False), "") == [0]
    with pytest.raises(ValueError, match="give a --prompt: this tokenizer has neither an end-of-text token nor a line"):
        prompt_tokens(CharTokenizer("ab", eot=False), "")
    with pytest.raises(ValueError, match="character 'c'"):
        prompt_tokens(CharTokenizer("ab", eot=False), "abc")


@pytest.mark.parametrize(
    "option", [{"max_new_tokens": 0}, {"num_samples": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0},
               {"top_p": 1.1}, {"seed": -1}, {"temperature": float("nan")}, {"min_p": -0.1}, {"min_p": 1.5},
               {"repetition_penalty": 0.0}, {"length_penalty": 11.0}, {"num_beams": 0},
               {"batch_size": 0}, {"num_samples": 5000}, {"stop": '["a", ""]'}, {"stop": "[1]"}], ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be "):
        SampleConfig(**option)


def test_a_choice_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="quantize must be one of none, int8, not 'int4'"):
        read_options(["--quantize=int4"])


@pytest.mark.parametrize(
    "options, sentence",
    [
        *[(f"--num_beams=4 --{option}", f"--{option.split('=')[0]} has no effect with --num_beams above 1")
          for option in ("temperature=0.8", "temperature=0", "top_k=0", "top_p=1", "min_p=0", "repetition_penalty=1",
                         "seed=1337", "stop=x")],
        ("--length_penalty=1", "--length_penalty has no effect with --num_beams=1"),
        ("--length_penalty=1 --num_beams=1", "--length_penalty has no effect with --num_beams=1"),
        ("--num_beams=4 --num_samples=5", "num_samples=5 texts cannot come from num_beams=4"),
        *[(f"--chat --{option}", f"--{option.split('=')[0]} has no effect with --chat")
          for option in ("json", "score=file", "prompt=x", "prompts=x.txt", "num_samples=2", "num_beams=4",
                         "batch_size=16", "length_penalty=1")],
        *[(f"--score=file --{option}", f"--{option.split('=')[0]} has no effect with --score")
          for option in ("prompt=x", "prompts=x.txt", "max_new_tokens=500", "temperature=0.8", "stop=x", "seed=1",
                         "system=x", "num_samples=2", "num_beams=2", "batch_size=2", "top_p=1.0")],
        ("--prompt=x --prompts=x.txt", "--prompt and --prompts were both given"),
        ("--prompt=x --batch_size=16", "--batch_size has no effect without --prompts"),
        ("--temperature=0 --num_samples=2", "num_samples=2 texts would all be the same"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_options(options.split())


@pytest.mark.parametrize(
    "options",
    ["--chat --json=False --num_beams=1 --stop= --system=x --top_k=3", "--score=file --chat=False --json",
     "--num_beams=3 --num_samples=3 --length_penalty=0 --prompts=x.txt --batch_size=2 --json", "--temperature=0",
     "--num_samples=2 --stop=x --top_p=0.5 --min_p=0.1 --seed=3 --system=x --num_beams=1"],
)  # fmt: skip
def test_options_that_go_together_are_taken(options, capsys):
    read_options(options.split())
    assert capsys.readouterr().err == ""


def test_greedy_search_says_which_options_cannot_change_the_text(capsys):
    assert read_options(["--temperature=0", "--top_p=0.5", "--seed=1337"]).temperature == 0
    read_options(["--chat", "--temperature=0", "--seed=1337", "--top_p=0.5"])
    told = "note: temperature=0 always takes the most likely token: seed, top_p cannot change the text\n"
    assert capsys.readouterr().err == 2 * told


def test_a_config_file_of_options_counts_as_given(tmp_path):
    (tmp_path / "mine.py").write_text("num_beams = 2\ntemperature = 0.8\n")
    with pytest.raises(ValueError, match="--temperature has no effect with --num_beams above 1"):
        read_options([str(tmp_path / "mine.py")])
