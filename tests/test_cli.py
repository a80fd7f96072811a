"""Whole command lines: what a user types, what comes out, and how mistakes are told."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import sample as sample_module
from common import cli

ROOT = Path(__file__).parent.parent


def run(*command: object, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment, **options
    )


@pytest.fixture(scope="module")
def trained(corpus_folder, tmp_path_factory):
    """The folder of a small run, made by the real command."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.py").write_text("n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\nmax_iters = 30\n")
    done = run("train.py", folder / "small.py", f"--dataset={corpus_folder}", f"--out_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake must end with."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def sample(trained, capsys, monkeypatch):
    """sample.py's command in this process, as its last lines run it (a new process each would take a minute)."""

    def command(*options: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", "--max_new_tokens=40", *options])
        code = 0
        try:
            cli.run(sample_module.main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return command


def test_sampling_continues_the_prompt_and_repeats_itself_by_seed(sample):
    first, again, other = (sample("--prompt=the quick", f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick") and first.stdout == again.stdout != other.stdout


def test_several_samples_are_those_of_the_seeds_that_follow(sample):
    both = sample("--num_samples=2", "--seed=5").stdout.split("\n" + "-" * 20 + "\n")
    alone = [sample(f"--seed={seed}").stdout for seed in (5, 6)]
    assert [text.strip() for text in both] == [text.strip() for text in alone]


def test_the_command_prints_what_it_samples(trained, sample):
    options = ["--prompt=the", "--seed=3"]
    done = run("sample.py", f"--out_dir={trained}", "--max_new_tokens=40", *options)
    assert done.returncode == 0 and done.stdout == sample(*options).stdout
    assert "no run in" in error_of(run("sample.py", "--out_dir=nowhere"))


def test_a_vocabulary_goes_from_text_to_samples(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"the cat number {i} sat on the mat, naïvely\n" for i in range(500)))
    vocabulary, corpus, out = tmp_path / "a.bpe", tmp_path / "corpus", tmp_path / "run"
    sizes = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--max_iters=2"]
    for command in (
        ["bpe.py", "train", "--input", tmp_path / "a.txt", "--vocab_size", "300", "--output", vocabulary],
        ["data/text/prepare.py", "--input", tmp_path / "a.txt", "--output", corpus, "--tokenizer", vocabulary],
        ["train.py", f"--dataset={corpus}", f"--out_dir={out}", *sizes],
        ["sample.py", f"--out_dir={out}", "--prompt=the cat", "--max_new_tokens=20"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    assert (out / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes() == vocabulary.read_bytes()


def test_greedy_needs_no_seed(sample):
    assert len({sample("--temperature=0", f"--seed={seed}").stdout for seed in (1, 2)}) == 1


def test_a_prompt_can_be_a_file(sample, tmp_path):
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    assert sample(f"--prompt=FILE:{tmp_path / 'prompt.txt'}").stdout.startswith("the lazy dog")


def test_text_and_prompt_may_be_longer_than_the_context(sample):
    done = sample("--prompt=" + "the quick brown fox " * 5, "--max_new_tokens=200")
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "note: the prompt has 101 tokens, and the model sees 16 at most: the beginning is not seen\n"
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
    assert lines[0]["score"] >= greedy["logprob"] / len(greedy["tokens"])
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
    assert score["text"]["bits_per_byte"] < 4.5 < score["noise"]["bits_per_byte"]
    shown = sample(f"--score={tmp_path / 'text'}", "--quantize=int8").stdout
    assert "56 tokens, 56 bytes" in shown and f"bits per byte {score['text']['bits_per_byte']:.4f}" in shown
    assert re.search(r"int8: \d\.\d{4} \([+-]0\.0", shown)


def test_generating_in_bytes_is_nearly_generating_in_floats(sample):
    options = ["--prompt=the quick", "--temperature=0", "--max_new_tokens=10", "--json"]
    plain, rounded = (json.loads(sample(*options, *more).stdout) for more in ([], ["--quantize=int8"]))
    assert plain["logprobs"] != rounded["logprobs"] == pytest.approx(plain["logprobs"], abs=0.2)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--prompt=Zebra"], "'Z' (U+005A) at position 0"), (["--prompt=FILE:none"], "cannot read the prompt file none"),
     (["--temperature=-1"], "temperature must be at least 0"), (["--top_p=0"], "top_p must be above 0"),
     (["--max_new_tokens=0"], "max_new_tokens must be at least 1"), (["--checkpoint=x"], "choose best, latest or"),
     (["--tempreature=1"], "did you mean temperature?"), (["--seed=x"], "seed must be of type int"),
     (["--num_beams=2", "--num_samples=3"], "cannot come from"),
     (["--json=1"], "json must be of type bool"), (["--seed"], "--seed: options are written --key=value, as in"),
     (["--seed", "1"], "options are written --key=value, as in --seed=1"),
     (["--score=none"], "cannot read the text none"),
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


def test_a_mistake_in_training_is_one_clear_line(corpus_folder, tmp_path):
    done = run("train.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'x'}", "--n_embd=130", "--n_head=4")
    assert "n_embd (130) must be a multiple of n_head (4)" in error_of(done)
    assert "did you mean learning_rate?" in error_of(run("train.py", "--lerning_rate=1"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_lists_the_keys(script):
    done = run(script, "--help")
    assert done.returncode == 0 and "--out_dir=out/pydocs" in done.stdout and "--seed=1337" in done.stdout


def test_a_run_moves_aside_for_a_new_one_of_its_name(trained, corpus_folder, tmp_path):
    (tmp_path / "c.py").write_text("n_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 8\nmax_iters = 1\n")
    command = ["train.py", tmp_path / "c.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'r'}"]
    assert run(*command).returncode == 0
    assert f"{tmp_path / 'r'} held a run already: it is now {tmp_path / 'r.1'}" in run(*command).stdout
    assert (tmp_path / "r.1" / "config.json").exists() and (tmp_path / "r" / "config.json").exists()


def test_training_needs_no_wandb(corpus_folder, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('not here')")
    (tmp_path / "c.py").write_text("n_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 8\nmax_iters = 1\n")
    command = ["train.py", tmp_path / "c.py", f"--dataset={corpus_folder}", f"--out_dir={tmp_path / 'r'}"]
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    assert run(*command, env=environment).returncode == 0
    assert "wandb_log=True needs the package wandb" in error_of(run(*command, "--wandb_log=True", env=environment))
