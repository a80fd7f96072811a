"""bpe.py against a naive reference, tiktoken, and Hugging Face's tokenizers."""

import json
import os
import pickle
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import regex
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import bpe
from bpe import BPE, EOT, SPECIAL_TOKENS, train
from common.files import write_whole
from formats.tokenizer_json import byte_characters
from tests.bpe_helpers import FIXTURES, PROSE, adversarial, characters, same
from text import chunks as chunks_module
from text.chunks import PATTERNS, complete, count_chunks, splitter
from text.merges import learn_merges

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
    chunks = {chunk.encode(): n for chunk, n in count_chunks([PROSE[:10_000]], "gpt4").items()}
    assert learn_merges(chunks, 200) == naive_merges(chunks, 200)


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
    text = "".join(page for _, page in sorted(topics.items()))[:150_000]
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
        monkeypatch.setattr(chunks_module, "ASCII_BLOCK", size)
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
    ((["a"], 300, "gpt5"), {}, "no pattern is called 'gpt5': did you mean 'gpt4'. There are gpt2, gpt4, digits"),
    ((["a"], 300, "["), {}, "neither one of gpt2, gpt4, digits nor a regular expression"),
    ((["a"], 300, "(a)|."), {}, "groups that capture"),
    ((["abc"], 300, ""), {}, "matches the empty string"),
    ((["abc"], 300, "a*|."), {}, "matches the empty string"),
    ((["abc"], 300, r"(?=b)|\w"), {}, "matches the empty string"),
    ((["abc"], 300, r"\b|."), {}, "matches the empty string"),
    ((["Q"], 300, r"(?=Q)|."), {}, "matches the empty string"),  # which only the text itself tells
    ((["abc"], 300, r"\X|."), {}, "does not work in tiktoken"),
    ((["a\ud800"], 300), {}, "'\\\\ud800' at position 1 is half a surrogate pair"),
    ((["a"], 300), {"special_tokens": EOT}, "a list of names is needed"),
    ((["a"], 300), {"special_tokens": [""]}, "none of them empty"),
    ((["a"], 300), {"max_token_length": 0}, "max_token_length=0: at least 1"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused_clearly(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        train(*arguments, **options)


# --- cutting text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_is_cut_as_the_plain_pattern_cuts_it(pattern, monkeypatch):
    monkeypatch.setattr(chunks_module, "ASCII_BLOCK", 20)
    monkeypatch.setattr(chunks_module, "OTHER_BLOCK", 10)
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
    for text in ("ab\ud800", "ab\udfff\ud800"):
        with pytest.raises(ValueError, match=r"'\\ud...' at position 2 is half a surrogate pair"):
            vocabularies["gpt4"].encode(text)


@pytest.mark.parametrize("pattern", [r"\d+", r"[a-z]+|\d", r"(?i)THE", r"[^\s]+"])
def test_what_a_pattern_leaves_out_is_a_chunk_of_its_own_and_nothing_is_lost(pattern):
    vocabulary = train([PROSE, "ab12c the The 7"], 400, pattern)
    for text in [*FIXTURES.values(), "ab12c, the THE 7!", *adversarial()[-200:]]:
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert "".join(splitter(pattern)(text)) == text
        assert vocabulary.encode(text) == naive_encode(vocabulary, text)
    assert complete(r"\d+") and re.findall(complete(r"\d+"), "ab12c") == ["ab", "12", "c"]
    assert splitter(r"\d+")("ab12c") == ["ab", "12", "c"] and splitter("a|b")("abc") == ["a", "b", "c"]


def test_a_text_that_exceeds_the_limits_of_tiktoken_is_refused_not_a_panic(vocabularies):
    text = " " * 1_100_000 + "x"
    for encode in (vocabularies["gpt4"].encode, train(["a 1"], 261, r"\d+").encode):
        with pytest.raises(ValueError, match="pattern cannot cut this text of 1,100,001 characters"):
            encode(text)
    with pytest.raises(ValueError, match="pattern cannot cut this text of 1 char"):
        BPE("b*", [], {}).encode("a")


def test_a_pattern_that_backtracks_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(chunks_module, "TIMEOUT", 0.05)
    with pytest.raises(ValueError, match="takes too long to cut a text of 42 characters"):
        train(["a" * 40 + "!b"], 300, r"(?:(?:a|aa)+)+c|b")
    with pytest.raises(ValueError, match="pattern cannot cut this text"):
        BPE(r"(?:(?=a)(?:a|aa)+)+c|b", [], {}).encode("a" * 60 + "!")


def test_matched_tokens_stand_for_their_spelling_in_texts(tmp_path):
    vocabulary = BPE("gpt4", [(104, 105)], {EOT: 257}, matched_tokens={"  ": 258, "    ": 259, "<tool>": 260})
    text = "hi      <tool>hi " + EOT
    assert vocabulary.encode("hi      <tool>hi") == [256, 259, 258, 260, 256]  # the longest one at each place
    assert vocabulary.decode(vocabulary.encode(text)) == text and 257 not in vocabulary.encode(text)
    vocabulary.save(tmp_path / "a.bpe")
    assert same(BPE.load(tmp_path / "a.bpe"), vocabulary)
    assert BPE.load(tmp_path / "a.bpe").matched_tokens == vocabulary.matched_tokens


def test_any_bytes_survive_decode_bytes_and_invalid_utf8_decodes_as_in_tiktoken(vocabularies):
    vocabulary, source = vocabularies["gpt4"], random.Random(5)
    for _ in range(300):
        data = source.randbytes(source.randrange(40))
        ids = [vocabulary.ranks[data[i : i + 1]] for i in range(len(data))]
        assert vocabulary.decode_bytes(ids) == data
        assert vocabulary.decode(ids) == vocabulary.encoding.decode(ids) == data.decode(errors="replace")
        ids = source.choices(range(vocabulary.vocab_size), k=20)
        assert vocabulary.decode(ids) == vocabulary.encoding.decode(ids)
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


def test_a_special_token_is_never_made_from_text(vocabularies):
    for vocabulary in vocabularies.values():
        special = set(vocabulary.special_tokens.values())
        assert list(vocabulary.special_tokens) == list(SPECIAL_TOKENS) and special == set(range(995, 1000))
        text = "".join(f"a{name}{name} " for name in SPECIAL_TOKENS)
        assert not special & set(vocabulary.encode(text)) and vocabulary.decode(vocabulary.encode(text)) == text


def test_special_tokens_are_never_learned_and_may_be_none():
    vocabulary = train([EOT * 500], 300, special_tokens=["<|b|>", "<|a|>", "<|b|>"])
    assert vocabulary.special_tokens == {"<|b|>": vocabulary.vocab_size - 2, "<|a|>": vocabulary.vocab_size - 1}
    assert train(["a b"], 256, special_tokens=()).encode("a") == [97]


def test_the_tiktoken_encoding_has_the_same_ids(vocabularies):
    for vocabulary in vocabularies.values():
        encoding = vocabulary.encoding
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


def test_a_missing_file_and_a_future_version_are_told(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.bpe: No such file"):
        BPE.load(tmp_path / "none.bpe")
    with pytest.raises(ValueError, match="cannot read"):
        BPE.load(tmp_path)
    content = train(["a b"], 261).content()
    del content["sha256"]
    (tmp_path / "a.bpe").write_text(json.dumps(bpe.with_checksum(content | {"version": 4})))
    with pytest.raises(ValueError, match="format version 4, this code reads 1 to 3"):
        BPE.load(tmp_path / "a.bpe")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "text\n"


def test_saving_to_a_pipe_writes_to_it_and_leaves_it_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit((tmp_path / "pipe").read_text)
        write_whole(tmp_path / "pipe", "text")
        assert text.result() == "text\n" and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "field, value",
    [("merges", "x"), ("merges", ["1"]), ("merges", ["9 a"]), ("merges", ["300 300"]), ("alphabet", [1]),
     ("alphabet", ["a"]), ("special_tokens", {"a": "b"}), ("special_tokens", {"a": 5}), ("first_id", "0"),
     ("first_id", 1 << 40), ("pattern", None), ("matched_tokens", [])], ids=str,
)  # fmt: skip
def test_a_file_with_fields_of_wrong_types_is_one_line(tmp_path, field, value):
    content = train(["a b"], 261).content()
    del content["sha256"]
    (tmp_path / "a.bpe").write_text(json.dumps(bpe.with_checksum(content | {field: value})))
    with pytest.raises(ValueError, match="a.bpe"):
        BPE.load(tmp_path / "a.bpe")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gpt4", [(97, 98), (97, 98)], {}), "two merges make the same token"),
        (("gpt4", [(256, 97)], {}), "the merge of 256 and 97, number 0, names a later token"),
        (("gpt4", [(-1, 97)], {}), "names a later token"),
        (("gpt4", [], {"<a>": 97}), "two tokens share the id 97"),
        (("gpt4", [], {"<a>": 1 << 31}), "the id 2147483648 is not between"),
        (("gpt4", [], {"": 300}), "empty name"),
        (("gpt4", [], {}, bytes(255) + b"a"), "each of the 256 bytes once"),
    ],
)
def test_what_is_no_vocabulary_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPE(*arguments)
    with pytest.raises(ValueError, match="the end token '</s>' is not among the special tokens: <a>"):
        BPE("gpt4", [], {"<a>": 300}, eot="</s>")


def test_people_see_spaces_whole_characters_and_long_runs():
    bytes_of = [bytes([byte]) for byte in " 从".encode()]
    assert bpe.spelled(bytes_of) == ["␣", "从₁", "从₂", "从₃"]
    assert bpe.spelled([b" " + bytes_of[1], b"".join(bytes_of[2:]), "从前\n".encode()]) == ["␣从₁", "从₂₃", r"从前\n"]
    assert bpe.shown(b" " * 39) == "' ' x 39" and bpe.shown(b"  ") == "'  '"
    assert bpe.shown(b"\n\n" + b" " * 8 + b"a") == r"'\n\n' + ' ' x 8 + 'a'"
    assert bpe.shown("从".encode()) == "'从'" and bpe.shown("从".encode()[:2]) == "<e4 bb>"
