"""Tokens to text: characters as they are finished, stop strings, and what of it a terminal may see."""

import codecs
import json
import sys

from common.cli import visible
from text.tokenizer import Tokenizer

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}  # after a backslash, in a stop string


class Text:
    """The text of one row of tokens, as they come, up to a stop string.

    Two things are held back until more tokens decide: the bytes of an unfinished character, and text that may be the
    beginning of a stop string. So a stop string is found wherever tokens cut it, and is never shown in part.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""  # all that is certain
        self.held = ""  # what may be the beginning of a stop string
        self.stopped = False  # has a stop string been found?

    def add(self, token: int) -> str:
        """Take the next token; returns the text that has become certain by it."""
        held = self._search(self.decoder.decode(self.tokenizer.bytes_of(token)))
        begun = [n for stop in self.stops for n in range(len(stop)) if held.endswith(stop[:n])]
        prefix = 0 if self.stopped else max(begun, default=0)
        return self._settle(held[: len(held) - prefix], held[len(held) - prefix :])

    def end(self) -> str:
        """No token follows: returns what was held back."""
        return self._settle(self._search(self.decoder.decode(b"", final=True)), "")

    def _search(self, piece: str) -> str:
        """The text that is not certain yet, with the new piece, up to the stop string that begins first in it."""
        held = "" if self.stopped else self.held + piece
        ends = [held.find(stop) for stop in self.stops if stop in held]
        self.stopped |= bool(ends)
        return held[: min(ends)] if ends else held

    def _settle(self, text: str, held: str) -> str:
        self.text, self.held = self.text + text, held
        return text


def read_stops(option: str) -> list[str]:
    r"""The stop strings of --stop: one string, in which \n, \t, \r and \\ are escapes, or a JSON list of strings.

    A shell passes '\n' on as a backslash and an n, and people mean a line break by it. Other backslashes stay.
    Raises ValueError for a JSON list of anything but strings that are not empty.
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
    """Print text that a model wrote. A terminal gets it `visible`; a file or a pipe gets exactly what was written.

    A terminal obeys control characters: an escape sequence can clear the screen, or type for the user.
    """
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def note(message: str) -> None:
    """Print a line for the user on stderr, apart from the text."""
    print(message, file=sys.stderr, flush=True)
