"""docs/ and lessons/: what a page names is there.

`model.py` is a file, `model.py: Head.rows` a name that the file defines; `my_answer.py` is the student's, and nowhere.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("lessons/*/*.md")])
REFERENCE = re.compile(r"`(?!my_answer\.py)([\w./]+\.py)(?:: ?([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


@cache
def defined_names(path: Path) -> set[str]:
    """The names that a file defines: functions, classes, variables, and `Class.name` for what is in a class."""
    found = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef(name=name):
                    found.add(prefix + name)
                case ast.ClassDef(name=name):
                    found.add(prefix + name)
                    collect(node.body, f"{prefix}{name}.")
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)

    collect(ast.parse(path.read_text()).body, "")
    return found


def broken(text: str) -> list[str]:
    """The references of a page's text that lead nowhere."""
    found = []
    for match in REFERENCE.finditer(text):
        path, name = ROOT / match[1], match[2]
        if not path.is_file() or (name and name not in defined_names(path)):
            found.append(match[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_name_of_a_page_is_there(page):
    text = page.read_text()
    assert not broken(text)
    assert not [link for link in LINK.findall(text) if not (page.parent / link).exists()]


@pytest.mark.parametrize(
    "reference", ["`nothing.py`", "`model.py: Nothing`", "`model.py: Head.nothing`", "`docs/model.py: GPT`"]
)
def test_a_wrong_reference_is_found(reference):
    right = "`model.py` `model.py: GPT` `model.py: Head.rows` `model.py: GPTConfig.norm_head` `model.py: IGNORE`"
    assert broken(f"{right} and {reference}, `python nothing.py`") == [reference]


def test_both_languages_name_the_same_code_and_the_same_figures():
    english, chinese = ((ROOT / "docs" / name).read_text() for name in ("baichuan2.md", "baichuan2.zh.md"))
    assert len(REFERENCE.findall(english)) > 30
    assert set(REFERENCE.findall(english)) == set(REFERENCE.findall(chinese))
    numbers = [
        [re.findall(r"[\d.]+ ± [\d.]+", line) for line in text.splitlines() if "±" in line]
        for text in (english, chinese)
    ]
    assert numbers[0] == numbers[1] and sum(map(len, numbers[0])) > 40


def test_the_figures_are_those_of_the_results():
    results, page = ((ROOT / name).read_text() for name in ("RESULTS.md", "docs/baichuan2.md"))
    figures = re.findall(r"[\d.]+ ± [\d.]+", page)
    assert figures and not set(figures) - set(re.findall(r"[\d.]+ ± [\d.]+", results))


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
READMES = ["README.md", "README.zh.md"]


def without_words(kind: str, block: str) -> list[str]:
    """A code block's lines without comments; of a map, in the block's own language, only the files and folders."""
    if kind == "text":
        return re.findall(r"\b\w+(?:\.py\b|/)", block)
    return [re.sub(r"\s*(?<!\S)#.*", "", line) for line in block.splitlines()]


def test_both_readmes_show_the_same_commands_the_same_code_and_the_same_figures():
    texts = [(ROOT / name).read_text() for name in READMES]
    blocks = [[(kind, without_words(kind, block)) for kind, block in BLOCK.findall(text)] for text in texts]
    assert blocks[0] == blocks[1] and len(blocks[0]) > 10
    assert sum(len(lines) for _, lines in blocks[0]) > 50
    english, chinese = (set(re.findall(r"--\w+", text)) for text in texts)
    assert english == chinese
    rows = [[line for line in text.splitlines() if line.startswith("|")] for text in texts]
    english, chinese = (re.findall(r"\d[\d,.]*\d", " ".join(lines)) for lines in rows)
    assert english == chinese != []
    assert texts[0].count("\n## ") == texts[1].count("\n## ")


@pytest.mark.parametrize("name, other", [READMES, READMES[::-1]])
def test_a_readmes_links_lead_somewhere_and_to_the_other_language(name, other):
    text = (ROOT / name).read_text()
    assert f"]({other})" in text
    assert not [link for link in LINK.findall(text) if not (ROOT / link).exists()] and not broken(text)


def test_a_command_that_only_one_readme_has_is_found():
    assert without_words("bash", "a --b=c   # one\nd #e") == without_words("bash", "a --b=c # two\nd") != ["a --b", "d"]
