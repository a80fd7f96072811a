"""Tokenizers of other projects, served by their own libraries: a tokenizer.json of Hugging Face, a SentencePiece model.

Both have the interface of text/tokenizer.py. The original file stays inside the saved tokenizer, so that a run needs
nothing else. Notable:
- a special token that is spelled out in a text is ordinary text, as `encode_special_tokens = True` does there;
- some of these tokenizers put a space before every text (`adds_space`): "Hello" becomes "▁Hello". `decode` takes a
  whole text and drops that space; `bytes_of` keeps it, since in the middle of a text it is a real one.
"""

import base64
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from bpe import with_checksum
from common.files import write_json
from common.textfile import check_text

SPACE = "▁"  # SentencePiece's spelling of a space
BYTE = re.compile("<0x([0-9A-F]{2})>")  # its spelling of a byte that is no character of its own
NO_TOKEN = b"\xff"  # the bytes of an id without a token; they decode to U+FFFD
FILE_NAME = "tokenizer.json"


class HubTokenizer:
    """A tokenizer.json of Hugging Face, through the package `tokenizers`.

    content: the object in that file. eot: the name of the token that ends a document, bos: of the one that begins it;
    both may be None. Raises ValueError if the package is missing, or cannot read the content.
    """

    name = "hub"

    def __init__(self, content: dict, eot: str | None, bos: str | None):
        self._content = json.dumps(content, ensure_ascii=False)  # far smaller than the object
        self._names = eot, bos
        self._tokenizer = _hub_encoder(self._content, [name for name in self._names if name])
        self._steps = _decoding_steps(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self.special_tokens = {
            name: id for id, name in sorted(self._added.items()) if added[id].special or name in self._names
        }
        self.eot_id, self.bos_id = _named(eot, self.special_tokens), _named(bos, self.special_tokens)
        unknown = content["model"].get("unk_token")
        if (number := content["model"].get("unk_id")) is not None:  # a Unigram model gives a number
            unknown = content["model"]["vocab"][number][0]
        self._bytes: dict[int, bytes] = {}  # what bytes_of found
        self._forgeable = {id for name, id in self.special_tokens.items() if name != unknown}
        self.adds_space = _adds_space(self)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which no special token is recognised, without a BOS.

        Raises ValueError for half a surrogate pair, for a text that the tokenizer has no tokens for, and if it would
        take a spelled-out special token for the token itself nevertheless.
        """
        check_text(text)
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises no other class
            raise ValueError(f"the imported tokenizer cannot encode this text: {error}") from None
        if not self._forgeable.isdisjoint(ids):
            name = next(name for name, id in self.special_tokens.items() if id in ids)
            raise ValueError(f"the text spells out {name!r}, which the imported tokenizer takes for its special token: "
                             "remove it from the text")  # fmt: skip
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array, a tensor), a whole text; special tokens are spelled out."""
        return _whole_text(self, ids)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token stands for."""
        if token not in self._bytes:
            spelled = self._tokenizer.id_to_token(token)
            found = NO_TOKEN if spelled is None else _token_bytes(spelled, self._steps)
            self._bytes[token] = self._added[token].encode() if token in self._added else found
        return self._bytes[token]

    def content(self) -> dict:
        """Return what `save` writes, as JSON."""
        eot, bos = self._names
        return {"kind": "hub", "tokenizer": json.loads(self._content), "eot": eot, "bos": bos}

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, with a checksum, into the folder."""
        write_json(Path(folder) / FILE_NAME, with_checksum(self.content()))

    def __reduce__(self):  # the package's own pickling forgets encode_special_tokens
        return HubTokenizer, (json.loads(self._content), *self._names)


class SentencePieceTokenizer:
    """A SentencePiece model, through the package `sentencepiece`.

    model: the bytes of the .model file. eot and bos: as for HubTokenizer. Raises ValueError as it does.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, eot: str | None, bos: str | None):
        self.model, self._names = model, (eot, bos)
        self._processor = p = _sentencepiece(model)
        self._bytes: dict[int, bytes] = {}  # what bytes_of found
        self.vocab_size = p.vocab_size()
        control = [id for id in range(self.vocab_size) if p.is_control(id) or p.is_unknown(id)]
        self.special_tokens = {p.id_to_piece(id): id for id in control}
        self.eot_id, self.bos_id = _named(eot, self.special_tokens), _named(bos, self.special_tokens)
        self.adds_space = _adds_space(self)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which no special token is recognised, without a BOS.

        Raises ValueError for half a surrogate pair.
        """
        return self._processor.encode(check_text(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array, a tensor), a whole text; special tokens are spelled out."""
        return _whole_text(self, ids)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token stands for."""
        if token not in self._bytes:
            p = self._processor
            piece = p.decode([token]) if p.is_unknown(token) else p.id_to_piece(token)  # it has a sign for the unknown
            found = _piece_bytes(piece, p.is_byte(token))
            self._bytes[token] = piece.encode() if p.is_control(token) else found
        return self._bytes[token]

    def own_ids(self) -> dict[str, int]:
        """Return the ids that the model itself gives to its first and last token; -1 for none."""
        return {"bos_token_id": self._processor.bos_id(), "eos_token_id": self._processor.eos_id()}

    def content(self) -> dict:
        """Return what `save` writes, as JSON."""
        eot, bos = self._names
        return {"kind": "sentencepiece", "model": base64.b64encode(self.model).decode(), "eot": eot, "bos": bos}

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, with a checksum, into the folder."""
        write_json(Path(folder) / FILE_NAME, with_checksum(self.content()))

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model, *self._names)


def sentencepiece_from_base64(model: str, eot: str | None, bos: str | None) -> SentencePieceTokenizer:
    """Make the tokenizer from the content that it saved. Raises ValueError if the model is not base64."""
    try:
        return SentencePieceTokenizer(base64.b64decode(model, validate=True), eot, bos)
    except ValueError as error:  # binascii.Error is one too
        raise ValueError(f"the saved SentencePiece model is damaged: {error}") from None


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return `ids` as a list of ints. Raises ValueError for an id outside the vocabulary."""
    ids = ids.tolist() if hasattr(ids, "tolist") else [int(token) for token in ids]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"token {wrong} is outside this tokenizer's vocabulary, 0 to {vocab_size - 1}")
    return ids


def _named(name: str | None, special_tokens: dict[str, int]) -> int | None:
    """Return the id of the special token of that name. Raises ValueError if there is none."""
    if name is None or name in special_tokens:
        return special_tokens.get(name)
    known = ", ".join(special_tokens)[:300] or "none"
    raise ValueError(f"the imported tokenizer has no special token {name!r}; its special tokens are {known}")


def _whole_text(tokenizer: HubTokenizer | SentencePieceTokenizer, ids: Iterable[int]) -> str:
    """Return the text of ids, without the space that the tokenizer puts before every text."""
    found = b"".join(map(tokenizer.bytes_of, checked_ids(ids, tokenizer.vocab_size)))
    return (found.removeprefix(b" ") if tokenizer.adds_space else found).decode(errors="replace")


def _adds_space(tokenizer: HubTokenizer | SentencePieceTokenizer) -> bool:
    """Return whether the tokenizer puts a space before every text."""
    try:
        return b"".join(map(tokenizer.bytes_of, tokenizer.encode("a"))).startswith(b" ")
    except ValueError:  # a vocabulary of characters, of which "a" is none
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The libraries


def _hub_encoder(content: str, special: list[str]):
    """Return the Tokenizer of the package `tokenizers`, set to encode a text and nothing besides."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("this tokenizer needs the package tokenizers: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the package raises no other class
        raise ValueError(f"the package tokenizers cannot read this tokenizer.json: {error}") from None
    for name in special:
        if tokenizer.token_to_id(name) is None:
            raise ValueError(f"the tokenizer.json has no token {name!r}, which was named to begin or end documents")
    tokenizer.add_special_tokens(special)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _sentencepiece(model: bytes):
    try:
        import sentencepiece
    except ImportError:
        raise ValueError("this tokenizer needs the package sentencepiece: pip install sentencepiece") from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"sentencepiece cannot read this model: {' '.join(str(error).split())}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The bytes of tokens


def byte_characters() -> dict[int, str]:
    """Return how tokenizer.json spells each byte: visible Latin-1 as itself, the others as U+0100 and following."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_OF = {character: byte for byte, character in byte_characters().items()}


def steps_of(step: dict | None, inner: str) -> list[dict]:
    """Return the steps of a (nested) Sequence as a flat list; inner: the key of a Sequence's list. [] for None."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [single for part in step[inner] for single in steps_of(part, inner)]


def _decoding_steps(content: dict) -> list[dict]:
    """Return the steps of the decoder that concern single tokens. Raises ValueError for one that is not known here.

    Strip removes the space before the whole text, which `decode` does.
    """
    steps = []
    try:
        for step in steps_of(content.get("decoder"), "decoders"):
            match step:
                case {"type": "Fuse"} | {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                    continue
                case {"type": "ByteLevel" | "ByteFallback" | "Metaspace"}:
                    steps.append(step)
                case {"type": "Replace", "pattern": {"String": str()}, "content": str()}:
                    steps.append(step)
                case _:
                    raise ValueError(f"the tokenizer.json decodes in a way not known here: {step['type']}")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the tokenizer.json is damaged: its decoder is none") from None
    if content.get("decoder") is None:
        raise ValueError("the tokenizer.json has no decoder, so that its tokens do not say where spaces are")
    return steps


def _token_bytes(token: str, steps: list[dict]) -> bytes:
    """Return the bytes that a token of a tokenizer.json adds to a text."""
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                known = all(character in BYTE_OF for character in token)
                return bytes(BYTE_OF[character] for character in token) if known else token.encode()
            case {"type": "ByteFallback"}:
                if match := BYTE.fullmatch(token):
                    return bytes([int(match[1], 16)])
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                token = token.replace(old, new)
            case {"type": "Metaspace"}:
                token = token.replace(step.get("replacement", SPACE), " ")
    return token.encode()


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Return the bytes that a piece of SentencePiece adds to a text."""
    return bytes([int(BYTE.fullmatch(piece)[1], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
