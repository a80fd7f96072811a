"""Byte-level BPE vocabularies to and from the tokenizer.json of Hugging Face tokenizers, with the same ids.

python -m formats.tokenizer_json import tokenizer.json mine.bpe
python -m formats.tokenizer_json export mine.bpe tokenizer.json
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable

from bpe import BPE, EOT
from common import cli
from common.files import read_json, write_whole
from text.chunks import PATTERNS

# Hugging Face's regular expressions are Ruby's, where {1,3}+ means any number of {1,3}, and not "possessive".
REPEATED = re.compile(r"\{[0-9]*,?[0-9]*\}\+")
DROPPABLE = ("post_processor", "truncation")  # parts of a tokenizer.json that may be left out on purpose
RUBY_PATTERNS = {name: pattern.replace("{1,3}+", "{1,3}") for name, pattern in PATTERNS.items()}


def byte_characters() -> dict[int, str]:
    """How tokenizer.json writes bytes: visible Latin-1 characters as themselves, the others as U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def export_tokenizer_json(bpe: BPE, path: str | os.PathLike) -> None:
    """Write the vocabulary as a tokenizer.json of Hugging Face tokenizers, with the same ids.

    Like tiktoken, it is to merge any two neighbours that make a token, not only those that made it here: every way to
    cut a token in two is a merge. ValueError for what such a file cannot say.
    """
    spelled = byte_characters()
    spell = {token: "".join(map(spelled.__getitem__, token)) for token in bpe.ranks}
    named = bpe.special_tokens | bpe.matched_tokens
    vocab = {spell[token]: id for token, id in bpe.ranks.items()} | named
    if len(vocab) < len(bpe.ranks) + len(named):
        raise ValueError("a special token is spelled like an ordinary one, which a tokenizer.json cannot tell apart")
    pattern = RUBY_PATTERNS.get(bpe.pattern, bpe.pattern)
    if REPEATED.search(pattern):
        raise ValueError(f"{pattern!r} means something else in a tokenizer.json: write (?>x{{1,3}}) for x{{1,3}}+")
    tokens, merges = list(bpe.ranks), []
    for token, (left, _) in zip(tokens[256:], bpe.merges, strict=True):
        learned = len(tokens[left - bpe.first_id])  # the cut that was learned first, for `import` to find
        for cut in sorted(range(1, len(token)), key=lambda cut: cut != learned):
            if token[:cut] in spell and token[cut:] in spell:
                merges.append((spell[token[:cut]], spell[token[cut:]]))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": name, **plain, "special": name in bpe.special_tokens}
        for name, id in sorted(named.items(), key=lambda item: item[1])
    ]  # fmt: skip
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=1))


def import_tokenizer_json(path: str | os.PathLike, eot: str | None = None, drop: Iterable[str] = ()) -> BPE:
    """The vocabulary of a byte-level BPE tokenizer.json, with the same ids.

    Its special tokens are special tokens here; added tokens that are not special are matched in texts. eot: the name
    of the token that ends a document, by default <|endoftext|> if there is one. drop: parts of the file that are to be
    left out, among DROPPABLE. ValueError, naming the obstacle, for what cannot be imported with the same ids.
    """
    content = read_json(path, "a tokenizer.json")
    try:
        model = content["model"]
        check_kind(content, model, path)
        check_droppable(content, path, drop)
        pattern = hugging_face_pattern(content["pre_tokenizer"], path)
        special, matched = added_tokens(content, path)
        byte_of = {character: byte for byte, character in byte_characters().items()}
        tokens = sorted((id, name) for name, id in model["vocab"].items() if name not in special | matched)
        spelled = [bytes(byte_of[character] for character in name) for _, name in tokens]
        ids = {token: id for (id, _), token in zip(tokens, spelled, strict=True)}
        pairs = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            left, right = (bytes(byte_of[character] for character in half) for half in (left, right))
            pairs.append((ids[left + right], ids[left], ids[right]))
        first = tokens[0][0]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} is no tokenizer.json of a byte-level BPE tokenizer") from None
    check_ids([*(id for id, _ in tokens), *special.values(), *matched.values()], path)
    if sorted(spelled[:256]) != [bytes([byte]) for byte in range(256)]:
        raise ValueError(f"{path}: its first 256 ids are not the bytes, so that there is text it cannot encode")
    made: dict[int, tuple[int, int]] = {}
    for made_id, left, right in pairs:
        if max(left, right) < made_id:
            made.setdefault(made_id, (left, right))  # of several ways to make a token, the first
    order = [made_id for made_id, _, _ in pairs]
    following = [id for id, _ in tokens] == list(range(first, first + len(tokens))) and order == sorted(order)
    if not following or len(made) != len(tokens) - 256:
        raise ValueError(f"{path}: its ids do not follow the order of its merges, which encoding here relies on")
    if not model.get("ignore_merges"):
        check_reachable(spelled, first, pairs, path)
    if eot is not None and eot not in special:
        raise ValueError(f"{path} has no special token {eot!r}: choose among {', '.join(special) or 'none'}")
    merges = [made[first + n] for n in range(256, len(tokens))]
    chosen = EOT if eot is None else eot
    return BPE(pattern, merges, special, b"".join(spelled[:256]), first, matched_tokens=matched, eot=chosen)


def check_kind(content: dict, model: dict, path: str | os.PathLike) -> None:
    """ValueError unless the file describes byte-level BPE of texts as they are."""
    if model["type"] != "BPE":
        raise ValueError(f"{path} is a {model['type']} tokenizer, not byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(key):
            raise ValueError(f"{path} is not byte-level BPE: it has {key}={model[key]!r}")
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("normalizers", True):  # an empty sequence of normalizers is none
        raise ValueError(f"{path} changes the text before it encodes it: it has the normalizer {normalizer['type']}")


def check_droppable(content: dict, path: str | os.PathLike, drop: Iterable[str]) -> None:
    """ValueError for what would be lost, unless it is among `drop`: tokens added to each text, a longest length."""
    for name in DROPPABLE:
        part = content.get(name)
        if part is None or name in drop:
            continue
        steps = part.get("processors", [part])
        harmless = name == "post_processor" and all(step["type"] == "ByteLevel" for step in steps)
        if not harmless:
            names = [token for step in steps for token in step.get("special_tokens", {})]
            what = f"adds {', '.join(names)} to every text" if names else f"is {part}"
            raise ValueError(f"{path}: its {name} {what:.200}, which has no place here: leave it out by --drop {name}")


def added_tokens(content: dict, path: str | os.PathLike) -> tuple[dict[str, int], dict[str, int]]:
    """The added tokens: special ones, and those that are matched in texts. ValueError for unusual ways of matching."""
    special, matched = {}, {}
    for token in content.get("added_tokens", []):
        (special if token["special"] else matched)[token["content"]] = token["id"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag) and not token["special"]:
                raise ValueError(
                    f"{path}: its added token {token['content']!r} has {flag}=true, which is not known here"
                )
    return special, matched


def check_ids(ids: list[int], path: str | os.PathLike) -> None:
    """ValueError if two tokens share an id."""
    shared = [id for id, count in Counter(ids).items() if count > 1]
    if shared:
        raise ValueError(f"{path}: two tokens share the id {shared[0]}")


def check_reachable(
    spelled: list[bytes], first: int, pairs: list[tuple[int, int, int]], path: str | os.PathLike
) -> None:
    """ValueError if the file's merges never make one of its tokens: it would be used here, and never there.

    tiktoken, which encodes here, takes a chunk that is a token as that token; Hugging Face's merges it step by step.
    """
    rank = {(left, right): n for n, (_, left, right) in reversed(list(enumerate(pairs)))}
    made = {(left, right): id for id, left, right in reversed(pairs)}
    id_of = {token: first + n for n, token in enumerate(spelled)}
    for n, token in enumerate(spelled[256:], start=256):
        word = [id_of[token[i : i + 1]] for i in range(len(token))]
        while len(word) > 1:
            best, at = min((rank.get(pair, math.inf), i) for i, pair in enumerate(zip(word, word[1:], strict=False)))
            if best == math.inf:
                raise ValueError(f"{path}: its merges never make its token {first + n}, {token!r}")
            word[at : at + 2] = [made[word[at], word[at + 1]]]


def hugging_face_pattern(pre_tokenizer: dict, path: str | os.PathLike) -> str:
    """The pattern by which a tokenizer.json cuts text; GPT-2's is built into its ByteLevel."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    patterns = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [PATTERNS["gpt2"]] if step.get("use_regex", True) else []  # older files do not say
        else:
            raise ValueError(f"{path} cuts text in a way not known here: {step['type']}")
    if len(patterns) != 1:
        kinds = ", ".join(step["type"] for step in steps)
        raise ValueError(f"{path} cuts text in {len(patterns)} steps ({kinds}), and one is known here")
    if REPEATED.search(patterns[0]):
        raise ValueError(f"{path} cuts text in a way not known here: {patterns[0]!r} means something else elsewhere")
    return next((name for name, pattern in RUBY_PATTERNS.items() if pattern == patterns[0]), patterns[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("import", "from Hugging Face's format to ours"), ("export", "from ours to Hugging Face's")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("source", help="the file to read")
        sub.add_argument("target", help="the file to write")
        if name == "import":
            sub.add_argument("--eot", metavar="TOKEN", help=f"the special token that ends a document (default {EOT})")
            text = "leave out, if it is in the way"
            sub.add_argument("--drop", nargs="+", choices=DROPPABLE, default=[], help=text)
    arguments = parser.parse_args()
    if arguments.command == "export":
        return export_tokenizer_json(BPE.load(arguments.source), arguments.target)
    bpe = import_tokenizer_json(arguments.source, arguments.eot, arguments.drop)
    bpe.save(arguments.target)
    print(f"{arguments.target}: {bpe.vocab_size:,} ids")
    if bpe.eot is None:
        names = ", ".join(bpe.special_tokens) or "there are none"
        print(
            f"note: it has no token that ends a document; name one by --eot (special tokens: {names})", file=sys.stderr
        )


if __name__ == "__main__":
    cli.run(main)
