"""bench/: the benchmarks that need a GPU, end to end through their command lines, at a tiny size on a CPU."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import attention_memory, decode, gpu, gpu_train, kernels

ROOT = Path(__file__).parent.parent

# What the benchmarks ask of a clone of nanoGPT: its model, and its two commands. The network is a smaller one.
NANOGPT_MODEL = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        print("number of parameters: few")

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        return 1e6 * fwdbwd_per_iter / dt / 312e12  # as if a row took a million operations

    def generate(self, idx, new, top_k=None):
        for _ in range(new):
            idx = torch.cat((idx, self(idx)[0][:, -1:].argmax(-1)), dim=1)
        return idx
"""
NANOGPT_TRAIN = """
import torch, sys, os
from model import GPT, GPTConfig
assert sys.argv[1] == "config/train_shakespeare_char.py" and "--device=cpu" in sys.argv
arguments = dict(n_layer=1, n_head=1, n_embd=8, vocab_size=len(set(open("data/shakespeare_char/input.txt").read())))
os.mkdir("out-shakespeare-char")
weights = {"_orig_mod." + name: weight for name, weight in GPT(GPTConfig(**arguments)).state_dict().items()}
torch.save({"model": weights, "model_args": arguments}, "out-shakespeare-char/ckpt.pt")
print("step 2: train loss 9.0000, val loss 9.0000")
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clones") / "nano"
    (folder / "data/shakespeare_char").mkdir(parents=True)
    (folder / "data/shakespeare_char/prepare.py").write_text("open('data/shakespeare_char/input.txt')")
    (folder / "model.py").write_text(NANOGPT_MODEL)
    (folder / "train.py").write_text(NANOGPT_TRAIN)
    return folder


@pytest.fixture
def table(monkeypatch, capsys):
    """Run a benchmark with these arguments: the rows of its tables, each a list of cells."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()
        return rows_of(capsys.readouterr().out)

    return run


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def number(cell: str) -> float:
    return float(re.sub("[,x%]", "", cell))


TRAIN = ["--device=cpu", "--shapes=tiny", "--no-compile"]


# ---------------------------------------------------------------------------------------------------------------------
# Each benchmark


def test_training_is_measured_beside_nanogpt(table, clone):
    header, _, peer, alike, modern = table(gpu_train, *TRAIN, f"--nanogpt={clone}")
    assert [row[0] for row in (peer, alike, modern)] == [
        "tiny, nanoGPT", "tiny, ours, nanoGPT's architecture", "tiny, ours, modern"
    ]  # fmt: skip
    for row in (peer, alike, modern):
        cells = dict(zip(header, row, strict=True))
        assert number(cells["ms per step"]) == pytest.approx(1000 * 128 / number(cells["tokens/s"]), rel=0.02, abs=0.1)
        assert number(cells["against nanoGPT"]) == pytest.approx(
            number(cells["tokens/s"]) / number(peer[2]), abs=0.0051
        )
        assert 0 <= number(cells["MFU, measured peak"]) <= 100 and number(cells["GiB"]) > 0
        assert number(cells["loss"]) == pytest.approx(math.log(96), abs=0.8)  # of random tokens
    assert number(alike[1]) > number(peer[1])


def test_without_a_clone_or_without_time_the_rows_of_training_say_so(table):
    peer, alike, modern = table(gpu_train, *TRAIN, "--seconds=0")[2:]
    assert peer[1] == "left out: no --nanogpt"
    assert alike[1].startswith("left out: ") and modern[1].endswith("of 0 s are over")


def test_a_shape_too_large_for_the_memory_is_a_row_that_says_so(table, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_train, "our_engine", refuse)
    assert [row[1] for row in table(gpu_train, *TRAIN)[3:]] == ["out of memory, with 2 x 32 tokens"] * 2


def test_both_train_on_the_same_random_tokens_each_of_which_is_the_target_of_the_one_before():
    shape = gpu_train.SHAPES["tiny"]
    one, again, other = (gpu_train.synthetic(shape, step, slice(2, 4)) for step in (3, 3, 4))
    assert torch.equal(one["idx"], again["idx"]) and not torch.equal(one["idx"], other["idx"])
    assert one["idx"].shape == (2, 32) and torch.equal(one["idx"][:, 1:], one["targets"][:, :-1])


def test_a_step_of_the_benchmark_is_a_step_of_train_py_and_changes_the_weights(monkeypatch):
    trainers = []
    monkeypatch.setattr(
        gpu_train, "Trainer", lambda *args, real=gpu_train.Trainer: trainers.append(real(*args)) or trainers[0]
    )
    engine = gpu_train.our_engine(gpu_train.OURS["ours, modern"], gpu_train.SHAPES["tiny"], "cpu", compiled=False)
    before = {name: weight.clone() for name, weight in trainers[0].model.state_dict().items()}
    losses = [engine.step(i).item() for i in range(3)]
    assert len(set(losses)) == 3
    matrices = {name for name, weight in trainers[0].model.named_parameters() if weight.dim() == 2}
    after = trainers[0].model.state_dict()
    assert matrices and not [name for name in matrices if torch.equal(before[name], after[name])]
    engine.close()


@pytest.mark.parametrize("module, option", [(gpu_train, "--shapes"), (gpu, "--parts")], ids=["shapes", "parts"])
def test_unknown_names_are_refused_in_one_line(module, option, table):
    with pytest.raises(ValueError, match=f"{option} takes .*, not 7b"):
        table(module, f"{option}=7b")


def test_a_folder_that_is_no_clone_of_nanogpt_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match="is not a clone of nanoGPT: it has no model.py"):
        table(gpu_train, *TRAIN, f"--nanogpt={tmp_path}")


@pytest.mark.parametrize("batch", attention_memory.BATCHES)
def test_the_measurement_of_attentions_memory_runs_and_both_kernels_agree_there(table, batch):
    header, _, *rows = table(attention_memory, "--lengths=32,64", f"--batches={batch}", "--one_process")
    assert [row[:2] for row in rows] == [[batch, "32"], [batch, "64"]]
    assert all(float(row[-1]) < 1e-5 for row in rows), rows


@pytest.mark.skipif(torch.version.cuda is not None, reason="compiles kernels for minutes")
def test_compiling_kernels_for_gpus_needs_a_pytorch_for_cuda(table, capsys):
    with pytest.raises(SystemExit):
        table(kernels)
    assert "this PyTorch is built without CUDA" in capsys.readouterr().err


def test_decoding_is_measured_beside_transformers_and_nanogpt(table, clone):
    header, _, *rows = table(decode, "--shape=tiny", "--new=2", "--repeat=1", f"--nanogpt={clone}")
    labels = ["greedy, batch 1", "greedy, batch 1: int8", "greedy, batch 1: nanoGPT", "4 beams, batch 1"]
    assert [row[0] for row in rows] == [*labels, "greedy, batch 16"]
    assert rows[0][5].endswith("%)") and number(rows[0][6]) == 100  # of the limit; the same tokens


# ---------------------------------------------------------------------------------------------------------------------
# All of them in one command


def test_one_command_measures_its_parts_and_writes_them_above_the_older_results(clone, tmp_path, table):
    results, text = tmp_path / "RESULTS.md", tmp_path / "text.txt"
    results.write_text("# Results\n\nThe newest first.\n\n## 2026-01-01 · older\n\nkept\n")
    text.write_text("to be or not to be\n" * 200)
    options = ["--tiny", "--device=cpu", f"--nanogpt={clone}", f"--input={text}", f"--results={results}"]
    table(gpu, *options, "--parts=loss")
    intro, new, old = results.read_text().split("\n## ")
    assert intro == "# Results\n\nThe newest first.\n" and old == "2026-01-01 · older\n\nkept\n"
    assert "`make gpu`, Python " in new and "torch " in new and str(tmp_path) not in new
    assert "`python bench/time_to_loss.py --tiny --short --input=text.txt --nanogpt=nano`" in new
    _, _, peer, *ours = rows_of(new)
    assert peer[0] == "nanoGPT" and peer[4] == "1.00x" and ours[0][0] == "plainGPT, 2 steps"
    for _, _, seconds, loss, ratio in ours:
        theirs, mine = number(peer[2]), number(seconds)  # printed to 0.1 s, and the ratio to 0.01
        assert (theirs - 0.051) / (mine + 0.051) - 0.006 <= number(ratio) <= (theirs + 0.051) / (mine - 0.051) + 0.006
        assert (number(loss) <= number(peer[3])) == (
            loss == ours[-1][3]
        )  # it stops as soon as nanoGPT's loss is passed


def test_without_a_gpu_it_says_so_in_one_line(table):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="^this needs a CUDA GPU, and PyTorch finds none on this machine"):
        table(gpu)
    with pytest.raises(ValueError, match="--device=cpu takes --tiny"):
        table(gpu, "--device=cpu")


def test_with_one_all_parts_are_planned_and_what_is_left_out_is_told(monkeypatch, tmp_path):
    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        return gpu.parse()

    def no_network(path):
        if path is None:
            raise ValueError("no download: get the file")

    monkeypatch.setattr(gpu, "tiny_shakespeare", no_network)
    parts, left_out = gpu.plan(parse())
    assert [part.name for part in parts] == ["tests", "attention", "decode", "decode", "train"]
    assert [words.split(":")[0] for words in left_out] == ["nanoGPT's rows", "the time to nanoGPT's loss"]
    parts, left_out = gpu.plan(parse(f"--nanogpt={tmp_path}", f"--input={tmp_path}/x.txt"))
    assert [part.name for part in parts] == [*gpu.PARTS[:3], *gpu.PARTS[2:]] and not left_out
    assert "tests/test_cuda.py" in parts[0].command and "tests/test_house.py" not in parts[0].command
    assert parts[4].command[1:3] == ["--gpu", "--short"]


def test_its_parts_end_within_their_time_fail_aloud_or_are_left_out(capsys):
    def part(code, seconds, timed=True, name="decode"):
        return gpu.Part(name, name, ["-c", code], seconds, timed)

    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = [part("print('whole')", 30, timed=False), part(f"print('begun', flush=True); {child}", 1)]
    parts += [part("raise SystemExit('no kernel')", 30)]
    whole, stopped, failed = gpu.run_all(parts, minutes=9)
    assert (whole.status, whole.output) == (0, "whole") and gpu.verdict(whole) == f"{whole.seconds:.0f} s"
    assert (stopped.status, stopped.output) == (None, "begun") and stopped.seconds < 10
    assert gpu.verdict(stopped) == "stopped after 1 s, the end of its time"
    assert failed.status == 1 and gpu.verdict(failed).endswith(": no kernel")
    (left_out,) = gpu.run_all([part("print('late')", 30)], minutes=0.1)
    assert gpu.verdict(left_out) == "left out: no time was left for it"
    assert "no kernel" in capsys.readouterr().out


def test_training_is_told_how_much_time_is_left():
    print_arguments = gpu.Part("train", "Training", ["-c", "import sys; print(sys.argv[1:])"], 600)
    (ended,) = gpu.run_all([print_arguments], minutes=1)
    assert re.fullmatch(r"\['--seconds=(39|40)'\]", ended.output)


def test_failed_tests_are_listed_without_the_dots():
    output = "..F.\nFAILED tests/test_cuda.py::test_a - assert 1\n1 failed, 3 passed in 2.50s"
    section = gpu.report([gpu.Ended(gpu.Part("tests", "Tests", ["-m", "pytest"], 1), 3.0, 1, output, "")], [], "cpu")
    assert section.endswith("FAILED tests/test_cuda.py::test_a - assert 1\n1 failed, 3 passed in 2.50s\n")
    assert "..F." not in section and "failed after 3 s" in section


def test_make_gpu_hands_on_what_it_is_given():
    options = ["NANOGPT=../nano", "INPUT=a b.txt", "MINUTES=20", "PARTS=train"]
    done = subprocess.run(["make", "-n", "gpu", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = 'bench/gpu.py --nanogpt="../nano" --input="a b.txt" --minutes=20 --parts=train'
    assert expected in re.sub(r"[\s\\]+", " ", done.stdout)
