"""The chat template: a conversation as tokens, and a mask of the tokens that count in the loss.

    <|endoftext|> <|user|> What is 1 + 1? <|end|> <|assistant|> 2. <|end|>
                                                                ^^ ^^^^^^^   mask = 1

The mask is 1 on the assistant's text and on the token that stops generation, and 0 elsewhere. The model reads an
assistant message with "weight": 0 but does not learn it: its mask is 0 throughout. The example is in this project's
own style; imported models have others (text/styles.py). Only `Template` makes special tokens. If a message spells one
out, it is encoded as ordinary text, so no message can speak for another role.
"""

import re
from collections.abc import Iterable
from typing import Literal, NotRequired, TypedDict, get_args

from text.styles import END_OF_TEXT, PLAINGPT, STYLES, jinja
from text.tokenizer import Tokenizer, start_id, with_special_tokens

Role = Literal["system", "user", "assistant"]

ROLES: tuple[Role, ...] = get_args(Role)
EMPTY_ANSWER = "an empty answer"  # the reason of a BadConversation


class Message(TypedDict):
    """What one of those who talk says."""

    role: Role
    content: str
    weight: NotRequired[Literal[0, 1]]  # 0: the loss ignores this assistant message; the default is 1


class BadConversation(ValueError):
    """A conversation that cannot be trained on. `reason` names the kind of fault; reports count by it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Template:
    """Renders conversations with a tokenizer, in a style of text/styles.py.

    default_system: the system message of conversations that have none; "" for none.
    Our own style adds the special tokens that the tokenizer lacks. Raises ValueError if another style lacks one.
    """

    def __init__(self, tokenizer: Tokenizer, style: str = PLAINGPT, default_system: str = ""):
        if style not in STYLES:
            raise ValueError(f"the chat style {style!r} is not known here: {', '.join(STYLES)}")
        self.style_name, self.style, self.default_system = style, STYLES[style], default_system
        missing = [name for name in self.style.special if name not in tokenizer.special_tokens]
        if missing and style != PLAINGPT:
            raise ValueError(f"the tokenizer lacks {missing[0]!r}, a special token of the chat style {style}: "
                             "choose the model's own style, or give it its own tokenizer")  # fmt: skip
        self.tokenizer = with_special_tokens(tokenizer, missing)
        self.ids = {name: self.tokenizer.special_tokens[name] for name in self.style.special}
        known = self.tokenizer.special_tokens
        begins = [start_id(tokenizer) if name == END_OF_TEXT else known.get(name) for name in self.style.begin]
        self.begin_id = next((token for token in begins if token is not None), None)
        end_id = tokenizer.eot_id if self.style.end == END_OF_TEXT else known.get(self.style.end)
        if end_id is None:
            raise ValueError(f"the tokenizer lacks an end-of-text token, with which the chat style {style} ends "
                             "answers: name one when you import the tokenizer")  # fmt: skip
        self.end_id = end_id

    def render(self, messages: list[Message], reply: bool = False) -> tuple[list[int], list[int]]:
        """Return the conversation's tokens and their mask, two lists of equal length.

        With `reply`, the messages are a prompt: the tokens end where the model's answer begins.
        Raises BadConversation for messages that `check` refuses, ValueError for text the tokenizer cannot encode.
        """
        check(messages, reply)
        style, draft = self.style, _Draft(self.tokenizer, self.ids)
        draft.add([] if self.begin_id is None else [self.begin_id])
        for message in self._as_written(messages):
            content = message["content"]
            if message["role"] == "assistant":
                before, after = style.assistant
                draft.write(before)
                answer = style.padding[0] + content + style.padding[1]
                draft.add_answer(answer, self.end_id, message.get("weight", 1) == 1)
                draft.write(after)
            else:
                before, after = style.system if message["role"] == "system" else style.user
                draft.write(before)
                draft.text += content
                draft.write(after)
        if reply:
            draft.write(style.assistant[0])
        draft.flush()
        return draft.tokens, draft.mask

    def _as_written(self, messages: list[Message]) -> list[Message]:
        """Return the messages that the style writes: with the default system message, merged, without white space."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        if self.style.merge and messages[0]["role"] == "system":
            (before, after), (system, user, *rest) = self.style.system, messages
            whole = before + system["content"] + after + user["content"]
            messages = [{"role": "user", "content": whole}, *rest]
        if self.style.strip:
            messages = [{**message, "content": message["content"].strip()} for message in messages]
        return messages

    def jinja(self) -> str:
        """Return the template as Jinja, for a model that is exported."""
        names = {id: name for name, id in self.tokenizer.special_tokens.items()}
        begin = "" if self.begin_id is None else names[self.begin_id]
        return jinja(self.style_name, self.default_system, begin, names[self.end_id])


class _Draft:
    """The tokens and the mask of a conversation while it is written.

    Ordinary text waits in `text` until a special token or an answer follows, so that text which stands together is
    encoded together, as transformers' apply_chat_template does. The only border within it is where the prompt of an
    answer ends: an answer's tokens come after all those of its prompt, in training as in generation. Where an answer
    begins with text that would merge with the end of its prompt, such as a line break, transformers gives other ids.
    """

    def __init__(self, tokenizer: Tokenizer, ids: dict[str, int]):
        self.tokenizer, self.ids = tokenizer, ids
        self.special = re.compile(f"({'|'.join(map(re.escape, ids))})" if ids else "(?!)")  # (?!) matches nothing
        self.tokens: list[int] = []
        self.mask: list[int] = []
        self.text = ""

    def add(self, ids: Iterable[int], learned: bool = False) -> None:
        """Add tokens."""
        new = list(ids)
        self.tokens += new
        self.mask += [int(learned)] * len(new)

    def write(self, text: str) -> None:
        """Add text of the style, in which names of special tokens stand for these."""
        for part in self.special.split(text):
            if part in self.ids:
                self.flush()
                self.add([self.ids[part]])
            else:
                self.text += part

    def flush(self) -> None:
        """Encode the text that waits."""
        if self.text:
            self.add(self.tokenizer.encode(self.text))
        self.text = ""

    def add_answer(self, text: str, end_id: int, learned: bool) -> None:
        """Add an answer and the token that ends it.

        The answer is encoded together with the text before it, unless this would change the tokens of that text.
        """
        prompt = self.tokenizer.encode(self.text) if self.text else []
        together = self.tokenizer.encode(self.text + text)
        fits = together[: len(prompt)] == prompt
        self.flush()
        self.add(together[len(prompt) :] if fits else self.tokenizer.encode(text), learned)
        self.add([end_id], learned)


def check(messages: object, reply: bool = False) -> None:
    """Raise BadConversation unless the messages are a conversation to learn from.

    An optional system message comes first; then user and assistant take turns, and the assistant's message is the last.
    At least one assistant message must have weight 1. With `reply`, the messages are a prompt: a user message is last.
    """
    if not isinstance(messages, list) or not messages:
        raise BadConversation("no messages", "the messages must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"message {number}")
    _check_turns([message["role"] for message in messages], reply)
    if not reply and all(message.get("weight", 1) == 0 for message in messages if message["role"] == "assistant"):
        raise BadConversation("weight 0 on every answer", "every answer has weight 0: there is nothing to learn from")


def _check_message(message: object, where: str) -> None:
    match message:
        case {"role": str(role), "content": str(content)}:
            pass
        case _:
            raise BadConversation("a wrong type", f'{where} must be an object with "role" and "content", both strings')
    if role not in ROLES:
        raise BadConversation(
            "an unknown role", f"{where} has the unknown role {role[:40]!r}; the roles are {', '.join(ROLES)}"
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        found = f"{content[error.start]!r}, which is no character: half a surrogate pair, or input that is not UTF-8"
        raise BadConversation("text with half a surrogate pair", f"{where} holds {found}") from None
    if message.get("weight", 1) not in (0, 1):
        raise BadConversation(
            "a weight other than 0 and 1", f'{where} has the "weight" {message["weight"]!r}: it must be 0 or 1'
        )
    if role == "assistant" and not content.strip():
        raise BadConversation(EMPTY_ANSWER, f"{where}, the assistant's, is empty: there is nothing to learn from it")


def _check_turns(roles: list[Role], reply: bool) -> None:
    first = int(roles[0] == "system")
    for i in range(first, len(roles)):
        due = ("user", "assistant")[(i - first) % 2]
        if roles[i] == due:
            continue
        if roles[i] == "system":
            reason = "a system message that is not the first"
        else:
            reason = "repeated roles" if i > first else "an opening assistant turn"
        rule = "after an optional system message, user and assistant take turns, and the user begins"
        raise BadConversation(reason, f"message {i + 1} has the role {roles[i]} instead of {due}: {rule}")
    if not reply and "assistant" not in roles:
        raise BadConversation("no answer", "there is no assistant message to learn from")
    last = "user" if reply else "assistant"
    if roles[-1] != last:
        raise BadConversation(f"a closing {roles[-1]} turn", f"the last message must be the {last}'s")
