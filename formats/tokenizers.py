"""Tokenizers that come along with a model: import from a model's folder or a GGUF file, and export to such a folder.

An imported tokenizer gives the ids of the original for every text, but for one thing that differs on purpose: a special
token that is spelled out in a text is ordinary text. It becomes a vocabulary of bpe.py if that gives the same ids, and
else a tokenizer of text/foreign.py. An exported tokenizer is a tokenizer.json that transformers' AutoTokenizer loads.
"""

import json
from pathlib import Path

from bpe import EOT
from common.files import read_json, replacing, write_json, write_whole
from formats.tokenizer_json import (
    DROPPABLE,
    RUBY_PATTERNS,
    added_token,
    all_cuts,
    byte_level_json,
    means_something_else,
    tokenizer_json,
    vocabulary_from,
    vocabulary_of,
)
from text.chunks import PATTERNS
from text.foreign import HubTokenizer, SentencePieceTokenizer, byte_characters, steps_of
from text.tokenizer import BPETokenizer, CharTokenizer, ExtendedTokenizer, TiktokenTokenizer, Tokenizer, start_id

# Texts on which an imported or exported tokenizer is compared with the original. Half surrogates are no text.
ADVERSARIAL = (
    "", " ", "a", " a", "a ", "  a  b   c  ", "Hello, world! It's DON'T we'll they'Ve 's 'd", "\n", "\n\n \n\t\t\r\n x",
    "def f(x):\n\treturn x**2  # 12345\r\n\r\n\n    if (a&&b){c->d[0x1F]++;}\n   \n", "▁a ▁ Ġ",
    "1 12 123 1234 1234567 a1b22 3.14", "https://a.org/?q=1&r=%20 x_y snake_case CamelCase",
    "从前有座山,山里有座庙。2024年、\u3000全角\u3000 空格", "🙂🙂 👩\u200d👩\u200d👧 👍🏽 1️⃣ 🇩🇪",
    "é e\u0301 ﬁ Ａ ² Ⅻ½ ٣٤٥ İı ſ Ω", "नमस्ते привет \u200b\ufeff\u2028\x00\x7f\x85\xa0",
    "<|endoftext|><s></s><unk><|im_start|><|end|>[PAD]<0x41>",
    "a" * 50 + " " * 50 + "!" * 50 + "7" * 50 + "\n" * 20,
)  # fmt: skip
# Types of tokens in a GGUF file; SentencePiece numbers them alike
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LOOKED_FOR = "tokenizer.json, tokenizer.model, and vocab.json with merges.txt"


# ---------------------------------------------------------------------------------------------------------------------
# Import from a folder


def import_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model's folder in the layout of Hugging Face.

    Raises ValueError if the folder has none, if a file is damaged, or if a package that it needs is missing.
    """
    folder = Path(folder)
    settings = {name: _optional_json(folder / f"{name}.json") for name in
                ("tokenizer_config", "special_tokens_map", "generation_config", "config", "added_tokens")}  # fmt: skip
    if (path := folder / "tokenizer.json").is_file():
        content = read_json(path, "a tokenizer.json")
        names = _names_by_id(content, path)
        eot = _named(settings, "eos", names) or (EOT if EOT in names.values() else None)
        return tokenizer_from_json(content, path, eot, _first_added(content.get("post_processor"), path))
    if (path := folder / "tokenizer.model").is_file():
        return _from_sentencepiece(path, settings)
    if (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        content = _gpt2_json(path, folder / "merges.txt", settings["added_tokens"])
        names = _names_by_id(content, path)
        eot = _named(settings, "eos", names) or (EOT if EOT in names.values() else None)
        adds_bos = settings["tokenizer_config"].get("add_bos_token", False)
        return tokenizer_from_json(content, path, eot, _named(settings, "bos", names) if adds_bos else None)
    raise ValueError(f"{folder} holds no tokenizer: none of {LOOKED_FOR} is there")


def tokenizer_from_json(content: dict, path: str | Path, eot: str | None, bos: str | None) -> Tokenizer:
    """Return a tokenizer with the ids of a tokenizer.json: our own kind if it can be, else a HubTokenizer.

    eot, bos: the names of the tokens that end and begin documents; path is for messages only.
    """
    content = _with_special(content, [name for name in (eot, bos) if name], path)
    first = None if bos and bos == eot else bos or ""  # as in BPE: None where the end of the document before begins it
    try:
        own, reason = BPETokenizer(vocabulary_from(content, path, eot, DROPPABLE, first)), ""
    except ValueError as error:
        own, reason = None, str(error)
    try:
        hub = HubTokenizer(content, eot, bos)
    except ValueError as error:
        if own is not None:  # the package is missing, or there is no decoder
            return own
        raise ValueError(f"{path}: {error} ({reason})") from None
    return own if own is not None and same_ids(own, hub) else hub


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two tokenizers agree on their special tokens and on the ids of the adversarial texts."""
    known = set(a.characters) if isinstance(a, CharTokenizer) else None
    texts = ADVERSARIAL + tuple(f"a {name}b" for name in a.special_tokens)
    if known is not None:
        texts = tuple("".join(c for c in text if c in known) for text in texts)
    same = (a.special_tokens, a.eot_id, start_id(a)) == (b.special_tokens, b.eot_id, start_id(b))
    return same and all(a.encode(text) == b.encode(text) for text in texts)


def _optional_json(path: Path) -> dict:
    """Return the object in a JSON file; {} if there is no such file. Raises ValueError if it is damaged."""
    content = read_json(path, "a file of settings") if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def _names_by_id(content: dict, path: Path) -> dict[int, str]:
    """Return {id: spelling} of all tokens of a tokenizer.json. Raises ValueError if it is none."""
    try:
        vocab = content["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((piece, id) for id, (piece, _) in enumerate(vocab))
        named = {id: name for name, id in pairs}
        return named | {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is damaged, or no tokenizer.json: it has no vocabulary") from None


def _named(settings: dict[str, dict], kind: str, names: dict[int, str]) -> str | None:
    """Return the name of the model's "bos" or "eos" token, by name or by id; None if no file gives one."""
    for file in ("tokenizer_config", "special_tokens_map"):
        token = settings[file].get(f"{kind}_token")
        name = token.get("content") if isinstance(token, dict) else token
        if name in names.values():
            return name
    for file in ("generation_config", "config"):
        id = settings[file].get(f"{kind}_token_id")
        id = id[0] if isinstance(id, list) and id else id
        if isinstance(id, int) and id in names:
            return names[id]
    return None


def _first_added(post_processor: dict | None, path: Path) -> str | None:
    """Return the name of the token that a tokenizer.json puts before every text; None if it puts none there.

    As in transformers, add_bos_token in the settings does not count where there is a tokenizer.json.
    """
    try:
        for step in steps_of(post_processor, "processors"):
            match step:
                case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, *_]}:
                    return step["special_tokens"][name]["tokens"][0]
                case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(name), _]}:
                    return name
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{path} is damaged: its post_processor is none") from None
    return None


def _with_special(content: dict, special: list[str], path: str | Path) -> dict:
    """Return the content of a tokenizer.json in which the tokens of these names are special."""
    added = [token | {"special": token["special"] or token["content"] in special}
             for token in content.get("added_tokens") or []]  # fmt: skip
    ids = {name: id for id, name in _names_by_id(content, path).items()}
    for name in special:
        if name not in ids:
            raise ValueError(f"{path} has no token {name!r}, which begins or ends documents by the model's settings")
        if all(token["content"] != name for token in added):
            added.append(added_token(name, ids[name], True))
    return content | {"added_tokens": sorted(added, key=lambda token: token["id"])}


def _gpt2_json(vocab: Path, merges: Path, added: dict) -> dict:
    """Return the tokenizer.json of GPT-2's two files; added: the content of added_tokens.json."""
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"{merges} is damaged: {' '.join(wrong)!r:.60} is no pair of tokens")
    content = read_json(vocab, "a vocabulary")
    tokens = [added_token(name, id, True) for name, id in added.items()]
    return byte_level_json("", content, pairs, tokens) | {"pre_tokenizer": _byte_level(True)}


def _from_sentencepiece(path: Path, settings: dict[str, dict]) -> Tokenizer:
    """Return the tokenizer of a .model file, with the tokens that the settings add to it."""
    model = path.read_bytes()
    try:
        plain = SentencePieceTokenizer(model, None, None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = {id: name for name, id in plain.special_tokens.items()}
    settings["config"] = plain.own_ids() | settings["config"]
    adds_bos = settings["tokenizer_config"].get("add_bos_token", True)  # as LlamaTokenizer does
    bos = _named(settings, "bos", names) if adds_bos else None
    tokenizer = SentencePieceTokenizer(model, _named(settings, "eos", names), bos)
    decoder = settings["tokenizer_config"].get("added_tokens_decoder") or {}
    added = settings["added_tokens"] | {token["content"]: int(id) for id, token in decoder.items()}
    names_of_new = {id: name for name, id in added.items() if id >= plain.vocab_size}
    new = sorted(names_of_new)
    matched = [token["content"] for id, token in decoder.items() if int(id) in new and not token.get("special")]
    eot = settings["tokenizer_config"].get("eos_token")
    reason = ""
    if new != list(range(plain.vocab_size, plain.vocab_size + len(new))):
        reason = f"have ids with gaps, {new[:5]}"
    elif matched:
        reason = f"are matched in texts, as {matched[0]!r} is"
    elif isinstance(eot, str) and eot in names_of_new.values():
        reason = f"end documents, as {eot!r} does"
    if reason:
        raise ValueError(f"{path}: tokens added to its {plain.vocab_size} pieces {reason}, which is not known here: "
                         "save the tokenizer with transformers first, as a tokenizer.json")  # fmt: skip
    return ExtendedTokenizer(tokenizer, [names_of_new[id] for id in new]) if new else tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Import from GGUF


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits(*patterns: str) -> dict:
    """Return the pre-tokenizer that cuts text by each of the regular expressions in turn."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(False)]}


def _words(digits: str) -> str:
    """Return the pattern of Llama 3 and Qwen2, which differ in how many digits a chunk may have."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# How a GGUF file's tokenizer.ggml.pre cuts text. "default" is what llama.cpp does for a file that names no pattern.
PRE_TOKENIZERS = {
    "gpt-2": _byte_level(True),
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]},
    "llama-bpe": _splits(_words(r"\p{N}{1,3}")),
    "dbrx": _splits(_words(r"\p{N}{1,3}")),  # of GPT-4, with merges that count
    "qwen2": _splits(_words(r"\p{N}")),
    "default": _splits(
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        "[0-9][0-9][0-9]",
    ),
}


def gguf_tokenizer(metadata: dict) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    metadata: the file's fields as plain values, of which those that begin with tokenizer.ggml. are read.
    Raises ValueError for a kind of tokenizer or a pattern that is not known here.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens, kind = fields.get("tokens"), fields.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"the GGUF file's tokenizer.ggml.model is {kind!r}; 'gpt2' and 'llama' are known here")
    if not tokens:
        raise ValueError("the GGUF file holds no tokens (tokenizer.ggml.tokens)")
    types = fields.get("token_type") or [NORMAL] * len(tokens)
    scores = fields.get("scores") or [0.0] * len(tokens)
    if not len(types) == len(tokens) == len(scores):
        raise ValueError(f"the GGUF file is damaged: {len(tokens)} tokens, {len(types)} types, {len(scores)} scores")
    adds_bos = fields.get("add_bos_token", kind == "llama" or fields.get("pre") == "llama-bpe")
    ids = [fields.get("eos_token_id"), fields.get("bos_token_id") if adds_bos else None]
    if wrong := next((id for id in ids if id is not None and not 0 <= id < len(tokens)), None):
        raise ValueError(f"the GGUF file is damaged: its special token {wrong} is beyond its {len(tokens)} tokens")
    eot, bos = (None if id is None else tokens[id] for id in ids)
    types = [CONTROL if token in (eot, bos) else type for token, type in zip(tokens, types, strict=True)]
    if kind == "llama":
        return SentencePieceTokenizer(_model_proto(tokens, scores, types, fields), eot, bos)
    return tokenizer_from_json(_gguf_json(tokens, types, fields), "the GGUF file's tokenizer", eot, bos)


def _gguf_json(tokens: list[str], types: list[int], fields: dict) -> dict:
    """Return the tokenizer.json of a GGUF file's byte-level BPE."""
    pre = fields.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"the GGUF file cuts text by the pattern {pre!r} (tokenizer.ggml.pre); known here are "
                         f"{', '.join(PRE_TOKENIZERS)}")  # fmt: skip
    vocab = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != UNUSED}
    merges = [merge.split(" ") for merge in fields.get("merges") or []]
    added = [added_token(token, id, type == CONTROL) for id, (token, type) in enumerate(zip(tokens, types, strict=True))
             if type in (CONTROL, USER_DEFINED)]  # fmt: skip
    content = byte_level_json("", vocab, merges, added) | {"pre_tokenizer": PRE_TOKENIZERS[pre]}
    if pre == "qwen2":  # the original normalises, although the file does not say so
        content["normalizer"] = {"type": "NFC"}
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    return content


def _model_proto(tokens: list[str], scores: list[float], types: list[int], fields: dict) -> bytes:
    """Return the SentencePiece model that a GGUF file's tokens were taken from."""
    proto = _protobuf().ModelProto()
    unknown = fields.get("unknown_token_id")
    for id, (token, score, type) in enumerate(zip(tokens, scores, types, strict=True)):
        type = UNKNOWN if id == unknown and UNKNOWN not in types else type
        proto.pieces.add(piece=token.replace(" ", "▁") if type == NORMAL else token, score=score, type=type)
    proto.trainer_spec.model_type = 2  # BPE: merge the neighbours whose union has the highest score
    proto.trainer_spec.byte_fallback = BYTE in types
    for name in ("bos", "eos", "unk", "pad"):
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        setattr(proto.trainer_spec, f"{name}_id", fields.get(f"{key}_token_id", -1))
    proto.trainer_spec.unk_id = next((id for id, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), -1)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = fields.get("add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = fields.get("remove_extra_whitespaces", False)
    return proto.SerializeToString()


def _protobuf():
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError(
            "this needs the packages sentencepiece and protobuf: pip install sentencepiece protobuf"
        ) from None
    return sentencepiece_model_pb2


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> None:
    """Write a tokenizer.json and a tokenizer_config.json, with which transformers' AutoTokenizer gives the same ids.

    A SentencePiece model is also written as the tokenizer.model that it is. chat_template: in Jinja, for the config.
    Raises ValueError if a tokenizer.json cannot give the same ids.
    """
    folder = Path(folder)
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    name_of = {id: name for name, id in tokenizer.special_tokens.items()}
    content = _content(tokenizer, base)
    eot, first = name_of.get(tokenizer.eot_id), name_of.get(start_id(tokenizer))
    special = [name for name in (eot, first) if name]
    if not same_ids(base, HubTokenizer(_with_special(_content(base, base), special, "it"), eot, first)):
        raise ValueError(f"a tokenizer.json cannot give the ids of this {tokenizer.name} tokenizer")
    if first and not isinstance(base, HubTokenizer):
        content["post_processor"] = _puts_first(first, start_id(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "bos_token": first, "eos_token": eot}  # fmt: skip
    config |= {"chat_template": chat_template} if chat_template else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1))
    write_json(folder / "tokenizer_config.json", {name: value for name, value in config.items() if value is not None})
    if isinstance(base, SentencePieceTokenizer):
        with replacing(folder / "tokenizer.model", "wb") as file:
            file.write(base.model)


def _content(tokenizer: Tokenizer, base: Tokenizer) -> dict:
    """Return the content of a tokenizer.json for the tokenizer, which is `base` with perhaps more special tokens."""
    match base:
        case BPETokenizer():
            return tokenizer_json(vocabulary_of(tokenizer, "the tokenizer"))
        case CharTokenizer():
            content = _char_json(base)
        case TiktokenTokenizer():
            content = _tiktoken_json(base)
        case HubTokenizer():
            content = base.content()["tokenizer"]
        case SentencePieceTokenizer():
            content = _sentencepiece_json(base)
    for name in tokenizer.special_tokens.keys() - base.special_tokens.keys():
        id = tokenizer.special_tokens[name]
        content["added_tokens"] = [*(content.get("added_tokens") or []), added_token(name, id, True)]
        if isinstance(content["model"]["vocab"], dict):
            content["model"]["vocab"][name] = id
    content["added_tokens"] = sorted(content.get("added_tokens") or [], key=lambda token: token["id"])
    return content


def _puts_first(bos: str, id: int) -> dict:
    """Return the post-processor that puts a BOS before every text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}}  # fmt: skip


def _char_json(tokenizer: CharTokenizer) -> dict:
    """Return the content of a tokenizer.json in which every character is a word."""
    special = [added_token(name, id, True) for name, id in tokenizer.special_tokens.items()]
    vocab = {character: id for id, character in enumerate(tokenizer.characters)} | tokenizer.special_tokens
    if halves := [c for c in tokenizer.characters if 0xD800 <= ord(c) < 0xE000]:
        raise ValueError(f"a tokenizer.json cannot hold the character {halves[0]!r}: it is half a surrogate pair")
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
    }  # fmt: skip


def _tiktoken_json(tokenizer: TiktokenTokenizer) -> dict:
    """Return the content of a tokenizer.json for an encoding of tiktoken: every way to cut a token is a merge."""
    encoding, spelled = tokenizer._encoding, byte_characters()
    ranks = dict(sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    pattern = encoding._pat_str
    named = next((name for name, ours in PATTERNS.items() if ours == pattern), None)
    pattern = RUBY_PATTERNS.get(named, pattern)
    if reason := means_something_else(pattern):
        raise ValueError(f"the pattern {pattern!r} means something else in a tokenizer.json: {reason}")
    spell = {token: "".join(map(spelled.__getitem__, token)) for token in ranks}
    merges = [(spell[left], spell[right]) for left, right in all_cuts(ranks, {})]
    vocab = {spell[token]: id for token, id in ranks.items()} | tokenizer.special_tokens
    special = [added_token(name, id, True) for name, id in tokenizer.special_tokens.items()]
    content = byte_level_json(pattern, vocab, merges, special)
    content["model"]["ignore_merges"] = True  # as tiktoken does, it looks a whole chunk up first
    return content


def _sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict:
    """Return the content of a tokenizer.json for a SentencePiece model of the kind BPE that leaves text as it is."""
    proto = _protobuf().ModelProto.FromString(tokenizer.model)
    norm = proto.normalizer_spec
    if proto.trainer_spec.model_type != 2 or norm.precompiled_charsmap or norm.remove_extra_whitespaces:
        raise ValueError("only a SentencePiece model that is BPE and does not change texts can become a tokenizer.json")
    if any(piece.type == USER_DEFINED for piece in proto.pieces):
        raise ValueError("a SentencePiece model with user-defined symbols cannot become a tokenizer.json")
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    cuts = ((name[:cut], name[cut:], name) for name in score for cut in range(1, len(name)))
    merges = sorted((cut for cut in cuts if cut[0] in score and cut[1] in score), key=lambda cut: -score[cut[2]])
    vocab = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    content = byte_level_json("", vocab, [cut[:2] for cut in merges], [
        added_token(name, id, True) for name, id in tokenizer.special_tokens.items()])  # fmt: skip
    prepend = [{"type": "Prepend", "prepend": "▁"}] if norm.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if norm.add_dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content |= {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }  # fmt: skip
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    content["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": proto.trainer_spec.byte_fallback}
    return content
