"""Python's own documentation: the language reference, and the docstrings of the standard library.

Modules are parsed, never imported, so all of them can be read on every system, and the same version of Python always
gives the same texts.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Not part of the library itself: tests, demos, bundled tools, generated tables, installed packages.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data", "site-packages"}
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\xa0": " "})
PLAIN = re.compile(r"[ -~\n]*")


def topics() -> Iterator[tuple[str, str]]:
    """Yield (title, text) of each section of the language reference; a page may hold several, and some are repeated."""
    from pydoc_data.topics import topics

    for _, page in sorted(topics.items()):
        # A heading is a line underlined with *, = or -; re.split gives [before, title, body, title, body, ...].
        parts = re.split(r"^(\S.*)\n(?:\*{3,}|={3,}|-{3,})$", page, flags=re.MULTILINE)
        yield from zip(parts[1::2], parts[2::2], strict=True)


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (name and signature, docstring) of each public object of the standard library, in source order."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        names = [*path.relative_to(library).parts[:-1], path.stem]
        if names[-1] == "__init__":
            names.pop()
        if not any(name.startswith("_") or name in SKIPPED or not name.isidentifier() for name in names):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the library's own invalid escapes
                tree = ast.parse(path.read_bytes())
            yield f"module {'.'.join(names)}", ast.get_docstring(tree) or ""
            yield from members(tree.body, ".".join(names))


def members(body: list[ast.stmt], parent: str, of_class: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (name and signature, docstring) of the public classes and functions in `body`, and of their members."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):  # defined on some systems only
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from members([*node.body, *handlers, *node.orelse], parent, of_class)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{parent}.{node.name}"
        yield signature(node, name, of_class), ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            yield from members(node.body, name, of_class=True)


def signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, of_class: bool) -> str:
    """Return `class queue.Queue` or `textwrap.fill(text, width=70, **kwargs)`: without self and annotations."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    arguments = node.args
    if of_class and arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{name}({ast.unparse(arguments)})"
