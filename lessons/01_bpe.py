"""Lesson 1: byte-pair encoding. Count the neighbours, merge the most frequent pair, repeat.

A language model reads numbers, so text must be cut into tokens first. Characters make long sequences; words make an
endless vocabulary. BPE lets the text decide: what often stands together becomes one token [Sennrich et al. 2016].
"""

import time
from collections import Counter
from pathlib import Path

from lesson import BLUE, GREY, claim, expect, figure, run, save, table

from bpe import BPE, train
from text.chunks import count_chunks
from text.merges import learn_merges

WORDS = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}  # a small corpus: words, and how often each occurs
TREE = 10  # merges of the small corpus


# The algorithm, as simple as it can be: after every merge, count all pairs again.


def merge(tokens: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace the pair by the new token wherever it stands, from left to right."""
    out: list[int] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def naive_merges(words: dict[bytes, int], number: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Return the merges as (left, right, count), and how many tokens the corpus has before and after each."""
    cut = {word: list(word) for word in words}  # a word begins as its bytes
    spelling = {byte: bytes([byte]) for byte in range(256)}
    merges, sizes = [], [sum(n * len(cut[word]) for word, n in words.items())]
    for new in range(256, 256 + number):
        counts: Counter[tuple[int, int]] = Counter()
        for word, n in words.items():
            for pair in zip(cut[word], cut[word][1:], strict=False):
                counts[pair] += n
        spelled = set(spelling.values())
        counts = {pair: n for pair, n in counts.items() if spelling[pair[0]] + spelling[pair[1]] not in spelled}
        # Of equally frequent pairs the oldest goes first, so that the result depends on the text alone.
        a, b = min(counts, key=lambda pair: (-counts[pair], max(pair), min(pair), pair[0] < pair[1]))
        merges.append((a, b, counts[a, b]))
        spelling[new] = spelling[a] + spelling[b]
        cut = {word: merge(tokens, (a, b), new) for word, tokens in cut.items()}
        sizes.append(sum(n * len(cut[word]) for word, n in words.items()))
    return merges, sizes


def spellings(merges: list[tuple[int, int, int]]) -> list[str]:
    """The text of every token."""
    tokens = [chr(byte) for byte in range(256)]
    for left, right, _ in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def main(small: bool):
    merges, sizes = naive_merges(WORDS, TREE)
    names = spellings(merges)
    print("The corpus: " + ", ".join(f"{word.decode()} x{n}" for word, n in WORDS.items()))
    table(
        ["merge", "count", "left", "right", "token", "tokens in the corpus"],
        [[i + 1, n, names[a], names[b], names[256 + i], sizes[i + 1]] for i, (a, b, n) in enumerate(merges)],
    )
    claim("text/merges.py learns the same merges as the naive recount", learn_merges(WORDS, TREE) == merges)
    claim("a merge of a pair that occurs n times leaves n tokens less",
          all(sizes[i] - sizes[i + 1] == n for i, (_, _, n) in enumerate(merges)))  # fmt: skip

    text = Path(__file__).parents[1].joinpath("model.py").read_text()[: 4_000 if small else None]
    chunks, number = {chunk.encode(): n for chunk, n in count_chunks([text], "gpt4").items()}, 20 if small else 200
    begin = time.perf_counter()
    slow, lengths = naive_merges(chunks, number)
    middle = time.perf_counter()
    fast = learn_merges(chunks, number)
    print(f"\nmodel.py, {len(text):,} characters, {number} merges: {middle - begin:.2f} s by recounting, "
          f"{time.perf_counter() - middle:.3f} s by text/merges.py")  # fmt: skip
    claim(f"both learn the same {number} merges of model.py", fast == slow)
    bpe = train([text], 256 + number, special_tokens=())
    claim("the tokenizer makes as many tokens as the merges have left", len(bpe.encode(text)) == lengths[-1])
    unseen = "naïve 中文 🙂"
    print(f"{unseen!r}: {len(unseen)} characters, {len(bpe.encode(unseen))} tokens")
    claim("a text it never saw comes back whole, as the bytes are tokens", bpe.decode(bpe.encode(unseen)) == unseen)
    return merges, sizes


def draw(merges, sizes) -> None:
    fig, (tree, bars) = figure(1, 2, height=4.6, sharey=True, width_ratios=(3.4, 1))
    names, ids = spellings(merges), {(a, b): 256 + i for i, (a, b, _) in enumerate(merges)}
    x = 0.0
    for word, n in WORDS.items():
        nodes = []  # (token, place, height) of what the word is made of
        start = x
        for byte in word:
            nodes.append((byte, x, 0))
            tree.text(x, -0.3, chr(byte), ha="center", va="top", family="DejaVu Sans Mono", fontsize=10)
            x += 1
        tree.text((start + x - 1) / 2, -1.25, f"{word.decode()} ×{n}", ha="center", va="top", color=GREY)
        x += 0.9
        for pair, new in ids.items():
            i = 0
            while i < len(nodes) - 1:
                (a, xa, ya), (b, xb, yb) = nodes[i : i + 2]
                if (a, b) == pair:
                    y, middle = new - 255, (xa + xb) / 2
                    tree.plot([xa, xa, xb, xb], [ya, y, y, yb], color=BLUE, linewidth=1.3)
                    tree.text(middle, y + 0.12, names[new], ha="center", va="bottom", fontsize=8.5,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
                    nodes[i : i + 2] = [(new, middle, y)]
                i += 1
    steps = range(1, len(merges) + 1)
    labels = [f"{i}.  {names[a]} + {names[b]}  ×{n}" for i, (a, b, n) in zip(steps, merges, strict=True)]
    tree.set(yticks=[0, *steps], yticklabels=["bytes", *labels], ylim=(-1.9, len(merges) + 0.7), xlim=(-0.7, x - 1.2),
             xticks=[], title="Each token at the height of its merge")  # fmt: skip
    tree.tick_params(left=False)
    tree.spines[["left", "bottom"]].set_visible(False)
    bars.barh([0, *steps], sizes, height=0.55, color=BLUE)
    for y, size in enumerate(sizes):
        bars.text(size - 2, y, str(size), ha="right", va="center", color="white", fontsize=8)
    bars.set(title="Tokens left", xticks=[])
    bars.tick_params(left=False)
    bars.spines[["left", "bottom"]].set_visible(False)
    save(fig, "01_bpe.svg")


def check(encode) -> None:
    """The exercise: encode(word: bytes, merges: list of (left, right)) → ids, by the merges in their order."""
    tests = [(b"newest", [merge[:2] for merge in learn_merges(WORDS, TREE)]), (b"", [(97, 98)]), (b"abab", [(97, 98)]),
             (b"abc", [(98, 99), (97, 98)]), (b"aaa", [(97, 97)]), (b"abcd", [(97, 98), (99, 100), (256, 257)]),
             (b"lowest wide", [merge[:2] for merge in learn_merges(WORDS, TREE)])]  # fmt: skip
    for word, merges in tests:
        right = BPE(r".+", merges, {}).encode(word.decode())
        expect(f"encode({word!r}, {merges})", encode(word, list(merges)), right)


if __name__ == "__main__":
    run(main, draw, check, asks="encode")
