"""Conversations: their template of special tokens, the mask of what the model is to say, and their files.

    <|endoftext|> <|user|> What is 1 + 1? <|end|> <|assistant|> 2. <|end|>
                                                                ^^ ^^^^^^^   the mask: what the assistant says

The mask is 1 on the assistant's words and on the <|end|> that stops generation, 0 on everything else. Only `Template`
makes special tokens: one that is spelled out in a message stays text, so that no message can speak for another role.
A file holds a conversation per line, {"messages": [{"role": "user", "content": "..."}, ...]}, or the Alpaca form
{"instruction", "input", "output"}; a .json file holds a list of the same.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from text.tokenizer import ExtendedTokenizer, Tokenizer

END = "<|end|>"
ROLES = ("system", "user", "assistant")
TOKENS = tuple(f"<|{role}|>" for role in ROLES) + (END,)

Message = dict[str, str]  # {"role": ..., "content": ...}


class Template:
    """Renders conversations with a tokenizer, to which the special tokens that it lacks are added."""

    def __init__(self, tokenizer: Tokenizer):
        missing = [name for name in TOKENS if name not in tokenizer.special_tokens]
        self.tokenizer = ExtendedTokenizer(tokenizer, missing) if missing else tokenizer
        self.ids = {name: self.tokenizer.special_tokens[name] for name in TOKENS}
        self.end_id = self.ids[END]

    def render(self, messages: list[Message], reply: bool = False) -> tuple[list[int], list[int]]:
        """(tokens, mask), equally long; with `reply`, up to where the assistant is to begin.

        ValueError for what is no conversation (see `check`), or for text that the tokenizer does not know.
        """
        check(messages, reply)
        eot = self.tokenizer.eot_id
        tokens, mask = ([], []) if eot is None else ([eot], [0])
        for message in messages:
            words = [*self.tokenizer.encode(message["content"]), self.end_id]
            tokens += [self.ids[f"<|{message['role']}|>"], *words]
            mask += [0, *[int(message["role"] == "assistant")] * len(words)]
        if reply:
            tokens.append(self.ids["<|assistant|>"])
            mask.append(0)
        return tokens, mask


def check(messages: object, reply: bool = False) -> None:
    """ValueError unless messages alternate: perhaps a system's, then user, assistant, …, ending with the assistant's.

    With `reply` they must end with the user's.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of at least one message')
    for i, message in enumerate(messages):
        match message:
            case {"role": str(role), "content": str(content)} if role in ROLES:
                try:
                    content.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"message {i} holds half a surrogate pair, which is no character") from None
            case {"role": role, "content": str()}:
                raise ValueError(f"message {i} has the role {str(role)[:40]!r}: it must be one of {', '.join(ROLES)}")
            case _:
                raise ValueError(f'message {i} must be an object with "role" and "content", both strings')
        if role == "assistant" and not content.strip():
            raise ValueError(f"message {i}, the assistant's, is empty: there is nothing to learn from it")
    turns = [message["role"] for message in messages]
    turns = turns[turns[0] == "system" :]
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if turns != expected:
        wrong = next(i for i, pair in enumerate(zip(turns, expected, strict=True)) if pair[0] != pair[1])
        raise ValueError(f"{turns[wrong]} speaks where it is {expected[wrong]}'s turn: after a system message, if any, "
                         "user and assistant take turns, and user begins")  # fmt: skip
    if not reply and "assistant" not in turns:
        raise ValueError("there is no assistant message to learn from")
    if turns[-1:] != ["user" if reply else "assistant"]:
        raise ValueError(f"the last message must be the {'user' if reply else 'assistant'}'s")


# --- files -------------------------------------------------------------------------------------------------------


def messages_of(row: object) -> list[Message]:
    """The messages of one line: of the form with "messages", or of Alpaca's. ValueError for anything else."""
    match row:
        case {"messages": messages}:
            check(messages)
            return [{"role": message["role"], "content": message["content"]} for message in messages]
        case {"instruction": str(instruction), "output": str(output)}:
            more = row.get("input") or ""
            if not isinstance(more, str):
                raise ValueError('"input" must be a string')
            question = f"{instruction}\n\n{more}" if more.strip() else instruction
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
            check(messages)
            return messages
    found = f"the fields {', '.join(map(str, row))[:200]}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise ValueError(f'an object with "messages", or with "instruction" and "output", is needed, not {found}')


def read_conversations(path: str | Path, skip_empty: bool = False) -> Iterator[list[Message]]:
    """The conversations of a .jsonl file (one per line) or of a .json file (a list).

    ValueError with the file and the line (.json: the item) that is not one; skip_empty passes over those of the Alpaca
    form whose output is empty, and says how many on stderr.
    """
    path = Path(path)
    listed = path.suffix.lower() == ".json"
    try:
        if listed:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError(f"{path}: a .json file must hold a list of conversations; one per line is .jsonl")
            places = ((f"item {i}", row) for i, row in enumerate(rows, 1))
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            places = ((f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    skipped = 0
    for place, row in places:
        try:
            row = row if listed else json.loads(row)
            if skip_empty and isinstance(row, dict) and row.get("output") in ("", None) and "instruction" in row:
                skipped += 1
                continue
            yield messages_of(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, {place}: not valid JSON ({error.msg}, column {error.colno})") from None
        except RecursionError:
            raise ValueError(f"{path}, {place}: not valid JSON (nested too deeply)") from None
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
    if skipped:
        print(f"{path}: {skipped:,} without an answer left out", file=sys.stderr)
