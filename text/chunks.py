"""How text is cut into chunks, which no merge of a BPE vocabulary crosses; and how often each chunk occurs.

Counting uses all cores, and Python's own regular expressions where the text is ASCII: they are several times faster
than those that know Unicode. This file imports little, since every process that helps must import it first.
"""

import contextlib
import difflib
import functools
import itertools
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import regex

# How text is cut into chunks, which merges never cross. `digits` follows the Baichuan 2 report (section 2.3): each
# digit alone, runs of spaces kept, and no space joined to the word behind it.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s""",
    "digits": r"""\p{L}++|\p{N}|[^\s\p{L}\p{N}]++| ++|[\r\n]++|\s""",
}  # fmt: skip
# The patterns again for text that is ASCII throughout, for Python's re: several times faster, and the same there.
IN_ASCII = {
    r"[^\s\p{L}\p{N}]": r"[^\sa-zA-Z0-9]", r"[^\r\n\p{L}\p{N}]": r"[^\r\na-zA-Z0-9]",
    r"\p{L}": "[a-zA-Z]", r"\p{N}": "[0-9]", "$": r"\Z",
}  # fmt: skip
ASCII_PATTERNS = {
    name: functools.reduce(lambda text, change: text.replace(*change), IN_ASCII.items(), pattern)
    for name, pattern in PATTERNS.items()
}
# Every named pattern has a boundary between a visible character and a space (1C to 1F, which Python takes for spaces
# and Unicode does not, are neither here), and what follows is cut alike wherever it stands: so text may be cut there.
CUT = re.compile(r"(?<=[^\s\x1c-\x1f]) ")
TASK = 1 << 20  # characters that are counted at once
PIECE, PART = 1 << 12, 1 << 8  # characters that are searched at once; and where they are not all ASCII
# A regular expression that takes longer than this to cut a text is taken for one that backtracks without end.
TIMEOUT, TIMEOUT_PER_CHARACTER = 10.0, 1e-4  # seconds of processor time
# A regular expression that can match nothing at all mostly does so somewhere in these texts.
PROBES = ("", "a b", "A1 ", " a", "\n\n", "it's x.\n", "12", "中文。", "\t")


def check_text(text: str) -> str:
    """Return the text. Raises ValueError for half a surrogate pair, which is no character and has no bytes."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text[error.start]!r} at position {error.start} is half a surrogate pair, no character"
        ) from None
    return text


def complete(pattern: str) -> str:
    r"""Return the regular expression of a pattern under which every character of a text belongs to a chunk.

    A named pattern leaves nothing out. A regular expression P may: \d+ matches digits only. P|(?:(?!P).)+ makes a
    chunk of every stretch between two matches of P, as the isolated Split of Hugging Face's tokenizers does:

        \d+ cuts "ab12c" into "ab", "12", "c"
    """
    return PATTERNS.get(pattern) or f"(?:{pattern})|(?s:(?:(?!(?:{pattern})).)+)"


def splitter(pattern: str) -> Callable[[str], list[str]]:
    """Return the function that cuts a text into chunks, by a named pattern or by a regular expression.

    Together the chunks are the text. Raises ValueError for what is neither, and for an expression that matches the
    empty string; the function itself raises ValueError when the expression backtracks without end.
    """
    if pattern in PATTERNS:
        find = regex.compile(PATTERNS[pattern]).findall
        find_ascii = re.compile(ASCII_PATTERNS[pattern], re.ASCII).findall
        return lambda text: find_ascii(text) if text.isascii() else find(text)
    expression = _compiled(pattern)
    matches_nothing = ValueError(f"the pattern {pattern!r} matches the empty string: write x+ for x*, x for x?")
    if any("" in expression.findall(probe) for probe in PROBES):
        raise matches_nothing
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
            raise matches_nothing
        return chunks

    return split


def _compiled(pattern: str) -> regex.Pattern:
    """The regular expression as it stands; VERSION1 reads [a[bc]] and (?i) as tiktoken's, which encodes, does."""
    if regex.fullmatch(r"[\w-]+", pattern):  # without any operator: the name of a pattern, and not one to search for
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
    if expression.groups:
        raise ValueError(f"the pattern {pattern!r} has groups that capture: write (?:...) for (...)")
    return expression


def count_chunks(
    texts: Iterable[str],
    pattern: str,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Counter[str]:
    """How often each chunk occurs in the texts. workers: processes that count, this one too; default: all cores.

    Others help only when there are more than a few tasks, for they take a moment to start.
    """
    chunks, split, tasks = Counter(), splitter(pattern), _tasks(texts, pattern)
    first = list(itertools.islice(tasks, 8))
    helpers = (workers or os.cpu_count() or 1) - 1 if len(first) == 8 else 0
    waiting: deque[Future] = deque()

    def collect() -> None:
        size, counts = waiting.popleft().result()
        for chunk, count in counts.items():
            chunks[chunk] += count
        progress(size)

    with contextlib.ExitStack() as stack:
        if helpers:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(helpers, context))
        for task in itertools.chain(first, tasks):
            if len(waiting) < 2 * helpers:  # no more of the text than this is ever in memory
                waiting.append(pool.submit(_count_apart, pattern, task))
            else:
                progress(_count(split, pattern, task, chunks))
            while waiting and waiting[0].done():
                collect()
        while waiting:
            collect()
    return chunks


def _pieces(text: str, size: int, pattern: str) -> Iterator[str]:
    """The text in pieces of about `size` characters that a named pattern cuts like the whole; else the whole text."""
    start = 0
    while pattern in PATTERNS and len(text) - start > size and (gap := CUT.search(text, start + size)):
        yield text[start : gap.start()]
        start = gap.start()
    yield text[start:]


def _tasks(texts: Iterable[str], pattern: str) -> Iterator[list[str]]:
    """The texts, or pieces of them, gathered to about TASK characters."""
    portion, size = [], 0
    for text in texts:
        for piece in _pieces(text, TASK, pattern):
            portion.append(piece)
            size += len(piece)
            if size >= TASK:
                yield portion
                portion, size = [], 0
    if portion:
        yield portion


def _count(split: Callable[[str], list[str]], pattern: str, task: list[str], chunks: Counter[str]) -> int:
    """Add the chunks of the task's texts; returns how many characters they are."""
    for text in task:
        for piece in _pieces(text, PIECE, pattern):
            for part in [piece] if piece.isascii() else _pieces(piece, PART, pattern):
                chunks.update(split(part))
    return sum(map(len, task))


def _count_apart(pattern: str, task: list[str]) -> tuple[int, Counter[str]]:
    """_count in a process of its own."""
    chunks: Counter[str] = Counter()
    return _count(splitter(pattern), pattern, task, chunks), chunks
