"""Where a text may be cut in two so that both halves together have the tokens of the whole.

Tokens never cross the chunks that a tokenizer's pattern makes, so a cut is safe where every pattern ends a chunk
whatever stands further left or right. Three kinds of places are such, for the patterns of GPT-2, GPT-4, GPT-4o and
Baichuan 2 alike: before a space behind a visible character; after a line break between two visible characters;
and, for languages that write no spaces, between a letter or digit and an ideographic comma, full stop and the like.
"""

import re
from collections.abc import Iterable, Iterator

# 1C to 1F are spaces for Python but not for Unicode, so they count as neither. GPT-4o joins "/" to a line break.
_VISIBLE = r"[^\s\x1c-\x1f]"
_STOPS = "\u3001\u3002\uff0c\uff1b\uff1a\uff01\uff1f"  # ideographic comma and full stop; full-width , ; : ! ?
CUT = re.compile(rf"(?<={_VISIBLE}) |(?<={_VISIBLE}\n)(?=[^\s\x1c-\x1f/])|(?<=[^\W_])(?=[{_STOPS}])")


def blocks(parts: Iterable[str], size: int, force: bool = True) -> Iterator[str]:
    """The text that the parts make, regrouped into blocks of at most `size` characters, cut at safe places.

    A block is at least half as long where a safe place allows it. Where there is none within `size` characters, the
    text is cut all the same, unless `force` is False: then the block goes on to the next safe place.
    """
    rest, searched = "", 0
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start > size:
            end = start + size if force else len(rest)
            place = CUT.search(rest, max(start + size // 2, start + 1, searched), end)
            if place is None and not force:
                searched = max(0, len(rest) - 1)
                break
            cut = place.start() if place else end
            yield rest[start:cut]
            start, searched = cut, 0
        rest, searched = rest[start:], max(0, searched - start)
    if rest:
        yield rest
