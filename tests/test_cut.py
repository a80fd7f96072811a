"""A cut of a text changes none of its chunks, so none of its tokens."""

import random

import pytest
import regex

from tests.bpe_helpers import FIXTURES, PROSE, adversarial
from text.chunks import PATTERNS
from text.cut import CUT, blocks

# tiktoken's own pattern of o200k_base, GPT-4o's encoding
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
CHINESE = (
    "从前有座山\uff0c山里有座庙。\n庙里有个老和尚、小和尚\uff1a讲故事\uff01真的\uff1f\n/第2章\uff1b\r\n\n“好。”他说"
)
TEXTS = [CHINESE, *FIXTURES.values(), "a.\n/b a\n/b", "x_。y 1。2", "a\n b\n\nc\nd", *adversarial()]


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), O200K], ids=[*PATTERNS, "o200k"])
def test_chunks_are_the_same_wherever_a_text_is_cut(pattern):
    expression, places = regex.compile(pattern), 0
    for text in TEXTS:
        whole = expression.findall(text)
        for found in CUT.finditer(text):
            place, places = found.start(), places + 1
            assert expression.findall(text[:place]) + expression.findall(text[place:]) == whole, (text, place)
    assert places > 1000


def test_text_of_any_language_has_places_to_cut():
    assert [found.start() for found in CUT.finditer("山里。庙里有\uff0c一\n二")] == [2, 6, 9]
    assert [found.start() for found in CUT.finditer("a b  c\nd\n\ne.\nf ")] == [1, 3, 7, 13, 14]


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1000, 10**9])
@pytest.mark.parametrize("force", [True, False])
def test_blocks_are_the_text_again(size, force):
    source = random.Random(0)
    for text in [PROSE[:5000], *TEXTS[:100]]:
        cuts = sorted(source.choices(range(len(text) + 1), k=source.choice((0, 1, 20))))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = list(blocks(parts, size, force))
        assert "".join(found) == text and all(found)
        if force:
            assert all(len(block) <= size for block in found)
        else:
            allowed, place = {match.start() for match in CUT.finditer(text)}, 0
            for block in found[:-1]:
                place += len(block)
                assert place in allowed
                assert size // 2 <= len(block)


def test_blocks_of_prose_are_half_full_at_least():
    found = list(blocks([PROSE], 500))
    assert all(250 <= len(block) <= 500 for block in found[:-1])
