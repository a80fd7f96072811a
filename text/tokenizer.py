"""Text to token ids and back, by characters, a vocabulary of bpe.py, tiktoken or foreign.py: one interface.

Every tokenizer here has `name`, `vocab_size`, `special_tokens` (spelling → id), `eot_id` (the id of the token that ends
a document, or None), `bos_id` (the id of a token of its own that begins a document, or None), `adds_space` (whether
`encode` puts a space before every text), `encode(text)`, `decode(ids)` (of a whole text), `bytes_of(id)`, `content()`
and `save(folder)`. Prompts begin with `start_id(tokenizer)`, if it is not None. `encode` treats
a special token that is spelled out in the text as ordinary text, so no document can forge the end of a document.
`load_tokenizer` reads what `save` wrote: plain JSON with a checksum.
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bpe import BPE, EOT, encode_ordinary, with_checksum, without_checksum
from common.files import read_json, write_json
from common.textfile import check_text
from text.foreign import FILE_NAME, HubTokenizer, SentencePieceTokenizer, checked_ids, sentencepiece_from_base64

MASK = "<|mask|>"  # the special token that stands where a masked model is to find one


class CharTokenizer:
    """One id per character, in sorted order; with `eot`, one more id at the end for <|endoftext|>."""

    bos_id, adds_space = None, False

    def __init__(self, characters: Iterable[str], eot: bool):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("a char tokenizer needs at least one character: is the text empty?")
        self.name, self.vocab_size = "char", len(self.characters) + eot
        self.eot_id = len(self.characters) if eot else None
        self.special_tokens = {EOT: self.eot_id} if eot else {}
        self._spellings = [*self.characters, *([EOT] if eot else [])]
        # One entry per Unicode code point, -1 for those without an id, so that one numpy look-up encodes a text.
        self._id_of = np.full(0x110000, -1, dtype=np.int32)
        self._id_of[_code_points(self.characters)] = np.arange(len(self.characters))

    def encode(self, text: str) -> list[int]:
        """Return the id of each character. Raises ValueError for an unknown character, with its position."""
        ids = self._id_of[_code_points(text)]
        if ids.size and ids.min() < 0:
            where = int(np.argmax(ids < 0))
            raise ValueError(
                f"character {text[where]!r} (U+{ord(text[where]):04X}) at position {where}, in "
                f"{text[max(0, where - 12) : where + 13]!r}, is not among the {len(self.characters)} this tokenizer "
                "knows: remove or replace it, or prepare the data (and train) with a tokenizer that knows it"
            )
        return ids.tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array, a tensor), in which <|endoftext|> is spelled out."""
        return "".join(map(self._spellings.__getitem__, checked_ids(ids, self.vocab_size)))

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token stands for."""
        return self._spellings[token].encode("utf-8", "surrogatepass")

    def content(self) -> dict:
        """Return what `save` writes, as JSON."""
        return {"kind": "char", "characters": self.characters, "eot": self.eot_id is not None}

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, with a checksum, into the folder."""
        write_json(Path(folder) / FILE_NAME, with_checksum(self.content()))


class TiktokenTokenizer:
    """An encoding of tiktoken by name: 'gpt2', 'cl100k_base', 'o200k_base', ..., or one of an installed plug-in."""

    bos_id, adds_space = None, False

    def __init__(self, name: str):
        import tiktoken  # here, as it takes a moment and character-level runs do not need it

        names = tiktoken.list_encoding_names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"no tiktoken encoding is called {name!r}: did you mean {near!r}? ({', '.join(names)})")
        try:
            self._encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are OSErrors
            raise ValueError(
                f"the tiktoken encoding {name!r} is downloaded at its first use, and that failed "
                f"({type(error).__name__}): connect to the network once, or set TIKTOKEN_CACHE_DIR to a filled cache"
            ) from None
        self.name = name
        self.vocab_size = self._encoding.n_vocab
        names = sorted(self._encoding.special_tokens_set)
        self.special_tokens = {name: self._encoding.encode_single_token(name) for name in names}
        self.eot_id = self.special_tokens.get(EOT)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which no special token is recognised. Raises ValueError as `encode_ordinary`."""
        return encode_ordinary(self._encoding, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array, a tensor); bytes that are not UTF-8 become U+FFFD."""
        return _decoded(self._encoding, checked_ids(ids, self.vocab_size))

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token stands for."""
        return _bytes_of(self._encoding, token)

    def content(self) -> dict:
        """Return what `save` writes, as JSON."""
        return {"kind": "tiktoken", "encoding": self.name}

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, with a checksum, into the folder."""
        write_json(Path(folder) / FILE_NAME, with_checksum(self.content()))


class BPETokenizer:
    """A vocabulary that bpe.py learned, or that was imported."""

    adds_space = False

    def __init__(self, bpe: BPE):
        self.bpe, self.name, self.vocab_size = bpe, "bpe", bpe.vocab_size
        self.special_tokens = bpe.special_tokens
        self.eot_id, self.bos_id = bpe.special_tokens.get(bpe.eot), bpe.special_tokens.get(bpe.bos)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which no special token is recognised."""
        return self.bpe.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array, a tensor); bytes that are not UTF-8 become U+FFFD."""
        return _decoded(self.bpe.encoding, checked_ids(ids, self.vocab_size))

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token stands for."""
        return _bytes_of(self.bpe.encoding, token)

    def content(self) -> dict:
        """Return what `save` writes, as JSON."""
        return self.bpe.content()

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, with a checksum, into the folder."""
        self.bpe.save(Path(folder) / FILE_NAME)


Unextended = CharTokenizer | TiktokenTokenizer | BPETokenizer | HubTokenizer | SentencePieceTokenizer


class ExtendedTokenizer:
    """Another tokenizer with special tokens added after its last id."""

    def __init__(self, base: Unextended, added: list[str]):
        for name in added:
            if not check_text(name) or name in base.special_tokens or added.count(name) > 1:
                raise ValueError(f"the added special token {name!r} is empty, or there is already one of that name")
        self.base, self.added, self.name = base, added, base.name
        self.special_tokens = base.special_tokens | {name: base.vocab_size + i for i, name in enumerate(added)}
        self.vocab_size, self.eot_id, self.bos_id = base.vocab_size + len(added), base.eot_id, base.bos_id
        self.adds_space = base.adds_space

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which no special token is recognised."""
        return self.base.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, in which the added tokens are spelled out."""
        text, ordinary = "", []
        for token in checked_ids(ids, self.vocab_size):
            if token < self.base.vocab_size:
                ordinary.append(token)
            else:
                text, ordinary = text + self.base.decode(ordinary) + self.added[token - self.base.vocab_size], []
        return text + self.base.decode(ordinary)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token stands for."""
        n = self.base.vocab_size
        return self.base.bytes_of(token) if token < n else self.added[token - n].encode()

    def content(self) -> dict:
        """Return what `save` writes, as JSON."""
        return {"kind": "extended", "base": self.base.content(), "special_tokens": self.added}

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, with a checksum, into the folder."""
        write_json(Path(folder) / FILE_NAME, with_checksum(self.content()))


Tokenizer = CharTokenizer | TiktokenTokenizer | BPETokenizer | ExtendedTokenizer | HubTokenizer | SentencePieceTokenizer


def with_special_tokens(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """Return the tokenizer with the special tokens that it lacks added after its last id; itself if it lacks none."""
    missing = [name for name in names if name not in tokenizer.special_tokens]
    if not missing:
        return tokenizer
    if isinstance(tokenizer, ExtendedTokenizer):
        return ExtendedTokenizer(tokenizer.base, [*tokenizer.added, *missing])
    return ExtendedTokenizer(tokenizer, missing)


def start_id(tokenizer: Tokenizer) -> int | None:
    """Return the token with which prompts begin, None if they begin with none.

    It is the bos_id; with our own tokenizers, which have none, the eot_id, since it ends the document before. An
    imported tokenizer begins texts as its original does.
    """
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    own = isinstance(base, CharTokenizer | TiktokenTokenizer) or (
        isinstance(base, BPETokenizer) and base.bpe.bos is None
    )
    return tokenizer.eot_id if own else tokenizer.bos_id


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer saved in `path`: a folder that holds tokenizer.json, or such a file, or a .bpe file.

    Raises ValueError if there is none, or if it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"no tokenizer at {str(path)!r}: give a prepared corpus, a run folder, a {FILE_NAME} or a .bpe"
        )
    return _from_content(read_json(path, "a tokenizer of this project"), path)


def _from_content(content: object, path: Path) -> Tokenizer:
    """Make the tokenizer of a file's content; path is for messages only."""
    if isinstance(content, dict) and content.get("format") == "plaingpt-bpe":
        return BPETokenizer(BPE.from_content(content, path))
    if isinstance(content, dict):
        content = without_checksum(content, path)  # files of the first version have none
    match content:  # for a new kind of tokenizer, add a case here and a name in tokenizer_from_name
        case {"kind": "char", "characters": str(characters), "eot": bool(eot), **rest} if not rest:
            tokenizer = CharTokenizer(characters, eot)
            if tokenizer.characters != characters:
                raise ValueError(f"{str(path)!r} is damaged: its characters are not sorted, or one occurs twice")
            return tokenizer
        case {"kind": "tiktoken", "encoding": str(name), **rest} if not rest:
            return TiktokenTokenizer(name)
        case {"kind": "extended", "base": dict(base), "special_tokens": list(added), **rest} if not rest:
            if base.get("kind") != "extended" and all(isinstance(name, str) for name in added):
                return ExtendedTokenizer(_from_content(base, path), added)
        case {"kind": "hub", "tokenizer": dict(file), "eot": str() | None, "bos": str() | None, **rest} if not rest:
            return HubTokenizer(file, content["eot"], content["bos"])
        case {"kind": "sentencepiece", "model": str(model), "eot": str() | None, "bos": str() | None, **rest} if not (
            rest
        ):
            return sentencepiece_from_base64(model, content["eot"], content["bos"])
    hint = ""
    if isinstance(content, dict) and "model" in content:
        hint = "; for Hugging Face's: python -m formats.tokenizer_json import"
    raise ValueError(
        f"{str(path)!r} is damaged, or no tokenizer of this project: it holds no known kind of tokenizer{hint}"
    )


def tokenizer_from_name(spec: str, texts: Iterable[str] | None = None) -> Tokenizer:
    """Return the tokenizer that `--tokenizer=spec` names: 'char', the path of a saved one, or an encoding of tiktoken.

    texts: read once for 'char', to collect their characters. Raises ValueError for an unknown name or a bad file.
    """
    if spec == "char":
        if texts is None:
            raise ValueError("the tokenizer 'char' is made from a text: give the path of a saved one instead")
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer(characters, eot=True)
    if os.path.exists(spec) or os.sep in spec or spec.endswith((".json", ".bpe")):
        return load_tokenizer(spec)
    try:
        return TiktokenTokenizer(spec)
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer also takes 'char' and the path of a saved tokenizer") from None


def _code_points(text: str) -> np.ndarray:
    """Return the code point of each character. Lone surrogates have one too, so that the error can name them."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _decoded(encoding, ids: list[int]) -> str:
    """Return the text of ids under an encoding of tiktoken."""
    try:
        return encoding.decode(ids)
    except KeyError:  # some encodings leave a few ids below n_vocab unused, and an untrained model may choose one
        return b"".join(_bytes_of(encoding, token) for token in ids).decode(errors="replace")


def _bytes_of(encoding, token: int) -> bytes:
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b"\xff"  # decodes to U+FFFD
