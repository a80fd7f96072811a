"""Byte-level BPE: learn a vocabulary from text, then turn text into token ids and back.

Text is cut into chunks whose frequencies text/chunks.py counts and text/merges.py learns merges from. Encoding is
tiktoken's native core, with our vocabulary.

    python bpe.py train --input book.txt --vocab_size 4096 --output book.bpe
    python bpe.py info book.bpe
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from common import cli
from common.files import checksum, read_json, write_whole
from common.textfile import read_text
from text import cut, documents
from text.chunks import PATTERNS, TASK, count_chunks, splitter
from text.merges import learn_merges

EOT = "<|endoftext|>"
SPECIAL_TOKENS = (EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # the last four are for conversations

FORMAT = {"format": "plaingpt-bpe", "version": 1}


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class BPE:
    """A vocabulary: the 256 bytes, the merges in order, the special tokens; and encoding and decoding with it.

    Ids: bytes from first_id on (in the order of `alphabet`), then one id per merge, then, or wherever `special_tokens`
    says, the special tokens.
    """

    def __init__(
        self, pattern: str, merges: list[tuple[int, int]], special_tokens: dict[str, int],
        alphabet: bytes = bytes(range(256)), first_id: int = 0,
    ):  # fmt: skip
        self.pattern, self.merges, self.special_tokens = pattern, merges, special_tokens
        self.alphabet, self.first_id = alphabet, first_id
        tokens = [bytes([byte]) for byte in alphabet]
        for left, right in merges:
            tokens.append(tokens[left - first_id] + tokens[right - first_id])
        self.ranks = {token: first_id + n for n, token in enumerate(tokens)}
        ids = {*self.ranks.values(), *special_tokens.values()}
        if sorted(alphabet) != list(range(256)) or len(self.ranks) < len(tokens):
            raise ValueError("a token is there twice, or not every byte once")
        if len(ids) < len(self.ranks) + len(special_tokens):
            raise ValueError("two tokens share an id")
        self.vocab_size = max(ids) + 1

    @functools.cached_property
    def encoding(self):
        """The same as an encoding of tiktoken, whose native core does the work."""
        import tiktoken

        return tiktoken.Encoding(
            "bpe", pat_str=PATTERNS.get(self.pattern, self.pattern), mergeable_ranks=self.ranks,
            special_tokens=self.special_tokens,
        )  # fmt: skip

    def to_tiktoken(self):
        """The encoding of tiktoken with the same ids."""
        return self.encoding

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "encoding"}

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of the text. A special token's spelling is ordinary text unless it is allowed by name.

        ValueError for half a surrogate pair, which is no character.
        """
        check_text(text)
        self._check_special(allowed_special)
        if not allowed_special:
            return self.encoding.encode_ordinary(text)
        return self.encoding.encode(text, allowed_special=set(allowed_special), disallowed_special=())

    def encode_batch(
        self, texts: list[str], allowed_special: Collection[str] = (), threads: int | None = None
    ) -> list[list[int]]:
        """`encode` of every text, on several threads (default: one per core)."""
        for text in texts:
            check_text(text)
        self._check_special(allowed_special)
        allowed, threads = set(allowed_special), threads or os.cpu_count() or 1
        if not allowed:
            return self.encoding.encode_ordinary_batch(texts, num_threads=threads)
        return self.encoding.encode_batch(texts, num_threads=threads, allowed_special=allowed, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. ValueError for an id that is none."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of the ids."""
        ids = list(ids)
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size or i not in self._all_ids)
            raise ValueError(f"{wrong} is no token id of this vocabulary of {self.vocab_size:,}") from None

    @functools.cached_property
    def _all_ids(self) -> set[int]:
        return {*self.ranks.values(), *self.special_tokens.values()}

    def _check_special(self, allowed: Collection[str]) -> None:
        for name in allowed:
            if name not in self.special_tokens:
                raise ValueError(
                    f"{name!r} is no special token here: {', '.join(self.special_tokens) or 'there are none'}"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary as readable JSON with a checksum; the file is there whole or not at all."""
        write_whole(path, json.dumps(self.content(), ensure_ascii=False, indent=0))

    def content(self) -> dict:
        """What the file holds."""
        content = FORMAT | {
            "pattern": self.pattern, "special_tokens": self.special_tokens, "first_id": self.first_id,
            "alphabet": list(self.alphabet), "merges": [f"{left} {right}" for left, right in self.merges],
        }  # fmt: skip
        return content | {"sha256": checksum(content)}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Read what `save` wrote. ValueError for any other file, and for one that is damaged."""
        return cls.from_content(read_json(path), path)

    @classmethod
    def from_content(cls, content: object, path: str | os.PathLike) -> "BPE":
        """The vocabulary of a file's content; path is for messages only."""
        if not isinstance(content, dict) or content.get("format") != FORMAT["format"]:
            raise ValueError(
                f"{path} is no vocabulary of bpe.py; to use a tokenizer.json: python -m formats.tokenizer_json"
            )
        stated, content = content.get("sha256"), {k: v for k, v in content.items() if k != "sha256"}
        if stated != checksum(content):
            raise ValueError(f"{path} is damaged: its checksum differs")
        if content["version"] != FORMAT["version"]:
            raise ValueError(f"{path} has format version {content['version']}, this code reads {FORMAT['version']}")
        merges = [tuple(map(int, merge.split())) for merge in content["merges"]]
        return cls(
            content["pattern"], merges, content["special_tokens"], bytes(content["alphabet"]), content["first_id"]
        )


def train(
    texts: Iterable[str], vocab_size: int, pattern: str = "gpt4", special_tokens: Iterable[str] = SPECIAL_TOKENS, *,
    max_token_length: int | None = None, workers: int | None = None, progress: bool = False,
) -> BPE:  # fmt: skip
    """Learn a vocabulary of vocab_size ids: 256 bytes, merges, and the special tokens at the end.

    texts may be a generator over more text than memory holds; what is kept is its distinct chunks. pattern: a name in
    PATTERNS or a regular expression. max_token_length: in bytes (Baichuan 2: 32). Fewer ids, with a warning on stderr,
    when nothing is left to merge. ValueError: no text, or a vocab_size too small for bytes and special tokens.
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
    splitter(pattern)  # refuses what is no pattern
    if pattern not in PATTERNS:  # regex, which learns, knows more than tiktoken, which is to encode
        try:
            BPE(pattern, [], {}).to_tiktoken()
        except ValueError as error:
            raise ValueError(f"the pattern {pattern!r} does not work in tiktoken: {error}") from None
    with tqdm(unit="B", unit_scale=True, desc="count", disable=None if progress else True) as bar:
        counts = count_chunks(texts, pattern, workers, bar.update)
    try:
        chunks = {chunk.encode(): n for chunk, n in counts.items()}
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"the texts hold {half!r}, half a surrogate pair, which is no character") from None
    if not any(chunks):
        raise ValueError("there is no text to learn from")
    merges = learn_merges(chunks, number, max_token_length, progress)
    if len(merges) < number:
        print(
            f"nothing is left to merge: {len(merges)} merges instead of {number}, more text would give more",
            file=sys.stderr,
        )
    start = 256 + len(merges)
    return BPE(pattern, [merge[:2] for merge in merges], {name: start + i for i, name in enumerate(special_tokens)})


def check_text(text: str) -> None:
    """ValueError for half a surrogate pair, which is no character and has no bytes."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text[error.start]!r} at position {error.start} is half a surrogate pair, no character"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_texts(
    paths: list[str], pattern: str = "gpt4", reading: documents.Reading = documents.DEFAULT_READING
) -> Iterator[str]:
    """The documents of files, as data/text/prepare.py reads them; in blocks where a named pattern allows to cut."""
    for text in documents.read_documents(paths, reading):
        parts = documents.parts_of(text)
        yield from cut.blocks(parts, TASK, force=False) if pattern in PATTERNS else ["".join(parts)]


def shown(token: bytes) -> str:
    """A token for people."""
    return repr(token.decode("utf-8", errors="backslashreplace"))


def explain(texts: Iterable[str], arguments: argparse.Namespace) -> None:
    """Print every merge with its count and what became of the words, as a lecture would."""
    chunks = {c.encode(): n for c, n in count_chunks(texts, arguments.pattern).items()}
    words = {chunk: [bytes([byte]) for byte in chunk] for chunk in chunks}

    def state() -> str:
        return ", ".join(
            " ".join(t.decode("utf-8", "backslashreplace") for t in w).strip() + f" x{chunks[c]}"
            for c, w in words.items()
        )

    print(f"words: {state()}")
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right, count in learn_merges(chunks, arguments.vocab_size - 256, arguments.max_token_length):
        a, b = tokens[left], tokens[right]
        tokens.append(a + b)
        for word in words.values():
            i = 0
            while i < len(word) - 1:
                if word[i] == a and word[i + 1] == b:
                    word[i : i + 2] = [a + b]
                i += 1
        print(f"{len(tokens) - 1}: {shown(a)} + {shown(b)}, {count} times → {shown(a + b)}    {state()}")


def info(bpe: BPE, texts: list[str]) -> None:
    """Print what is in a vocabulary, and how well it compresses the texts, if any, beside gpt2 and cl100k_base."""
    text = "".join(read_texts(texts))
    tokens = list(bpe.ranks)
    print(f"{bpe.vocab_size:,} ids: 256 bytes, {len(bpe.merges):,} merges, {len(bpe.special_tokens)} special tokens")
    print(f"pattern {bpe.pattern}; special tokens {', '.join(bpe.special_tokens) or 'none'}")
    print("first merges:", " ".join(shown(token) for token in tokens[256:276]))
    print("longest:", " ".join(shown(token) for token in sorted(tokens, key=len, reverse=True)[:8]))
    if text:
        size = len(text.encode())
        print(f"bytes per token on {size:,} bytes: {size / len(bpe.encode(text)):.3f}", end="")
        for name in ("gpt2", "cl100k_base"):
            try:
                import tiktoken

                print(f", {name} {size / len(tiktoken.get_encoding(name).encode_ordinary(text)):.3f}", end="")
            except OSError:
                print(f", {name} is not here (tiktoken downloads it)", end="")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help="learn a vocabulary from text files")
    sub.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, folders, - for standard input")
    documents.add_reading_options(sub)
    sub.add_argument("--vocab_size", type=int, default=4096, help="ids in all, special tokens included (default 4096)")
    sub.add_argument("--output", metavar="FILE", help="the vocabulary to write")
    sub.add_argument("--pattern", default="gpt4", help=f"{', '.join(PATTERNS)} or a regular expression (default gpt4)")
    sub.add_argument("--max_token_length", type=int, metavar="N", help="longest token in bytes (default: no limit)")
    sub.add_argument("--explain", action="store_true", help="print every merge, as a lecture would; for a few words")
    for name, text in (("encode", "text to ids"), ("decode", "ids to text"), ("info", "what is in a vocabulary")):
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
            return explain(texts, arguments)
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
        if wrong := next((word for word in words if not word.isdecimal()), None):
            raise ValueError(f"{wrong!r} is no token id: decode reads numbers separated by spaces")
        sys.stdout.buffer.write(BPE.load(arguments.vocabulary).decode_bytes(map(int, words)))
    else:
        info(BPE.load(arguments.vocabulary), arguments.input)


if __name__ == "__main__":
    cli.run(main)
