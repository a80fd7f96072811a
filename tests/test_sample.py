"""sample.py's parts: text from tokens as they come, stop strings, prompts, impossible settings."""

import pytest

from sample import SampleConfig, Text, prompt_tokens, read_prompt
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

    def bytes_of(self, token):
        return [b"a", b" \xe4", b"\xb8\x96", b"\x80", b"\xc3", b"\xa9"][token]


def test_a_stop_string_before_half_a_character_is_found_and_wrong_bytes_harm_none_that_follow():
    new = Text(BytePairs(), [" "])
    assert [new.add(token) for token in (0, 1, 2)] == ["a", "", ""] and new.stopped and new.end() == ""
    new = Text(BytePairs(), [" "])
    assert new.add(0) == "a" and new.add(1) == "" and new.end() == "" and new.stopped and new.text == "a"
    new = Text(BytePairs(), [])
    assert "".join(new.add(token) for token in [3] * 9 + [4, 5]) == "\ufffd" * 9 + "é"


def test_a_prompt_can_be_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Grüße\r\n".encode())
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    assert read_prompt("text: FILE") == "text: FILE"
    assert read_prompt(f"FILE:{tmp_path}/prompt.txt") == "Grüße\r\n"
    for name, reason in {"missing": "No such file", "bytes": "not UTF-8"}.items():
        with pytest.raises(ValueError, match=f"cannot read the prompt file .*{name}: .*{reason}"):
            read_prompt(f"FILE:{tmp_path}/{name}")


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
               {"repetition_penalty": 0.0}, {"length_penalty": 11.0}, {"num_beams": 0}, {"quantize": "int4"},
               {"stop": '["a", ""]'}, {"stop": "[1]"}], ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be "):
        SampleConfig(**option)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_beams": 4, "top_k": 3}, "top_k is for drawing tokens one by one"),
        ({"num_beams": 4, "repetition_penalty": 1.1}, "repetition_penalty is for drawing tokens one by one"),
        ({"num_beams": 4, "stop": "x"}, "stop is for drawing tokens one by one"),
        ({"num_beams": 4, "num_samples": 5}, "num_samples=5 texts cannot come from num_beams=4"),
        ({"num_beams": 4, "chat": True}, "--chat shows tokens as they come"),
        ({"chat": True, "json": True}, "--chat goes with none of --json, --score, --prompt"),
        ({"chat": True, "score": "file"}, "--chat goes with none of"),
        ({"chat": True, "num_samples": 2}, "--chat goes with none of"),
        ({"score": "file", "prompt": "x"}, "--score measures a text"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleConfig(**options)


def test_stop_is_one_string_or_a_json_list_of_them():
    assert SampleConfig(stop="Q: [").stops() == ["Q: ["] and SampleConfig().stops() == []
    assert SampleConfig(stop='["\\n\\n", "Q:"]').stops() == ["\n\n", "Q:"]
    assert SampleConfig(stop="[end]").stops() == ["[end]"]
