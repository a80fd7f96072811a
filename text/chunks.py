"""Pre-tokenization: cut text into chunks that no BPE merge crosses, and count how often each chunk occurs.

Counting uses all cores. For ASCII text it uses Python's module re, which is several times faster than the module regex
and its Unicode classes. This file imports little, since every worker process must import it first.
"""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import regex

from text.cut import blocks
from text.pool import parallel_map

# The regular expressions that match one chunk. `digits` follows the Baichuan 2 report (section 2.3): each digit is a
# chunk, a run of spaces is a chunk, and no space joins the word after it.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s""",
    "digits": r"""\p{L}++|\p{N}|[^\s\p{L}\p{N}]++| ++|[\r\n]++|\s""",
}  # fmt: skip
# The same patterns for ASCII text and Python's re: several times faster, and equal on ASCII.
IN_ASCII = {
    r"[^\s\p{L}\p{N}]": r"[^\sa-zA-Z0-9]", r"[^\r\n\p{L}\p{N}]": r"[^\r\na-zA-Z0-9]",
    r"\p{L}": "[a-zA-Z]", r"\p{N}": "[0-9]", "$": r"\Z",
}  # fmt: skip
ASCII_PATTERNS = {
    name: functools.reduce(lambda text, change: text.replace(*change), IN_ASCII.items(), pattern)
    for name, pattern in PATTERNS.items()
}
TASK = 1 << 20  # characters per task of a worker
ASCII_BLOCK, OTHER_BLOCK = 1 << 12, 1 << 8  # characters per search: in ASCII text, in other text
# A regular expression that takes longer than this to cut a text counts as one that backtracks without end.
TIMEOUT, TIMEOUT_PER_CHARACTER = 10.0, 1e-4  # seconds of processor time
# Almost every regular expression that can match the empty string does so somewhere in these texts.
PROBES = ("", "a b", "A1 ", " a", "\n\n", "it's x.\n", "12", "中文。", "\t")


def complete(pattern: str) -> str:
    r"""Return the pattern as a regular expression that puts every character of a text into a chunk.

    A named pattern matches every character. A regular expression P may not: \d+ matches digits only. P|(?:(?!P).)+
    also makes a chunk of all text between two matches of P, as the isolated Split of Hugging Face's tokenizers does:

        \d+ cuts "ab12c" into "ab", "12", "c"
    """
    return PATTERNS.get(pattern) or f"(?:{pattern})|(?s:(?:(?!(?:{pattern})).)+)"


def splitter(pattern: str) -> Callable[[str], list[str]]:
    """Return the function that cuts a text into chunks, by a named pattern or by a regular expression.

    The chunks joined are the text. Raises ValueError if `pattern` is neither, if it matches the empty string, or if it
    has capturing groups. The returned function raises ValueError if the expression backtracks without end.
    """
    if pattern in PATTERNS:
        find = regex.compile(PATTERNS[pattern]).findall
        find_ascii = re.compile(ASCII_PATTERNS[pattern], re.ASCII).findall
        return lambda text: find_ascii(text) if text.isascii() else find(text)
    if check_expression(pattern).groups:
        raise ValueError(f"the pattern {pattern!r} has groups that capture: write (?:...) for (...)")
    find = regex.compile(complete(pattern), regex.VERSION1).findall

    def split(text: str) -> list[str]:
        try:
            chunks = find(text, timeout=TIMEOUT + TIMEOUT_PER_CHARACTER * len(text))
        except TimeoutError:
            raise ValueError(
                f"the pattern {pattern!r} takes too long to cut a text of {len(text):,} characters: "
                "avoid a repetition inside a repetition, as in (x+)+"
            ) from None
        if "" in chunks:
            raise _matches_nothing(pattern)
        return chunks

    return split


def check_expression(pattern: str) -> regex.Pattern:
    """Return the compiled regular expression. VERSION1 reads [a[bc]] and (?i) as tiktoken, our encoder, does.

    Raises ValueError if `pattern` is an unknown name, if it is not a regular expression, or if it matches the empty
    string, on which tiktoken fails.
    """
    if regex.fullmatch(r"[\w-]+", pattern):  # without any operator: meant as a name, not as an expression
        near = difflib.get_close_matches(pattern, PATTERNS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no pattern is called {pattern!r}: did you mean {near!r}? There are {', '.join(PATTERNS)}; "
            "anything else must be a regular expression"
        )
    try:
        expression = regex.compile(pattern, regex.VERSION1)
    except regex.error as error:
        names = ", ".join(PATTERNS)
        raise ValueError(
            f"the pattern {pattern!r} is neither one of {names} nor a regular expression: {error}"
        ) from None
    if any(not match[0] for probe in PROBES for match in expression.finditer(probe)):
        raise _matches_nothing(pattern)
    return expression


def _matches_nothing(pattern: str) -> ValueError:
    return ValueError(f"the pattern {pattern!r} matches the empty string: write x+ for x*, x for x?")


def count_chunks(
    texts: Iterable[str],
    pattern: str,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Counter[str]:
    """Count how often each chunk occurs in the texts.

    workers: the number of processes that count, by default one per CPU; this process counts a few megabytes itself.
    progress: called after each task with the number of characters in it. Raises ValueError as `splitter` does.
    """
    chunks: Counter[str] = Counter()
    splitter(pattern)  # raises ValueError for a wrong pattern before any process starts
    for size, counts in parallel_map(functools.partial(_count, pattern), _tasks(texts, pattern), workers, few=8):
        for chunk, count in counts.items():
            chunks[chunk] += count
        progress(size)
    return chunks


def _blocks(text: str, size: int, pattern: str) -> Iterable[str]:
    """Cut the text into blocks of about `size` characters where every named pattern cuts; else leave it whole."""
    return blocks([text], size, force=False) if pattern in PATTERNS else [text]


def _tasks(texts: Iterable[str], pattern: str) -> Iterator[list[str]]:
    """Group the texts, or blocks of them, into tasks of about TASK characters."""
    task, size = [], 0
    for text in texts:
        for block in _blocks(text, TASK, pattern):
            task.append(block)
            size += len(block)
            if size >= TASK:
                yield task
                task, size = [], 0
    if task:
        yield task


def _count(pattern: str, task: list[str]) -> tuple[int, Counter[str]]:
    """Count the chunks of one task; returns the number of characters in it, and the counts."""
    split, chunks = splitter(pattern), Counter()
    for text in task:
        for block in _blocks(text, ASCII_BLOCK, pattern):
            for part in [block] if block.isascii() else _blocks(block, OTHER_BLOCK, pattern):
                chunks.update(split(part))
    return sum(map(len, task)), chunks
