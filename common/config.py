"""Read config files and command-line options into typed dataclasses.

Notable:
- a config file is a list of assignments of constants; it is parsed, never executed;
- all dataclasses of a command share one flat namespace, so any field can be set in a config file or as an option;
- a field's type says what it allows (int, bool, Literal["a", "b"], UserPath, unions of these), and the comment
  after it is its documentation; checks and --help come from the dataclass itself.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import operator
import os
import textwrap
import tokenize
import types
import typing
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parents[1]

UserPath = Annotated[str, "path"]  # the type of a field that holds a path: a leading ~ means the home folder

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}  # fmt: skip

# Other programs' names for our keys. They are never accepted, but the error for an unknown key suggests ours.
ALSO_CALLED = {
    "learning_rate": "lr", "weight_decay": "wd", "batch_size": "bs micro_batch_size per_device_train_batch_size",
    "n_layer": "layers n_layers num_layers num_hidden_layers depth", "n_head": "heads n_heads num_heads",
    "n_kv_head": "kv_heads n_kv_heads num_kv_heads num_key_value_heads", "n_embd": "width dim d_model hidden_size",
    "block_size": "ctx n_ctx context context_size context_length seq_len seq_length sequence_length max_seq_len",
    "num_epochs": "epochs num_train_epochs passes",
    "max_iters": "steps max_steps num_steps train_steps iters num_iters iterations epochs num_train_epochs",
    "gradient_accumulation_steps": "accum grad_accum accumulation", "warmup_iters": "warmup warmup_steps",
    "lr_schedule": "scheduler lr_scheduler lr_scheduler_type", "grad_clip": "clip max_grad_norm clip_grad",
    "optimizer": "optim", "dataset": "data data_dir", "init_from": "resume base base_model",
    "out_dir": "out output output_dir model run", "dtype": "precision fp16 bf16", "device": "gpu cuda",
    "wandb_log": "wandb", "lora_rank": "lora_r r", "temperature": "temp", "num_samples": "n samples",
    "num_beams": "beams beam_size beam_width", "max_new_tokens": "max_tokens max_length length tokens",
    "prompt": "text question input", "checkpoint": "ckpt",
}  # fmt: skip

Values = dict[str, tuple[object, str]]  # key → (value, where it was given)


# ---------------------------------------------------------------------------------------------------------------------
# Config files


def read_config_file(path: str) -> dict[str, object]:
    """Return the assignments of a config file.

    A value is a constant, a key assigned above, or arithmetic on numbers (5 * 8). Raises ValueError with the line for
    anything else, and ValueError if the file is missing; then the message names the most similar file.
    """
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        hint = f"; {suggest_config(path)}" if isinstance(error, FileNotFoundError) else ""
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the config file {path}: {reason}{hint}") from None
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} is not a config file: {error or type(error).__name__}") from None
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{where}: a config file holds plain assignments only, like n_layer = 6")
        try:
            values[node.targets[0].id] = value_of(node.value, values)
        except (ValueError, ArithmeticError, RecursionError) as error:  # such as 1 / 0, or a sum of thousands of terms
            raise ValueError(f"{where}: {error}") from None
    return values


def value_of(node: ast.expr, values: dict[str, object]) -> object:
    """Evaluate a constant, a name in `values`, or arithmetic on numbers; raise ValueError for anything else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            numbers, function = [value_of(operand, values)], operator.neg
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            numbers, function = [value_of(left, values), value_of(right, values)], ARITHMETIC[type(op)]
        case _:
            raise ValueError("the value must be a constant, or arithmetic on numbers and keys above")
    if not all(type(n) in (int, float) and abs(n) < 1e18 for n in numbers):
        raise ValueError("arithmetic is for numbers below 1e18")
    if function is operator.pow and numbers[1] > 64:
        raise ValueError("an exponent must be at most 64")
    return function(*numbers)


def suggest_config(path: str) -> str:
    """Return a hint for a missing config file: the file with the most similar name, or how to write options."""
    folders = (Path(path).parent, ROOT / "config")
    known = {file.stem: file.absolute() for folder in folders for file in sorted(folder.glob("*.py"))}
    near = difflib.get_close_matches(Path(path).stem, known, n=1, cutoff=0.5)
    if near:
        found, here = known[near[0]], Path.cwd()
        return f"did you mean {found.relative_to(here) if found.is_relative_to(here) else found}?"
    return "options are written --key=value, and config files are in config/"


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def read_arguments(argv: list[str], *classes: type, default: str | None = None) -> Values:
    """Read arguments `[file.py ...] [--key=value | --key value | --switch ...]` for the fields of these dataclasses.

    Returns {key: (value of the field's type, where it was given)}; of several values for a key, the last one counts.
    default: the config file to read if the arguments name none. Raises ValueError for an unknown key (the message names
    a similar one), a missing value, or a value of the wrong type.
    """
    fields = fields_of(classes)
    arguments = list(split_arguments(argv, fields))
    if default is not None and all(key is not None for key, _ in arguments):
        arguments.insert(0, (None, default))
    given: Values = {}
    for key, value in arguments:
        options, source = ({key: value}, "the command line") if key else (read_config_file(value), value)
        given |= {name: (option, source) for name, option in options.items()}
    return {key: (typed(key, value, source, fields), source) for key, (value, source) in given.items()}


def split_arguments(argv: list[str], fields: dict[str, dataclasses.Field]) -> Iterator[tuple[str | None, object]]:
    """Yield (key, value) for each option and (None, path) for each config file.

    The word after `--key` is its value unless that word is an option itself. A switch (a field that can be True) needs
    no value, and never takes a config file as its value: `--compile config/x.py` is --compile=True and a config file.
    """
    words = deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith("-"):
            yield None, word
            continue
        if not word.startswith("--"):
            raise ValueError(f"cannot read {word!r}: options are written --key=value or --key value")
        key, equals, value = word[2:].partition("=")
        kind = field_of(key, "the command line", fields).type
        if not equals:
            alone = not words or words[0].startswith("--")
            if any(choice is True for choice in choices_of(kind)) and (alone or words[0].endswith(".py")):
                value = True
            elif alone:
                raise ValueError(f"--{key} needs a value, as in --{key}={fields[key].default}")
            else:
                value = words.popleft()
        yield key, value


# ---------------------------------------------------------------------------------------------------------------------
# Types


def choices_of(kind: object) -> list:
    """List the values that a field's type allows, or the types where the values cannot be listed.

    bool | Literal["auto"] → [True, False, "auto"];  int | None → [int, NoneType];  UserPath → [UserPath]
    """
    if kind is bool:
        return [True, False]
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [choice for option in typing.get_args(kind) for choice in choices_of(option)]
    return [kind]


def is_value(choice: object) -> bool:
    """Return whether an item of `choices_of` is a value and not a type."""
    return isinstance(choice, bool | int | float | str)


def convert(value: object, kind: object) -> object:
    """Convert the value to `kind`: text from the command line is parsed, 1 becomes 1.0, ~ becomes the home folder.

    A union takes the first type that fits. Raises ValueError if information would be lost or the value is not allowed.
    """
    for choice in choices_of(kind):
        try:
            converted = convert_to_type(value, type(choice) if is_value(choice) else choice)
        except ValueError:
            continue
        if not is_value(choice) or converted == choice:
            return converted
    raise ValueError


def convert_to_type(value: object, kind: object) -> object:
    """Convert the value to a single type: int, float, bool, str, NoneType or UserPath; see `convert`."""
    if kind is UserPath:
        return os.path.expanduser(str(convert_to_type(value, str)))
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, TypeError, SyntaxError, ArithmeticError, MemoryError, RecursionError):
            raise ValueError from None
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if type(value) is not kind:
        raise ValueError
    if kind is float and not math.isfinite(value) or kind is int and abs(value) >= 2**63:
        raise ValueError
    return value


def typed(key: str, value: object, source: str, fields: dict[str, dataclasses.Field]) -> object:
    """Convert the value to the type of the field `key`. A ValueError names key, value and allowed values."""
    kind = field_of(key, source, fields).type
    try:
        return convert(value, kind)
    except ValueError:
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:80] + "…"
        raise ValueError(f"{key} must be {expected(kind, value)}, not {shown} (in {source})") from None


def expected(kind: object, value: object) -> str:
    """Describe the values that a field's type allows, for the error message about `value`."""
    choices = choices_of(kind)
    if kind is bool:
        return "of type bool (True or False)"
    if all(is_value(choice) for choice in choices):
        return f"one of {', '.join(map(str, choices))}"
    is_huge = isinstance(value, int) or isinstance(value, str) and value.lstrip("+-").isdigit()
    if kind is int and is_huge:
        return "of type int and between -2**63 and 2**63"
    return f"of type {getattr(kind, '__name__', str(kind))}"


def fields_of(classes: tuple[type, ...]) -> dict[str, dataclasses.Field]:
    """Return the fields of all these dataclasses by name, as one flat namespace."""
    return {field.name: field for c in classes for field in dataclasses.fields(c)}


def field_of(key: str, source: str, fields: dict[str, dataclasses.Field]) -> dataclasses.Field:
    """Return the field `key`. Raises ValueError for an unknown key; the message suggests a known one."""
    if key in fields:
        return fields[key]
    plain = key.replace("-", "_").lower()
    switch = plain.removeprefix("no_")
    if switch != plain and switch in fields and True in choices_of(fields[switch].type):
        hint = f"did you mean {switch}=False?"
    else:
        near = nearest(plain, list(fields))
        hint = f"did you mean {near}?" if near else "--help lists all keys"
    raise ValueError(f"unknown key {key!r} in {source}: {hint}")


def nearest(name: str, keys: list[str]) -> str | None:
    """Return the key that a user who wrote `name` probably meant.

    The first match counts: the key itself, another name of it ("lr"), a part of it ("momentum"), a similar spelling.
    """
    also_called = [key for key in keys if name in ALSO_CALLED.get(key, "").split()]
    parts = [key for key in keys if set(name.split("_")) <= set(key.split("_"))]
    found = [*(key for key in keys if key == name), *also_called, *parts, *difflib.get_close_matches(name, keys, n=1)]
    return found[0] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Dataclasses


def build(values: Values, *classes: type) -> list:
    """Make one instance of each dataclass from {key: (value, where it was given)}; other fields keep their defaults.

    Raises ValueError for an unknown key, a value of the wrong type, or a value that a dataclass rejects.
    """
    fields = fields_of(classes)
    converted = {key: typed(key, value, source, fields) for key, (value, source) in values.items()}
    return [c(**{name: converted[name] for name in fields_of((c,)) if name in converted}) for c in classes]


@dataclass(frozen=True)
class Range:
    """A range of numbers, given by its limits: `at_least(0).below(1)`."""

    limits: tuple[tuple[str, Callable[[float, float], bool], float], ...]

    def at_most(self, high: float) -> "Range":
        """The part of this range up to high, high included."""
        return Range((*self.limits, ("at most", operator.le, high)))

    def below(self, high: float) -> "Range":
        """The part of this range up to high, high excluded."""
        return Range((*self.limits, ("below", operator.lt, high)))

    def __contains__(self, number: float) -> bool:
        return all(holds(number, limit) for _, holds, limit in self.limits)

    def __str__(self) -> str:
        return " and ".join(f"{words} {limit}" for words, _, limit in self.limits)


def at_least(low: float) -> Range:
    """All numbers from low on, low included."""
    return Range((("at least", operator.ge, low),))


def above(low: float) -> Range:
    """All numbers from low on, low excluded."""
    return Range((("above", operator.gt, low),))


def check_ranges(config: object, **ranges: Range) -> None:
    """Raise ValueError if a field of the config lies outside its range.

    check_ranges(self, batch_size=at_least(1), top_p=above(0).at_most(1), dropout=at_least(0).below(1))
    """
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} must be {allowed}, not {value}")


def help_text(usage: str, *classes: type, defaults: dict[str, object] | None = None) -> str:
    """Return the text of --help: every key with its default, its choices, and the comment after it in the source.

    defaults: key → the default to show instead of the dataclass's own.
    """
    lines = [usage.strip()]
    for c in classes:
        lines.append(f"\n{c.__name__}:")
        comments = comments_of(c)
        for field in dataclasses.fields(c):
            option = f"  --{field.name}={(defaults or {}).get(field.name, field.default)}"
            choices = choices_of(field.type)
            if len(choices) > 1 and field.type is not bool and all(is_value(choice) for choice in choices):
                option = f"{option.ljust(38)} {' | '.join(map(str, choices))}:"
            lines.append(f"{option.ljust(38)} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def comments_of(c: type) -> dict[str, str]:
    """Return {field: comment after it in the source} for a dataclass."""
    source = textwrap.dedent(inspect.getsource(c))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, node.end_lineno + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
