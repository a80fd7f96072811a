"""The command lines of bpe.py and of formats/tokenizer_json.py."""

import io
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

import bpe
from bpe import BPE, EOT, train
from common import cli, textfile
from formats import tokenizer_json
from tests.bpe_helpers import FIXTURES, PROSE, ROOT, same
from text.chunks import PATTERNS, count_chunks, splitter
from text.merges import learn_merges
from text.tokenizer import CharTokenizer


def run(*command: object, input: bytes = b"") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, input=input, env=environment
    )


@pytest.fixture
def command(capfdbinary, monkeypatch):
    """bpe.py's command in this process, as its last lines run it."""

    def call(*options: object, input: bytes = b"") -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["bpe.py", *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
        code = 0
        try:
            cli.run_command(bpe.main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capfdbinary.readouterr())

    return call


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, done.stderr
    assert not done.stdout
    return done.stderr.decode()


def test_the_command_trains_encodes_and_decodes(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    done = run("bpe.py", "train", "--input", tmp_path / "a.txt", "--vocab_size", "500", "--output", tmp_path / "a.bpe")
    assert done.returncode == 0 and not done.stderr and b"a.bpe: 500 ids" in done.stdout
    assert same(BPE.load(tmp_path / "a.bpe"), train([PROSE], 500))
    text = "naïve café, 世界 <|endoftext|>\r\n  def f(): pass\n"
    ids = run("bpe.py", "encode", tmp_path / "a.bpe", input=text.encode())
    assert list(map(int, ids.stdout.split())) == BPE.load(tmp_path / "a.bpe").encode(text)
    assert run("bpe.py", "decode", tmp_path / "a.bpe", input=ids.stdout).stdout == text.encode()
    wrong = run("bpe.py", "decode", tmp_path / "a.bpe", input=b"500")
    assert "500 is no token id of this vocabulary of 500" in refused(wrong)


def test_several_files_and_standard_input_are_read(command, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE[:5000])
    options = ["--vocab_size", 400, "--pattern", "digits", "--max_token_length", 4]
    done = command(
        "train", "--input", tmp_path / "a.txt", "-", "--output", tmp_path / "a.bpe", *options, input=PROSE.encode()
    )
    assert done.returncode == 0
    expected = train([PROSE[:5000], PROSE], 400, "digits", max_token_length=4)
    assert same(BPE.load(tmp_path / "a.bpe"), expected)
    (tmp_path / "ids").write_text("104 105 255")
    assert command("decode", tmp_path / "a.bpe", "--input", tmp_path / "ids").stdout == b"hi\xff"


@pytest.mark.parametrize("block", [1, 3, 10, 1000])
def test_files_are_read_in_blocks_that_lose_nothing(block, tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "TASK", block)
    monkeypatch.setattr(textfile, "BLOCK", block)
    for text in filter(None, FIXTURES.values()):
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert "".join(bpe.read_texts([str(tmp_path / "a.txt")])) == text
        for pattern in PATTERNS:
            blocks = bpe.read_texts([str(tmp_path / "a.txt")])
            assert count_chunks(blocks, pattern, workers=1) == Counter(splitter(pattern)(text))


def test_explain_prints_the_textbook_example(command):
    words = b"low low low low low lower lower newest newest newest newest newest newest widest widest widest"
    done = command("train", "--explain", "--input", "-", "--vocab_size", "262", input=words)
    lines = done.stdout.decode().splitlines()
    assert (
        done.returncode == 0 and len(lines) == 7 and lines[0].startswith("words: l o w x1, ␣ l o w x4, ␣ l o w e r x2")
    )
    # `we` and `es` and `st` occur 8, 9 and 9 times: of the last two, e < s decides, then s < t
    assert lines[1] == "256: 'e' + 's', 9 times → 'es'    ␣ n e w es t x6, ␣ w i d es t x3"
    assert lines[2] == "257: 'es' + 't', 9 times → 'est'    ␣ n e w est x6, ␣ w i d est x3"
    merges = learn_merges({c.encode(): n for c, n in count_chunks([words.decode()], "gpt4").items()}, 6)
    assert [re.search(r", (\d+) times", line)[1] for line in lines[1:]] == [str(count) for *_, count in merges]


def test_explain_shows_whole_characters_and_the_words_as_they_end_up(command):
    text = "从前 从前 前"
    done = command("train", "--explain", "--input", "-", "--vocab_size", "300", input=text.encode())
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "中₁ 中₂ 中₃ are the bytes of 中" and "\\x" not in done.stdout.decode()
    assert lines[1] == "words: 从₁ 从₂ 从₃ 前₁ 前₂ 前₃ x1, ␣ 从₁ 从₂ 从₃ 前₁ 前₂ 前₃ x1, ␣ 前₁ 前₂ 前₃ x1"
    assert lines[2].startswith("256: '前₂' + '前₃', 3 times → '前₂₃'    从₁ 从₂ 从₃ 前₁ 前₂₃ x1, ␣ 从₁")
    assert lines[-1].endswith("→ '␣从前'    ␣从前 x1")
    many = " ".join(f"{a}{b}" for a in "abcdef" for b in "ghijkl").encode()
    done = command("train", "--explain", "--input", "-", "--vocab_size", "257", input=many)
    assert done.stdout.decode().splitlines()[0].endswith(", and 16 more")


def test_info_shows_what_is_in_a_vocabulary(command, tmp_path, monkeypatch):
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there: no download
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    vocabulary = train([PROSE], 500, "gpt2")
    vocabulary.save(tmp_path / "a.bpe")
    (tmp_path / "a.txt").write_text(PROSE)
    done = command("info", tmp_path / "a.bpe", "--input", tmp_path / "a.txt")
    shown = done.stdout.decode()
    assert done.returncode == 0 and "500 ids: 256 bytes, 239 merges, 5 special tokens" in shown
    size = len(PROSE.encode())
    assert f"{size:,} bytes: {size / len(vocabulary.encode(PROSE)):.3f}, gpt2 is not here" in shown
    first = next(iter(list(vocabulary.ranks)[256:]))
    assert f"first merges: {bpe.shown(first)}" in shown and EOT in shown and "pattern gpt2" in shown
    assert f"end of a document: {EOT}" in shown
    assert "bytes per token" not in command("info", tmp_path / "a.bpe").stdout.decode()


def test_a_mistake_is_one_clear_line(command, tmp_path):
    vocabulary, text, bad = tmp_path / "a.bpe", tmp_path / "a.txt", tmp_path / "bad"
    train(["a b"], 261).save(vocabulary)
    text.write_text("some text, some text")
    (tmp_path / "empty").mkdir()
    bad.write_bytes(b"ab\xff\xfe\x00{")
    output = ("--output", tmp_path / "x.bpe")
    for options, message in (
        (("train", "--input", tmp_path / "none", *output), "cannot read"),
        (("train", "--input", tmp_path / "empty", *output), "no file in this folder can be read"),
        (("train", "--input", bad, *output), "bad, line 1: not UTF-8"),
        (("train", "--input", "-", *output), "no text to learn from"),
        (("train", "--input", text), "--output is missing"),
        (("train", "--input", text, "--explain", *output), "leave --output out"),
        (("train", "--input", text, "--explain", "--vocab_size", 256), "vocab_size=256 is too small"),
        (("train", "--input", text, *output, "--pattern", "gpt5"), "There are gpt2, gpt4, digits"),
        (("train", "--input", text, *output, "--pattern", r"\d*"), "matches the empty string"),
        (("train", "--input", text, "--output", tmp_path / "none" / "x.bpe"), "is no folder"),
        (("train", "--input", text, "--output", tmp_path), "is a folder"),
        (("train", "--input", text, *output, "--vocab_size", 100), "too small"),
        (("train", "--input", text, *output, "--pattern", "(a"), "neither one of"),
        (("train", "--input", text, *output, "--max_token_length", 0), "at least 1"),
        (("encode", tmp_path / "none"), "cannot read"),
        (("encode", bad), "bad is damaged"),
        (("encode", text), "a.txt is damaged"),
        (("encode", vocabulary, "--input", bad), "not UTF-8"),
        (("decode", vocabulary, "--input", text), "'some' is no token id"),
        (("decode", vocabulary, "--input", bad), "not UTF-8"),
        (("info", bad), "bad is damaged"),
        (("info", vocabulary, "--input", tmp_path / "none"), "cannot read"),
    ):
        assert message in refused(command(*options)), options
    for numbers in (b"-1", b"1e3", b"9" * 5000, "²".encode(), b"999"):
        assert "is no token id" in refused(command("decode", vocabulary, input=numbers))
    assert sorted(os.listdir(tmp_path)) == ["a.bpe", "a.txt", "bad", "empty"]


def test_the_tokenizer_json_command(vocabularies, tmp_path, monkeypatch):
    vocabularies["gpt4"].save(tmp_path / "a.bpe")
    for kind, source, target in (("export", "a.bpe", "t.json"), ("import", "t.json", "b.bpe")):
        done = run("-m", "formats.tokenizer_json", kind, tmp_path / source, tmp_path / target)
        assert done.returncode == 0, done.stderr
    assert same(BPE.load(tmp_path / "b.bpe"), vocabularies["gpt4"])
    CharTokenizer("ab", eot=True).save(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "export", str(tmp_path), str(tmp_path / "t.json")])
    with pytest.raises(ValueError, match="holds a char tokenizer, which has no merges"):
        tokenizer_json.main()
    monkeypatch.setattr(sys, "argv", ["x", "import", str(tmp_path / "none"), str(tmp_path / "x.bpe")])
    with pytest.raises(ValueError, match="cannot read"):
        tokenizer_json.main()
