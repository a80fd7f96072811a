"""finetune.py through its command line: what it learns, what must not change the result, what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
import sample as sample_module
import train
from common import cli
from model import GPT, IGNORE, GPTConfig
from runs import checkpoint
from runs.run import Run, grow, model_to_fine_tune
from tasks.packing import Rows, make_examples
from tests.helpers import assert_close
from tests.test_train import final_files, log, losses
from text.chat import Template
from text.conversations import read_conversations
from text.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent
BASE = ["--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32", "--mlp_dim=32", "--block_size=48", "--device=cpu",
        "--dtype=float32"]  # fmt: skip
LEARN = ["--max_iters=150", "--eval_interval=150", "--optimizer=muon", "--learning_rate=0.02"]
RUN = ["--batch_size=8", "--max_iters=8", "--eval_interval=4", "--log_interval=1", "--learning_rate=0.01",
       "--eval_questions=6", "--eval_tokens=12", "--device=cpu", "--dtype=float32"]  # fmt: skip
WORDS = "the quick brown fox jumps over a lazy dog and sleeps".split()


@pytest.fixture(scope="module")
def base(corpus_folder, tmp_path_factory):
    """A small run of train.py, on characters; its tokenizer knows nothing of conversations."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "empty.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", str(folder / "empty.py"), f"--dataset={corpus_folder}", *BASE,
                                    f"--out_dir={folder / 'run'}", "--max_iters=40", "--eval_interval=40"])  # fmt: skip
        train.main()
    return folder / "run"


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A folder of conversations with answers of 1 to 12 words: "word after X" is answered by the words after X."""
    folder, rows = tmp_path_factory.mktemp("talk"), []
    for i in range(220):
        word, n = WORDS[i % 11], 1 + (7 * i + i // 11) % 12
        answer = " ".join((WORDS * 3)[i % 11 + 1 : i % 11 + 1 + n])[:30]
        rows.append({"instruction": f"{word} {'and ' * (i % 3)}{n % 3 * 'a'}".strip(), "output": answer})
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines[:180]))
    (folder / "val.jsonl").write_text("\n".join(lines[180:]))
    return folder


@pytest.fixture
def command(base, conversations, tmp_path, monkeypatch):
    """Run finetune.py's command in this process; options given later win. Returns the run's folder."""
    (tmp_path / "empty.py").write_text("")

    def run(name: str, *options: str) -> Path:
        arguments = [tmp_path / "empty.py", f"--dataset={conversations}", f"--init_from={base}", *RUN]
        arguments = [] if "--init_from=resume" in options else arguments
        arguments = ["finetune.py", *arguments, f"--out_dir={tmp_path / name}", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        finetune.main()
        return tmp_path / name

    return run


def test_it_learns_to_answer_and_to_stop(command, capsys):
    run = command("a", *LEARN, "--sample_interval=150", "--eval_tokens=40")
    events = log(run, "val_loss")
    assert events[-1]["val_loss"] < 0.65 * events[0]["val_loss"]
    shown = capsys.readouterr().out
    assert "conversations, " in shown and "of them in responses" in shown
    assert shown.count("of 6 answers end by themselves") == 2 and "6 of 6 answers end by themselves" in shown
    assert shown.count("\n> ") >= 3


@pytest.mark.parametrize("more", [[], ["--packing=False"], ["--lora_rank=4"]], ids=str)
def test_8_micro_steps_of_1_are_1_of_8(command, more):
    one = command("one", *more)
    eight = command("eight", "--batch_size=1", "--gradient_accumulation_steps=8", *more)
    mine, theirs = ([e for e in log(run, "train_loss")] for run in (one, eight))
    for key in ("train_loss", "grad_norm"):  # of the first step, before rounding had time to grow
        assert mine[0][key] == pytest.approx(theirs[0][key], rel=1e-5)
    assert torch.allclose(losses(one), losses(eight), atol=2e-3)


def test_two_processes_are_one(command, base, conversations, tmp_path):
    options = ["--batch_size=2", "--gradient_accumulation_steps=4", "--packing=False", "--dropout=0.1"]
    one = command("one", *options)
    (tmp_path / "c.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune.py",
         tmp_path / "c.py", f"--dataset={conversations}", f"--init_from={base}", *RUN, f"--out_dir={tmp_path / 'two'}",
         *options], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    mine, theirs = ([e for e in log(run, "train_loss")] for run in (one, tmp_path / "two"))
    for key in ("train_loss", "grad_norm"):
        assert mine[0][key] == pytest.approx(theirs[0][key], rel=1e-5)
    assert torch.allclose(losses(one), losses(tmp_path / "two"), atol=2e-3)


def test_in_bfloat16_on_a_cpu_fine_tuning_is_close_to_float32(command):
    runs = [command(dtype, f"--dtype={dtype}", "--activation_checkpointing=True") for dtype in ("float32", "bfloat16")]
    full, half = map(losses, runs)
    assert 0 < (full - half).abs().max() < 0.02


def test_the_loss_is_one_mean_over_all_responses_and_not_a_mean_of_means(conversations, command):
    first = command("first", *LEARN)
    options = ["--batch_size=2", "--gradient_accumulation_steps=4", "--packing=False", "--max_iters=1"]
    run = command("a", f"--init_from={first}", *options)
    model, tokenizer = Run.open(first).load_model(), Run.open(first).tokenizer
    found = make_examples(list(read_conversations(conversations / "train.jsonl")), Template(tokenizer), 48).examples
    rows = Rows(found, 48, packing=False)
    batches = [rows.batch(0, 1337, 8, slice(i, i + 2)) for i in range(0, 8, 2)]
    with torch.no_grad():
        counts = [int((batch["targets"] != IGNORE).sum()) for batch in batches]
        means = [model(**batch)[1].item() for batch in batches]
    mean = sum(n * m for n, m in zip(counts, means, strict=True)) / sum(counts)
    assert log(run, "train_loss")[0]["train_loss"] == pytest.approx(mean, rel=1e-5)
    assert abs(sum(means) / 4 / mean - 1) > 1e-3  # the mistake would show


@pytest.mark.parametrize("more", [[], ["--dropout=0.2"], ["--lora_rank=4", "--dropout=0.1"]], ids=str)
def test_killed_and_resumed_is_never_stopped(command, monkeypatch, more):
    whole = command("whole", *more)
    next_batches = train.Trainer.next_batches

    class Killed(BaseException):
        pass

    def deadly(trainer, now):
        if now == step:
            raise Killed
        return next_batches(trainer, now)

    for step in (2, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train.Trainer, "next_batches", deadly)
            command(f"killed{step}", *more)
        run = command(f"killed{step}", "--init_from=resume")
        assert log(run) == log(whole) and final_files(run) == final_files(whole)


def test_lora_saves_its_corrections_only_and_loads_merged(command, base):
    run = command("a", "--lora_rank=4", "--lora_targets=qkv,down", "--lora_alpha=8")
    folder = checkpoint.find_checkpoint(run, "latest")
    saved = load_file(folder / "model.safetensors")
    assert len(saved) == 9 and all("lora_" in name for name in saved)
    merged, tokenizer = Run.open(run).load_model(), Run.open(run).tokenizer
    plain = model_to_fine_tune(Run.open(base), "best", tokenizer)
    for name, weight in merged.named_parameters():
        before = plain.get_parameter(name)
        if name.endswith(("qkv.weight", "down.weight")):
            A, B = (saved[name.replace("weight", f"lora_{m}")] for m in "AB")
            assert_close(weight, before + 2.0 * B @ A, 1e-6)
        elif name == "tok_emb.weight":
            new = Run.open(run).lora.new_rows
            assert_close(weight[list(new)], before[list(new)] + saved["tok_emb.lora_rows"], 1e-6)
            old = [i for i in range(len(weight)) if i not in new]
            assert torch.equal(weight[old], before[old]) and saved["tok_emb.lora_rows"].abs().min(1).values.max() > 0
        else:
            assert torch.equal(weight, before)


def test_a_fine_tuned_model_can_be_fine_tuned_again_with_its_special_tokens_kept(command, base):
    first = command("first")
    model = Run.open(first).load_model()
    again = model_to_fine_tune(Run.open(first), "best", Template(Run.open(first).tokenizer).tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    second = command("second", f"--init_from={first}")
    assert log(second, "val_loss")[0]["val_loss"] == pytest.approx(log(first, "val_loss")[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("padded", [23, 64])
@torch.no_grad()
def test_added_tokens_change_nothing_for_the_others(tie, padded):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=padded, n_layer=1, n_head=2, n_embd=16, tie_embeddings=tie)).eval()
    idx = torch.arange(8)[None]
    before = model(idx)[0]
    grow(model, 27, (23, 24, 25, 26))
    after = model(idx)[0]
    assert model.config.vocab_size == after.size(2) == max(padded, 27)
    assert torch.equal(after[..., :23], before[..., :23])
    assert (model.head.weight is model.tok_emb.weight) == tie
    lengths = model.tok_emb.weight.norm(dim=1)
    assert len(set(lengths[23:27].tolist())) == 4 and lengths[23:27].max() < lengths[:23].max()


def test_a_fine_tuned_model_answers_and_chats(command, monkeypatch, tmp_path, capsys):
    import io

    run = command("a", *LEARN)
    capsys.readouterr()

    def sample(*options):
        greedy = [] if "--num_beams=3" in options else ["--temperature=0"]
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={run}", *greedy, *options])
        try:
            cli.run_command(sample_module.main)
            return capsys.readouterr()
        except SystemExit as stopped:
            assert stopped.code == 1
            return capsys.readouterr()

    lines = [json.loads(sample(f"--prompt={word}", "--json").out) for word in WORDS]
    assert [line["prompt"] for line in lines] == WORDS and {line["finish"] for line in lines} == {"eos"}
    assert sum(len(set(line["text"].split()) & set(WORDS)) for line in lines) > 30  # it learned words
    line = lines[WORDS.index("quick")]
    assert sample("--prompt=quick").out == line["text"] + "\n"
    beam = json.loads(sample("--prompt=quick", "--num_beams=3", "--json").out)
    assert beam["finish"] == "eos" and "<|end|>" not in beam["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"quick\n\nlazy\n/save {tmp_path / 's'}\n/quit\n"))
    shown = sample("--chat")
    (saved,) = read_conversations(tmp_path / "s")
    assert [m["content"] for m in saved[::2]] == ["quick", "lazy"] and saved[1]["content"] == line["text"]
    assert line["text"] in shown.out
    assert "give it a --prompt, or talk with it by --chat" in sample().err


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--init_from=scratch"], "--init_from must be the folder of a trained run"),
        (["--init_from=nowhere"], "no run in nowhere"),
        (["--dataset=nowhere"], "no prepared conversations in 'nowhere': python data/chat/prepare.py"),
        (["--n_layer=3"], "n_layer is 2 in .* and cannot become 3"),
        (["--lora_rank=2", "--lora_targets=,"], "lora_targets must name layers"),
        (["--lora_rank=2", "--lora_alpha=0"], "lora_alpha must be above 0"),
        (["--init_from"], "--init_from needs a value, as in"),
        (["--lora_rank=-1"], "lora_rank must be at least 0"),
        (["--lora_rank=2", "--lora_targets=head"], "no layer is called 'head'"),
        (["--lora_rank=2", "--optimizer=muon"], "Muon does not suit LoRA's"),
        (["--lora_rnk=2"], "did you mean lora_rank?"),
    ],
)
def test_bad_settings_are_refused_before_a_run_is_made(command, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        command("bad", *options)
    assert not (tmp_path / "bad").exists()


def test_a_character_that_the_base_does_not_know_is_told(command, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"instruction": "the", "output": "Ünknown"}))
    with pytest.raises(ValueError, match="character 'Ü'"):
        command("bad", f"--dataset={tmp_path}")


def test_each_command_sends_the_other_kinds_runs_to_the_other(command, base, monkeypatch):
    run = command("a", "--max_iters=1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--init_from=resume", f"--out_dir={run}"])
    with pytest.raises(ValueError, match="is a fine-tuned run: go on with finetune.py"):
        train.main()
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--init_from=resume", f"--out_dir={base}"])
    with pytest.raises(ValueError, match="is no fine-tuned run: go on with train.py"):
        finetune.main()


def test_lora_with_a_base_that_is_gone_or_changed_is_told(command, base, tmp_path):
    run = command("a", "--lora_rank=2", "--max_iters=1")
    (run / "base").rename(run / "gone")
    with pytest.raises(ValueError, match="no run in .*base"):
        Run.open(run).load_model()
    (run / "gone").rename(run / "base")
    CharTokenizer("xyz", eot=True).save(tmp_path)
    os.replace(tmp_path / "tokenizer.json", run / "base" / "tokenizer.json")
    with pytest.raises(ValueError, match="base was trained with another tokenizer"):
        Run.open(run).load_model()


def test_a_run_with_lora_keeps_its_base_however_long_the_chain(command, base, tmp_path):
    command("first", "--lora_rank=2", "--max_iters=2")
    second = command("second", f"--init_from={tmp_path / 'first'}", "--lora_rank=3", "--max_iters=2")
    before = Run.open(second).load_model()
    shutil.rmtree(tmp_path / "first")
    after = Run.open(second).load_model()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    command("second", "--init_from=resume", "--max_iters=4")


def test_bits_per_byte_count_the_responses_only_even_where_prompts_are_trained_on(command):
    plain, both = command("plain", "--max_iters=1"), command("both", "--max_iters=1", "--train_on_prompt")
    assert log(plain, "val_loss")[0] == log(both, "val_loss")[0]
    assert log(plain, "train_loss") != log(both, "train_loss")


def test_a_resumed_run_keeps_its_corrections(command, tmp_path):
    command("a", "--lora_rank=2", "--max_iters=1")
    for option, sentence in {"--lora_alpha=3": "lora_alpha is 16.0 in", "--lora_rank=0": "lora_rank is 2 in"}.items():
        with pytest.raises(ValueError, match=f"{sentence} .* and cannot become"):
            command("a", "--init_from=resume", "--max_iters=2", option)
