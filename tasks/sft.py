"""Supervised fine-tuning (SFT): the next-token loss on the assistants' tokens only."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from decoding.stream import generate
from model import GPT
from tasks.packing import Examples, Rows, make_examples
from tasks.task import Task, dataset_folder
from text.chat import Message, Template, read_conversations
from training.config import TrainConfig
from training.lora import TARGETS

SHOWN = 3  # held-out questions that are answered aloud


@dataclass
class FinetuneConfig:
    packing: bool = True  # several conversations per row; False: one per row, padded to the longest of its batch
    train_on_prompt: bool = False  # count the users' words in the loss too
    eval_questions: int = 50  # held-out questions that are answered at every sample_interval; 3 of them are shown
    eval_tokens: int = 100  # longest answer to one of them
    lora_rank: int = 0  # rank of LoRA's corrections; 0 = train all weights
    lora_alpha: float = 16.0  # their weight is lora_alpha / lora_rank
    lora_targets: str = ",".join(TARGETS)  # the layers that are corrected

    def __post_init__(self):
        for name, low in {"eval_questions": 1, "eval_tokens": 1, "lora_rank": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 < self.lora_alpha <= 10_000:
            raise ValueError(f"lora_alpha must be above 0 and at most 10000, not {self.lora_alpha}")
        if self.lora_rank and not self.targets():
            raise ValueError(f"lora_targets must name layers to correct: one or more of {','.join(TARGETS)}")

    def targets(self) -> list[str]:
        return [name.strip() for name in self.lora_targets.split(",") if name.strip()]


def conversation_task(
    splits: dict[str, Examples], questions: list[list[Message]], template: Template, config: TrainConfig,
    more: FinetuneConfig, block_size: int,
) -> Task:  # fmt: skip
    """Say what the assistants say."""
    rows = {
        "train": Rows(splits["train"].examples, block_size, more.packing, more.train_on_prompt),
        "val": Rows(splits["val"].examples, block_size, more.packing),  # responses only, so that runs compare
    }
    whole = config.batch_size * config.gradient_accumulation_steps

    def batch(step: int, part: slice) -> dict[str, Tensor]:
        return rows["train"].batch(step, config.seed, whole, part)

    def validation(rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        return rows["val"].all_batches(config.batch_size, rank, world_size, config.eval_iters)

    per_row = sum(len(example.tokens) - 1 for example in splits["train"].examples) / len(rows["train"].rows)
    val = splits["val"]
    return Task(
        batch, validation, val.response_tokens / max(1, val.response_bytes), round(whole * per_row), template.tokenizer,
        lambda model: preview(model, questions, template, more),
    )  # fmt: skip


def preview(model: GPT, questions: list[list[Message]], template: Template, more: FinetuneConfig) -> str:
    """A few held-out questions with the model's answers, and how many of all its answers end by themselves."""
    n = min(len(questions), more.eval_questions)
    questions = [questions[i * len(questions) // n] for i in range(n)]  # from everywhere
    answers = answer(model, questions, template, more.eval_tokens)
    lines = []
    for i in range(0, n, -(-n // SHOWN)):
        question = next(message["content"] for message in questions[i] if message["role"] == "user")
        text = template.tokenizer.decode(token for token in answers[i] if token != template.end_id)
        lines += [f"> {question}", text]
    ended = sum(tokens[-1] == template.end_id for tokens in answers)
    return "\n".join([*lines, f"{ended} of {len(answers)} answers end by themselves"])


def answer(model: GPT, questions: list[list[Message]], template: Template, max_new_tokens: int) -> list[list[int]]:
    """Greedy answers to the first user message of each conversation, after its system message if it has one."""
    prompts = []
    for messages in questions:
        until = 1 + next(i for i, message in enumerate(messages) if message["role"] == "user")
        prompts.append(template.render(messages[:until], reply=True)[0])
    return generate(
        model, prompts, max_new_tokens, temperature=0, eos_id=template.end_id, vocab_size=template.tokenizer.vocab_size
    )


def load_splits(config: TrainConfig, template: Template, block_size: int) -> tuple[dict[str, Examples], list]:
    """Each split's examples, and the validation conversations. ValueError: no such data set, or nothing to train on."""
    folder = dataset_folder(config.dataset, "train.jsonl")
    if not (folder / "train.jsonl").is_file():
        script = folder / "prepare.py"
        how = f"run python {script}" if script.is_file() else "python data/chat/prepare.py --input FILE --output DIR"
        raise ValueError(f"no prepared conversations in {str(folder)!r}: {how}")
    conversations = {split: list(read_conversations(folder / f"{split}.jsonl")) for split in ("train", "val")}
    splits = {split: make_examples(found, template, block_size) for split, found in conversations.items()}
    for split, found in splits.items():
        if not conversations[split]:
            raise ValueError(f"{folder / split}.jsonl holds no conversation")
        if not found.examples:
            raise ValueError(f"{folder / split}.jsonl: no answer fits into block_size={block_size}")
    return splits, conversations["val"]
