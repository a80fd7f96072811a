"""Byte-level BPE: learn a vocabulary from text, then turn text into token ids and back.

text/chunks.py cuts text into chunks and counts them, and text/merges.py learns merges from the counts. tiktoken's
native core encodes text with our vocabulary.

    python bpe.py train --input book.txt --vocab_size 4096 --output book.bpe
    python bpe.py info book.bpe
"""

import argparse
import functools
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from common import cli
from common.files import checksum, read_json, write_whole
from common.textfile import check_text, read_text
from text import cut, documents
from text.chunks import PATTERNS, TASK, complete, count_chunks, splitter
from text.merges import learn_merges

if TYPE_CHECKING:  # imported where it is needed, because the import takes time
    import tiktoken

EOT = "<|endoftext|>"
SPECIAL_TOKENS = (EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # the last four are for conversations

FORMAT = "plaingpt-bpe"
VERSION = 3  # version 1 has no matched_tokens and eot, version 2 no bos; the oldest that suffices is written
LARGEST_ID = (1 << 31) - 1
LONG = 1 << 18  # characters; on shorter texts no named pattern exceeds the limits of tiktoken's regular expressions


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class BPE:
    """A vocabulary (the 256 bytes, the merges in order, the special tokens) that encodes and decodes text.

    Ids: the bytes have ids from first_id on, in the order of `alphabet`, and each merge has the next id. Special tokens
    have the ids in `special_tokens`.

    special_tokens: {spelling: id} of tokens that `encode` never produces, so no text can forge them.
    matched_tokens: {spelling: id} of tokens that replace their spelling in a text before it is cut into chunks; of
    several at one place the longest (Hugging Face: added tokens that are not special).
    eot: the special token that ends a document; None if there is none. bos: the one that begins a text, where another
    does; "" where none does.
    Raises ValueError if the merges and ids do not make a vocabulary.
    """

    def __init__(
        self, pattern: str, merges: list[tuple[int, int]], special_tokens: dict[str, int],
        alphabet: bytes = bytes(range(256)), first_id: int = 0, *,
        matched_tokens: dict[str, int] | None = None, eot: str | None = EOT, bos: str | None = None,
    ):  # fmt: skip
        self.pattern, self.merges, self.special_tokens = pattern, merges, special_tokens
        self.alphabet, self.first_id = alphabet, first_id
        self.matched_tokens = matched_tokens or {}
        if eot not in special_tokens and eot not in (EOT, None):
            raise ValueError(f"the end token {eot!r} is not among the special tokens: {', '.join(special_tokens)}")
        if bos and bos not in special_tokens:
            raise ValueError(f"the first token {bos!r} is not among the special tokens: {', '.join(special_tokens)}")
        self.eot, self.bos = eot if eot in special_tokens else None, bos
        if sorted(alphabet) != list(range(256)):
            raise ValueError("the alphabet must hold each of the 256 bytes once")
        tokens = [bytes([byte]) for byte in alphabet]
        for left, right in merges:
            if not first_id <= min(left, right) <= max(left, right) < first_id + len(tokens):
                raise ValueError(f"the merge of {left} and {right}, number {len(tokens) - 256}, names a later token")
            tokens.append(tokens[left - first_id] + tokens[right - first_id])
        self.ranks = {token: first_id + n for n, token in enumerate(tokens)}
        if len(self.ranks) < len(tokens):
            raise ValueError("two merges make the same token")
        self.vocab_size = max(self._check_ids()) + 1

    def _check_ids(self) -> list[int]:
        """Return all ids. Raises ValueError if two tokens share one, or if one is too large."""
        names = [*self.special_tokens, *self.matched_tokens]
        ids = [*self.ranks.values(), *self.special_tokens.values(), *self.matched_tokens.values()]
        for name in names:
            if not check_text(name):
                raise ValueError("a special token has an empty name")
        for id in (min(ids), max(ids)):
            if not 0 <= id <= LARGEST_ID:
                raise ValueError(f"the id {id} is not between 0 and {LARGEST_ID}")
        if len(set(names)) < len(names):
            raise ValueError("a special token is a matched token too")
        if len(set(ids)) < len(ids):
            shared = next(id for id, count in Counter(ids).items() if count > 1)
            raise ValueError(f"two tokens share the id {shared}")
        return ids

    @functools.cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The vocabulary as an encoding of tiktoken, whose native core encodes and decodes here.

        It does not search for matched tokens; `encode` does.
        Raises ValueError if tiktoken cannot read the pattern.
        """
        import tiktoken

        try:
            return tiktoken.Encoding(
                "bpe", pat_str=complete(self.pattern), mergeable_ranks=self.ranks,
                special_tokens=self.special_tokens | self.matched_tokens,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"the pattern {self.pattern!r} does not work in tiktoken: {error}") from None

    @functools.cached_property
    def _matched(self) -> re.Pattern:
        """Matches any matched token; longer spellings come first, so that the longest one matches."""
        return re.compile("|".join(map(re.escape, sorted(self.matched_tokens, key=len, reverse=True))))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "encoding"}

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text; a special token that is spelled out in it is ordinary text.

        Raises ValueError for half a surrogate pair, which is no character, and for text that the pattern cannot cut.
        """
        if not self.matched_tokens:
            return self._encode_ordinary(text)
        ids, start = [], 0
        for match in self._matched.finditer(text):
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self.matched_tokens[match[0]])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def _encode_ordinary(self, text: str) -> list[int]:
        return encode_ordinary(self.encoding, text, self.pattern in PATTERNS)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside this vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of the ids. Raises ValueError for an id outside this vocabulary."""
        ids = list(ids)
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            known = {*self.ranks.values(), *self.special_tokens.values(), *self.matched_tokens.values()}
            wrong = next(id for id in ids if id not in known)
            raise ValueError(f"{wrong} is no token id of this vocabulary of {self.vocab_size:,}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary as readable JSON with a checksum, whole or not at all. Raises WriteError."""
        write_whole(path, json.dumps(self.content(), ensure_ascii=False, indent=0))

    def content(self) -> dict:
        """Return the content of the file that `save` writes."""
        default_eot = EOT if EOT in self.special_tokens else None
        more: dict[str, object] = {"matched_tokens": self.matched_tokens} if self.matched_tokens else {}
        more |= {"eot": self.eot} if self.eot != default_eot else {}
        version = 2 if more else 1
        if self.bos is not None:
            more, version = more | {"bos": self.bos}, VERSION
        return with_checksum({
            "format": FORMAT, "version": version,
            "pattern": self.pattern, "special_tokens": self.special_tokens, "first_id": self.first_id,
            "alphabet": list(self.alphabet), "merges": [f"{left} {right}" for left, right in self.merges],
        } | more)  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Read a file that `save` wrote. Raises ValueError for any other file and for a damaged one."""
        return cls.from_content(read_json(path), path)

    @classmethod
    def from_content(cls, content: object, path: str | os.PathLike) -> "BPE":
        """Make the vocabulary from a file's content; path: for messages only. Raises ValueError as `load` does."""
        if isinstance(content, dict) and "kind" in content:
            raise ValueError(f"{path} is no vocabulary of bpe.py: it holds a {content['kind']} tokenizer, "
                             "which has no merges")  # fmt: skip
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no vocabulary of bpe.py; to use a tokenizer.json: python -m formats.tokenizer_json"
            )
        content = without_checksum(content, path, required=True)
        if content.get("version") not in range(1, VERSION + 1):
            raise ValueError(f"{path} has format version {content.get('version')}, this code reads 1 to {VERSION}")
        return cls._from_fields(content, path)

    @classmethod
    def _from_fields(cls, content: dict, path: str | os.PathLike) -> "BPE":
        """Do the rest of `from_content`, for content with the right checksum: its fields may still have wrong types."""
        types = {"pattern": str, "special_tokens": dict, "first_id": int, "alphabet": list, "merges": list}
        optional = {"matched_tokens": dict, "eot": str, "bos": str}
        for name, kind in (types | {name: kind for name, kind in optional.items() if name in content}).items():
            if type(content.get(name)) is not kind and (name, content.get(name)) != ("eot", None):
                raise ValueError(f"{path}: {name!r} must be a {kind.__name__}, not {content.get(name)!r:.60}")
        for name in ("special_tokens", "matched_tokens"):
            for token, id in content.get(name, {}).items():
                if type(id) is not int:
                    raise ValueError(f"{path}: {name!r} must map names to ids, not {token!r} to {id!r:.60}")
        try:
            alphabet = bytes(content["alphabet"])
            merges = [(int(left), int(right)) for left, right in map(str.split, content["merges"])]
        except (TypeError, ValueError):
            raise ValueError(f"{path}: 'alphabet' must hold bytes, and 'merges' pairs of ids as \"3 5\"") from None
        try:
            return cls(
                content["pattern"], merges, content["special_tokens"], alphabet, content["first_id"],
                matched_tokens=content.get("matched_tokens"), eot=content.get("eot", EOT), bos=content.get("bos"),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{path} is no vocabulary: {error}") from None


def encode_ordinary(encoding: "tiktoken.Encoding", text: str, harmless: bool = True) -> list[int]:
    """Encode the text with an encoding of tiktoken; special tokens that are spelled out in it are ordinary text.

    harmless: whether the encoding's pattern is known to cut every text of ordinary length.
    Raises ValueError for half a surrogate pair, and for a text that the pattern cannot cut: it matches the empty
    string there, or backtracks too much.
    """
    check_text(text)
    try:
        if harmless and len(text) < LONG:
            return encoding.encode_ordinary(text)
        # `encode` is a little slower, but raises ValueError where the native code of encode_ordinary panics.
        return encoding.encode(text, allowed_special=set(), disallowed_special=())
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).removeprefix("Regex error while tokenizing: Error executing regex: ")
        raise ValueError(
            f"the vocabulary's pattern cannot cut this text of {len(text):,} characters ({reason}): "
            "give it in shorter parts, or use a vocabulary with another pattern"
        ) from None


def with_checksum(content: dict) -> dict:
    """Return the content of a file with its SHA-256 in the field "sha256"."""
    return content | {"sha256": checksum(content)}


def without_checksum(content: dict, path: str | os.PathLike, required: bool = False) -> dict:
    """Return the content without its checksum; path: for messages only.

    Raises ValueError if the checksum differs from that of the rest, or if it is required and missing.
    """
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if ("sha256" in content or required) and content.get("sha256") != checksum(rest):
        raise ValueError(f"{path} is damaged: its checksum differs")
    return rest


def train(
    texts: Iterable[str], vocab_size: int, pattern: str = "gpt4", special_tokens: Iterable[str] = SPECIAL_TOKENS, *,
    max_token_length: int | None = None, workers: int | None = None, progress: bool = False,
) -> BPE:  # fmt: skip
    """Learn a vocabulary of vocab_size ids: 256 bytes, merges, and the special tokens at the end.

    texts: may be a generator over more text than fits in memory, which holds only the distinct chunks.
    pattern: a name in PATTERNS, or a regular expression; text between two matches of it is a chunk too.
    max_token_length: in bytes (Baichuan 2: 32).
    If nothing is left to merge, the vocabulary has fewer ids, and a warning on stderr says so.
    Raises ValueError if there is no text, if vocab_size is too small for the bytes and special tokens, or if the
    pattern is not a regular expression, matches the empty string, or backtracks without end.
    """
    if isinstance(special_tokens, str) or "" in (special_tokens := list(dict.fromkeys(special_tokens))):
        raise ValueError(f"special_tokens={special_tokens!r}: a list of names is needed, none of them empty")
    if max_token_length is not None and max_token_length < 1:
        raise ValueError(f"max_token_length={max_token_length}: at least 1 is needed, or None for no limit")
    number = vocab_size - 256 - len(special_tokens)
    if number < 0:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens come first"
        )
    splitter(pattern)  # raises ValueError for a wrong pattern
    if pattern not in PATTERNS:  # the module regex, which cuts here, accepts more than tiktoken, which encodes
        BPE(pattern, [], {}).encode("")
    with tqdm(unit="B", unit_scale=True, desc="count", disable=None if progress else True) as bar:
        counts = count_chunks(map(check_text, texts), pattern, workers, bar.update)
    chunks = {chunk.encode(): n for chunk, n in counts.items()}
    if not chunks:
        raise ValueError("there is no text to learn from")
    merges = learn_merges(chunks, number, max_token_length, progress)
    if len(merges) < number:
        print(
            f"nothing is left to merge: {len(merges)} merges instead of {number}, more text would give more",
            file=sys.stderr,
        )
    start = 256 + len(merges)
    return BPE(pattern, [merge[:2] for merge in merges], {name: start + i for i, name in enumerate(special_tokens)})


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_texts(
    paths: list[str], pattern: str = "gpt4", reading: documents.Reading = documents.DEFAULT_READING
) -> Iterator[str]:
    """Yield the documents of the files, as data/text/prepare.py reads them, in blocks if the pattern is a named one."""
    for text in documents.read_documents(paths, reading):
        parts = documents.parts_of(text)
        yield from cut.blocks(parts, TASK, force=False) if pattern in PATTERNS else ["".join(parts)]


LONG_RUN = re.compile(
    r"(.)\1{7,}|(?:(?!(.)\2{7}).)+", re.DOTALL
)  # a character eight times or more, or text without such a run
SUBSCRIPTS = "₁₂₃₄"
MOST_WORDS = 20  # most words that --explain prints in a line


def shown(token: bytes) -> str:
    """Return a readable form of a token: 'the', ' ' x 39 for a long run, <e4 b8> for part of a character."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return f"<{token.hex(' ')}>"
    return " + ".join(f"{run[1]!r} x {len(run[0])}" if run[1] else repr(run[0]) for run in LONG_RUN.finditer(text))


def spelled(word: list[bytes]) -> list[str]:
    """Return a readable form of each token of a word, with ␣ for a space.

    Subscripts number the bytes of a token that holds only part of a character: 中₁₂ 中₃ are bytes 1 and 2, and byte 3.
    """
    text = b"".join(word).decode()
    places = iter([(index, byte) for index, c in enumerate(text) for byte in range(len(c.encode()))])
    shown_tokens = []
    for token in word:
        bytes_of: dict[int, list[int]] = {}  # which bytes of which character the token holds
        for index, byte in itertools.islice(places, len(token)):
            bytes_of.setdefault(index, []).append(byte)
        shown_token = ""
        for index, some in bytes_of.items():
            c = text[index]
            shown_token += "␣" if c == " " else c if c.isprintable() else repr(c)[1:-1]
            if len(some) < len(c.encode()):
                shown_token += "".join(SUBSCRIPTS[byte] for byte in some)
        shown_tokens.append(shown_token)
    return shown_tokens


def merge_pair(word: list[bytes], left: bytes, right: bytes) -> int | None:
    """Merge left and right wherever they are neighbours in the word; return the first index, None if there is none."""
    first, i = None, 0
    while i < len(word) - 1:
        if word[i] == left and word[i + 1] == right:
            word[i : i + 2] = [left + right]
            first = i if first is None else first
        i += 1
    return first


def explain(texts: Iterable[str], pattern: str, vocab_size: int, max_token_length: int | None) -> None:
    """Print every merge with its count and the words that it changes, for teaching.

    The line `256: 'e' + 's', 9 times → 'es'    n e w es t x6, w i d es t x3` says: token 256 is made of e and s, which
    were neighbours 9 times in the text; newest, which occurs 6 times, now has the tokens n e w es t.
    Raises ValueError if vocab_size is at most 256.
    """
    if vocab_size <= 256:
        raise ValueError(f"vocab_size={vocab_size} is too small: the 256 bytes come first, and then the merges")
    chunks = {chunk.encode(): n for chunk, n in count_chunks(map(check_text, texts), pattern).items()}
    words = {chunk: [bytes([byte]) for byte in chunk] for chunk in chunks}

    def listed(some: list[bytes]) -> str:
        shown_words = [f"{' '.join(spelled(words[chunk]))} x{chunks[chunk]}" for chunk in some[:MOST_WORDS]]
        more = len(some) - MOST_WORDS
        return ", ".join([*shown_words, *([f"and {more:,} more"] if more > 0 else [])])

    if any(not chunk.isascii() for chunk in chunks):
        print("中₁ 中₂ 中₃ are the bytes of 中")
    print(f"words: {listed(list(words))}")
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right, count in learn_merges(chunks, vocab_size - 256, max_token_length):
        a, b = tokens[left], tokens[right]
        tokens.append(a + b)
        changed, example = [], ()
        for chunk, word in words.items():
            before = list(word)
            if (first := merge_pair(word, a, b)) is not None:
                changed.append(chunk)
                example = example or (*spelled(before)[first : first + 2], spelled(word)[first])
        one, other, made = example
        print(f"{len(tokens) - 1}: '{one}' + '{other}', {count} times → '{made}'    {listed(changed)}")


def info(bpe: BPE, texts: list[str]) -> None:
    """Print the parts of a vocabulary and, if there are texts, its bytes per token beside gpt2 and cl100k_base."""
    text = "".join(read_texts(texts))
    tokens, matched = list(bpe.ranks), len(bpe.matched_tokens)
    print(f"{bpe.vocab_size:,} ids: 256 bytes, {len(bpe.merges):,} merges, {len(bpe.special_tokens)} special tokens"
          + (f", {matched} tokens that stand for their spelling in a text" if matched else ""))  # fmt: skip
    print(f"pattern {bpe.pattern}; special tokens {', '.join(bpe.special_tokens) or 'none'}")
    print(f"end of a document: {bpe.eot or 'no token'}")
    print("first merges:", ", ".join(shown(token) for token in tokens[256:276]) or "none")
    print("longest:", ", ".join(shown(token) for token in sorted(tokens, key=len, reverse=True)[:8]))
    if text:
        size = len(text.encode())
        print(f"bytes per token on {size:,} bytes: {size / len(bpe.encode(text)):.3f}", end="")
        for name in ("gpt2", "cl100k_base"):
            try:
                import tiktoken

                print(f", {name} {size / len(encode_ordinary(tiktoken.get_encoding(name), text)):.3f}", end="")
            except OSError:
                print(f", {name} is not here (tiktoken downloads it)", end="")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help="learn a vocabulary from text files")
    sub.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, folders, - for standard input")
    documents.add_reading_options(sub)
    sub.add_argument("--vocab_size", type=int, default=4096, help="ids in total, with special tokens (default 4096)")
    sub.add_argument("--output", metavar="FILE", help="the vocabulary to write")
    sub.add_argument("--pattern", default="gpt4", help=f"{', '.join(PATTERNS)} or a regular expression (default gpt4)")
    sub.add_argument("--max_token_length", type=int, metavar="N", help="longest token in bytes (default: no limit)")
    sub.add_argument("--explain", action="store_true", help="print every merge, for teaching; use a short text")
    for name, text in (("encode", "text to ids"), ("decode", "ids to text"), ("info", "describe a vocabulary")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("vocabulary", help="a file that train wrote")
        many = {"nargs": "*", "default": []} if name == "info" else {"default": "-"}
        sub.add_argument(
            "--input", metavar="FILE", help="default: standard input" if name != "info" else "text to compress", **many
        )
    arguments = parser.parse_args()
    if arguments.command == "train":
        texts = read_texts(arguments.input, arguments.pattern, documents.Reading.of(arguments))
        if arguments.explain:
            if arguments.output:
                raise ValueError("--explain prints the merges and writes nothing: leave --output out")
            return explain(texts, arguments.pattern, arguments.vocab_size, arguments.max_token_length)
        if not arguments.output:
            raise ValueError("--output is missing: the file to write the vocabulary to")
        if not (folder := Path(arguments.output).parent).is_dir():  # before an hour of learning, not after it
            raise ValueError(f"--output={arguments.output}: {folder} is no folder")
        if Path(arguments.output).is_dir():
            raise ValueError(f"--output={arguments.output} is a folder: give the name of a file in it")
        bpe = train(texts, arguments.vocab_size, arguments.pattern,
                    max_token_length=arguments.max_token_length, progress=True)  # fmt: skip
        bpe.save(arguments.output)
        print(f"{arguments.output}: {bpe.vocab_size:,} ids")
    elif arguments.command == "encode":
        bpe = BPE.load(arguments.vocabulary)
        print(*bpe.encode(read_text(arguments.input)))
    elif arguments.command == "decode":
        words = read_text(arguments.input).split()
        if wrong := next((word for word in words if not word.isdecimal() or len(word) > 10), None):
            raise ValueError(f"{wrong[:40]!r} is no token id: decode reads numbers separated by spaces")
        sys.stdout.buffer.write(BPE.load(arguments.vocabulary).decode_bytes(map(int, words)))
    else:
        info(BPE.load(arguments.vocabulary), arguments.input)


if __name__ == "__main__":
    cli.run_command(main)
