"""Find places where a text can be cut without changing its tokens: both halves together have the tokens of the whole.

No token crosses a boundary between chunks, so a cut is safe where every pattern ends a chunk, whatever the rest of the
text is. Three kinds of places are safe under the patterns of GPT-2, GPT-4, GPT-4o and Baichuan 2: before a space that
follows a visible character; after a line break between two visible characters; and, for languages without spaces,
between a letter or digit and an ideographic punctuation mark.
"""

import re
from collections.abc import Iterable, Iterator

# Python, but not Unicode, counts 1C to 1F as spaces, so no cut is made next to them. GPT-4o joins "/" to a line break.
_VISIBLE = r"[^\s\x1c-\x1f]"
_STOPS = "\u3001\u3002\uff0c\uff1b\uff1a\uff01\uff1f"  # ideographic comma and full stop; full-width , ; : ! ?
CUT = re.compile(rf"(?<={_VISIBLE}) |(?<={_VISIBLE}\n)(?=[^\s\x1c-\x1f/])|(?<=[^\W_])(?=[{_STOPS}])")


def blocks(parts: Iterable[str], size: int, force: bool = True) -> Iterator[str]:
    """Join the parts of a text and yield it in blocks of at most `size` characters, cut at safe places.

    A block has at least size / 2 characters where a safe place allows it. If there is no safe place within `size`
    characters, the text is cut there anyway, or, with force=False, the block extends to the next safe place.
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
