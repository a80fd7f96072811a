"""From a config file and --key=value arguments to typed dataclasses.

Notable:
- a config file is a list of assignments of constants, read as data and never executed;
- all dataclasses share one flat namespace, so any field can stand in a config file or on the command line;
- --help is made from the dataclasses themselves: the comment behind a field is its documentation.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import operator
import re
import types
import typing
from pathlib import Path

BARE = "the command line, without a value"  # where a --key came from

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}  # fmt: skip


def read_config_file(path: str) -> dict[str, object]:
    """The assignments of a config file: constants, arithmetic on them (5 * 8) and keys assigned above."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from None
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
        except (ValueError, ArithmeticError, RecursionError) as error:  # 1 / 0, or a sum of thousands
            raise ValueError(f"{where}: {error}") from None
    return values


def value_of(node: ast.expr, values: dict[str, object]) -> object:
    """The value of a constant, a name among `values`, or arithmetic on numbers; ValueError for anything else."""
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
    if (
        not all(type(n) in (int, float) and abs(n) < 1e18 for n in numbers)
        or function is operator.pow
        and numbers[1] > 64
    ):
        raise ValueError("arithmetic is for numbers, and not for huge ones")
    return function(*numbers)


def read_arguments(argv: list[str]) -> dict[str, tuple[object, str]]:
    """Arguments `[file.py ...] [--key=value ...]` as {key: (value, where it came from)}; the last one wins.

    A bare --key is --key=True, the last word on a switch.
    """
    values: dict[str, tuple[object, str]] = {}
    for before, argument in zip(["", *argv], argv, strict=False):
        if not argument.startswith("--"):
            if before.startswith("--") and "=" not in before:
                raise ValueError(f"{before} {argument}: options are written --key=value, as in {before}={argument}")
            values |= {key: (value, argument) for key, value in read_config_file(argument).items()}
        elif "=" not in argument:
            values[argument[2:]] = (True, BARE)
        else:
            key, value = argument[2:].split("=", 1)
            values[key] = (value, "the command line")
    return values


def convert(value: object, kind: object) -> object:
    """The value as that type, where nothing is lost by it (text from the command line, 1 for 1.0); else ValueError."""
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return convert(value, option)
            except ValueError:
                continue
        raise ValueError
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval(value.replace("true", "True").replace("false", "False"))
        except (ValueError, TypeError, SyntaxError, ArithmeticError, MemoryError, RecursionError):
            raise ValueError from None
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if type(value) is not kind or kind is float and not math.isfinite(value) or kind is int and abs(value) >= 2**63:
        raise ValueError
    return value


def build(values: dict[str, tuple[object, str]], *classes: type) -> list:
    """One instance of each dataclass, from values as `read_arguments` returns them; defaults for what is not given.

    ValueError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    fields = {f.name: f for c in classes for f in dataclasses.fields(c)}
    converted = {}
    for key, (value, source) in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all keys"
            raise ValueError(f"unknown key {key!r} in {source}: {hint}")
        kind = fields[key].type
        if source == BARE and kind is not bool:
            raise ValueError(f"--{key}: options are written --key=value, as in --{key}={fields[key].default}")
        try:
            converted[key] = convert(value, kind)
        except ValueError:
            name = getattr(kind, "__name__", str(kind))
            shown = repr(value) if len(repr(value)) < 80 else repr(value)[:80] + "…"
            raise ValueError(f"{key} must be of type {name}, not {shown} (in {source})") from None
    return [c(**{f.name: converted[f.name] for f in dataclasses.fields(c) if f.name in converted}) for c in classes]


def help_text(usage: str, *classes: type, defaults: dict[str, object] | None = None) -> str:
    """What --help prints: every key with its default and the comment that stands behind it in the source.

    defaults: those that are not the dataclass's.
    """
    lines = [usage.strip()]
    for c in classes:
        lines.append(f"\n{c.__name__}:")
        comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(c), re.MULTILINE))
        for f in dataclasses.fields(c):
            lines.append(
                f"  --{f.name}={(defaults or {}).get(f.name, f.default)}".ljust(38) + f" {comments.get(f.name, '')}"
            )
    return "\n".join(lines)
