"""Convert the common forms of conversation data to the messages of text/chat.py.

  a list of messages   "messages", "conversations", "conversation" or "data": objects with "role" and "content", or with
                       "from" and "value" (ShareGPT), or with "human" and "assistant"; or just strings, the user's first
  question and answer  "instruction", "prompt", "question", "query" or "input", with "output", "completion", "response",
                       "answer" or "target"; the question may go on in "input" or "context"; earlier turns in "history"

In both forms "system" or "system_prompt" becomes the system message. Content that a conversation needs but text cannot
hold (tool calls, images) is an error. All other unknown fields are dropped, and their names are counted.
"""

from collections import Counter
from typing import NoReturn

from text.chat import BadConversation, Message, Role, check

LISTS = ("messages", "conversations", "conversation", "data")
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "completion", "response", "answer", "target")
SYSTEMS = ("system", "system_prompt")
WEIGHTS = ("weight", "train", "training", "loss")  # whether a message counts in the loss
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NOTHING = (None, "", [], {})  # values of an empty field, which can be dropped

ROLE_NAMES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
}
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "function_response", "tool_response")
TOOL_PARTS = ("tool_use", "tool_result", "tool_call", "tool_response")
THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")


def messages_of(row: object, left_out: Counter[str] | None = None) -> list[Message]:
    """Return the checked messages of a row in any of the forms above; count its unknown fields in `left_out`.

    Raises BadConversation if the row has none of these forms, or if it cannot be trained on.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise BadConversation("no known form", f"a conversation must be an object, not {_kind(row)}")
    for name in MEDIA:
        if row.get(name) not in NOTHING:
            _refuse_content(f'there is "{name}" beside the text')
    fields: set[str] = set()
    listed = next((name for name in LISTS if row.get(name) is not None), None)
    if listed:
        messages, used = _from_list(row[listed], f'"{listed}"', fields), {listed}
    else:
        messages, used = _from_pair(row, fields)
    for name in SYSTEMS:
        messages = _with_system(row.get(name), f'"{name}"', messages, fields)
    check(messages)
    fields |= {str(name) for name in row if name not in {*used, *SYSTEMS} and row[name] not in NOTHING}
    if left_out is not None:
        left_out.update(fields)
    return messages


# --- a list of messages ------------------------------------------------------------------------------------------


def _from_list(items: object, where: str, fields: set[str]) -> list[Message]:
    if not isinstance(items, list):
        _refuse_type(where, "a list of messages", items)
    if items and all(isinstance(item, str) for item in items):
        return [{"role": ("user", "assistant")[i % 2], "content": item} for i, item in enumerate(items)]
    messages = []
    for number, item in enumerate(items, 1):
        messages += _from_item(item, f"message {number}", fields)
    return messages


def _from_item(item: object, where: str, fields: set[str]) -> list[Message]:
    """Convert one item of a list: return its message, or the two messages of {"human": ..., "assistant": ...}."""
    if not isinstance(item, dict):
        _refuse_type(where, 'an object with "role" and "content"', item)
    if item.get("tool_calls") not in NOTHING or item.get("function_call") not in NOTHING:
        _refuse_tools(where)
    for name in MEDIA:
        if item.get(name) not in NOTHING:
            _refuse_content(f'{where} has "{name}"')
    role_key = next((name for name in ("role", "from") if name in item), None)
    text_key = next((name for name in ("content", "value", "text") if name in item), None)
    if role_key and text_key:
        message: Message = {"role": _role(item[role_key], f'{where}: "{role_key}"'), "content": ""}
        message["content"] = _text(item[text_key], f'{where}: "{text_key}"', fields)
        used, messages = {role_key, text_key}, [message]
    elif "human" in item and "assistant" in item:
        pair = {"user": "human", "assistant": "assistant"}
        messages = [
            {"role": role, "content": _text(item[key], f'{where}: "{key}"', fields)} for role, key in pair.items()
        ]
        used = set(pair.values())
    else:
        found = f"only the fields {_names(item)}"
        message = f'{where} must be an object with "role" and "content" (or "from" and "value"); it has {found}'
        raise BadConversation("a message without role or content", message)
    weights = [_weight(item[name], f'{where}: "{name}"') for name in WEIGHTS if item.get(name) is not None]
    if weights:
        messages[-1]["weight"] = min(weights)
    fields |= {f"{name} of a message" for name in item if name not in {*used, *WEIGHTS} and item[name] not in NOTHING}
    return messages


def _role(value: object, where: str) -> Role:
    if not isinstance(value, str):
        _refuse_type(where, "a string", value)
    name = value.strip().lower()
    if name in TOOL_ROLES:
        _refuse_tools(f"{where} is {value!r}")
    if name not in ROLE_NAMES:
        known = ", ".join(ROLE_NAMES)
        raise BadConversation("an unknown role", f"{where} is {value[:40]!r}; the known roles are {known}")
    return ROLE_NAMES[name]


def _text(content: object, where: str, fields: set[str]) -> str:
    """Return the text of a message; `content` is a string or a list of text parts, which are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse_type(where, "a string or a list of text parts", content)
    return "".join(_part(part, where, fields) for part in content)


def _part(part: object, where: str, fields: set[str]) -> str:
    match part:
        case str():
            return part
        case {"type": str(kind)} if kind in TOOL_PARTS:
            _refuse_tools(where)
        case {"type": str(kind)} if kind in THOUGHT_PARTS:
            fields.add(f"{kind} of a message")
            return ""
        case {"type": "text" | "input_text" | "output_text", "text": str(text)} | {"text": str(text)}:
            used = ("type", "text")
            fields.update(f"{name} of a text part" for name in part if name not in used and part[name] not in NOTHING)
            return text
    kind = f"type {part['type']!r}" if isinstance(part, dict) and "type" in part else _kind(part)
    _refuse_content(f"{where} has a part of {kind}")


def _weight(value: object, where: str) -> int:
    if value not in (0, 1):  # false and true count as 0 and 1
        raise BadConversation("a weight other than 0 and 1", f"{where} must be 0 or 1, not {value!r}")
    return int(value)


# --- question and answer -----------------------------------------------------------------------------------------


def _from_pair(row: dict, fields: set[str]) -> tuple[list[Message], set[str]]:
    """Return the messages of a row with question and answer, and the names of the fields that it used."""
    question = next((name for name in QUESTIONS if row.get(name) is not None), None)
    answers = [name for name in ANSWERS if name in row]
    if question is None:
        forms = '"messages", "conversations", "instruction" with "output", "prompt" with "completion" and some others'
        advice = f"the forms that are read have {forms} (python data/chat/prepare.py --help)"
        raise BadConversation("no known form", f"no conversation is found in the fields {_names(row)}: {advice}")
    if not answers:
        usual = "completion" if question == "prompt" else "output"
        others = ", ".join(name for name in ANSWERS if name != usual)
        message = f'there is no "{usual}" beside "{question}" (nor {others}), only the fields {_names(row)}'
        raise BadConversation("no field with an answer", message)
    answer = next((name for name in answers if row[name] is not None), answers[0])
    if isinstance(row[question], list):
        return _from_prompt(row, question, answer, fields), {question, answer}
    context = next((name for name in CONTEXTS if name != question and row.get(name) is not None), None)
    parts = [_string(row[name], f'"{name}"') for name in (question, context) if name]
    asked = "\n\n".join(part for part in parts if part.strip())
    said = "" if row[answer] is None else _string(row[answer], f'"{answer}"')
    texts = [*_history(row.get("history")), asked, said]
    return _from_list(texts, "", fields), {question, answer, context, "history"}


def _from_prompt(row: dict, question: str, answer: str, fields: set[str]) -> list[Message]:
    """Return the messages of a prompt that is a list of messages, and of its completion, which alone has weight 1."""
    prompt = _from_list(row[question], f'"{question}"', fields)
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0
    if isinstance(row[answer], list):
        return prompt + _from_list(row[answer], f'"{answer}"', fields)
    return [*prompt, {"role": "assistant", "content": _string(row[answer], f'"{answer}"')}]


def _history(history: object) -> list[str]:
    """Flatten earlier turns: [[question, answer], ...] → [question, answer, ...]."""
    if history is None:
        return []
    if not isinstance(history, list):
        _refuse_type('"history"', "a list of [question, answer] pairs", history)
    texts = []
    for number, pair in enumerate(history, 1):
        match pair:
            case [str(question), str(answer)]:
                texts += [question, answer]
            case _:
                _refuse_type(f'item {number} of "history"', "a pair [question, answer] of strings", pair)
    return texts


# --- both --------------------------------------------------------------------------------------------------------


def _with_system(system: object, where: str, messages: list[Message], fields: set[str]) -> list[Message]:
    """Put the system message before the messages, unless it is empty or already there."""
    text = "" if system is None else _text(system, where, fields)
    if not text.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != text:
            message = f"{where} and the first message are two different system messages"
            raise BadConversation("two system messages", message)
        return messages
    return [{"role": "system", "content": text}, *messages]


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        _refuse_type(where, "a string", value)
    return value


def _refuse_type(where: str, expected: str, found: object) -> NoReturn:
    raise BadConversation("a wrong type", f"{where} must be {expected}, not {_kind(found)}")


def _refuse_tools(where: str) -> NoReturn:
    raise BadConversation("tool calls", f"{where}: tool calls and their results are not supported")


def _refuse_content(what: str) -> NoReturn:
    raise BadConversation("content that is not text", f"{what}: only text can be trained on")


def _kind(value: object) -> str:
    """Return the name of the value's JSON type, with an article."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def _names(row: dict) -> str:
    return ", ".join(map(str, row))[:200] or "(none)"
