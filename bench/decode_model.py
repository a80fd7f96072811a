"""Tokens per second of a real model: ours, transformers' and llama.cpp's, in several precisions, in one run.

    python bench/decode.py --model=out/smollm2 [--new=64] [--repeat=5]

The run is exported for the others first: as a folder for transformers, as GGUF files in float16 and q8_0 for llama.cpp
(pip install llama-cpp-python; left out if it is missing). One prompt, greedy, as many threads as cores. The engines
take turns; medians. Reading the prompt is not counted.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decoding.fast import speed_up  # noqa: E402
from decoding.stream import stream  # noqa: E402
from runs.run import Run  # noqa: E402

PROMPT = "The history of the city begins long before the first walls were built, when"


def export(run: Path, to: Path, *options: str) -> str:
    """Export the run; returns the path as a string."""
    command = [sys.executable, str(ROOT / "convert.py"), "export", f"--out_dir={run}", f"--to={to}", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(to)


def rate(tokens: Iterator, new: int) -> float:
    """Tokens per second of an iterator of new tokens, from the first on: before it, the prompt is read."""
    next(tokens)
    begin = time.perf_counter()
    for _ in range(new - 1):
        next(tokens)
    return (new - 1) / (time.perf_counter() - begin)


def ours(run: Run, prompt: list[int], new: int, dtype: torch.dtype, quantize: str) -> Callable[[], float]:
    """How fast our decoding is."""
    model = speed_up(run.load_model(dtype=None if quantize == "int8" else dtype), 1, quantize)
    return lambda: rate(iter(stream(model, [prompt], new, temperature=0)), new)


def theirs(folder: str, prompt: list[int], new: int, dtype: torch.dtype) -> Callable[[], float]:
    """How fast transformers' generate is: the time of all new tokens less that of one."""
    from transformers import AutoModelForCausalLM

    model, idx = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), torch.tensor([prompt])

    def seconds(n: int) -> float:
        begin = time.perf_counter()
        model.generate(idx, attention_mask=torch.ones_like(idx), min_new_tokens=n, max_new_tokens=n, do_sample=False,
                       pad_token_id=0)  # fmt: skip
        return time.perf_counter() - begin

    return lambda: (new - 1) / (seconds(new) - seconds(1))


def llama_cpp(file: str, prompt: list[int], new: int) -> Callable[[], float]:
    """How fast llama.cpp is."""
    from llama_cpp import Llama

    model = Llama(file, n_ctx=len(prompt) + new + 1, n_threads=torch.get_num_threads(), verbose=False)
    return lambda: rate(model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), new)


def measure_model(path: Path, new: int, repeat: int) -> None:
    """Print the table for a run: `new` tokens after one prompt, the median of so many rounds."""
    run = Run.open(path)
    prompt = run.tokenizer.encode(PROMPT)
    with tempfile.TemporaryDirectory() as name:
        folder = export(path, Path(name, "hub"))
        engines = {
            "plainGPT, float32": ours(run, prompt, new, torch.float32, "none"),
            "plainGPT, bfloat16": ours(run, prompt, new, torch.bfloat16, "none"),
            "plainGPT, int8": ours(run, prompt, new, torch.float32, "int8"),
            "transformers, float32": theirs(folder, prompt, new, torch.float32),
            "transformers, bfloat16": theirs(folder, prompt, new, torch.bfloat16),
        }
        if find_spec("llama_cpp"):
            for label, dtype in (("F16", "float16"), ("Q8_0", "q8_0")):
                file = export(path, Path(name, f"{dtype}.gguf"), f"--dtype={dtype}")
                engines[f"llama.cpp, {label}"] = llama_cpp(file, prompt, new)
        speeds: dict[str, list[float]] = {label: [] for label in engines}
        for _ in range(repeat):
            for label, measure in engines.items():
                speeds[label].append(measure())
    print(f"{run.folder}, {torch.get_num_threads()} threads, {new} tokens after {len(prompt)}, greedy\n")
    print("| engine | tokens/s |\n|---|---|")
    for label, found in speeds.items():
        print(f"| {label} | {statistics.median(found):.1f} |")
