"""Byte-level BPE vocabularies to and from the tokenizer.json of Hugging Face tokenizers, with the same ids.

python -m formats.tokenizer_json import tokenizer.json mine.bpe
python -m formats.tokenizer_json export mine.bpe tokenizer.json
"""

import json
import os
import re
import sys

from bpe import BPE
from common import cli
from common.files import read_json, write_whole
from text.chunks import PATTERNS

# Hugging Face's regular expressions are Ruby's, where {1,3}+ means any number of {1,3}, and not "possessive".
REPEATED = re.compile(r"\{[0-9]*,?[0-9]*\}\+")
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
    vocab = {spell[token]: id for token, id in bpe.ranks.items()} | bpe.special_tokens
    if len(vocab) < len(bpe.ranks) + len(bpe.special_tokens):
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
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": id, "content": name, **plain}
        for name, id in sorted(bpe.special_tokens.items(), key=lambda item: item[1])
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


def import_tokenizer_json(path: str | os.PathLike) -> BPE:
    """The vocabulary of a byte-level BPE tokenizer.json, with the same ids.

    Its added tokens are special tokens here. ValueError for other kinds of tokenizers, and where ids do not follow the
    order of merges.
    """
    content = read_json(path)
    try:
        model = content["model"]
        if model["type"] != "BPE":
            raise ValueError(f"{path} is a {model['type']} tokenizer, not byte-level BPE")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
            if model.get(key):
                raise ValueError(f"{path} is not byte-level BPE: it has {key}={model[key]!r}")
        if content.get("normalizer") is not None:
            raise ValueError(f"{path} changes the text before it encodes it ({content['normalizer']['type']})")
        pattern = hugging_face_pattern(content["pre_tokenizer"], path)
        special = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        byte_of = {character: byte for byte, character in byte_characters().items()}
        tokens = sorted((id, name) for name, id in model["vocab"].items() if name not in special)
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
    if sorted(spelled[:256]) != [bytes([byte]) for byte in range(256)]:
        raise ValueError(f"{path}: its first 256 ids are not the bytes, so that there is text it cannot encode")
    made = {}
    for made_id, left, right in pairs:
        if max(left, right) < made_id:
            made.setdefault(made_id, (left, right))  # of several ways to make a token, the first
    order = [made_id for made_id, _, _ in pairs]
    following = [id for id, _ in tokens] == list(range(first, first + len(tokens))) and order == sorted(order)
    if not following or len(made) != len(tokens) - 256:
        raise ValueError(f"{path}: its ids do not follow the order of its merges, which encoding here relies on")
    return BPE(pattern, [made[first + n] for n in range(256, len(tokens))], special, b"".join(spelled[:256]), first)


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
        raise ValueError(f"{path} cuts text in {len(patterns)} steps, one is known here")
    if REPEATED.search(patterns[0]):
        raise ValueError(f"{path} cuts text in a way not known here: {patterns[0]!r} means something else elsewhere")
    return next((name for name, pattern in RUBY_PATTERNS.items() if pattern == patterns[0]), patterns[0])


def main() -> None:
    match sys.argv[1:]:
        case ["import", source, target]:
            import_tokenizer_json(source).save(target)
        case ["export", source, target]:
            export_tokenizer_json(BPE.load(source), target)
        case _:
            raise ValueError("usage: python -m formats.tokenizer_json import|export SOURCE TARGET")


if __name__ == "__main__":
    cli.run(main)
