"""The chat template: a conversation as tokens, and a mask of the tokens that count in the loss.

    <|endoftext|> <|user|> What is 1 + 1? <|end|> <|assistant|> 2. <|end|>
                                                                ^^ ^^^^^^^   mask = 1

The mask is 1 on the assistant's text and on the <|end|> that stops generation, and 0 elsewhere. The model reads an
assistant message with "weight": 0 but does not learn it: its mask is 0 throughout. Only `Template` makes special
tokens. If a message spells one out, it is encoded as ordinary text, so no message can speak for another role.
"""

from typing import Literal, NotRequired, TypedDict, get_args

from text.tokenizer import ExtendedTokenizer, Tokenizer, start_id

Role = Literal["system", "user", "assistant"]

END = "<|end|>"
ROLES: tuple[Role, ...] = get_args(Role)
TOKENS = tuple(f"<|{role}|>" for role in ROLES) + (END,)
EMPTY_ANSWER = "an empty answer"  # the reason of a BadConversation


class Message(TypedDict):
    role: Role
    content: str
    weight: NotRequired[Literal[0, 1]]  # 0: the loss ignores this assistant message; the default is 1


class BadConversation(ValueError):
    """A conversation that cannot be trained on. `reason` names the kind of fault; reports count by it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Template:
    """Renders conversations with a tokenizer, and adds the special tokens that the tokenizer lacks."""

    def __init__(self, tokenizer: Tokenizer):
        missing = [name for name in TOKENS if name not in tokenizer.special_tokens]
        self.tokenizer = ExtendedTokenizer(tokenizer, missing) if missing else tokenizer
        self.ids = {name: self.tokenizer.special_tokens[name] for name in TOKENS}
        self.end_id = self.ids[END]

    def render(self, messages: list[Message], reply: bool = False) -> tuple[list[int], list[int]]:
        """Return the conversation's tokens and their mask, two lists of equal length.

        With `reply`, the messages are a prompt: the tokens end with <|assistant|>, and the model writes what follows.
        Raises BadConversation for messages that `check` refuses, ValueError for text the tokenizer cannot encode.
        """
        check(messages, reply)
        start = start_id(self.tokenizer)
        tokens, mask = ([], []) if start is None else ([start], [0])
        for message in messages:
            words = [*self.tokenizer.encode(message["content"]), self.end_id]
            learned = message["role"] == "assistant" and message.get("weight", 1) == 1
            tokens += [self.ids[f"<|{message['role']}|>"], *words]
            mask += [0] + [int(learned)] * len(words)
        if reply:
            tokens.append(self.ids["<|assistant|>"])
            mask.append(0)
        return tokens, mask


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
