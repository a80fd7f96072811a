import json
import pickle
import sys

import numpy as np
import pytest
import torch

from bpe import BPE, train
from text.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    ExtendedTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
    tokenizer_from_name,
)

TEXT = "Grüße, 世界! 🙂\r\n\ttabs, and <|endoftext|> spelled out\n"


@pytest.fixture(scope="module")
def vocabulary():
    """What bpe.py learned from the text."""
    return BPETokenizer(train([TEXT * 9], 300))


def same(a, b):
    return (a.vocab_size, a.eot_id, a.encode(TEXT)) == (b.vocab_size, b.eot_id, b.encode(TEXT))


@pytest.mark.parametrize("eot", [True, False])
def test_characters_are_numbered_in_sorted_order(eot):
    tokenizer = CharTokenizer("banana", eot)
    assert tokenizer.encode("ban") == [1, 0, 2]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == ((4, 3) if eot else (3, None))


def test_any_text_survives_encode_and_decode(tiny_encoding, vocabulary):
    for tokenizer in (CharTokenizer(TEXT, eot=True), TiktokenTokenizer(tiny_encoding), vocabulary):
        ids = tokenizer.encode(TEXT)
        assert isinstance(ids, list) and all(type(token) is int for token in ids)
        assert tokenizer.decode(ids) == TEXT
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_a_special_token_spelled_out_in_text_stays_text(tiny_encoding, vocabulary):
    for tokenizer in (CharTokenizer(TEXT, eot=True), TiktokenTokenizer(tiny_encoding), vocabulary):
        assert tokenizer.eot_id not in tokenizer.encode("<|endoftext|>")
        assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"


def test_decode_takes_lists_arrays_and_tensors():
    tokenizer = CharTokenizer("abc", eot=False)
    for ids in ([0, 2], np.array([0, 2], dtype=np.uint16), torch.tensor([0, 2]), iter([0, 2])):
        assert tokenizer.decode(ids) == "ac"


def test_an_unknown_character_is_named_with_its_position():
    tokenizer = CharTokenizer("abc ", eot=True)
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 5"):
        tokenizer.encode("abc aé")
    with pytest.raises(ValueError, match=r"U\+DC80"):  # a byte of the command line that was no UTF-8
        tokenizer.encode("\udc80")
    with pytest.raises(ValueError, match=r"U\+1F642"):
        tokenizer.encode("🙂")


def test_ids_outside_the_vocabulary_are_refused(tiny_encoding, vocabulary):
    for tokenizer in (CharTokenizer("abc", eot=True), TiktokenTokenizer(tiny_encoding), vocabulary):
        for wrong in (-1, tokenizer.vocab_size, 10**30):
            with pytest.raises(ValueError, match=f"token {wrong} is outside"):
                tokenizer.decode([0, wrong])


def test_tiktoken_ids_are_those_of_tiktoken(tiny_encoding):
    import tiktoken

    tokenizer, oracle = TiktokenTokenizer(tiny_encoding), tiktoken.get_encoding(tiny_encoding)
    assert tokenizer.encode(TEXT) == oracle.encode(TEXT, disallowed_special=())
    assert tokenizer.vocab_size == oracle.n_vocab and tokenizer.eot_id == oracle.eot_token


def test_unused_tiktoken_ids_and_broken_utf8_decode_to_replacement_characters(tiny_encoding):
    tokenizer = TiktokenTokenizer(tiny_encoding)
    unused = tokenizer.eot_id - 1
    assert tokenizer.decode([*tokenizer.encode("a"), unused, *tokenizer.encode("b")]) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_a_vocabulary_of_bpe_py_keeps_its_ids_and_its_file(tmp_path, vocabulary):
    vocabulary.save(tmp_path)
    vocabulary.bpe.save(tmp_path / "a.bpe")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "a.bpe").read_bytes()
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "a.bpe"):
        for loaded in (load_tokenizer(path), tokenizer_from_name(str(path))):
            assert same(loaded, vocabulary) and loaded.name == "bpe"
    assert vocabulary.encode(TEXT) == vocabulary.bpe.encode(TEXT)
    assert vocabulary.eot_id == vocabulary.vocab_size - 5
    assert BPETokenizer(train([TEXT], 260, special_tokens=())).eot_id is None


def test_a_vocabulary_with_unused_ids_decodes_them_to_replacement_characters():
    tokenizer = BPETokenizer(BPE("gpt4", [], {"<|endoftext|>": 300}))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (301, 300)
    assert tokenizer.decode([97, 280, 98, 195]) == "a\ufffdb\ufffd"


def test_a_damaged_vocabulary_and_a_foreign_tokenizer_json_are_told_apart(tmp_path, vocabulary):
    path = tmp_path / "tokenizer.json"
    vocabulary.save(tmp_path)
    path.write_text(path.read_text().replace('"gpt4"', '"gpt2"'))
    with pytest.raises(ValueError, match="tokenizer.json is damaged: its checksum differs"):
        load_tokenizer(tmp_path)
    path.write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match="for Hugging Face's: python -m formats.tokenizer_json import"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at 'none.bpe'"):
        tokenizer_from_name("none.bpe")


def test_save_and_load_give_the_same_tokenizer(tmp_path, tiny_encoding, vocabulary):
    for tokenizer in (
        CharTokenizer(TEXT, eot=True),
        CharTokenizer(TEXT, eot=False),
        CharTokenizer([*TEXT, "\ud800"], eot=True),
        TiktokenTokenizer(tiny_encoding),
        vocabulary,
    ):
        tokenizer.save(tmp_path)
        assert same(load_tokenizer(tmp_path), tokenizer)
        assert same(load_tokenizer(tmp_path / "tokenizer.json"), tokenizer)
        assert same(tokenizer_from_name(str(tmp_path)), tokenizer)
        assert same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)  # how it reaches the processes that tokenise
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[" * 100_000,
        "null",
        "[]",
        '{"kind": "char"}',
        '{"kind": "char", "characters": "abc"}',
        '{"kind": "char", "characters": "abc", "eot": 1}',
        '{"kind": "char", "characters": "cba", "eot": true}',
        '{"kind": "char", "characters": "aab", "eot": true}',
        '{"kind": "tiktoken", "encoding": 7}',
        '{"version": "1.0", "model": {}}',
        b"\x80\x04\x95pickle",
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["char", "tiktoken", "extended"])
def test_a_flipped_bit_in_a_tokenizer_file_is_noticed_wherever_it_is(tmp_path, kind, tiny_encoding):
    char = CharTokenizer("abc", eot=True)
    tokenizer = {
        "char": char,
        "tiktoken": TiktokenTokenizer(tiny_encoding),
        "extended": ExtendedTokenizer(char, ["<s>"]),
    }[kind]
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = path.read_bytes()
    assert load_tokenizer(path).content() == tokenizer.content()
    for place in range(len(content.rstrip())):
        if content[place : place + 1].isspace():  # the layout of the file, which says nothing
            continue
        for bit in (0, 5):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match="damaged"):
                load_tokenizer(path)


def test_files_of_the_first_version_have_no_checksum_and_load(tmp_path, tiny_encoding):
    char = {"kind": "char", "characters": "abc", "eot": True}
    bpe = train(["a b a b"], 262)
    for content, size in (
        (char, 4),
        ({"kind": "tiktoken", "encoding": tiny_encoding}, TiktokenTokenizer(tiny_encoding).vocab_size),
        ({"kind": "extended", "base": char, "special_tokens": ["<|user|>"]}, 5),
        ({"kind": "extended", "base": bpe.content(), "special_tokens": ["<x>"]}, bpe.vocab_size + 1),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).vocab_size == size


def test_special_tokens_that_cannot_be_added_are_refused(tmp_path):
    base = CharTokenizer("abc", eot=True)
    for added in (["<s>", "<s>"], [""], ["<|endoftext|>"]):
        with pytest.raises(ValueError, match="is empty, or there is already one of that name"):
            ExtendedTokenizer(base, added)


def test_half_a_surrogate_pair_is_refused_by_tokenizers_that_encode_bytes(tiny_encoding, vocabulary):
    for tokenizer in (TiktokenTokenizer(tiny_encoding), vocabulary, ExtendedTokenizer(vocabulary, ["<s>"])):
        with pytest.raises(ValueError, match=r"'\\udc80' at position 1 is half a surrogate pair"):
            tokenizer.encode("a\udc80")


def test_the_end_token_of_a_vocabulary_may_have_another_name(tmp_path):
    for eot, id in (("</s>", 301), (None, None), ("<|endoftext|>", 300)):
        bpe = BPE("gpt4", [], {"<|endoftext|>": 300, "</s>": 301}, eot=eot)
        BPETokenizer(bpe).save(tmp_path)
        assert load_tokenizer(tmp_path).eot_id == id
        assert ExtendedTokenizer(load_tokenizer(tmp_path), ["<x>"]).eot_id == id


def test_what_is_missing_or_empty_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.json"):
        with pytest.raises(ValueError, match="no tokenizer at"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("", eot=True)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gpt2'.*'char'"):
        tokenizer_from_name("gpt-2")
    with pytest.raises(ValueError, match="did you mean 'cl100k_base'"):
        TiktokenTokenizer("cl100k")


def test_an_encoding_that_cannot_be_downloaded_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there: refused at once, on any machine
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="'p50k_edit' is downloaded at its first use, and that failed"):
        TiktokenTokenizer("p50k_edit")


def test_char_collects_the_characters_of_all_texts():
    tokenizer = tokenizer_from_name("char", iter(["ab", "", "bc"]))
    assert (tokenizer.characters, tokenizer.eot_id) == ("abc", 3)
    with pytest.raises(ValueError, match="made from a text"):
        tokenizer_from_name("char")


def test_the_file_is_plain_json(tmp_path):
    CharTokenizer("ab", eot=True).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content.pop("sha256") and content == {"kind": "char", "characters": "ab", "eot": True}


@pytest.mark.parametrize("change", [{"characters": "ba"}, {"characters": "ac"}, {"eot": False}])
def test_a_changed_file_is_told_and_one_from_before_there_were_checksums_opens(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    CharTokenizer("ab", eot=True).save(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match="tokenizer.json is damaged: its checksum differs"):
        load_tokenizer(tmp_path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).characters == "ab"


def test_the_char_tokenizer_does_not_import_tiktoken():
    import subprocess

    code = "import sys; from text.tokenizer import CharTokenizer; CharTokenizer('ab', True).encode('a'); " + (
        "sys.exit('tiktoken' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/tests/", 1)[0]).returncode == 0
