"""Classification: the class of a text, by a model that was pretrained on other texts.

Notable: every epoch takes the texts in an order of its own, and a batch is a pure function of (seed, step); each text
is a row, padded on the right, and padding is masked, so that the length of a batch changes nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from classifier import class_names
from common.spread import evenly
from decoding.classify import document_tokens
from decoding.stream import padded
from model import GPT, GPTConfig
from runs.start import Start
from tasks.packing import MULTIPLE
from tasks.task import Task, batch_starts, dataset_folder, draw_examples
from text.corpus import META
from text.labelled import Texts, read_labelled
from text.tokenizer import Tokenizer
from training.config import TrainConfig

SHOWN = 5  # validation texts in a preview
Example = tuple[list[int], int]  # tokens, and the number of the class


def classify_task(start: Start, config: TrainConfig, model_config: GPTConfig) -> tuple[Task, str]:
    """The task, and a line about its data. Sets model_config.classes.

    Raises ValueError for data that is missing or wrong, or without a run to start from, or one of another kind.
    """
    known = start.known
    if known is None:
        raise ValueError("objective=classify begins with a trained model: name its run, as in "
                         "--init_from=out/bert_pydocs")  # fmt: skip
    folder, texts = open_texts(config.dataset)
    classes = ",".join(texts.labels)
    if model_config.classes not in ("", classes):
        raise ValueError(f"{known.folder} tells apart {model_config.classes}, and {folder} has {classes}: start from "
                         "a run that is no classifier")  # fmt: skip
    model_config.classes = classes
    train, cut_train = make_examples(texts, "train", known.tokenizer, model_config.block_size)
    val, cut_val = make_examples(texts, "val", known.tokenizer, model_config.block_size)
    cut = (
        f"; {cut_train + cut_val:,} are cut off at block_size={model_config.block_size}" if cut_train + cut_val else ""
    )
    whole = config.batch_size * config.gradient_accumulation_steps

    def batch(step: int, rows: slice) -> dict[str, Tensor]:
        return collate(draw_examples(train, step, rows, config))

    def validation(rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        for start in batch_starts(len(val), config.batch_size, rank, world_size, config.eval_iters):
            yield collate(val[start : start + config.batch_size])

    task = Task(
        batch=batch,
        validation=validation,
        tokens_per_byte=None,
        tokens_per_step=round(whole * sum(len(tokens) for tokens, _ in train) / len(train)),
        steps_per_pass=len(train) / whole,
        fixed_shapes=False,
        tokenizer=known.tokenizer,
        preview=lambda model: preview_classes(model, texts, val),
    )
    return task, f"{folder}: {texts.summary()}{cut}"


def open_texts(dataset: str) -> tuple[Path, Texts]:
    """The labelled texts of that name under data/, or at that path, and their folder."""
    folder = dataset_folder(dataset, "train.jsonl")
    if not (folder / "train.jsonl").is_file():
        script = folder / "prepare.py"
        how = (
            f"run python {script}"
            if script.is_file() and not (folder / META).exists()
            else 'write train.jsonl and val.jsonl, with "text" and "label"'
        )
        raise ValueError(f"no labelled texts in {str(folder)!r}: {how}")
    return folder, read_labelled(folder)


def make_examples(texts: Texts, split: str, tokenizer: Tokenizer, block_size: int) -> tuple[list[Example], int]:
    """The texts of a split as the model reads them, and how many of them are cut off at block_size."""
    rows = texts.splits[split]
    found = [document_tokens(tokenizer, row.text, block_size) for row in rows]
    labels = [texts.labels.index(row.label) for row in rows]
    examples = [(tokens, label) for (tokens, _), label in zip(found, labels, strict=True)]
    return examples, sum(cut for _, cut in found)


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """A batch: idx and padding (B, T), True at real tokens, and targets (B,)."""
    idx, real = padded([tokens for tokens, _ in examples], multiple=MULTIPLE)
    return {"idx": idx, "padding": real, "targets": torch.tensor([label for _, label in examples])}


@torch.inference_mode()
def preview_classes(model: GPT, texts: Texts, examples: list[Example]) -> str:
    """The beginnings of a few validation texts, with the class that the model tells and the true one."""
    chosen, names = evenly(SHOWN, len(examples)), class_names(model.config)
    batch = collate([examples[i] for i in chosen])
    inputs = {name: batch[name].to(model.tok_emb.weight.device) for name in ("idx", "padding")}
    lines = []
    for i, row in zip(chosen, model(**inputs)[0].softmax(-1).tolist(), strict=True):
        told, (text, label) = names[row.index(max(row))], texts.splits["val"][i]
        lines.append(
            f"{told} {max(row):.0%}, {'right' if told == label else f'truly {label}'}: {' '.join(text.split())[:60]}"
        )
    return "\n".join(lines)
