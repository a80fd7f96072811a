"""The corrections of a run with LoRA as an adapter of the package peft, which applies them to the base model it names.

peft corrects each matrix by itself where ours may be stacked: queries, keys and values then share A, and each has its
rows of B. Sources: Hu et al. 2021; the file names and keys of peft's save_pretrained.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from common.files import write_json
from formats.export import exported, target
from formats.weights import Entry, write_safetensors
from model import GPTConfig

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_adapter(
    folder: Path, config: GPTConfig, rank: int, alpha: float, targets: tuple[str, ...], base: str,
    read: Callable[[str], Tensor],
) -> None:  # fmt: skip
    """Write an adapter into a folder that is there.

    targets: our names of the corrected layers, such as "qkv". base: what peft loads the base model from.
    read: the correction of that name, such as blocks.0.attention.qkv.lora_A.
    """
    kind = target(config)
    _, renaming, _ = exported(config, kind)
    entries, modules = [], set()
    for ours, weight in renaming.weights.items():
        layer, _, end = ours.rpartition(".")
        if end != "weight" or layer.rpartition(".")[2] not in targets or not layer.startswith("blocks."):
            continue
        A, B = read(f"{layer}.lora_A"), read(f"{layer}.lora_B")
        for name, rows in zip(weight.names, B.split(list(weight.rows)), strict=True):
            module = name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            entries += [entry(module, "lora_A", A), entry(module, "lora_B", rows)]
    write_safetensors(folder / FILE, entries)
    content: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(modules), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "fan_in_fan_out": kind == "gpt2",  # GPT-2 keeps its matrices as (in, out)
    }  # fmt: skip
    write_json(folder / CONFIG, content)


def entry(module: str, part: str, tensor: Tensor) -> Entry:
    """One of the two factors of a correction, under peft's name."""
    return Entry(f"base_model.model.{module}.{part}.weight", tuple(tensor.shape), tensor.dtype, tensor.clone)
