"""Config files, options of the command line, and the dataclasses that they fill."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common.config import UserPath, above, at_least, build, check_ranges, help_text, read_arguments, read_config_file
from model import GPTConfig
from sample import SampleConfig
from tasks.sft import FinetuneConfig
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Shape:
    n_layer: int = 6  # transformer blocks
    rate: float = 1e-3  # how fast
    shift: int = 0  # a number of either sign


@dataclass
class Run:
    name: str = "x#1"  # what to call it
    fast: bool | Literal["auto"] = "auto"  # how it runs
    loud: bool = False  # a plain switch
    kind: Literal["a", "b", 3] = "a"  # which kind
    folder: UserPath = "out/x"  # where it goes


def parse(tmp_path, text: str, *arguments: str) -> list:
    path = tmp_path / "c.py"
    path.write_text(text)
    return build(read_arguments([str(path), *arguments], Shape, Run), Shape, Run)


# --- config files ----------------------------------------------------------------------------------------------------


def test_arguments_override_the_file_and_the_file_overrides_defaults(tmp_path):
    assert parse(tmp_path, "n_layer = 2 * 4\nrate = 1\n", "--n_layer=3") == [Shape(3, 1.0), Run()]


def test_config_files_are_assignments_of_constants_and_earlier_names(tmp_path):
    text = '"""About."""\na = 3\nn_layer = a * 2 ** 2  # why\nname = "y"\n'
    path = tmp_path / "c.py"
    path.write_text(text)
    assert read_config_file(str(path)) == {"a": 3, "n_layer": 12, "name": "y"}


@pytest.mark.parametrize(
    "line",
    ["import os", "n_layer = open('x')", "n_layer = other", "n_layer += 1", "x.y = 1", "n_layer = [1][0]", "a = 1 / 0",
     "a = 9**9**9", "a = 'x' * 9", "a = 10**17 * 10**17 * 2", "a = 2.0 ** 9999"],
)  # fmt: skip
def test_anything_else_in_a_config_file_is_refused_with_its_line(tmp_path, line):
    with pytest.raises(ValueError, match="line 2"):
        parse(tmp_path, "rate = 1.0\n" + line)


def test_a_missing_file_and_a_syntax_error_are_told_plainly(tmp_path):
    with pytest.raises(ValueError, match="cannot read the config file .*No such file"):
        read_arguments([str(tmp_path / "none.py")], Shape)
    with pytest.raises(ValueError, match="line 1"):
        parse(tmp_path, "n_layer = = 3")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("config/shakespeare_cpu.py", "shakespeare_char_cpu.py"), ("config/pydoc.py", "pydocs.py"),
     ("pydocs", "pydocs.py"), ("gpt2_124m.py", "gpt2_124m.py"), ("config/sft_alpacca.py", "sft_alpaca.py")],
)  # fmt: skip
def test_a_wrong_path_of_a_config_file_names_the_nearest(tmp_path, monkeypatch, given, meant):
    for folder, expected in [(ROOT, f"config/{meant}"), (tmp_path, f"{ROOT}/config/{meant}")]:
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=re.escape(f"did you mean {expected}?")):
            read_arguments([given], Shape)


def test_the_nearest_config_file_may_lie_beside_the_one_that_was_asked_for(tmp_path):
    (tmp_path / "my_experiment.py").write_text("")
    with pytest.raises(ValueError, match="did you mean .*my_experiment.py"):
        read_arguments([str(tmp_path / "my_experimant.py")], Shape)


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_value_may_stand_behind_an_equals_sign_or_a_space():
    spaced = ["--n_layer", "3", "--rate", "-2.5", "--shift", "-4", "--name", "", "--kind", "b", "--folder", "-"]
    joined = ["--n_layer=3", "--rate=-2.5", "--shift=-4", "--name=", "--kind=b", "--folder=-"]
    expected = [Shape(3, -2.5, -4), Run(name="", kind="b", folder="-")]
    for argv in (spaced, joined):
        assert build(read_arguments(argv, Shape, Run), Shape, Run) == expected


@pytest.mark.parametrize(
    ("arguments", "fast", "loud"),
    [(["--fast", "--loud"], True, True), (["--loud", "--fast", "auto"], "auto", True),
     (["--fast", "False", "--loud", "true"], False, True), (["--fast", "c.py"], True, False),
     (["--loud", "c.py", "--fast=auto"], "auto", True), (["--loud=false", "c.py", "--fast"], True, False)],
)  # fmt: skip
def test_a_switch_needs_no_value_and_takes_no_config_file_for_one(tmp_path, monkeypatch, arguments, fast, loud):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text("n_layer = 9\n")
    shape, run = build(read_arguments(arguments, Shape, Run), Shape, Run)
    assert (run.fast, run.loud, shape.n_layer) == (fast, loud, 9 if "c.py" in arguments else 6)


def test_the_default_config_is_read_first_and_only_where_none_is_named(tmp_path):
    (tmp_path / "default.py").write_text("n_layer = 2\nrate = 0.5\n")
    (tmp_path / "c.py").write_text("rate = 0.25\n")
    default = str(tmp_path / "default.py")
    for argv, expected in [
        (["--n_layer", "3"], Shape(3, 0.5)),  # the word 3 is no config file
        (["--loud", "--rate=1"], Shape(2, 1.0)),
        ([str(tmp_path / "c.py")], Shape(6, 0.25)),
        (["--loud", str(tmp_path / "c.py")], Shape(6, 0.25)),
    ]:
        assert build(read_arguments(argv, Shape, Run, default=default), Shape, Run)[0] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--n_layer"], "--n_layer needs a value, as in --n_layer=6"), (["--name", "--loud"], "--name needs a value"),
     (["-n_layer=3"], "cannot read '-n_layer=3': options are written --key=value or --key value"),
     (["--loud", "maybe"], "loud must be of type bool (True or False), not 'maybe'"),
     (["hello"], "cannot read the config file hello: No such file or directory; options are written --key=value"),
     (["--"], "unknown key ''"), (["--=3"], "unknown key ''")],
)  # fmt: skip
def test_an_argument_that_cannot_be_read_says_how_to_write_it(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_arguments(arguments, Shape, Run)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_and_the_nearest_one_named(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'n_layers' in the command line: did you mean n_layer"):
        parse(tmp_path, "", "--n_layers=3")
    with pytest.raises(ValueError, match="unknown key 'lairs' in .*c.py: --help lists all keys"):
        parse(tmp_path, "lairs = 3")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("lr", "learning_rate"), ("wd", "weight_decay"), ("bs", "batch_size"), ("batch-size", "batch_size"),
     ("layers", "n_layer"), ("n_layers", "n_layer"), ("heads", "n_head"), ("n_heads", "n_head"), ("dim", "n_embd"),
     ("steps", "max_iters"), ("ctx", "block_size"), ("context", "block_size"), ("seq_len", "block_size"),
     ("lora_r", "lora_rank"), ("alpha", "lora_alpha"), ("momentum", "muon_momentum"), ("warmup_steps", "warmup_iters"),
     ("max_grad_norm", "grad_clip"), ("Learning_Rate", "learning_rate"), ("lerning_rate", "learning_rate"),
     ("no-wandb_log", "wandb_log=False"), ("output_dir", "out_dir")],
)  # fmt: skip
def test_what_other_programs_call_a_key_is_understood(written, meant):
    with pytest.raises(ValueError, match=f"unknown key '{written}' in the command line: did you mean {meant}\\?"):
        read_arguments([f"--{written}=1"], TrainConfig, FinetuneConfig, GPTConfig)


def test_epochs_are_num_epochs_where_there_are_any_and_steps_elsewhere():
    passes = dataclasses.make_dataclass("Passes", [("num_epochs", int, 3), ("max_iters", int, 0)])
    with pytest.raises(ValueError, match="did you mean num_epochs"):
        read_arguments(["--epochs=3"], passes)
    with pytest.raises(ValueError, match="did you mean max_iters"):
        read_arguments(["--epochs", "3"], dataclasses.make_dataclass("Steps", [("max_iters", int, 0)]))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    ["--n_layer=2.5", "--n_layer=two", "--n_layer=True", "--rate=fast", "--rate=None", "--rate=1e999", "--n_layer=",
     "--n_layer=9223372036854775808", "--n_layer=-99999999999999999999", "--n_layer=1e300", "--rate=1" + "0" * 400],
)  # fmt: skip
def test_a_value_of_the_wrong_type_names_key_value_and_type(tmp_path, bad):
    key, value = bad[2:].split("=")
    with pytest.raises(ValueError, match=f"{key} must be of type (int|float).*, not .*{value[:70]}.*in the command"):
        parse(tmp_path, "", bad)


@pytest.mark.parametrize("line", ["n_layer = 2**63", "n_layer = 10**17 * 10**17", "rate = 10**17 * 10**17"])
def test_a_number_too_large_in_a_config_file_is_told_with_its_key_and_limit(tmp_path, line):
    with pytest.raises(ValueError, match="(n_layer must be of type int and between -2..63|rate must be of type float)"):
        parse(tmp_path, line)


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False), ("auto", "auto")])
def test_unions_take_the_first_type_that_fits(tmp_path, text, value):
    assert parse(tmp_path, "", f"--fast={text}")[1].fast == value


def test_text_stays_text_even_if_it_looks_like_a_number(tmp_path):
    assert parse(tmp_path, "", "--name=12")[1].name == "12"


def test_choices_are_checked_and_all_of_them_named(tmp_path):
    assert parse(tmp_path, "kind = 'b'")[1].kind == "b" and parse(tmp_path, "", "--kind=3")[1].kind == 3
    for bad in ("c", "4", "True"):
        with pytest.raises(ValueError, match=f"kind must be one of a, b, 3, not '{bad}'"):
            parse(tmp_path, "", f"--kind={bad}")
    with pytest.raises(ValueError, match="fast must be one of True, False, auto, not 'x.'"):
        parse(tmp_path, "", "--fast=x1")


def test_a_leading_tilde_is_the_home_folder_in_paths_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for text, arguments in [("", ["--folder=~/x"]), ("", ["--folder", "~/x"]), ("folder = '~/x'", [])]:
        assert parse(tmp_path, text, *arguments)[1].folder == "/home/somebody/x"
    assert parse(tmp_path, "", "--name=~/x", "--folder=a~/x")[1] == Run(name="~/x", folder="a~/x")
    assert read_arguments(["--folder=~"], Run) == {"folder": ("/home/somebody", "the command line")}
    for c, keys in [(TrainConfig, ("out_dir", "init_from", "dataset")), (SampleConfig, ("out_dir", "score"))]:
        for key in keys:
            assert read_arguments([f"--{key}=~/x"], c)[key][0] == "/home/somebody/x"


@pytest.mark.parametrize("c", [TrainConfig, GPTConfig, FinetuneConfig, SampleConfig])
def test_every_default_is_a_value_of_its_type(c):
    for field in dataclasses.fields(c):
        (values,) = build({field.name: (str(field.default), "here")}, c)  # what --help shows can be given
        assert getattr(values, field.name) == getattr(c(), field.name)


def test_numbers_are_held_to_their_ranges():
    @dataclass
    class Numbers:
        size: int = 1
        share: float = 0.5

        def __post_init__(self):
            check_ranges(self, size=at_least(1), share=above(0).at_most(1))

    Numbers(1, 1.0)
    for bad, message in [
        ((0, 0.5), "size must be at least 1, not 0"),
        ((1, 0.0), "share must be above 0 and at most 1, not 0.0"),
        ((1, 1.5), "share must be above 0 and at most 1, not 1.5"),
        ((1, float("nan")), "share must be above 0 and at most 1, not nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Numbers(*bad)
    assert 1 not in at_least(0).below(1) and 0 in at_least(0).below(1) and str(at_least(0).below(1)).endswith("below 1")


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_key_with_its_default_choices_and_meaning():
    lines = help_text("usage", Shape, Run, defaults={"rate": 0.5}).splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    for line in (
        "usage", "--n_layer=6 transformer blocks", "--rate=0.5 how fast", "--name=x#1 what to call it",
        "--fast=auto True | False | auto: how it runs", "--loud=False a plain switch", "--kind=a a | b | 3: which kind",
        "--folder=out/x where it goes",
    ):  # fmt: skip
        assert line in text.splitlines()
