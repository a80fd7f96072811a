"""Vocabularies to and from tokenizer.json: the ids are those of Hugging Face's tokenizers."""

import json
import os

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bpe import BPE, EOT, train
from formats.tokenizer_json import byte_characters, export_tokenizer_json, import_tokenizer_json
from tests.bpe_helpers import FIXTURES, PROSE, adversarial, same
from text.chunks import PATTERNS
from text.tokenizer import load_tokenizer


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W"])
def test_an_exported_vocabulary_has_the_same_ids_in_tokenizers(vocabularies, pattern, tmp_path):
    vocabulary = vocabularies.get(pattern) or train([PROSE], 600, pattern)
    export_tokenizer_json(vocabulary, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == vocabulary.vocab_size
    for name, id in vocabulary.special_tokens.items():
        assert theirs.token_to_id(name) == id
        assert theirs.encode(f"a{name}b").ids == [*vocabulary.encode("a"), id, *vocabulary.encode("b")]
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
    assert [vocabulary.special_tokens[EOT]] == theirs.encode(EOT).ids == [0]
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
    ("normalizer", {"type": "NFC"}, "changes the text before it encodes it: it has the normalizer NFC"),
    ("post_processor", {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}, "adds <s> to every text.*--drop"),
    ("truncation", {"max_length": 5}, "its truncation is .*--drop truncation"),
    ("added_tokens", [{"content": "x", "id": 9, "special": False, "lstrip": True}], "'x' has lstrip=true"),
    ("added_tokens", [{"content": EOT, "id": 0, "special": True}, {"content": "<pad>", "id": 1, "special": True},
                      {"content": "<x>", "id": 9, "special": True}], "two tokens share the id 9"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": x}, "behavior": "Isolated", "invert": False} for x in "abc"]},
     r"in 3 steps \(Split, Split, Split\)"),
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


BLOOM = r" ?[^(\s|[.,!?…。,、।۔،])]+"  # leaves punctuation and spaces out


@pytest.mark.parametrize("pattern", [BLOOM, r"\d+", r"[A-Za-z]+"])
def test_what_an_isolated_split_leaves_out_is_kept_as_hugging_face_keeps_it(tmp_path, pattern):
    theirs = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    theirs.train_from_iterator([PROSE, *FIXTURES.values()], trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    theirs.save(str(tmp_path / "t.json"))
    vocabulary = import_tokenizer_json(tmp_path / "t.json")
    for text in ["Hello, world!", *FIXTURES.values(), PROSE]:
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.encode(text) == theirs.encode(text).ids


def test_added_tokens_that_are_not_special_are_matched_in_texts_as_hugging_face_does(gpt2_like, tmp_path):
    theirs = Tokenizer.from_file(str(gpt2_like[0]))
    theirs.add_tokens(["    ", "  ", "<tool>", "<tool", "\t\t"])
    theirs.save(str(tmp_path / "t.json"))
    theirs.encode_special_tokens = True
    vocabulary = import_tokenizer_json(tmp_path / "t.json")
    assert len(vocabulary.matched_tokens) == 5 and vocabulary.special_tokens == {EOT: 0, "<pad>": 1}
    texts = ["a      b<tool><tool x\t\t\t", *FIXTURES.values()]
    assert [vocabulary.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]
    export_tokenizer_json(vocabulary, tmp_path / "again.json")
    assert import_tokenizer_json(tmp_path / "again.json").matched_tokens == vocabulary.matched_tokens


def test_another_end_token_is_named_and_remembered(gpt2_like, tmp_path):
    content = json.loads(gpt2_like[0].read_text())
    content["post_processor"] = {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    vocabulary = import_tokenizer_json(tmp_path / "t.json", eot="<pad>", drop=["post_processor"])
    vocabulary.save(tmp_path / "a.bpe")
    assert load_tokenizer(tmp_path / "a.bpe").eot_id == 1
    with pytest.raises(ValueError, match="has no special token '</s>': choose among <.endoftext.>, <pad>"):
        import_tokenizer_json(gpt2_like[0], eot="</s>")


def test_a_token_that_the_merges_never_make_is_refused(tmp_path):
    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("a", "bc"), ("abc", "d")]  # "abcd" is merged to "ab", "cd"
    vocab = {character: n for n, character in enumerate(byte_characters().values())}
    vocab |= {left + right: 256 + n for n, (left, right) in enumerate(merges)}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    (tmp_path / "t.json").write_text(json.dumps({"model": model, "pre_tokenizer": plain, "added_tokens": []}))
    with pytest.raises(ValueError, match="its merges never make its token 259, b'abc'"):
        import_tokenizer_json(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps({"model": model | {"ignore_merges": True}, "pre_tokenizer": plain}))
    assert import_tokenizer_json(tmp_path / "t.json").encode("abcd") == [260]
