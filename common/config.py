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
import re
import types
import typing
from pathlib import Path

ARITHMETIC = (ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Load)


def read_config_file(path: str) -> dict[str, object]:
    """The assignments of a config file: constants, arithmetic on them (5 * 8) and names assigned above."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from None
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{where}: a config file holds plain assignments only, like n_layer = 6")
        expression = ast.Expression(node.value)
        for part in ast.walk(expression):
            if not isinstance(part, ARITHMETIC) or isinstance(part, ast.Name) and part.id not in values:
                raise ValueError(f"{where}: the value must be a constant, or arithmetic on constants and names above")
        try:
            values[node.targets[0].id] = eval(compile(expression, path, "eval"), {"__builtins__": {}}, values)
        except Exception as error:  # the user's own arithmetic: 1 / 0, "a" + 1
            raise ValueError(f"{where}: {error}") from None
    return values


def read_arguments(argv: list[str]) -> dict[str, tuple[object, str]]:
    """Arguments `[file.py ...] [--key=value ...]` as {key: (value, where it came from)}; the last one wins."""
    values: dict[str, tuple[object, str]] = {}
    for argument in argv:
        if not argument.startswith("--"):
            values |= {key: (value, argument) for key, value in read_config_file(argument).items()}
        elif "=" not in argument:
            raise ValueError(f"{argument}: options are written --key=value, as in {argument.split()[0]}=1")
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
        except (ValueError, SyntaxError):
            raise ValueError from None
    if kind is float and type(value) is int or kind is int and type(value) is float and value.is_integer():
        value = kind(value)
    if type(value) is not kind:
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
        try:
            converted[key] = convert(value, kind)
        except ValueError:
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{key} must be of type {name}, not {value!r} (in {source})") from None
    return [c(**{f.name: converted[f.name] for f in dataclasses.fields(c) if f.name in converted}) for c in classes]


def help_text(usage: str, *classes: type) -> str:
    """What --help prints: every key with its default and the comment that stands behind it in the source."""
    lines = [usage.strip()]
    for c in classes:
        lines.append(f"\n{c.__name__}:")
        comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(c), re.MULTILINE))
        for f in dataclasses.fields(c):
            lines.append(f"  --{f.name}={f.default}".ljust(38) + f" {comments.get(f.name, '')}")
    return "\n".join(lines)
