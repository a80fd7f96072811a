"""Turn tokens into text: complete characters only, up to a stop string; and print it safely on a terminal."""

import codecs
import json
import sys

from common.cli import visible
from text.tokenizer import Tokenizer

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}  # after a backslash, in a stop string


class Text:
    """The text of one row of tokens, built token by token, up to a stop string.

    Two things are held back until more tokens decide: the bytes of an incomplete character, and text that may be the
    beginning of a stop string. So a stop string is found even if it spans several tokens, and is never shown in part.
    Example: with the stop string "\\nQ", add returns "" for "\\n", and then "\\nA" for "A".
    begins: whether the tokens begin a text of their own, and do not continue one. If the tokenizer puts a space before
    every text, that space is then left out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], begins: bool = False):
        self.tokenizer, self.stops = tokenizer, stops
        self.drops_space = begins and tokenizer.adds_space
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""  # the text without what is held back
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False  # has a stop string been found?

    def add(self, token: int) -> str:
        """Add the next token; return the new text that is no longer held back."""
        found = self.tokenizer.bytes_of(token)
        if self.drops_space:
            found, self.drops_space = found.removeprefix(b" "), False
        held = self._search(self.decoder.decode(found))
        begun = [n for stop in self.stops for n in range(len(stop)) if held.endswith(stop[:n])]
        prefix = 0 if self.stopped else max(begun, default=0)
        return self._settle(held[: len(held) - prefix], held[len(held) - prefix :])

    def end(self) -> str:
        """End the text after the last token; return the text that was held back."""
        return self._settle(self._search(self.decoder.decode(b"", final=True)), "")

    def _search(self, piece: str) -> str:
        """Return the held text plus the new piece, up to the first stop string in it."""
        held = "" if self.stopped else self.held + piece
        ends = [held.find(stop) for stop in self.stops if stop in held]
        self.stopped |= bool(ends)
        return held[: min(ends)] if ends else held

    def _settle(self, text: str, held: str) -> str:
        self.text, self.held = self.text + text, held
        return text


def text_of(tokenizer: Tokenizer, tokens: list[int], begins: bool) -> str:
    """Return the text of new tokens. Unlike `tokenizer.decode`, it keeps a space at its beginning; begins: see Text."""
    text = Text(tokenizer, [], begins)
    for token in tokens:
        text.add(token)
    text.end()
    return text.text


def read_stops(option: str) -> list[str]:
    r"""Return the stop strings of --stop: one string, with the escapes \n, \t, \r and \\, or a JSON list of strings.

    A shell passes '\n' on as a backslash and an n. Other backslashes stay as they are.
    Raises ValueError if the JSON list holds anything but non-empty strings.
    """
    try:
        stops = json.loads(option) if option.startswith("[") else None
    except (ValueError, RecursionError):
        stops = None  # a text that happens to begin with a bracket
    if stops is None:
        return [unescape(option)] if option else []
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop must be a string, or a JSON list of strings that are not empty, not {option}")
    return stops


def unescape(text: str) -> str:
    r"""Replace \n, \t, \r and \\ by the characters that they stand for."""
    pieces, i = [], 0
    while i < len(text):
        escape = ESCAPES.get(text[i + 1 : i + 2]) if text[i] == "\\" else None
        pieces.append(escape or text[i])
        i += 2 if escape else 1
    return "".join(pieces)


def show(text: str, end: str = "\n") -> None:
    """Print text that a model wrote: unchanged to a file or a pipe, and with escapes (`visible`) to a terminal.

    A terminal obeys control characters: an escape sequence can clear the screen, or type for the user.
    """
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def note(message: str) -> None:
    """Print a message for the user on stderr."""
    print(message, file=sys.stderr, flush=True)
