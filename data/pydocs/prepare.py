"""Prepare the embedded corpus: English that every Python carries, so that no network is needed.

It is the language reference (pydoc_data.topics), a document per section, and the docstrings of the standard library's
public modules, classes and functions, read from the source without importing it, a document per object: a line with
its name and signature, an empty line, its docstring. The corpus is always the same for the same version of Python.
Typographic quotes, dashes and the like become ASCII, paragraphs with characters other than printable ASCII are left
out, and so are very short documents and repeated ones. One document in twenty, by a hash of its text, is validation.
Tokens are characters; --vocab_size N learns a byte-pair vocabulary from the training documents instead.
"""

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run
from common.prepare import corpus_parser, prepare, split_of

HERE = Path(__file__).resolve().parent
# Not the library itself: its tests, demos, bundled tools, generated tables, and what others installed.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data", "site-packages"}
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\xa0": " "})
PLAIN = re.compile(r"[ -~\n]*")
MIN_WORDS = 8


def topics() -> Iterator[tuple[str, str]]:
    """(title, text) of each section of the language reference: a long page holds several, some of them in two pages."""
    from pydoc_data.topics import topics

    for _, page in sorted(topics.items()):
        # A heading is a line underlined with *, = or -; re.split gives [before, title, body, title, body, ...].
        parts = re.split(r"^(\S.*)\n(?:\*{3,}|={3,}|-{3,})$", page, flags=re.MULTILINE)
        yield from zip(parts[1::2], parts[2::2], strict=True)


def docstrings() -> Iterator[tuple[str, str]]:
    """(name and signature, docstring) of each public object of the standard library, in the order of the source."""
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
    """The public classes and functions defined in `body`, and theirs."""
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
    """As in `class queue.Queue` or `textwrap.fill(text, width=70, **kwargs)`: no self, no annotations."""
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


def pydocs() -> list[str]:
    """All documents, without repetition."""
    documents = {}
    for source in (topics(), docstrings()):
        for title, text in source:
            paragraphs = inspect.cleandoc(text.translate(ASCII)).split("\n\n")
            text = "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if PLAIN.fullmatch(paragraph))
            title = title.translate(ASCII)
            if len(text.split()) >= MIN_WORDS and PLAIN.fullmatch(title):
                documents.setdefault(text, f"{title}\n\n{text}\n")
    return list(documents.values())


def main() -> None:
    args = corpus_parser(__doc__, output=HERE, tokenizer=1024, val_fraction=0.05).parse_args()
    documents = pydocs()
    if len(documents) < 1000:
        raise ValueError(
            f"this Python carries no source of its standard library: only {len(documents)} documents found"
        )
    prepare(lambda: ((split_of(text, args.val_fraction), text) for text in documents), args)


if __name__ == "__main__":
    run(main)
