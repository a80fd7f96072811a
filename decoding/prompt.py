"""Prompts: a text to continue, or for a fine-tuned model a conversation to answer, and how they become tokens.

A prompt comes from --prompt, from a chat, or from a file of prompts: a .txt file with one per line, or a
.jsonl file with an object per line, {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}. An object
may also have a "system", and any other fields, such as an id, which its answer repeats.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.textfile import check_text, unique_fields
from decoding.stream import prompt_tokens
from model import GPT
from text.chat import Message, Template
from text.tokenizer import Tokenizer

# The fields that an answer adds to those of its prompt
ANSWER_FIELDS = ("text", "finish", "score", "logprob", "tokens", "logprobs")


@dataclass
class TextModel:
    """A model with its tokenizer and its chat template."""

    gpt: GPT
    tokenizer: Tokenizer
    template: Template | None  # None for a base model, which knows no roles

    @property
    def eos_id(self) -> int | None:
        """The token with which the model ends its text."""
        return self.template.end_id if self.template else self.tokenizer.eot_id

    @property
    def translates(self) -> bool:
        """Whether the model is an encoder–decoder, whose prompt is a source and whose text is the target."""
        return self.gpt.config.n_encoder_layer > 0

    @property
    def block_size(self) -> int:
        """Length of the context: the most tokens that the model sees at once."""
        return self.gpt.config.block_size


@dataclass
class Question:
    """A prompt as the user gave it."""

    fields: dict[str, Any]  # "prompt" or "messages", perhaps "system", and whatever else its line holds
    place: str = ""  # its file and line, for messages


@dataclass
class Prompt:
    """A prompt as the model reads it."""

    question: Question
    tokens: list[int]
    shown: str  # the text to print before the model's
    begins: bool  # whether the model's text is one of its own, and does not continue the prompt's


def read_text(path: str, what: str) -> str:
    """Return a file's text, its line breaks as they are. Raises ValueError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"cannot read the {what} {path}: it is not UTF-8 text (line {line})") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from None


def typed_text(text: str, what: str) -> str:
    """Return the text that a user typed. Raises ValueError if it is not UTF-8.

    Bytes that the locale cannot decode arrive as lone surrogates; if they are UTF-8 after all, they are read as such.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except ValueError:
        raise ValueError(f"{what} is not UTF-8 text: set the terminal to UTF-8, or correct it") from None


def text_or_file(option: str, what: str) -> str:
    """Return the option's text, or for FILE:path the text of that file."""
    if option.startswith("FILE:"):
        return read_text(option.removeprefix("FILE:"), f"file of {what}")
    return typed_text(option, what)


# ---------------------------------------------------------------------------------------------------------------------
# Files of prompts


def read_questions(path: str) -> list[Question]:
    """Read prompts from a .txt file (one per line), a .jsonl file (an object per line) or a .json file (a list).

    Blank lines are skipped. Raises ValueError with the file and the line for a prompt that cannot be read.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".txt", ".jsonl", ".json"):
        raise ValueError(f"{path}: prompts are read from a .jsonl, .json or .txt file; the end of its name tells which")
    text = read_text(path, "file of prompts")
    if kind == ".json":
        rows = parse_json(text, path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a .json file must hold a list of prompts; one object per line is .jsonl")
        places = [(f"{path}, item {i}", row) for i, row in enumerate(rows, start=1)]
    else:
        lines = [(f"{path}, line {i}", line.rstrip("\r")) for i, line in enumerate(text.split("\n"), start=1)]
        lines = [(place, line) for place, line in lines if line.strip()]
        places = [(place, {"prompt": line} if kind == ".txt" else parse_json(line, place)) for place, line in lines]
    if not places:
        raise ValueError(f"{path} holds no prompts")
    return [Question(check_fields(row, place), place) for place, row in places]


def parse_json(text: str, place: str) -> object:
    """Parse a JSON value. Raises ValueError with the place."""

    def refuse(name: str) -> None:
        raise json.JSONDecodeError(f"{name} is no number", text, text.find(name))

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique_fields)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"{place}: not valid JSON ({error.msg}, {where})") from None
    except (ValueError, RecursionError) as error:  # a field that occurs twice, thousands of digits or of brackets
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def check_fields(row: object, place: str) -> dict[str, Any]:
    """Return the row. Raises ValueError with the place if it is not a prompt."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{place}: an object with either "prompt" or "messages" is needed')
    for name in ("prompt", "system"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f'{place}: "{name}" must be a string')
        try:
            check_text(row.get(name, ""))
        except ValueError:
            raise ValueError(f'{place}: "{name}" holds half a surrogate pair, which is no character') from None
    for name in ANSWER_FIELDS:
        if name in row:
            raise ValueError(f'{place}: the answer has a field "{name}" of its own: rename this one')
    messages = row.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        unknown = sorted(message.keys() - {"role", "content"}) if isinstance(message, dict) else []
        if unknown:
            raise ValueError(
                f"{place}: message {i} has the field {unknown[0]!r}; a prompt's messages have role and content only"
            )
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Prompts to tokens


def make_prompts(model: TextModel, questions: list[Question], system: str) -> list[Prompt]:
    """Turn every question into a prompt. Raises ValueError with the place of a question that this model cannot read.

    system: the system message for questions without one.
    """
    prompts = []
    for question in questions:
        try:
            prompts.append(make_prompt(model, question, system))
        except ValueError as error:
            raise ValueError(f"{question.place}: {error}" if question.place else str(error)) from None
    return prompts


def make_prompt(model: TextModel, question: Question, system: str = "") -> Prompt:
    """Turn a question into tokens: a text to continue, a source to translate, or a conversation up to its answer.

    Raises ValueError if this model cannot read the question.
    """
    fields = question.fields
    if model.template is not None:
        tokens, _ = model.template.render(conversation(fields, system), reply=True)
        return Prompt(question, tokens, shown="", begins=True)
    if "messages" in fields or fields.get("system", system):
        what = (
            "translates a source: give it" if model.translates else "continues a text: fine-tune it first, or give it"
        )
        raise ValueError(f"this is a base model, which knows no messages, the system's included, and {what} a prompt")
    text = fields["prompt"]
    if model.translates:
        return Prompt(question, source_tokens(model, text), shown="", begins=True)
    return Prompt(question, prompt_tokens(model.tokenizer, text), shown=text, begins=text == "")


def source_tokens(model: TextModel, text: str) -> list[int]:
    """Encode a source, and the token that begins its target. Raises ValueError if it is empty or too long."""
    tokens = model.tokenizer.encode(text)
    if not 0 < len(tokens) <= model.block_size:
        raise ValueError(f"this model translates a --prompt of 1 to {model.block_size} tokens, not of {len(tokens)}")
    return [*tokens, model.tokenizer.eot_id]


def conversation(fields: dict, system: str) -> list[Message]:
    """Return the messages of a question, with the system message first if there is one."""
    if fields.get("prompt") == "":
        raise ValueError("this model was fine-tuned to answer: give it a --prompt, or talk with it by --chat")
    system = fields.get("system", system)
    begin = [{"role": "system", "content": system}] if system else []
    if "prompt" in fields:
        return [*begin, {"role": "user", "content": fields["prompt"]}]
    match fields["messages"]:
        case [{"role": "system"}, *_] as messages:
            if "system" in fields:
                raise ValueError('there are two system messages, one in "system" and one in "messages"')
            return messages
        case [*messages]:
            return [*begin, *messages]
        case messages:
            return messages  # not a list: `Template.render` raises the error
