"""bpe.py against a naive reference, tiktoken, and Hugging Face's tokenizers."""

import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import regex
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import bpe
from bpe import BPE, EOT, SPECIAL_TOKENS, train
from common import chunks as chunks_module
from common import cli
from common.chunks import PATTERNS, count_chunks, splitter
from common.merges import learn_merges
from common.tokenizer_json import byte_characters, export_tokenizer_json, import_tokenizer_json

ROOT = Path(__file__).parent.parent
PROSE = "".join((ROOT / name).read_text() for name in ("README.md", "LICENSE", "train.py", "model.py"))[:60_000]
FIXTURES = {
    "empty": "",
    "chinese": "从前有座山,山里有座庙。庙里有个老和尚 讲故事:2024年、1234567!\u3000全角\u3000 空格",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙂🙂🙂 👍🏽 1️⃣ 🇩🇪🇫🇷",
    "marks": "e\u0301 n\u0303 Z̷̢̛a̸͝l̵͠g̵o ก็็็็ नमस्ते ﷺ İı ſ ß K Ω",
    "code": "def f(x):\n\treturn x**2  # 12345\r\n\r\n\n    if (a&&b){c->d[0x1F]++;}\n   \n\t\t\n",
    "contractions": "I'm don't DON'T we'LL it'ſ they'Ve 'tis ''s 'd'd  'll 's",
    "controls": "a\x00b\x1cc\x1d \x1e\x1f d\x85e\u2028f\u2029\xa0g\u200bh\ufeffi\x0b\x0c\x7f \x1c \n\x85 \r\n \x1f\n",
    "spaces": "  a   b \n\n  c\t\t d \r\n\r \n e   ",
    "mixed": "Größe 世界x123y٣٤٥ Ⅻ½ привет,мир! a.org/?q=1&r=%20 <|endoftext|><|user|> \U0010ffff\ue000\ufffe",
    "runs": "a" * 300 + " " * 300 + "!" * 300 + "\n" * 30 + "1" * 30,
}


def characters(source: random.Random, size: int) -> str:
    """A text that changes its kind of character all the time; those that are younger than this Python are left out.

    (Libraries disagree on what a letter is only where Unicode is newer than one of them.)
    """
    pools = ["aZsStTlLmMrReEvVdDſKé中", "'’", "  \n\r\t\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000", "019٣½Ⅻ²",
             "!?.-_\x00\x7f\u200d\u0301\ufe0f🙂🏽"]  # fmt: skip
    text = ""
    while len(text) < size:
        if source.random() < 0.1:
            c = chr(source.choice((source.randrange(0xD800), source.randrange(0xE000, 0x110000))))
            text += c if unicodedata.category(c) != "Cn" else ""
        else:
            text += "".join(source.choices(source.choice(pools), k=source.choice((1, 1, 2, 5))))
    return text


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, BPE]:
    """A vocabulary per named pattern, learned from prose, code and all fixtures."""
    texts = [PROSE, *[text for text in FIXTURES.values() for _ in range(3)]]
    return {pattern: train(texts, 1000, pattern) for pattern in PATTERNS}


def same(a: BPE, b: BPE) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in
               ("pattern", "merges", "special_tokens", "alphabet", "first_id", "ranks", "vocab_size"))  # fmt: skip


# --- learning ----------------------------------------------------------------------------------------------------


def merged(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    result = []
    while word:
        found = tuple(word[:2]) == pair
        result.append(token if found else word[0])
        word = word[1 + found :]
    return result


def naive_merges(chunks, number, max_token_length=None):
    """Merge the most frequent pair, again and again: everything is counted anew each time."""
    words, tokens, merges = {c: list(c) for c in chunks}, [bytes([byte]) for byte in range(256)], []
    while len(merges) < number:
        counts = Counter()
        for chunk, word in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += chunks[chunk]
        allowed = [p for p in counts if (token := tokens[p[0]] + tokens[p[1]]) not in tokens
                   and len(token) <= (max_token_length or len(token))]  # fmt: skip
        if not allowed:
            break
        best = min(allowed, key=lambda p: (-counts[p], max(p), min(p), p[0] < p[1]))
        words = {c: merged(word, best, len(tokens)) for c, word in words.items()}
        merges.append((*best, counts[best]))
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return merges


@pytest.mark.parametrize("seed", range(40))
def test_merges_and_counts_equal_those_of_the_naive_reference(seed):
    source = random.Random(seed)
    for _ in range(12):
        alphabet, longest = source.choice((b"a", b"ab", b"abc", b"abcdefgh", bytes(range(256)))), source.choice((4, 30))
        chunks = {
            bytes(source.choices(alphabet, k=source.randint(1, longest))): source.choice((1, 1, 2, 3, 1000, 10**10))
            for _ in range(source.choice((1, 5, 60)))
        }
        number, limit = (
            source.choice((1, 7, 40, 10_000 if len(chunks) < 60 else 40)),
            source.choice((None, None, 1, 2, 5)),
        )
        assert learn_merges(chunks, number, limit) == naive_merges(chunks, number, limit), (chunks, number, limit)


def test_merges_of_real_text_equal_those_of_the_naive_reference():
    chunks = {chunk.encode(): n for chunk, n in count_chunks([PROSE[:30_000]], "gpt4").items()}
    assert learn_merges(chunks, 300) == naive_merges(chunks, 300)


@pytest.mark.parametrize("text, expected", [
    ("aaaa", ["aa 3", "aaaa 1"]),  # pairs overlap when they are counted, and not when they are merged
    ("aaa", ["aa 2", "aaa 1"]),
    ("abcab", ["ab 2", "abc 1", "abcab 1"]),
    ("ba", ["ba 1"]),
])  # fmt: skip
def test_small_examples_can_be_followed_by_hand(text, expected):
    tokens = [bytes([byte]) for byte in range(256)]
    found = []
    for left, right, count in learn_merges({text.encode(): 1}, 9):
        tokens.append(tokens[left] + tokens[right])
        found.append(f"{tokens[-1].decode()} {count}")
    assert found == expected


def test_of_equally_frequent_pairs_the_one_of_older_tokens_goes_first():
    # The newer token counts first (b < c), then the older one (a < b), then the newer one on the left (ba before ab)
    assert learn_merges({b"ac": 1, b"bb": 1}, 1) == [(98, 98, 1)]
    assert learn_merges({b"cb": 1, b"ac": 1}, 1) == [(97, 99, 1)]
    assert learn_merges({b"ab": 1, b"ba": 1}, 1) == [(98, 97, 1)]


def test_the_merges_are_hugging_faces_up_to_a_tie():
    # They break ties by the ids alone, smaller left token first; that is the one thing in which the two may differ.
    text = "".join(page for _, page in sorted(topics.items()))
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    spelled = {c: bytes([b]) for b, c in byte_characters().items()}
    pairs = [
        tuple(b"".join(map(spelled.__getitem__, half)) for half in m)
        for m in json.loads(theirs.to_str())["model"]["merges"]
    ]
    chunks = {chunk.encode(): n for chunk, n in count_chunks([text], "gpt2").items()}
    tokens, words = [bytes([byte]) for byte in range(256)], {c: [bytes([b]) for b in c] for c in chunks}
    ours, number = learn_merges(chunks, len(pairs)), 0
    for left, right, _ in ours:
        pair = tokens[left], tokens[right]
        if pair != pairs[number]:
            break
        number += 1
        tokens.append(tokens[left] + tokens[right])
        words = {c: merged(word, pair, tokens[-1]) for c, word in words.items()}
    counts = Counter()
    for chunk, word in words.items():
        for other in zip(word, word[1:], strict=False):
            counts[other] += chunks[chunk]
    assert number > 50 and counts[pair] == ours[number][2] == counts[pairs[number]]  # the tie


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W"])
def test_the_result_depends_neither_on_processes_nor_on_how_texts_are_cut(pattern, monkeypatch):
    texts = [PROSE[:9000], "", *FIXTURES.values(), characters(random.Random(1), 3000)]
    whole = Counter(chunk for text in texts for chunk in splitter(pattern)(text))
    assert count_chunks(texts, pattern) == whole
    for size in (7, 100, 5000):
        monkeypatch.setattr(chunks_module, "TASK", size)
        monkeypatch.setattr(chunks_module, "PIECE", size)
        assert count_chunks(iter(texts), pattern, workers=1) == whole
    monkeypatch.setattr(chunks_module, "TASK", 700)
    assert count_chunks(iter(texts), pattern, workers=3) == whole  # spawned


def test_training_is_the_same_with_processes(monkeypatch):
    alone = train([PROSE], 600, workers=1)
    monkeypatch.setattr(chunks_module, "TASK", 4000)
    assert same(
        train(iter([PROSE[:20_000], PROSE[20_000:]]), 600, workers=2), train([PROSE[:20_000], PROSE[20_000:]], 600)
    )
    assert same(train([PROSE], 600, workers=2), alone)


def test_no_token_is_longer_than_max_token_length():
    assert max(map(len, train([PROSE, "the " * 999, "=" * 999], 700).ranks)) > 5
    limited = train([PROSE, "=" * 999], 700, max_token_length=5)
    assert max(map(len, limited.ranks)) == 5 and limited.vocab_size == 700


def test_training_stops_with_a_warning_when_nothing_is_left(capsys):
    vocabulary = train(["abc abc"], 1000)
    assert "nothing is left to merge: 3 merges instead of" in capsys.readouterr().err
    assert vocabulary.vocab_size == 256 + 3 + len(SPECIAL_TOKENS) and len(vocabulary.encode("abc abc")) == 2


@pytest.mark.parametrize("arguments, options, message", [
    ((["a"], 260), {}, "too small: 256 bytes and 5 special tokens"),
    ((["a"], 255), {"special_tokens": ()}, "too small: 256 bytes and 0 special"),
    (([], 300), {}, "no text to learn from"),
    (([""], 300), {}, "no text to learn from"),
    ((["a"], 300, "gpt5"), {}, "leaves characters of 'a' out"),
    ((["a"], 300, "["), {}, "neither one of gpt2, gpt4, digits nor a regular expression"),
    ((["a"], 300, "(a)|."), {}, "groups that capture"),
    ((["abc"], 300, "a|b"), {}, "leaves characters of 'abc' out"),
    ((["abc"], 300, ""), {}, "leaves characters"),
    ((["abc"], 300, r"\X|."), {}, "does not work in tiktoken"),
    ((["a\ud800"], 300), {}, "'\\\\ud800', half a surrogate pair"),
    ((["a"], 300), {"special_tokens": EOT}, "a list of names is needed"),
    ((["a"], 300), {"special_tokens": [""]}, "none of them empty"),
    ((["a"], 300), {"max_token_length": 0}, "max_token_length=0: at least 1"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused_clearly(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        train(*arguments, **options)


# --- cutting text ------------------------------------------------------------------------------------------------


def adversarial() -> list[str]:
    source = random.Random(0)
    return [*FIXTURES.values(), *("".join(source.sample(list(FIXTURES.values()), 3)) for _ in range(30)),
            *(characters(source, source.choice((3, 10, 40, 400))) for _ in range(1500))]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_is_cut_as_the_plain_pattern_cuts_it(pattern, monkeypatch):
    monkeypatch.setattr(chunks_module, "PIECE", 20)
    plain, split = regex.compile(PATTERNS[pattern]), splitter(pattern)
    for text in adversarial():
        chunks = plain.findall(text)
        assert "".join(chunks) == text
        assert split(text) == chunks
        assert count_chunks([text], pattern, workers=1) == Counter(chunks)
        ascii = text.encode("ascii", "ignore").decode()
        assert split(ascii) == plain.findall(ascii)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_is_cut_as_tiktoken_cuts_it(pattern):
    """With every chunk a token, the encoding of a text is its chunks exactly if tiktoken finds the same."""
    texts, split = adversarial(), splitter(pattern)
    cuts = [split(text) for text in texts]
    tokens = dict.fromkeys([bytes([byte]) for byte in range(256)] + [c.encode() for cut in cuts for c in cut])
    encoding = tiktoken.Encoding("chunks", pat_str=PATTERNS[pattern], special_tokens={},
                                 mergeable_ranks={token: n for n, token in enumerate(tokens)})  # fmt: skip
    for text, cut in zip(texts, cuts, strict=True):
        assert encoding.decode_tokens_bytes(encoding.encode_ordinary(text)) == [chunk.encode() for chunk in cut]


def test_the_patterns_gpt2_and_gpt4_are_those_of_tiktoken():
    module = pytest.importorskip("tiktoken_ext.openai_public")
    assert PATTERNS["gpt2"] == module.r50k_pat_str
    source = Path(module.__file__).read_text()
    assert regex.sub(r"\s", "", PATTERNS["gpt4"]) in regex.sub(r"\s", "", source)


def test_digits_stand_alone_and_runs_of_spaces_stay():
    assert splitter("digits")("x  = 2024; y\n\n z") == ["x", "  ", "=", " ", *"2024", ";", " ", "y", "\n\n", " ", "z"]


# --- encoding and decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_what_was_encoded_gives_the_text(vocabularies, pattern):
    vocabulary, source = vocabularies[pattern], random.Random(3)
    anything = "".join(
        chr(source.choice((source.randrange(0xD800), source.randrange(0xE000, 0x110000)))) for _ in range(5000)
    )
    for text in [*adversarial()[:400], anything, PROSE]:
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text and vocabulary.decode_bytes(ids) == text.encode()


def test_half_a_surrogate_pair_is_refused_with_its_position(vocabularies):
    for encode in (vocabularies["gpt4"].encode, lambda text: vocabularies["gpt4"].encode_batch(["fine", text])):
        for text in ("ab\ud800", "ab\udfff\ud800"):
            with pytest.raises(ValueError, match=r"'\\ud...' at position 2 is half a surrogate pair"):
                encode(text)


def test_any_bytes_survive_decode_bytes_and_invalid_utf8_decodes_as_in_tiktoken(vocabularies):
    vocabulary, source = vocabularies["gpt4"], random.Random(5)
    for _ in range(300):
        data = source.randbytes(source.randrange(40))
        ids = [vocabulary.ranks[data[i : i + 1]] for i in range(len(data))]
        assert vocabulary.decode_bytes(ids) == data
        assert vocabulary.decode(ids) == vocabulary.to_tiktoken().decode(ids) == data.decode(errors="replace")
        ids = source.choices(range(vocabulary.vocab_size), k=20)
        assert vocabulary.decode(ids) == vocabulary.to_tiktoken().decode(ids)
    assert vocabulary.decode([]) == "" and vocabulary.decode_bytes(iter([])) == b""


@pytest.mark.parametrize("wrong", [-1, 1000, 10**30])
def test_an_id_that_is_none_is_refused(vocabularies, wrong):
    with pytest.raises(ValueError, match=f"{wrong} is no token id of this vocabulary of 1,000"):
        vocabularies["gpt4"].decode([1, wrong])


def naive_encode(vocabulary: BPE, text: str) -> list[int]:
    """In each chunk, merge the neighbours that make the oldest token, again and again."""
    ids, ranks = [], vocabulary.ranks
    for chunk in splitter(vocabulary.pattern)(text):
        word = [bytes([byte]) for byte in chunk.encode()]
        while found := [
            (ranks[a + b], i) for i, (a, b) in enumerate(zip(word, word[1:], strict=False)) if a + b in ranks
        ]:
            i = min(found)[1]
            word[i : i + 2] = [word[i] + word[i + 1]]
        ids += map(ranks.__getitem__, word)
    return ids


@pytest.mark.parametrize("pattern", [*PATTERNS, r"(?s:.{1,40})"])
def test_encoding_equals_the_naive_encoder(vocabularies, pattern):
    source, texts = random.Random(6), [*FIXTURES.values(), PROSE[:3000]]
    vocabulary = vocabularies.get(pattern) or train([PROSE], 600, pattern)
    texts += ["".join(source.choices(source.choice(["ab", "the ", " \n=", "中文字"]), k=50)) for _ in range(100)]
    for text in texts:
        assert vocabulary.encode(text) == naive_encode(vocabulary, text)


def test_a_batch_is_encoded_like_its_texts(vocabularies):
    vocabulary, texts = vocabularies["gpt4"], [*FIXTURES.values(), PROSE, EOT + "a"]
    for threads in (None, 1, 3):
        assert vocabulary.encode_batch(texts, threads=threads) == [vocabulary.encode(text) for text in texts]
        assert vocabulary.encode_batch(texts, [EOT], threads) == [vocabulary.encode(text, [EOT]) for text in texts]
    assert vocabulary.encode_batch([]) == []


def test_a_special_token_is_never_made_from_text_unless_it_is_allowed_by_name(vocabularies):
    for vocabulary in vocabularies.values():
        special = set(vocabulary.special_tokens.values())
        assert list(vocabulary.special_tokens) == list(SPECIAL_TOKENS) and special == set(range(995, 1000))
        text = "".join(f"a{name}{name} " for name in SPECIAL_TOKENS)
        assert not special & set(vocabulary.encode(text)) and vocabulary.decode(vocabulary.encode(text)) == text
        assert not special & set(vocabulary.encode_batch([text])[0])
        ids = vocabulary.encode(text, allowed_special={EOT})
        assert special & set(ids) == {vocabulary.special_tokens[EOT]} and vocabulary.decode(ids) == text
        assert vocabulary.encode("<|user|>", SPECIAL_TOKENS) == [997]
        with pytest.raises(ValueError, match="'<.other.>' is no special token here: <.endoftext.>, "):
            vocabulary.encode("a", allowed_special=["<|other|>"])


def test_special_tokens_are_never_learned_and_may_be_none():
    vocabulary = train([EOT * 500], 300, special_tokens=["<|b|>", "<|a|>", "<|b|>"])
    assert vocabulary.special_tokens == {"<|b|>": vocabulary.vocab_size - 2, "<|a|>": vocabulary.vocab_size - 1}
    assert train(["a b"], 256, special_tokens=()).encode("a") == [97]


def test_the_tiktoken_encoding_has_the_same_ids(vocabularies):
    for vocabulary in vocabularies.values():
        encoding = vocabulary.to_tiktoken()
        assert encoding.n_vocab == vocabulary.vocab_size and encoding.eot_token == 995
        assert encoding.encode_ordinary(PROSE) == vocabulary.encode(PROSE)


def test_a_pickled_vocabulary_is_the_same(vocabularies):
    for vocabulary in vocabularies.values():
        vocabulary.encode("a")
        again = pickle.loads(pickle.dumps(vocabulary))
        assert same(again, vocabulary) and again.encode(PROSE) == vocabulary.encode(PROSE)


# --- files -------------------------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_vocabulary(vocabularies, tmp_path):
    other = BPE(r"\w+|\W", [(7, 8)], {"<|ü|>": 0, "x": 900}, bytes(reversed(range(256))), 5)
    for vocabulary in (*vocabularies.values(), other):
        vocabulary.save(tmp_path / "a.bpe")
        again = BPE.load(tmp_path / "a.bpe")
        assert same(again, vocabulary) and again.encode(PROSE) == vocabulary.encode(PROSE)
    assert os.listdir(tmp_path) == ["a.bpe"]
    json.loads((tmp_path / "a.bpe").read_text())  # readable JSON


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "a.bpe"
    vocabulary = train(["low lower newest widest"], 275)
    vocabulary.save(path)
    content = path.read_bytes()
    for place in range(0, len(content) - 1, 7):  # the last byte is a line break
        for bit in (0, 2, 5, 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match="damaged|no vocabulary"):
                BPE.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        BPE.load(path)


@pytest.mark.parametrize("content", [
    b"", b"no json", b"null", b"[]", b"{}", b'"text"', b"[" * 100_000, b'{"version": "1.0", "model": {}}',
    b'{"format": "plaingpt-bpe"}', b'{"format": "plaingpt-bpe", "version": 1, "sha256": 5}', b"\x80\x04pickle",
    b'{"kind": "char", "characters": "abc", "eot": true}',
])  # fmt: skip
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "a.bpe").write_bytes(content)
    with pytest.raises(ValueError, match="a.bpe is (damaged|no vocabulary)"):
        BPE.load(tmp_path / "a.bpe")


def test_a_missing_file_and_a_future_version_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot read .*none.bpe: No such file"):
        BPE.load(tmp_path / "none.bpe")
    with pytest.raises(ValueError, match="cannot read"):
        BPE.load(tmp_path)
    monkeypatch.setattr(bpe, "FORMAT", {"format": "plaingpt-bpe", "version": 2})
    train(["a b"], 261).save(tmp_path / "a.bpe")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 2, this code reads 1"):
        BPE.load(tmp_path / "a.bpe")


# --- tokenizer.json ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W"])
def test_an_exported_vocabulary_has_the_same_ids_in_tokenizers(vocabularies, pattern, tmp_path):
    vocabulary = vocabularies.get(pattern) or train([PROSE], 600, pattern)
    export_tokenizer_json(vocabulary, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == vocabulary.vocab_size
    for name, id in vocabulary.special_tokens.items():
        assert theirs.token_to_id(name) == id and theirs.encode(f"a{name}b").ids == vocabulary.encode(
            f"a{name}b", [name]
        )
    theirs.encode_special_tokens = True  # special tokens in text are text, as in ours
    for text in [*FIXTURES.values(), PROSE, *adversarial()[-500:]]:
        ids = vocabulary.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert same(import_tokenizer_json(tmp_path / "tokenizer.json"), vocabulary)


def test_runs_of_digits_are_cut_alike_in_tokenizers(tmp_path):
    vocabulary = train(["1234567 98765 " * 50], 300)
    export_tokenizer_json(vocabulary, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("1234567 x98765").ids == vocabulary.encode("1234567 x98765")


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory):
    """A tokenizer.json as GPT-2's, made by tokenizers: the special tokens come first."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    theirs.train_from_iterator([PROSE, *FIXTURES.values()], trainers.BpeTrainer(
        vocab_size=3000, special_tokens=[EOT, "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    theirs.save(str(path))
    return path, theirs


def test_an_imported_vocabulary_has_the_ids_it_had(gpt2_like, tmp_path):
    path, theirs = gpt2_like
    vocabulary = import_tokenizer_json(path)
    assert (vocabulary.pattern, vocabulary.first_id, vocabulary.special_tokens) == ("gpt2", 2, {EOT: 0, "<pad>": 1})
    assert vocabulary.vocab_size == theirs.get_vocab_size()
    assert vocabulary.encode(EOT, [EOT]) == theirs.encode(EOT).ids == [0]
    theirs.encode_special_tokens = True
    texts = [*FIXTURES.values(), PROSE, *adversarial()[-300:]]
    assert [vocabulary.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]
    vocabulary.save(tmp_path / "a.bpe")
    export_tokenizer_json(BPE.load(tmp_path / "a.bpe"), tmp_path / "again.json")
    again = Tokenizer.from_file(str(tmp_path / "again.json"))
    assert again.get_vocab() == theirs.get_vocab() and again.encode(EOT).ids == [0]
    assert [again.encode(text).ids for text in texts if EOT not in text] == [
        theirs.encode(text).ids for text in texts if EOT not in text
    ]
    assert same(import_tokenizer_json(tmp_path / "again.json"), vocabulary)


def change(content: dict, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for key in parents:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize("path, value, message", [
    ("model/type", "WordPiece", "WordPiece tokenizer, not byte-level BPE"),
    ("model/type", "Unigram", "Unigram tokenizer, not byte-level BPE"),
    ("model/byte_fallback", True, "byte_fallback=True"),
    ("model/end_of_word_suffix", "</w>", "end_of_word_suffix='</w>'"),
    ("model", {}, "no tokenizer.json of a byte-level BPE"),
    ("model/vocab", {}, "no tokenizer.json of a byte-level BPE"),
    ("model/vocab", {"▁the": 0}, "no tokenizer.json of a byte-level BPE"),
    ("model/merges", [["a", "zzzz"]], "no tokenizer.json of a byte-level BPE"),
    ("model/merges", [], "do not follow the order"),
    ("normalizer", {"type": "NFC"}, r"changes the text before it encodes it \(NFC\)"),
    ("pre_tokenizer", None, "no tokenizer.json of a byte-level BPE"),
    ("pre_tokenizer", {"type": "Whitespace"}, "cuts text in a way not known here: Whitespace"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, "not known here: ByteLevel"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, "in 0 steps"),
])  # fmt: skip
def test_other_kinds_of_tokenizer_json_are_refused(gpt2_like, tmp_path, path, value, message):
    content = json.loads(gpt2_like[0].read_text())
    change(content, path, value)
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        import_tokenizer_json(tmp_path / "t.json")


def test_ids_that_do_not_follow_the_merges_are_refused(gpt2_like, tmp_path):
    content = json.loads(gpt2_like[0].read_text())
    merges = content["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]  # their merging order, our ids: other tokens, silently
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="do not follow the order of its merges"):
        import_tokenizer_json(tmp_path / "t.json")
    for text in ("", "[]", "null", "{"):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ValueError, match="t.json is"):
            import_tokenizer_json(tmp_path / "t.json")


def test_older_tokenizer_json_files_are_read_too(gpt2_like, tmp_path):
    content = json.loads(gpt2_like[0].read_text())
    del content["pre_tokenizer"]["use_regex"]
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert same(import_tokenizer_json(tmp_path / "t.json"), import_tokenizer_json(gpt2_like[0]))


def test_what_a_tokenizer_json_cannot_say_is_not_exported(tmp_path):
    for vocabulary, message in (
        (BPE(r"\d{1,2}+|\D", [], {}), "means something else"),
        (BPE("gpt4", [], {"a": 256}), "spelled like an ordinary one"),
    ):
        with pytest.raises(ValueError, match=message):
            export_tokenizer_json(vocabulary, tmp_path / "t.json")
    assert not os.listdir(tmp_path)


# --- the command -------------------------------------------------------------------------------------------------


def run(*command: object, input: bytes = b"") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, input=input, env=environment
    )


@pytest.fixture
def command(capfdbinary, monkeypatch):
    """bpe.py's command in this process, as its last lines run it."""

    def call(*options: object, input: bytes = b"") -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["bpe.py", *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
        code = 0
        try:
            cli.run(bpe.main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capfdbinary.readouterr())

    return call


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, done.stderr
    assert not done.stdout
    return done.stderr.decode()


def test_the_command_trains_encodes_and_decodes(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    done = run("bpe.py", "train", "--input", tmp_path / "a.txt", "--vocab_size", "500", "--output", tmp_path / "a.bpe")
    assert done.returncode == 0 and not done.stderr and b"a.bpe: 500 ids" in done.stdout
    assert same(BPE.load(tmp_path / "a.bpe"), train([PROSE], 500))
    text = "naïve café, 世界 <|endoftext|>\r\n  def f(): pass\n"
    ids = run("bpe.py", "encode", tmp_path / "a.bpe", input=text.encode())
    assert list(map(int, ids.stdout.split())) == BPE.load(tmp_path / "a.bpe").encode(text)
    assert run("bpe.py", "decode", tmp_path / "a.bpe", input=ids.stdout).stdout == text.encode()
    wrong = run("bpe.py", "decode", tmp_path / "a.bpe", input=b"500")
    assert "500 is no token id of this vocabulary of 500" in refused(wrong)


def test_several_files_and_standard_input_are_read(command, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE[:5000])
    options = ["--vocab_size", 400, "--pattern", "digits", "--max_token_length", 4]
    done = command(
        "train", "--input", tmp_path / "a.txt", "-", "--output", tmp_path / "a.bpe", *options, input=PROSE.encode()
    )
    assert done.returncode == 0
    expected = train([PROSE[:5000], PROSE], 400, "digits", max_token_length=4)
    assert same(BPE.load(tmp_path / "a.bpe"), expected)
    (tmp_path / "ids").write_text("104 105 255")
    assert command("decode", tmp_path / "a.bpe", "--input", tmp_path / "ids").stdout == b"hi\xff"


@pytest.mark.parametrize("block", [1, 3, 10, 1000])
def test_files_are_read_in_blocks_that_lose_nothing(block, tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "TASK", block)
    for text in FIXTURES.values():
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert "".join(bpe.read_texts([str(tmp_path / "a.txt")])) == text
        for pattern in PATTERNS:
            blocks = bpe.read_texts([str(tmp_path / "a.txt")])
            assert count_chunks(blocks, pattern, workers=1) == Counter(splitter(pattern)(text))


def test_explain_prints_the_textbook_example(command):
    words = b"low low low low low lower lower newest newest newest newest newest newest widest widest widest"
    done = command("train", "--explain", "--input", "-", "--vocab_size", "262", input=words)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and len(lines) == 7 and lines[0].startswith("words: l o w x1, l o w x4, l o w e r x2")
    # `we` and `es` and `st` occur 8, 9 and 9 times: of the last two, e < s decides, then s < t
    assert lines[1].startswith("256: 'e' + 's', 9 times → 'es'")
    assert lines[2].startswith("257: 'es' + 't', 9 times → 'est'") and "n e w est x6" in lines[2]
    merges = learn_merges({c.encode(): n for c, n in count_chunks([words.decode()], "gpt4").items()}, 6)
    assert [re.search(r", (\d+) times", line)[1] for line in lines[1:]] == [str(count) for *_, count in merges]


def test_info_shows_what_is_in_a_vocabulary(command, tmp_path, monkeypatch):
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there: no download
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    vocabulary = train([PROSE], 500, "gpt2")
    vocabulary.save(tmp_path / "a.bpe")
    (tmp_path / "a.txt").write_text(PROSE)
    done = command("info", tmp_path / "a.bpe", "--input", tmp_path / "a.txt")
    shown = done.stdout.decode()
    assert done.returncode == 0 and "500 ids: 256 bytes, 239 merges, 5 special tokens" in shown
    size = len(PROSE.encode())
    assert f"{size:,} bytes: {size / len(vocabulary.encode(PROSE)):.3f}, gpt2 is not here" in shown
    first = next(iter(list(vocabulary.ranks)[256:]))
    assert f"first merges: {bpe.shown(first)}" in shown and EOT in shown and "pattern gpt2" in shown
    assert "bytes per token" not in command("info", tmp_path / "a.bpe").stdout.decode()


def test_a_mistake_is_one_clear_line(command, tmp_path):
    vocabulary, text, bad = tmp_path / "a.bpe", tmp_path / "a.txt", tmp_path / "bad"
    train(["a b"], 261).save(vocabulary)
    text.write_text("some text, some text")
    bad.write_bytes(b"ab\xff\xfe\x00{")
    output = ("--output", tmp_path / "x.bpe")
    for options, message in (
        (("train", "--input", tmp_path / "none", *output), "cannot read"),
        (("train", "--input", tmp_path, *output), "cannot read"),
        (("train", "--input", bad, *output), "bad is not UTF-8 text"),
        (("train", "--input", "-", *output), "no text to learn from"),
        (("train", "--input", text), "--output is missing"),
        (("train", "--input", text, "--output", tmp_path / "none" / "x.bpe"), "is no folder"),
        (("train", "--input", text, *output, "--vocab_size", 100), "too small"),
        (("train", "--input", text, *output, "--pattern", "(a"), "neither one of"),
        (("train", "--input", text, *output, "--max_token_length", 0), "at least 1"),
        (("encode", tmp_path / "none"), "cannot read"),
        (("encode", bad), "bad is damaged"),
        (("encode", text), "a.txt is damaged"),
        (("encode", vocabulary, "--input", bad), "not UTF-8"),
        (("decode", vocabulary, "--input", text), "'some' is no token id"),
        (("decode", vocabulary, "--input", bad), "not UTF-8"),
        (("info", bad), "bad is damaged"),
        (("info", vocabulary, "--input", tmp_path / "none"), "cannot read"),
    ):
        assert message in refused(command(*options)), options
    for numbers in (b"-1", b"1e3", b"9" * 5000, "²".encode(), b"999"):
        refused(command("decode", vocabulary, input=numbers))
    assert sorted(os.listdir(tmp_path)) == ["a.bpe", "a.txt", "bad"]


def test_the_tokenizer_json_command(vocabularies, tmp_path):
    vocabularies["gpt4"].save(tmp_path / "a.bpe")
    for kind, source, target in (("export", "a.bpe", "t.json"), ("import", "t.json", "b.bpe")):
        done = run("-m", "common.tokenizer_json", kind, tmp_path / source, tmp_path / target)
        assert done.returncode == 0, done.stderr
    assert same(BPE.load(tmp_path / "b.bpe"), vocabularies["gpt4"])
    assert "usage: " in refused(run("-m", "common.tokenizer_json", "convert"))
