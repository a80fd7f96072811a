"""What a run is: where it begins, what it remembers, and what is told when something is missing or changed."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import finetune
import train
from runs.run import Run, model_to_fine_tune
from runs.start import RunFolder
from tests.test_finetune import WORDS
from text.corpus import write_corpus
from text.tokenizer import CharTokenizer
from training.config import TrainConfig
from training.plan import count_weights

SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--mlp_dim=32", "--block_size=48", "--device=cpu"]
SHORT = ["--batch_size=8", "--max_iters=8", "--eval_interval=4", "--log_interval=1", "--learning_rate=0.01"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a command's main() with arguments, in tmp_path, with an empty config file unless the first one is None."""
    (tmp_path / "empty.py").write_text("")
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments, config="empty.py"):
        argv = [main.__module__, *([config] if config else []), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        main()

    return run


@pytest.fixture
def pretrain(call, corpus_folder):
    def run(name, *options):
        call(train.main, f"--dataset={corpus_folder}", *SHAPE, *SHORT, f"--out_dir={name}", *options)
        return Path(name)

    return run


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A folder of 60 conversations, of which 12 are for validation."""
    folder, rows = tmp_path_factory.mktemp("talk"), []
    for i in range(60):
        answer = " ".join((WORDS * 2)[i % 11 + 1 : i % 11 + 3])
        rows.append(json.dumps({"instruction": f"{WORDS[i % 11]}{' ' * (i // 11)}", "output": answer}))
    (folder / "train.jsonl").write_text("\n".join(rows[:48]))
    (folder / "val.jsonl").write_text("\n".join(rows[48:]))
    return folder


@pytest.fixture
def tune(call, talk):
    def run(name, base, *options, config="empty.py"):
        arguments = [f"--dataset={talk}", f"--init_from={base}", "--device=cpu", "--batch_size=4", f"--out_dir={name}"]
        call(finetune.main, *arguments, *options, config=config)
        return Path(name)

    return run


def events(run: Path, key: str) -> list[dict]:
    found = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [event for event in found if key in event]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Run.open(run).load_model("latest").state_dict()


# --- resuming ----------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_resuming_falls_back_to_the_newest_intact_checkpoint_and_says_so(pretrain, call, capsys):
    run = pretrain("a")
    before = weights(run)
    damage(run / "checkpoints" / "step_00000008" / "model.safetensors")
    call(train.main, "--init_from=resume", "--out_dir=a", config=None)
    assert "step_00000008/model.safetensors is damaged" in (shown := capsys.readouterr().out)
    assert "going on from the one before it" in shown
    assert all(torch.equal(before[name], weight) for name, weight in weights(run).items())
    assert [event["step"] for event in events(run, "val_loss")] == [0, 4, 8]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_is(pretrain, call):
    run = pretrain("a")
    for folder in Run.open(run).checkpoints():
        damage(folder / "optimizer.safetensors")
    log = (run / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="every checkpoint in a is damaged"):
        call(train.main, "--init_from=resume", "--out_dir=a", config=None)
    assert (run / "log.jsonl").read_text() == log


def test_starting_over_after_all_checkpoints_were_deleted_is_told_and_the_log_is_kept(pretrain, call, capsys):
    run = pretrain("a")
    log = (run / "log.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    call(train.main, "--init_from=resume", "--out_dir=a", config=None)
    shown = capsys.readouterr().out
    assert "a holds no checkpoint: it begins again at step 0" in shown and "kept as a/log.before.jsonl" in shown
    assert (run / "log.before.jsonl").read_text() == log and events(run, "val_loss")[-1]["step"] == 8


def test_more_steps_for_a_finished_run_tell_that_the_learning_rate_jumps(pretrain, call, capsys):
    pretrain("a", "--lr_schedule=cosine", "--warmup_iters=0")
    call(train.main, "--init_from=resume", "--out_dir=a", "--max_iters=12", config=None)
    assert "its learning rate now jumps from" in capsys.readouterr().out
    pretrain("b", "--lr_schedule=constant", "--warmup_iters=0")
    call(train.main, "--init_from=resume", "--out_dir=b", "--max_iters=12", config=None)
    assert "jumps" not in capsys.readouterr().out


class Killed(BaseException):
    pass


def killed_at_once(trainer, step):
    raise Killed


def test_a_run_from_the_run_of_its_own_name_resumes_though_it_was_killed_before_it_saved(
    pretrain, call, monkeypatch, capsys
):
    pretrain("a")
    whole = pretrain("whole", "--init_from=a", "--seed=3")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Trainer, "next_batches", killed_at_once)
        pretrain("a", "--init_from=a", "--seed=3")
    assert "a held a run already: it is now a.1" in capsys.readouterr().out
    assert Run.open("a").origin.source == "a.1"
    call(train.main, "--init_from=resume", "--out_dir=a", config=None)
    assert all(torch.equal(weight, weights(Path("a"))[name]) for name, weight in weights(whole).items())


def test_lora_in_the_folder_of_its_base_keeps_the_base(pretrain, tune):
    base = pretrain("a")
    run = tune("a", base, "--lora_rank=2", "--max_iters=4")
    assert Run.open(run).origin.source == "a.1" and Run.open(run).lora.rank == 2
    shutil.rmtree("a.1")
    assert Run.open(run).load_model()


# --- another run's weights ---------------------------------------------------------------------------------------


def test_continued_pretraining_of_a_fine_tuned_model_keeps_its_chat_tokens(pretrain, tune, call, corpus_folder):
    tuned = tune("tuned", pretrain("base"), "--max_iters=8")
    more = pretrain("more", "--init_from=tuned")
    assert Run.open(more).fine_tuned and Run.open(more).task == "pretrain"
    new = [Run.open(tuned).tokenizer.special_tokens[name] for name in ("<|user|>", "<|end|>")]
    again = model_to_fine_tune(Run.open(more), "latest", Run.open(more).tokenizer)
    assert torch.equal(again.tok_emb.weight[new], Run.open(more).load_model("latest").tok_emb.weight[new])
    call(train.main, "--init_from=resume", "--out_dir=more", "--max_iters=12", config=None)
    assert Run.open(more).fine_tuned


def test_training_goes_on_from_a_run_with_lora_by_merging(pretrain, tune):
    lora = tune("lora", pretrain("base"), "--lora_rank=2", "--max_iters=8")
    merged, started = Run.open(lora).load_model().state_dict(), {}

    class Peek(train.Trainer):
        def train(self, folder):
            started.update(self.model.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", Peek)
        run = pretrain("more", "--init_from=lora")
    assert Run.open(run).lora is None and Run.open(run).fine_tuned
    assert all(torch.equal(merged[name], started[name]) for name in merged)


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal", "none"])
def test_block_size_may_change_where_positions_have_no_weights(pretrain, position):
    base = pretrain("a", f"--position={position}")
    run = pretrain("b", "--init_from=a", "--block_size=64", f"--position={position}")
    assert Run.open(run).model_config.block_size == 64 and Run.open(base).model_config.block_size == 48


def test_learned_positions_are_cut_off_and_cannot_grow(pretrain):
    base = pretrain("a", "--position=learned")
    run = pretrain(
        "b", "--init_from=a", "--block_size=32", "--position=learned", "--max_iters=1", "--learning_rate=1e-9"
    )
    before = weights(base)["pos_emb.weight"][:32]
    assert torch.allclose(weights(run)["pos_emb.weight"], before, atol=1e-6)
    with pytest.raises(ValueError, match="positions are learned: it can only become smaller"):
        pretrain("c", "--init_from=a", "--block_size=64", "--position=learned")


def test_a_corpus_of_another_tokenizer_is_refused_with_the_remedy(pretrain, tmp_path):
    pretrain("a")
    documents = [(split, "abc xyz " * 50) for split in ("train", "val")]
    write_corpus(tmp_path / "other", documents, CharTokenizer("abcxyz ", eot=True), workers=1)
    with pytest.raises(ValueError, match="another tokenizer than that of .*other: .* --tokenizer a"):
        pretrain("b", "--init_from=a", f"--dataset={tmp_path / 'other'}")


# --- fine-tuning -------------------------------------------------------------------------------------------------


def test_lora_on_a_base_model_learns_to_stop(pretrain, tune, capsys):
    base = pretrain("base", "--max_iters=60", "--eval_interval=60")
    options = ["--lora_rank=4", "--learning_rate=0.03", "--eval_questions=12", "--eval_tokens=24"]
    run = tune("a", base, *options, "--max_iters=120", "--eval_interval=120", "--sample_interval=120")
    shown = capsys.readouterr().out
    assert "12 of 12 answers end by themselves" in shown and "0 of 12 answers end" in shown
    assert len(Run.open(run).lora.new_rows) == 4


def test_a_lora_run_of_before_new_rows_were_trained_still_opens(pretrain, tune):
    run = tune("a", pretrain("base"), "--lora_rank=2", "--max_iters=4")
    content = json.loads((run / "config.json").read_text())
    for key in ("sha256", "format", "version", "task", "origin"):
        del content[key]
    del content["chat"]["lora"]["new_rows"]
    (run / "config.json").write_text(json.dumps(content))
    opened = Run.open(run)
    assert opened.task == "sft" and opened.fine_tuned and opened.lora.new_rows == ()
    assert not any("lora_rows" in name for name, _ in opened.corrected_base().named_parameters())


def test_a_run_of_before_a_model_setting_existed_opens_with_its_default(pretrain):
    run = pretrain("base", "--max_iters=4")
    before, content = Run.open(run), json.loads((run / "config.json").read_text())
    del content["sha256"]
    for key in ("qkv_bias", "sliding_window", "nope_every", *(key for key in content["model"] if key[:5] == "rope_")):
        if key != "rope_theta":
            del content["model"][key]
    (run / "config.json").write_text(json.dumps(content))
    assert Run.open(run).model_config == before.model_config == Run.open(run).load_model().config


def test_own_conversations_get_three_passes_and_the_passes_are_told(pretrain, tune, capsys):
    run = tune("a", pretrain("base"), config=None)
    shown = capsys.readouterr().out
    steps = Run.open(run).settings["max_iters"]
    passes, each = re.search(
        rf"\n{steps} steps: ([\d.]+) passes over the training data, ([\d.]+) steps", shown
    ).groups()
    assert 3.0 <= float(passes) < 3.3 and steps - 1 < 3 * float(each) <= steps
    per_pass = [event["step"] for event in events(run, "val_loss")]
    assert len(per_pass) == 4 and per_pass[-1] == steps


def test_max_iters_on_the_command_line_overrides_passes(pretrain, tune):
    run = tune("a", pretrain("base"), "--max_iters=5", config=None)
    assert events(run, "train_loss")[-1]["step"] <= 5 and Run.open(run).settings["max_iters"] == 5
    run = tune("b", "base", "--num_epochs=1.5")
    assert Run.open(run).settings["num_epochs"] == 1.5


def test_answers_of_weight_0_cannot_be_trained_on_with_the_prompts(pretrain, tune, tmp_path):
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox", "weight": 0},
                {"role": "user", "content": "dog"}, {"role": "assistant", "content": "and"}]  # fmt: skip
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"messages": messages}))
    options = [f"--dataset={tmp_path}", "--max_iters=1"]
    with pytest.raises(ValueError, match="train_on_prompt counts every word, and 1 answers have weight 0"):
        tune("a", pretrain("base"), "--train_on_prompt", *options)
    tune("b", "base", *options)


def test_lora_switches_to_adamw_and_says_so(pretrain, tune, capsys):
    (Path("muon.py")).write_text('optimizer = "muon"\n')
    run = tune("a", pretrain("base"), "--lora_rank=2", "--max_iters=2", config="muon.py")
    assert "LoRA trains with AdamW" in capsys.readouterr().out and Run.open(run).settings["optimizer"] == "adamw"


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": False, "bias": True}, {"position": "learned", "n_layer": 5}]
)
def test_weights_are_counted_without_building_the_model(tiny_gpt, options):
    model = tiny_gpt(**options)
    assert count_weights(model.config) == model.num_params()


@pytest.mark.parametrize("option", ["--n_layer=100000000", "--n_embd=2000000", "--vocab_size=999999999999"])
def test_a_model_beyond_memory_is_refused_with_its_number_of_weights(pretrain, option):
    with pytest.raises(ValueError, match="this model has .* weights: training takes at least .* GiB"):
        pretrain("a", option)
    assert not Path("a").exists()


def test_the_folder_is_locked_while_it_is_open_and_free_afterwards(pretrain, tmp_path):
    run = Run.open(pretrain("a"))
    start = train.decide({"init_from": ("resume", ""), "out_dir": ("a", "")}, {}, "pretrain")
    with RunFolder(run, start, run.tokenizer, TrainConfig(), active=True):
        with pytest.raises(ValueError, match="a is in use by process"):
            RunFolder(run, start, run.tokenizer, TrainConfig(), active=True)
    with RunFolder(run, start, run.tokenizer, TrainConfig(), active=True):
        pass
