"""Pictures: figures of matplotlib, an optional package, written whole or not at all.

matplotlib is imported when a picture is drawn, so commands that draw none neither need it nor wait for it. The settings
are always its defaults, whatever the user's own are, and nothing opens a window.
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # the same figure gives the same file
LOOK = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.titlesize": 10, "axes.titlelocation": "left", "svg.fonttype": "none", "svg.hashsalt": "plaingpt",
    "savefig.dpi": 150,
}  # fmt: skip


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def picture(path: str | os.PathLike, width: float, height: float) -> Iterator["Figure"]:
    """Yield a figure of that size, in inches, and write it to `path` when the block ends. Raises WriteError.

    path: its ending, one of FORMATS, decides the format. A letter that matplotlib's font lacks is drawn as a box, with
    a warning, except in SVG, where the text stays text and the viewer's fonts have it.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it tells that it makes a cache of fonts
    from matplotlib import style
    from matplotlib.figure import Figure

    kind = Path(path).suffix.lower()
    with style.context(["default", LOOK]), warnings.catch_warnings():
        if kind == ".svg":
            warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path, "wb") as file:
            figure.savefig(file, format=kind[1:], metadata=NO_DATE.get(kind))
