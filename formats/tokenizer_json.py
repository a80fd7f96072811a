"""Convert byte-level BPE vocabularies to and from the tokenizer.json of Hugging Face tokenizers, with the same ids.

    python -m formats.tokenizer_json import tokenizer.json mine.bpe
    python -m formats.tokenizer_json export mine.bpe tokenizer.json

An imported vocabulary gives the ids of Hugging Face for every text. If a tokenizer.json does something that bpe.py
cannot do, the import fails and names it. One thing differs on purpose: a special token that is spelled out in a text is
ordinary text here, as with `encode_special_tokens = True` there.
"""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bpe import BPE, EOT
from common import cli
from common.files import read_json, write_whole
from text.chunks import PATTERNS, check_expression
from text.foreign import BYTE_OF, byte_characters, steps_of
from text.tokenizer import BPETokenizer, ExtendedTokenizer, Tokenizer, load_tokenizer

# Hugging Face uses Ruby's regular expressions, where {1,3}+ repeats {1,3} and is not a possessive quantifier.
REPEATED = re.compile(r"\{[0-9]*,?[0-9]*\}\+")
RUBY_PATTERNS = {name: pattern.replace("{1,3}+", "{1,3}") for name, pattern in PATTERNS.items()}
# Digits(individual_digits) before ByteLevel, which is GPT-2's pattern: \s+ ends a chunk before a digit too.
SINGLE_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
DROPPABLE = ("post_processor", "truncation", "padding")  # parts of a tokenizer.json that do more than encode a text


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export_tokenizer_json(bpe: BPE, path: str | os.PathLike) -> None:
    """Write the vocabulary as a tokenizer.json of Hugging Face tokenizers; see `tokenizer_json`."""
    write_whole(path, json.dumps(tokenizer_json(bpe), ensure_ascii=False, indent=1))


def tokenizer_json(bpe: BPE) -> dict:
    """Return the content of a tokenizer.json of Hugging Face tokenizers with the same ids.

    tiktoken, which encodes here, merges any two neighbours that together are a token. To make Hugging Face do the same,
    every way to cut a token in two becomes a merge: "abc" gives the merges (a, bc) and (ab, c), if "bc" and "ab" are
    tokens. Raises ValueError if a tokenizer.json cannot express the vocabulary.
    """
    spelled = byte_characters()
    spell = {token: "".join(map(spelled.__getitem__, token)) for token in bpe.ranks}
    named = bpe.special_tokens | bpe.matched_tokens
    vocab = {spell[token]: id for token, id in bpe.ranks.items()} | named
    if len(vocab) < len(bpe.ranks) + len(named):
        raise ValueError("a special token is spelled like an ordinary one, which a tokenizer.json cannot tell apart")
    for special, matched in itertools.product(bpe.special_tokens, bpe.matched_tokens):
        if overlap(special, matched):  # Hugging Face searches for both at once
            raise ValueError(f"the special token {special!r} and the matched token {matched!r} overlap, so that a "
                             "tokenizer.json cannot say which of them is found")  # fmt: skip
    pattern = RUBY_PATTERNS.get(bpe.pattern, bpe.pattern)
    if reason := means_something_else(pattern):
        raise ValueError(f"the pattern {pattern!r} means something else in a tokenizer.json: {reason}")
    tokens = list(bpe.ranks)
    learned = {
        token: len(tokens[left - bpe.first_id]) for token, (left, _) in zip(tokens[256:], bpe.merges, strict=True)
    }
    merges = [(spell[left], spell[right]) for left, right in all_cuts(bpe.ranks, learned)]
    added = [added_token(name, id, name in bpe.special_tokens) for name, id in named.items()]
    return byte_level_json(pattern, vocab, merges, sorted(added, key=lambda token: token["id"]))


def all_cuts(ranks: dict[bytes, int], first: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield every cut of each token in two tokens. first: the length of the left part that comes first."""
    for token in ranks:
        for cut in sorted(range(1, len(token)), key=lambda cut: cut != first.get(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                yield token[:cut], token[cut:]


def added_token(name: str, id: int, special: bool) -> dict:
    """Return an entry of a tokenizer.json's added_tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": name, **plain, "special": special}


def byte_level_json(pattern: str, vocab: dict[str, int], merges: list, added: list[dict]) -> dict:
    """Return the content of a tokenizer.json of byte-level BPE that cuts text by the regular expression `pattern`."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def vocabulary_of(tokenizer: Tokenizer, path: str | os.PathLike) -> BPE:
    """Return the vocabulary of a tokenizer, with the special tokens of an ExtendedTokenizer.

    Raises ValueError for a tokenizer that has no merges; path is for the message only.
    """
    match tokenizer:
        case BPETokenizer(bpe=bpe):
            return bpe
        case ExtendedTokenizer(base=BPETokenizer(bpe=bpe)):
            return BPE(
                bpe.pattern, bpe.merges, tokenizer.special_tokens, bpe.alphabet, bpe.first_id,
                matched_tokens=bpe.matched_tokens, eot=bpe.eot, bos=bpe.bos,
            )  # fmt: skip
    kind = "a char tokenizer, which has no merges"
    if tokenizer.name != "char":
        kind = f"the encoding {tokenizer.name!r} of tiktoken"
    raise ValueError(f"{path} holds {kind}: only a vocabulary of bpe.py can be exported")


# ---------------------------------------------------------------------------------------------------------------------
# Import


class Merge(NamedTuple):
    """A merge of a tokenizer.json: the tokens left and right make the token with this id."""

    id: int
    left: bytes
    right: bytes


def import_tokenizer_json(path: str | os.PathLike, eot: str | None = None, drop: Iterable[str] = ()) -> BPE:
    """Return the vocabulary of a byte-level BPE tokenizer.json, with the same ids.

    Its special added tokens are special tokens here, its other added tokens are matched tokens.
    eot: the token that ends a document, such as "</s>"; by default <|endoftext|>, if there is one.
    drop: the parts of DROPPABLE to ignore; without it, a file with such a part is an error.
    Raises ValueError for other kinds of tokenizers, and for a setting under which bpe.py would give other ids.
    """
    return vocabulary_from(read_json(path, "a tokenizer.json"), path, eot, drop)


def vocabulary_from(
    content: dict, path: str | os.PathLike, eot: str | None = None, drop: Iterable[str] = (), bos: str | None = None
) -> BPE:
    """Do what `import_tokenizer_json` does, for the content of the file; path is for messages only."""
    try:
        _check_kind(content, path)
        for name in DROPPABLE:
            if name not in drop and (reason := addition(name, content.get(name))):
                raise ValueError(f"{path}: its {name} {reason}, which encoding here does not: "
                                 f"--drop {name} ignores it")  # fmt: skip
        pattern = hugging_face_pattern(content["pre_tokenizer"], path)
        special, matched = added_tokens(content, eot, path)
        vocab = content["model"]["vocab"].items()
        ordinary = sorted((id, name) for name, id in vocab if name not in special and name not in matched)
        ids = {token_bytes(name, path): id for id, name in ordinary}
        pairs = list(_merges(content["model"]["merges"], ids, path))
        first = ordinary[0][0]
    except (KeyError, TypeError, AttributeError, IndexError):  # a field is missing, or has another type
        raise ValueError(f"{path} is no tokenizer.json of a byte-level BPE tokenizer") from None
    tokens = list(ids)
    if sorted(tokens[:256]) != [bytes([byte]) for byte in range(256)]:
        raise ValueError(f"{path}: its first 256 ids are not the bytes, so that there is text it cannot encode")
    learned = _learned_merges(ids, pairs, path)
    _check_reachable(ids, pairs, bool(content["model"].get("ignore_merges")), path)
    try:
        check_expression(PATTERNS.get(pattern, pattern))
        return BPE(
            pattern, learned, special, b"".join(tokens[:256]), first,
            matched_tokens=matched, eot=EOT if eot is None else eot, bos=bos,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def token_bytes(name: str, path: str | os.PathLike) -> bytes:
    """Return the bytes of a token as tokenizer.json spells them; path is for the message only."""
    try:
        return bytes(BYTE_OF[character] for character in name)
    except KeyError:
        raise ValueError(f"{path} is not byte-level BPE: its token {name!r} is not spelled in bytes") from None


def _merges(merges: list, ids: dict[bytes, int], path: str | os.PathLike) -> Iterator[Merge]:
    """Yield the merges of a tokenizer.json; each is a pair, or in older files a string with a space."""
    for merge in merges:
        names = merge.split(" ") if isinstance(merge, str) else merge
        left, right = (token_bytes(name, path) for name in names)
        for token in (left, right, left + right):
            if token not in ids:
                raise ValueError(f"{path}: the merge of {names[0]!r} and {names[1]!r} needs the token "
                                 f"{_readable(token)}, which is no ordinary token of the vocabulary")  # fmt: skip
        yield Merge(ids[left + right], left, right)


def _check_kind(content: dict, path: str | os.PathLike) -> None:
    """Raise ValueError unless the model is byte-level BPE that encodes the text unchanged."""
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{path} is a {model['type']} tokenizer, not byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(key):
            raise ValueError(f"{path} is not byte-level BPE: it has {key}={model[key]!r}")
    if changes := steps_of(content.get("normalizer"), "normalizers"):
        names = ", ".join(step["type"] for step in changes)
        raise ValueError(f"{path} changes the text before it encodes it ({names}), which encoding here does not")


def addition(name: str, setting: dict | None) -> str:
    """Describe what a part in DROPPABLE does to the ids of a text, as the rest of a sentence; "" for nothing."""
    if setting is None:
        return ""
    if name == "truncation":
        return f"cuts off what is beyond {setting['max_length']} tokens"
    if name == "padding":
        fixed = isinstance(setting["strategy"], dict)  # {"Fixed": n}; "BatchLongest" pads no text that stands alone
        return f"pads every text with {setting['pad_token']}" if fixed else ""
    for step in steps_of(setting, "processors"):
        if step["type"] == "TemplateProcessing":
            added = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
        elif step["type"] == "ByteLevel":  # changes positions in the text only
            added = []
        else:
            added = [step[key][0] for key in ("cls", "sep")]
        if added:
            return f"adds {' and '.join(added)} to every text"
    return ""


def added_tokens(
    content: dict, eot: str | None, path: str | os.PathLike
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """Return the special and the matched tokens of a tokenizer.json, {spelling: id} each. `eot` is a special token.

    Raises ValueError if `eot` is unknown, if two tokens share an id, or if the options of a token are not supported.
    """
    vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
    named = {token["content"]: token["id"] for token in added}
    if eot is not None and eot not in named:
        if eot not in vocab:
            raise ValueError(f"{path} has no token {eot!r}; the tokens added to its vocabulary are "
                             f"{', '.join(named)[:1000] or 'none'}")  # fmt: skip
        named[eot] = vocab[eot]
    name_of: dict[int, str] = {}
    for name, id in [*vocab.items(), *named.items()]:
        if type(id) is not int:
            raise TypeError
        if name_of.setdefault(id, name) != name:
            raise ValueError(f"{path}: the tokens {name_of[id]!r} and {name!r} share the id {id}")
        if name in named and named[name] != id:
            raise ValueError(f"{path}: the token {name!r} has two ids, {id} and {named[name]}")
    matched = {}
    for token in added:
        name = token["content"]
        if token["special"] or name == eot:
            continue
        matched[name] = named[name]
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise ValueError(f"{path}: the added token {name!r} has {option}, which is not known here")
        for other in added:
            different = (other["special"], other.get("normalized")) != (False, token.get("normalized"))
            if different and overlap(name, other["content"]):
                raise ValueError(f"{path}: the added tokens {name!r} and {other['content']!r} overlap, and are of "
                                 "different kinds, so that which of them is found is not known here")  # fmt: skip
    return {name: id for name, id in named.items() if name not in matched}, matched


def overlap(a: str, b: str) -> bool:
    """Return whether two different spellings can share characters of a text."""
    ends = (a[-n:] == b[:n] or b[-n:] == a[:n] for n in range(1, min(len(a), len(b))))
    return a in b or b in a or any(ends)


def _learned_merges(ids: dict[bytes, int], pairs: list[Merge], path: str | os.PathLike) -> list[tuple[int, int]]:
    """Return, for each token but the bytes, the two older ids that are merged into it, in the order of ids.

    Raises ValueError if there are none, or if the ids are not in the order of the merges, as encoding here needs.
    """
    numbers = list(ids.values())
    made: dict[int, tuple[int, int]] = {}
    for id, left, right in pairs:
        if max(ids[left], ids[right]) < id:
            made.setdefault(id, (ids[left], ids[right]))  # the first of several ways to make the token
    order = [id for id, _, _ in pairs]
    if order != sorted(order):
        raise ValueError(f"{path}: its ids do not follow the order of its merges, which encoding here relies on")
    for token, id in [*ids.items()][256:]:
        if id not in made:
            raise ValueError(f"{path}: no merge of two older tokens makes the token {_readable(token)} (id {id}), "
                             "but encoding here would use it")  # fmt: skip
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        gap = next(id for id, following in zip(numbers, numbers[1:], strict=False) if following != id + 1)
        raise ValueError(f"{path}: its ids have a gap after {gap}, so that they are not the numbers of its merges")
    return [made[id] for id in numbers[256:]]


def _check_reachable(ids: dict[bytes, int], pairs: list[Merge], whole: bool, path: str | os.PathLike) -> None:
    """Raise ValueError for a token that encoding here produces and Hugging Face's merges do not.

    tiktoken looks a whole chunk up before it merges (Hugging Face: only if `whole`, its ignore_merges), and merges any
    two neighbours that together are a token; Hugging Face merges the listed pairs only. For instance, if "bc"
    and then "abc" were made of "a" and "bc", but an older merge makes "ab", Hugging Face cuts "abc" into "ab" and "c".
    Merging does not depend on what surrounds a token, so it is enough to encode every token by itself.
    """
    rank_of: dict[tuple[bytes, bytes], int] = {}
    for rank, (_, left, right) in enumerate(pairs):
        rank_of.setdefault((left, right), rank)
    for token, id in ids.items():
        theirs = merge_by_rank(token, lambda left, right: rank_of.get((left, right)))
        if theirs == [token]:
            continue
        ours = merge_by_rank(token, lambda left, right: ids.get(left + right)) if whole else [token]
        if ours != theirs:
            parts = " + ".join(map(_readable, theirs))
            raise ValueError(f"{path}: its merges do not arrive at the token {_readable(token)} (id {id}), but at "
                             f"{parts}; encoding here would use it")  # fmt: skip


def merge_by_rank(token: bytes, rank: Callable[[bytes, bytes], int | None]) -> list[bytes]:
    """Merge the bytes of a token: the neighbours with the lowest rank first, of equals the leftmost; None: no merge."""
    word = [bytes([byte]) for byte in token]
    while True:
        ranked = [(n, i) for i in range(len(word) - 1) if (n := rank(word[i], word[i + 1])) is not None]
        if not ranked:
            return word
        i = min(ranked)[1]
        word[i : i + 2] = [word[i] + word[i + 1]]


def _readable(token: bytes) -> str:
    return repr(token.decode("utf-8", errors="backslashreplace"))


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


def hugging_face_pattern(pre_tokenizer: dict | None, path: str | os.PathLike) -> str:
    """Convert the pre-tokenizer of a tokenizer.json to a pattern of bpe.py.

    Text that the pattern does not match is a chunk of its own, there and here. Raises ValueError if the pre-tokenizer
    has several steps, or a step that is not supported; the message names it.
    """
    patterns, steps = [], steps_of(pre_tokenizer, "pretokenizers")
    match steps:
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, **rest}]:
            if rest.get("use_regex", True):
                return SINGLE_DIGITS
    for step in steps:
        kind = step["type"]
        if kind == "Split":
            patterns.append(_split_pattern(step, path))
        elif kind == "ByteLevel" and step["add_prefix_space"]:
            raise ValueError(f"{path} puts a space before every text (add_prefix_space), which encoding here does not")
        elif kind == "ByteLevel":  # GPT-2's pattern is built into it; older files do not say use_regex
            patterns += [PATTERNS["gpt2"]] if step.get("use_regex", True) else []
        else:
            raise ValueError(f"{path} cuts text in a way not known here: {kind}")
    if [step["type"] for step in steps].count("ByteLevel") != 1 or steps[-1]["type"] != "ByteLevel":
        raise ValueError(f"{path} is not byte-level BPE: its last pre-tokenizer must be its only ByteLevel")
    if len(patterns) != 1:
        kinds = ", ".join(step["type"] for step in steps)
        raise ValueError(f"{path} cuts text in {len(patterns)} steps ({kinds}); exactly one is known here")
    pattern = patterns[0]
    for name, ruby in RUBY_PATTERNS.items():
        if pattern == ruby:
            return name
    if reason := means_something_else(pattern):
        raise ValueError(f"{path} cuts text by {pattern!r}, which means something else here: {reason}")
    return pattern


def _split_pattern(step: dict, path: str | os.PathLike) -> str:
    """Return the regular expression of a Split. Raises ValueError if it drops text or joins chunks."""
    [(kind, pattern)] = step["pattern"].items()
    pattern = re.escape(pattern) if kind == "String" else pattern
    behavior, invert = step["behavior"], step["invert"]
    if behavior == "Isolated" or behavior == "Removed" and invert and matches_all(pattern):
        return pattern
    if behavior == "Removed":
        raise ValueError(f"{path} drops the text that its Split {'does not match' if invert else 'matches'} (Removed)")
    raise ValueError(f"{path} cuts text in a way not known here: a Split that is {behavior}")


def matches_all(pattern: str) -> bool:
    """Return whether the pattern matches all of Unicode's characters, side by side and between spaces."""
    if pattern in RUBY_PATTERNS.values():
        return True
    expression = check_expression(pattern)
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    texts = characters, " ".join(characters)
    return all(sum(len(match[0]) for match in expression.finditer(text)) == len(text) for text in texts)


def means_something_else(pattern: str) -> str:
    """Describe what Hugging Face (Ruby) and tiktoken read differently in a regular expression; "" for nothing."""
    if pattern in RUBY_PATTERNS.values():
        return ""
    if REPEATED.search(pattern):
        return "x{1,3}+ takes x any number of times there; (?>x{1,3}) is the same everywhere"
    without_escapes = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    outside_classes = re.sub(r"\[\^?\]?[^\]]*\]", "", without_escapes)
    if re.search(r"[\^$]", outside_classes):
        return "^ and $ stand for the ends of a line there, and for the ends of the text in tiktoken"
    if re.search(r"\(\?[a-z]*m", outside_classes):
        return "(?m) lets . match a line break there"
    if re.search(r"\\[1-9kg]|\(\?P?<[^=!]", pattern):
        return "named groups and references to groups are not known here"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("import", "tokenizer.json to a vocabulary of bpe.py"), ("export", "the other way round")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("source", metavar="SOURCE", help="the file to read")
        sub.add_argument("target", metavar="TARGET", help="the file to write")
        if name == "import":
            sub.add_argument("--eot", metavar="NAME", help=f"the token that ends a document; default: {EOT}")
            sub.add_argument(
                "--drop", action="append", default=[], choices=DROPPABLE, metavar="WHAT",
                help="ignore a part that does more than encode a text (may be repeated): " + ", ".join(DROPPABLE),
            )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.command == "export":
        bpe = vocabulary_of(load_tokenizer(arguments.source), arguments.source)
        return export_tokenizer_json(bpe, arguments.target)
    bpe = import_tokenizer_json(arguments.source, arguments.eot, arguments.drop)
    bpe.save(arguments.target)
    print(f"{arguments.target}: {bpe.vocab_size:,} ids")
    if bpe.eot is None:
        names = ", ".join([*bpe.special_tokens, *bpe.matched_tokens])[:1000] or "there are none"
        print(
            f"note: it has no token {EOT}, so that nothing will stand between documents; if another token ends them, "
            f"name it by --eot (added tokens: {names})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run_command(main)
