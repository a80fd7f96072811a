"""A foreign model becomes a run: its weights are copied tensor by tensor, in a precision that holds them."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from common.files import check_new, making, write_json
from formats.source import HUB, Foreign, is_hub_name, open_source
from formats.weights import Entry, dtype_of, our_shapes, read_weight, write_safetensors
from runs.checkpoint import FILES, seal
from runs.run import IMPORT, Origin, Run
from text.styles import PLAINGPT, default_system, detect_style


def import_run(foreign: Foreign, folder: Path, step: Callable[[int], object] = lambda size: None) -> Run:
    """Write the foreign model as a run in a new folder, whole or not at all; step(bytes) follows each tensor.

    Raises ValueError if something is in the folder already, or if it cannot be written.
    """
    check_new(folder, "--out_dir")
    style = detect_style(foreign.chat_template, foreign.tokenizer.special_tokens)
    run = Run(
        folder, foreign.config, {"model_type": foreign.model_type}, IMPORT, style is not None,
        origin=Origin(foreign.origin, ""), chat_style=style or PLAINGPT,
        default_system=default_system(foreign.chat_template) if style else "",
    )  # fmt: skip
    with making(folder) as temporary:
        checkpoint = temporary / "checkpoints" / "step_00000000"
        checkpoint.mkdir(parents=True)
        foreign.tokenizer.save(temporary)
        write_safetensors(checkpoint / FILES[0], entries(foreign), step)
        save_file({}, checkpoint / FILES[1])
        write_json(checkpoint / FILES[2], {"step": 0})
        shutil.copymode(checkpoint / FILES[2], checkpoint / FILES[1])  # safetensors lets only its owner read it
        seal(checkpoint)
        run.save_in(temporary)
    return run


def entries(foreign: Foreign) -> list[Entry]:
    """The model's weights under our names, to be read one at a time as they are written."""
    shapes, tensors = our_shapes(foreign.config), foreign.tensors
    return [
        Entry(name, shapes[name], dtype_of(tensors, weight), partial(read_weight, tensors, weight))
        for name, weight in foreign.renaming.weights.items()
    ]


def default_folder(source: str) -> Path:
    """Where a source is imported if nothing else is said: hf:Qwen/Qwen3-0.6B → out/Qwen_Qwen3-0.6B, a.gguf → out/a."""
    if is_hub_name(source):
        return Path("out") / source.removeprefix(HUB).replace("/", "_")
    path = Path(source).resolve()
    return Path("out") / (path.name if path.is_dir() else path.stem)


def imported(name: str) -> tuple[Run, list[str]]:
    """The run of a model that --init_from names (gpt2, hf:NAME), imported into out/ if it is not there yet; notes."""
    hub = name if name.startswith(HUB) else HUB + name
    folder = default_folder(hub)
    if folder.exists() and any(folder.iterdir()):
        run = Run.open(folder)
        if run.origin.source == hub:
            return run, []
        raise ValueError(f"{folder} is where {hub} would be imported, and it holds another run: move it first")
    foreign = open_source(hub)
    try:
        return import_run(foreign, folder), [f"{hub} was imported as {folder}", *foreign.notes]
    except (ValueError, OSError):
        if folder.exists():  # another process, such as torchrun starts, was faster
            return imported(name)
        raise
