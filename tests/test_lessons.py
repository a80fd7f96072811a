"""lessons/: every lesson's claims hold, its picture can be drawn, its pages are true, and its exercise is checked.

The references of the pages are resolved by test_docs.py, with those of docs/.
"""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from lesson_answers import ANSWERS
from test_docs import REFERENCE

ROOT = Path(__file__).parent.parent
LESSONS = sorted(ROOT.glob("lessons/[0-9]*.py"))
NAMES = [path.stem for path in LESSONS]
CLAIM = re.compile(r"^ *(= holds: .*)$", re.MULTILINE)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def beside_the_lessons(monkeypatch):
    """A lesson imports `lesson`, which lies beside it."""
    monkeypatch.syspath_prepend(ROOT / "lessons")


def page(language: str, name: str) -> str:
    return (ROOT / "lessons" / language / f"{name}.md").read_text()


def without_numbers(lines: list[str]) -> list[str]:
    """The sizes in a claim may differ between a small run and the run that a page quotes."""
    return [re.sub(r"[\d.,]*\d", "#", line) for line in lines]


def run_as_command(monkeypatch, name: str, *options: str) -> None:
    path = str(ROOT / "lessons" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *options])
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_the_claims_hold_and_the_pages_quote_them_and_the_picture_can_be_drawn(name, monkeypatch, capsys, tmp_path):
    import torch

    lesson = runpy.run_path(str(ROOT / "lessons" / f"{name}.py"), run_name="imported")
    torch.manual_seed(0)
    shown = lesson["main"](True)
    printed = CLAIM.findall(capsys.readouterr().out)
    assert len(printed) >= 2
    for language in ("en", "zh"):
        quoted = CLAIM.findall(page(language, name))
        assert quoted and not set(without_numbers(quoted)) - set(without_numbers(printed))
    monkeypatch.setattr(sys.modules["lesson"], "PICTURES", tmp_path / "lessons" / "pictures")
    (tmp_path / "lessons").mkdir()
    lesson["draw"](*shown)
    drawn = list(tmp_path.rglob("*.*"))
    assert [path.stem for path in drawn] == [name]
    assert (ROOT / "lessons" / "pictures" / drawn[0].name).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_passes(name, monkeypatch, capsys, tmp_path):
    (tmp_path / "answer.py").write_text(ANSWERS[name][0])
    run_as_command(monkeypatch, name, "--check", str(tmp_path / "answer.py"))
    assert capsys.readouterr().out.startswith("right: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_answer_fails_with_one_line(name, monkeypatch, capsys, tmp_path):
    (tmp_path / "answer.py").write_text(ANSWERS[name][1])
    with pytest.raises(SystemExit) as ended:
        run_as_command(monkeypatch, name, "--check", str(tmp_path / "answer.py"))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert "right" in err  # the result is wrong; the file itself runs


@pytest.mark.parametrize(
    "source, message",
    [
        ("def encode(:", "answer.py, line 1: SyntaxError"),
        ("import nothing_here", "answer.py, line 1: ModuleNotFoundError"),
        ("raise SystemExit(0)", "does not run"),
        ("def code(word): pass", "must define the function encode; it defines code"),
        ("def encode(word): pass", "encode fails: .*TypeError"),
        ("def encode(word, merges):\n    return merges[99]", "answer.py, line 2: IndexError"),
        ("def encode(word, merges): return None", "gives None, right is"),
        (None, "No such file"),
    ],
)
def test_a_broken_answer_is_one_line(source, message, monkeypatch, capsys, tmp_path):
    if source is not None:
        (tmp_path / "answer.py").write_text(source)
    with pytest.raises(SystemExit) as ended:
        run_as_command(monkeypatch, "01_bpe", "--check", str(tmp_path / "answer.py"))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and not out and err.count("\n") == 1 and re.search(message, err), err


@pytest.mark.parametrize("name", NAMES)
def test_both_pages_show_the_picture_name_the_same_code_and_give_the_command(name):
    english, chinese = page("en", name), page("zh", name)
    assert set(REFERENCE.findall(english)) == set(REFERENCE.findall(chinese)) != set()
    for text, other in ((english, "zh"), (chinese, "en")):
        assert re.search(rf"!\[[^]]+\]\(\.\./pictures/{name}\.(svg|png)\)", text)
        assert f"](../{other}/{name}.md)" in text
        assert f"python lessons/{name}.py --check my_answer.py" in text


def test_nothing_is_left_over():
    for pattern in ("lessons/en/*.md", "lessons/zh/*.md", "lessons/pictures/*.*"):
        assert sorted(path.stem for path in ROOT.glob(pattern)) == NAMES
    assert set(ANSWERS) == set(NAMES)


def test_a_lesson_is_a_command_that_runs_small_without_a_picture(tmp_path):
    command = [sys.executable, ROOT / "lessons" / "01_bpe.py", "--small"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "= holds: " in done.stdout and "picture" not in done.stdout


def test_without_matplotlib_a_lesson_says_how_to_get_it(monkeypatch, capsys):
    import lesson

    monkeypatch.setattr(sys, "argv", ["lesson"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lesson.run(lambda small: (), pytest.fail, pytest.fail, asks="nothing")
    assert "pip install matplotlib" in capsys.readouterr().out


def test_a_claim_that_does_not_hold_is_an_error():
    import lesson

    with pytest.raises(AssertionError, match="does not hold: 1 = 2"):
        lesson.claim("1 = 2", 1 == 2)
