"""What the tests of BPE share: hard texts, and when two vocabularies are the same."""

import random
import unicodedata
from pathlib import Path

from bpe import BPE

ROOT = Path(__file__).parent.parent
# This project's README, licence, train.py and model.py of 2026-11-29, kept apart: an edit of these must not change what
# the tests' tokenizers learn.
PROSE = (ROOT / "tests" / "prose.txt").read_text()
FIXTURES = {
    "empty": "",
    "chinese": "从前有座山,山里有座庙。庙里有个老和尚 讲故事:2024年、1234567!\u3000全角\u3000 空格",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙂🙂🙂 👍🏽 1️⃣ 🇩🇪🇫🇷",
    "marks": "e\u0301 n\u0303 Z̷̢̛a̸͝l̵͠g̵o ก็็็็ नमस्ते ﷺ İı ſ ß K Ω",
    "code": "def f(x):\n\treturn x**2  # 12345\r\n\r\n\n    if (a&&b){c->d[0x1F]++;}\n   \n\t\t\n",
    "contractions": "I'm don't DON'T we'LL it'ſ they'Ve 'tis ''s 'd'd  'll 's",
    "controls": "a\x00b\x1cc\x1d \x1e\x1f d\x85e\u2028f\u2029\xa0g\u200bh\ufeffi\x0b\x0c\x7f \x1c \n\x85 \r\n \x1f\n",
    "spaces": "  a   b \n\n  c\t\t d \r\n\r \n e   ",
    "mixed": "Größe 世界x123y٣٤٥ Ⅻ½ привет,мир! a.org/?q=1&r=%20 <|endoftext|><|user|> \U0010ffff\ue000\ufffe",
    "runs": "a" * 300 + " " * 300 + "!" * 300 + "\n" * 30 + "1" * 30,
}


def characters(source: random.Random, size: int) -> str:
    """A text that changes its kind of character all the time; those that are younger than this Python are left out.

    (Libraries disagree on what a letter is only where Unicode is newer than one of them.)
    """
    pools = ["aZsStTlLmMrReEvVdDſKé中", "'’", "  \n\r\t\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000", "019٣½Ⅻ²",
             "!?.-_\x00\x7f\u200d\u0301\ufe0f🙂🏽"]  # fmt: skip
    text = ""
    while len(text) < size:
        if source.random() < 0.1:
            c = chr(source.choice((source.randrange(0xD800), source.randrange(0xE000, 0x110000))))
            text += c if unicodedata.category(c) != "Cn" else ""
        else:
            text += "".join(source.choices(source.choice(pools), k=source.choice((1, 1, 2, 5))))
    return text


def adversarial() -> list[str]:
    source = random.Random(0)
    return [*FIXTURES.values(), *("".join(source.sample(list(FIXTURES.values()), 3)) for _ in range(30)),
            *(characters(source, source.choice((3, 10, 40, 400))) for _ in range(1500))]  # fmt: skip


def same(a: BPE, b: BPE) -> bool:
    names = "pattern merges special_tokens matched_tokens eot alphabet first_id ranks vocab_size".split()
    return all(getattr(a, name) == getattr(b, name) for name in names)
