"""What the lessons share: their options, their claims, the look of their pictures, and the check of an exercise.

A lesson has three functions. `main(small)` computes, prints and claims, and returns what its picture shows;
`draw(...)` draws that; `check(answer)` tries a student's function. Its last line hands all three to `run`:

    python lessons/05_norms.py                        prints the numbers, claims, draws lessons/pictures/05_norms.svg
    python lessons/05_norms.py --small                a small size without a picture, as the tests run it
    python lessons/05_norms.py --check my_answer.py   says what is right or wrong in the answer to the exercise
"""

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "lessons" / "pictures"
LARGEST = 300_000  # bytes of a picture
# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#777777",
)  # fmt: skip
LOOK = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8.5,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False,
    "grid.alpha": 0.3, "lines.linewidth": 1.6, "image.cmap": "Blues", "savefig.dpi": 140, "svg.hashsalt": "plainGPT",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and claims


def claim(words: str, holds: object) -> None:
    """Print a claim that holds. Raises AssertionError if it does not. holds: anything with a truth value."""
    if not holds:
        raise AssertionError(f"does not hold: {words}")
    print(f"= holds: {words}")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their heads: text to the left, numbers to the right, floats with four digits that count."""
    cells = [[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    left = [isinstance(cell, str) for cell in rows[0]]
    for line in [list(heads), *cells]:
        fitted = [cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(line, widths, left, strict=True)]
        print("  " + "  ".join(fitted).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def figure(rows: int = 1, columns: int = 1, *, height: float = 3.4, **options):
    """Return (figure, axes) of matplotlib's `subplots` in the lessons' look, 7 inches wide: 700 pixels on a page.

    height: in inches. options: as `subplots` takes them, such as sharey or width_ratios.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(LOOK)
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(7, height), layout="constrained", **options)


def save(fig, name: str) -> None:
    """Write lessons/pictures/<name>, an .svg, or a .png where an .svg would be too large; the same figure, same bytes.

    name: or a whole path, for what is not kept with the lessons. Raises ValueError if the file has more than 300 KB.
    """
    from matplotlib import pyplot

    path = PICTURES / name
    PICTURES.mkdir(exist_ok=True)
    fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(fig)
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, more than {LARGEST:,}: draw less, or save it as a .png")
    print(f"the picture: {path.relative_to(PICTURES.parents[1])}")


# ---------------------------------------------------------------------------------------------------------------------
# The exercise


def expect(case: str, given: object, right: object, tolerance: float = 1e-5) -> None:
    """Raise ValueError, which says both, if an answer's result is not the right one.

    case: the call, as in "merge([1, 2, 1, 2], (1, 2), 9)". Tensors and floats may differ by the tolerance.
    """
    import torch

    if isinstance(right, torch.Tensor | float):
        a, b = (torch.as_tensor(x).double() for x in (given, right))
        if a.shape != b.shape:
            raise ValueError(f"{case} has the shape {tuple(a.shape)}, the right one is {tuple(b.shape)}")
        wrong = (~torch.isclose(a, b, rtol=tolerance, atol=tolerance)).nonzero().tolist()  # the places
        if not wrong:
            return
        case += f" at {wrong[0]}" if a.dim() else ""
        given, right = (x[tuple(wrong[0])].item() for x in (a, b))
    if given != right:
        given, right = (" ".join(repr(x).split()) for x in (given, right))
        raise ValueError(f"{case} gives {given:.200}, right is {right:.200}")


def place_of(error: BaseException, path: str) -> str:
    """Say where in the student's file an error came up, and what it was, in one line."""
    lines, message = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path], str(error)
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, message = [error.lineno], error.msg
    what = " ".join(f"{type(error).__name__}: {message}".split())
    return f"{path}, line {lines[-1]}: {what}" if lines else f"{path}: {what}"


def check_answer(path: str, asks: str, check: Callable[[Callable], None]) -> None:
    """Run a student's file and try its function `asks` with `check`.

    Raises ValueError, one line, if the file does not run, has no such function, or if its results are wrong.
    """
    names: dict[str, object] = {"__name__": "answer"}
    source = Path(path).read_bytes()
    try:
        exec(compile(source, path, "exec"), names)
    except (Exception, SystemExit) as error:
        raise ValueError(f"your file does not run: {place_of(error, path)}") from None
    if not callable(names.get(asks)):
        functions = [name for name, value in names.items() if callable(value)]
        raise ValueError(f"{path} must define the function {asks}; it defines {', '.join(functions) or 'none'}")

    def answer(*arguments):
        try:
            return names[asks](*arguments)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{asks} fails: {place_of(error, path)}") from None

    try:
        check(answer)
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:  # a result of another type
        raise ValueError(f"the result of {asks} cannot be used: {place_of(error, path)}") from None
    print(f"right: {asks} does what the exercise asks")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(main: Callable, draw: Callable, check: Callable[[Callable], None], asks: str) -> None:
    """Run the lesson that calls this, as its command line says.

    main(small) returns the arguments of draw, a tuple. check(answer) gets the student's function, whose name is `asks`,
    and raises ValueError, through `expect`, if it is wrong.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="run the claims at a small size, and draw nothing")
    parser.add_argument("--check", metavar="FILE", help=f"check your answer to the exercise: the function {asks}")
    options = parser.parse_args()

    def lesson() -> None:
        if options.check:
            return check_answer(options.check, asks, check)
        import torch

        torch.manual_seed(0)
        shown = main(options.small)
        if options.small:
            return
        if importlib.util.find_spec("matplotlib") is None:
            print("no picture is drawn, for matplotlib is not here: .venv/bin/pip install matplotlib")
            return
        draw(*shown)

    run_command(lesson)
