"""nanoGPT as a peer: its model.py, read from a clone of https://github.com/karpathy/nanoGPT and never copied."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def nanogpt_module(clone: str | Path) -> ModuleType:
    """nanoGPT's model.py under a name of its own, as both projects call that file model.py.

    Raises ValueError if there is no such file in the clone.
    """
    path = Path(clone) / "model.py"
    if not path.is_file():
        raise ValueError(f"{clone} is not a clone of nanoGPT: it has no model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
