"""Supervised fine-tuning (SFT): the next-token loss on the assistants' tokens only."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from common.config import above, at_least, check_ranges
from common.spread import evenly
from decoding.stream import generate
from model import GPT
from tasks.packing import Examples, Rows, make_examples
from tasks.task import Task, dataset_folder
from text.chat import Message, Template
from text.conversations import open_conversations
from training.config import TrainConfig
from training.lora import TARGETS

SHOWN = 3  # held-out questions that are answered aloud


@dataclass
class FinetuneConfig:
    """The settings that finetune.py has beside those of training."""

    num_epochs: float = 0.0  # passes over the training conversations; 0 = max_iters steps
    packing: bool = True  # several conversations per row; False: one per row, padded to the longest of its batch
    train_on_prompt: bool = False  # count the users' words in the loss too
    eval_questions: int = 50  # held-out questions that are answered at every sample_interval; 3 of them are shown
    eval_tokens: int = 100  # longest answer to one of them
    lora_rank: int = 0  # rank of LoRA's corrections; 0 = train all weights
    lora_alpha: float = 16.0  # their weight is lora_alpha / lora_rank
    lora_targets: str = ",".join(TARGETS)  # the layers that are corrected

    def __post_init__(self):
        check_ranges(
            self, num_epochs=at_least(0), eval_questions=at_least(1), eval_tokens=at_least(1), lora_rank=at_least(0),
            lora_alpha=above(0).at_most(10_000),
        )  # fmt: skip
        if self.lora_rank and not self.targets():
            raise ValueError(f"lora_targets must name layers to correct: one or more of {','.join(TARGETS)}")

    def targets(self) -> list[str]:
        """The names in lora_targets."""
        return [name.strip() for name in self.lora_targets.split(",") if name.strip()]


@dataclass
class Conversations:
    """A data set of conversations, as the model reads them."""

    train: Examples
    val: Examples
    template: Template
    questions: list[list[Message]]  # the conversations of the validation split
    unlearned: int  # answers of the training split with weight 0


def conversation_task(data: Conversations, config: TrainConfig, sft: FinetuneConfig, block_size: int) -> Task:
    """Predict the assistants' tokens. Validation counts responses only, even with train_on_prompt: runs compare."""
    if sft.train_on_prompt and data.unlearned:
        raise ValueError(
            f"train_on_prompt counts every word, and {data.unlearned} answers have weight 0, not to be learned: "
            "leave one of the two out"
        )
    train = Rows(data.train.examples, block_size, sft.packing, sft.train_on_prompt)
    val = Rows(data.val.examples, block_size, sft.packing)
    whole = config.batch_size * config.gradient_accumulation_steps

    def batch(step: int, part: slice) -> dict[str, Tensor]:
        return train.batch(step, config.seed, whole, part)

    def validation(rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        return val.all_batches(config.batch_size, rank, world_size, config.eval_iters)

    tokens_per_row = sum(len(example.tokens) - 1 for example in data.train.examples) / len(train.rows)
    return Task(
        batch=batch,
        validation=validation,
        tokens_per_byte=data.val.response_tokens / max(1, data.val.response_bytes),
        tokens_per_step=round(whole * tokens_per_row),
        steps_per_pass=len(train.rows) / whole,
        fixed_shapes=sft.packing,
        tokenizer=data.template.tokenizer,
        preview=lambda model: preview_answers(model, data.questions, data.template, sft),
    )


def set_length(config: TrainConfig, sft: FinetuneConfig, task: Task) -> None:
    """Where num_epochs is asked for: as many steps as these passes need, with an evaluation after each pass."""
    if sft.num_epochs:
        config.max_iters = max(1, math.ceil(sft.num_epochs * task.steps_per_pass))
        config.eval_interval = max(1, math.ceil(task.steps_per_pass))
        config.sample_interval = config.eval_interval if config.sample_interval else 0


def preview_answers(model: GPT, questions: list[list[Message]], template: Template, sft: FinetuneConfig) -> str:
    """A few held-out questions with the model's answers, and how many of all its answers end by themselves."""
    questions = [questions[i] for i in evenly(sft.eval_questions, len(questions))]
    answers = answer_questions(model, questions, template, sft.eval_tokens)
    lines = []
    for i in evenly(SHOWN, len(questions)):
        question = next(message["content"] for message in questions[i] if message["role"] == "user")
        text = template.tokenizer.decode(token for token in answers[i] if token != template.end_id)
        lines += [f"> {question}", text]
    ended = sum(tokens[-1] == template.end_id for tokens in answers)
    return "\n".join([*lines, f"{ended} of {len(answers)} answers end by themselves"])


def answer_questions(
    model: GPT, questions: list[list[Message]], template: Template, max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers to the first user message of each conversation, after its system message if it has one."""
    prompts = []
    for messages in questions:
        until = 1 + next(i for i, message in enumerate(messages) if message["role"] == "user")
        prompts.append(template.render(messages[:until], reply=True)[0])
    return generate(
        model, prompts, max_new_tokens, temperature=0, eos_id=template.end_id, vocab_size=template.tokenizer.vocab_size
    )


def load_conversations(dataset: str, template: Template, block_size: int) -> Conversations:
    """Read and render the data set of that name under data/, or at that path.

    ValueError: there is no such data set, or nothing to train on.
    """
    folder = dataset_folder(dataset, "train.jsonl")
    if not (folder / "train.jsonl").is_file():
        script = folder / "prepare.py"
        how = f"run python {script}" if script.is_file() else "python data/chat/prepare.py --input FILE --output DIR"
        raise ValueError(f"no prepared conversations in {str(folder)!r}: {how}")
    conversations = open_conversations(folder)
    splits = {split: make_examples(found, template, block_size) for split, found in conversations.items()}
    for split, found in splits.items():
        if not found.examples:
            raise ValueError(f"{folder / split}.jsonl: no answer fits into block_size={block_size}")
    unlearned = sum(message.get("weight", 1) == 0 for messages in conversations["train"] for message in messages)
    return Conversations(splits["train"], splits["val"], template, conversations["val"], unlearned)
