"""The house stays as drawn: who may import whom, no circle of files, and how long files and functions may be."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Who may import whom: room → rooms. `text.base` are the files of text/ below bpe.py, which know nothing of tokenizers.
ROOMS = {
    "common": {"common"},
    "fused": set(),
    "positions": set(),
    "model": {"fused", "positions"},
    "classifier": {"model"},
    "seq2seq": {"fused", "model", "classifier"},
    "text.base": {"common", "text.base"},
    "bpe": {"common", "text.base"},
    "text": {"common", "text.base", "bpe", "text"},
    "training": {"common", "fused", "model", "seq2seq", "training"},
    "decoding": {"common", "fused", "model", "classifier", "seq2seq", "bpe", "text", "decoding"},
    "formats": {"common", "model", "text.base", "bpe", "text", "formats"},
    "runs": {"common", "model", "seq2seq", "positions", "text", "training", "formats", "runs"},
    "tasks": {"common", "model", "classifier", "seq2seq", "text", "training", "decoding", "runs", "tasks"},
    "train": {"common", "model", "text", "training", "runs", "tasks"},
    "finetune": {"common", "model", "text", "training", "runs", "tasks", "train"},
    "convert": {"common", "model", "text", "training", "formats", "runs"},
    "sample": {"common", "model", "text", "training", "decoding", "runs"},
    "plot": {"common", "training", "runs"},
    "data": {"common", "bpe", "text.base", "text", "data"},
}
ROOMS["lessons"] = set(ROOMS)  # the course shows all of it
BELOW_BPE = ("chunks", "merges", "documents", "cut", "pool")
LONGEST = {"model.py": 450, "train.py": 400}  # lines; 500 for all others

FILES = sorted(
    Path(line)
    for line in subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not line.startswith(("tests/", "bench/", "config/")) and not line.endswith("__init__.py")
)


def room_of(module: str) -> str | None:
    """The room of a module's dotted name; None for what is not ours."""
    first, _, rest = module.partition(".")
    if first == "text" and rest in BELOW_BPE:
        return "text.base"
    return first if first in ROOMS else None


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, but for the type checker alone."""
    tree, found = ast.parse((ROOT / path).read_text()), set()
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if Path(ROOT, *name.split(".")).with_suffix(".py").is_file()} or {
                node.module
            }
    return {module for module in found if room_of(module)}


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def test_there_are_files_to_check():
    assert len(FILES) > 30 and Path("train.py") in FILES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_what_its_room_may(path):
    room = room_of(module_of(path))
    assert room, f"{path} is in no room"
    wrong = {module for module in imports(path) if room_of(module) not in ROOMS[room]}
    assert not wrong, f"{path} must not import {wrong}"


def test_there_is_no_circle_of_files():
    graph = {module_of(path): imports(path) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path, parts", [("model.py", {"fused", "positions"}), ("fused.py", set()), ("positions.py", set())]
)
def test_the_network_imports_torch_and_its_parts_only(path, parts):
    tree = ast.parse((ROOT / path).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"torch", "math", "dataclasses", "typing"} | parts


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    source = (ROOT / path).read_text()
    assert source.count("\n") <= LONGEST.get(str(path), 500)
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]
    assert not long, f"functions past 50 lines in {path}: {long}"
