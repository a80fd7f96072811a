"""Config files and --key=value arguments."""

from dataclasses import dataclass

import pytest

from common.config import build, help_text, read_arguments, read_config_file


@dataclass
class Shape:
    n_layer: int = 6  # transformer blocks
    rate: float = 1e-3  # how fast


@dataclass
class Run:
    name: str = "x"  # what to call it
    fast: bool | str = "auto"  # True, False or auto


def parse(tmp_path, text: str, *arguments: str) -> list:
    path = tmp_path / "c.py"
    path.write_text(text)
    return build(read_arguments([str(path), *arguments]), Shape, Run)


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
     "a = 9**9**9", "a = 'x' * 9"],
)  # fmt: skip
def test_anything_else_in_a_config_file_is_refused_with_its_line(tmp_path, line):
    with pytest.raises(ValueError, match="line 2"):
        parse(tmp_path, "rate = 1.0\n" + line)


def test_an_unknown_key_is_refused_and_the_nearest_one_named(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'n_layers' in the command line: did you mean n_layer"):
        parse(tmp_path, "", "--n_layers=3")


@pytest.mark.parametrize(
    "bad", ["--n_layer=2.5", "--n_layer=two", "--n_layer=True", "--rate=fast", "--rate=None", "--rate=1e999"]
)
def test_a_value_of_the_wrong_type_names_key_value_and_type(tmp_path, bad):
    key, value = bad[2:].split("=")
    with pytest.raises(ValueError, match=f"{key} must be of type (int|float), not .*{value}"):
        parse(tmp_path, "", bad)


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False), ("auto", "auto")])
def test_unions_take_the_first_type_that_fits(tmp_path, text, value):
    assert parse(tmp_path, "", f"--fast={text}")[1].fast is value or text == "auto"


def test_text_stays_text_even_if_it_looks_like_a_number(tmp_path):
    assert parse(tmp_path, "", "--name=12")[1].name == "12"


def test_an_option_without_a_value_says_how_to_write_it(tmp_path):
    with pytest.raises(ValueError, match="--key=value"):
        parse(tmp_path, "", "--fast")


def test_a_missing_file_and_a_syntax_error_are_told_plainly(tmp_path):
    with pytest.raises(ValueError, match="cannot read the config file"):
        read_arguments([str(tmp_path / "none.py")])
    with pytest.raises(ValueError, match="line 1"):
        parse(tmp_path, "n_layer = = 3")


def test_help_lists_every_key_with_its_default_and_meaning():
    text = help_text("usage", Shape, Run)
    for piece in ("--n_layer=6", "transformer blocks", "--fast=auto", "True, False or auto"):
        assert piece in text
