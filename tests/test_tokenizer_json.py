"""Vocabularies to and from tokenizer.json: the ids are those of Hugging Face's tokenizers."""

import json
import os
import random
import sys

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bpe import BPE, EOT, train
from formats.tokenizer_json import byte_characters, export_tokenizer_json, import_tokenizer_json, main, vocabulary_of
from tests.bpe_helpers import FIXTURES, PROSE, adversarial, same
from text.chunks import PATTERNS
from text.tokenizer import BPETokenizer, CharTokenizer, ExtendedTokenizer, load_tokenizer


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
    assert [vocabulary.special_tokens[EOT]] == theirs.encode(EOT).ids == [0] and vocabulary.eot == EOT
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


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    """A pre-tokenizer that splits by a pattern."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [step, level]}


THREE = {
    "type": "Sequence",
    "pretokenizers": [*(split(x)["pretokenizers"][0] for x in "abc"), split("")["pretokenizers"][1]],
}
TEMPLATE = {"type": "TemplateProcessing", "single": [
    {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}  # fmt: skip
BERT = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
ADDED = {"special": False, "normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
SPECIAL = [{"content": EOT, "id": 0, "special": True}, {"content": "<pad>", "id": 1, "special": True}]


@pytest.mark.parametrize("path, value, message", [
    ("model/type", "WordPiece", "WordPiece tokenizer, not byte-level BPE"),
    ("model/type", "Unigram", "Unigram tokenizer, not byte-level BPE"),
    ("model/byte_fallback", True, "byte_fallback=True"),
    ("model/end_of_word_suffix", "</w>", "end_of_word_suffix='</w>'"),
    ("model", {}, "no tokenizer.json of a byte-level BPE"),
    ("model/vocab", {}, "the merge of '.' and '.' needs the token '.*', which is no ordinary token"),
    ("model/vocab", {"▁the": 5}, "its token '▁the' is not spelled in bytes"),
    ("model/vocab", {"a": "b"}, "no tokenizer.json of a byte-level BPE"),
    ("model/merges", [["a", "zzzz"]], "the merge of 'a' and 'zzzz' needs the token 'zzzz'"),
    ("model/merges", [], r"no merge of two older tokens makes the token '.*' \(id 258\)"),
    ("normalizer", {"type": "NFC"}, r"changes the text before it encodes it \(NFC\)"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, "NFC, Lowercase"),
    ("post_processor", TEMPLATE, "post_processor adds <s> to every text.*--drop post_processor"),
    ("post_processor", {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, "adds <s> to every"),
    ("post_processor", BERT, "adds <s> and </s> to every text"),
    ("truncation", {"max_length": 512}, "truncation cuts off what is beyond 512 tokens.*--drop truncation"),
    ("padding", {"strategy": {"Fixed": 8}, "pad_token": "<pad>"}, "padding pads every text with <pad>.*--drop padding"),
    ("added_tokens", [ADDED | {"content": "<x>", "id": 3000, "lstrip": True}], "'<x>' has lstrip"),
    ("added_tokens", [*SPECIAL, {"content": "<x>", "id": 9, "special": True}], "'.' and '<x>' share the id 9"),
    ("added_tokens", [*SPECIAL, ADDED | {"content": "the", "id": 9999}], "the token 'the' has two ids"),
    ("added_tokens", [*SPECIAL, ADDED | {"content": "pad>x", "id": 9999}], "'pad>x' and '<pad>' overlap"),
    ("pre_tokenizer", THREE, r"in 3 steps \(Split, Split, Split, ByteLevel\)"),
    ("pre_tokenizer", None, "its last pre-tokenizer must be its only ByteLevel"),
    ("pre_tokenizer", split("a")["pretokenizers"][0], "its last pre-tokenizer must be its only ByteLevel"),
    ("pre_tokenizer", {"type": "Whitespace"}, "cuts text in a way not known here: Whitespace"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "puts a space before every text"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, "in 0 steps"),
    ("pre_tokenizer", split("a+", "Removed"), r"drops the text that its Split matches \(Removed\)"),
    ("pre_tokenizer", split("a+", "Removed", True), "drops the text that its Split does not match"),
    ("pre_tokenizer", split("a+", "MergedWithNext"), "a Split that is MergedWithNext"),
    ("pre_tokenizer", split(r"\d{1,2}+"), r"which means something else here: x\{1,3\}\+ takes x any number of times"),
    ("pre_tokenizer", split(r"^\S+|\s"), r"something else here: \^ and \$ stand for the ends of a line"),
    ("pre_tokenizer", split(r"(?m:.+)"), "lets . match a line break"),
    ("pre_tokenizer", split(r"(.)\1"), "references to groups"),
    ("pre_tokenizer", split(r"\d*"), "matches the empty string"),
    ("pre_tokenizer", split(r"\d("), "nor a regular expression"),
])  # fmt: skip
def test_what_a_tokenizer_json_does_otherwise_is_refused_by_name(gpt2_like, tmp_path, path, value, message):
    content = json.loads(gpt2_like[0].read_text())
    change(content, path, value)
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"t.json.*{message}|{message}.*t.json"):
        import_tokenizer_json(tmp_path / "t.json")


@pytest.mark.parametrize("path, value", [
    ("normalizer", {"type": "Sequence", "normalizers": []}),
    ("post_processor", {"type": "ByteLevel", "trim_offsets": True}),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}),
    ("padding", {"strategy": "BatchLongest", "pad_token": "<pad>"}),
])  # fmt: skip
def test_what_changes_nothing_is_no_obstacle(gpt2_like, tmp_path, path, value):
    content = json.loads(gpt2_like[0].read_text())
    change(content, path, value)
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert same(import_tokenizer_json(tmp_path / "t.json"), import_tokenizer_json(gpt2_like[0]))


@pytest.mark.parametrize("name, setting", [
    ("post_processor", BERT), ("truncation", {"max_length": 5}), 
    ("padding", {"strategy": {"Fixed": 8}, "pad_token": "<pad>"}),
])  # fmt: skip
def test_what_stands_in_the_way_may_be_dropped_on_purpose(gpt2_like, tmp_path, name, setting):
    content = json.loads(gpt2_like[0].read_text()) | {name: setting}
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert same(import_tokenizer_json(tmp_path / "t.json", drop=[name]), import_tokenizer_json(gpt2_like[0]))


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
        (BPE(r"^\d|\D", [], {}), "means something else"),
        (BPE("gpt4", [], {"a": 256}), "spelled like an ordinary one"),
        (BPE("gpt4", [], {"<a>": 256}, matched_tokens={"a>b": 257}), "'<a>' and the matched token 'a>b' overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            export_tokenizer_json(vocabulary, tmp_path / "t.json")
    assert not os.listdir(tmp_path)


# --- the same ids as Hugging Face, or a refusal ------------------------------------------------------------------

PRE_TOKENIZERS = {  # of models on the Hub, and stranger ones
    "BLOOM": r" ?[^(\s|[.,!?…。，、|_।۔،])]+",  # leaves punctuation and spaces out
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "words": r"\s?\p{L}+",
    "digits": r"\d",
    "behind": r"(?<=a)b+|\p{N}",
    "groups": r"([A-Z])([a-z]+)",
}


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "a string"])
def test_what_an_isolated_split_leaves_out_is_kept_as_hugging_face_keeps_it(tmp_path, name):
    theirs, texts = (
        Tokenizer(models.BPE()),
        [*FIXTURES.values(), PROSE[:20_000], "Hello, world!", *adversarial()[-300:]],
    )
    by = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[name]) if name in PRE_TOKENIZERS else " ", "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Sequence([by, level]), decoders.ByteLevel()
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    theirs.save(str(tmp_path / "t.json"))
    theirs.encode_special_tokens = True
    vocabulary = import_tokenizer_json(tmp_path / "t.json")
    for text in texts:
        assert vocabulary.encode(text) == theirs.encode(text).ids
        assert vocabulary.decode(vocabulary.encode(text)) == text
    if name != "groups":  # of which no pattern to learn from may have any
        assert train([PROSE[:5000]], 300, vocabulary.pattern).decode(vocabulary.encode("")) == ""


@pytest.mark.parametrize("pattern", [PATTERNS["gpt2"], PRE_TOKENIZERS["Llama 3"]])
def test_a_split_that_removes_nothing_is_as_good_as_an_isolated_one(gpt2_like, tmp_path, pattern):
    content = json.loads(gpt2_like[0].read_text())  # as in the conversions of GPT-4's encoding
    content["pre_tokenizer"] = split(pattern, "Removed", True)
    (tmp_path / "t.json").write_text(json.dumps(content))
    theirs = Tokenizer.from_file(str(tmp_path / "t.json"))
    theirs.encode_special_tokens = True
    vocabulary = import_tokenizer_json(tmp_path / "t.json")
    assert all(
        vocabulary.encode(text) == theirs.encode(text).ids for text in [*FIXTURES.values(), *adversarial()[-300:]]
    )


def test_added_tokens_that_are_not_special_are_matched_in_texts_as_hugging_face_does(gpt2_like, tmp_path):
    theirs = Tokenizer.from_file(str(gpt2_like[0]))
    theirs.add_tokens(["    ", "  ", "<tool>", "<tool", "\t\t"])
    theirs.save(str(tmp_path / "t.json"))
    theirs.encode_special_tokens = True
    vocabulary = import_tokenizer_json(tmp_path / "t.json")
    assert len(vocabulary.matched_tokens) == 5 and vocabulary.special_tokens == {EOT: 0, "<pad>": 1}
    texts = ["a      b<tool><tool x\t\t\t", *FIXTURES.values(), *adversarial()[-300:]]
    assert [vocabulary.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]
    assert all(vocabulary.decode(vocabulary.encode(text)) == text for text in texts)
    vocabulary.save(tmp_path / "a.bpe")
    export_tokenizer_json(BPE.load(tmp_path / "a.bpe"), tmp_path / "again.json")
    assert same(import_tokenizer_json(tmp_path / "again.json"), vocabulary)
    again = Tokenizer.from_file(str(tmp_path / "again.json"))
    again.encode_special_tokens = True
    assert [again.encode(text).ids for text in texts] == [theirs.encode(text).ids for text in texts]


def test_another_end_token_is_named_and_remembered(gpt2_like, tmp_path):
    vocabulary = import_tokenizer_json(gpt2_like[0], eot="<pad>")
    vocabulary.save(tmp_path / "a.bpe")
    assert load_tokenizer(tmp_path / "a.bpe").eot_id == 1 and same(BPE.load(tmp_path / "a.bpe"), vocabulary)
    with pytest.raises(ValueError, match="has no token '</s>'; the tokens added.* are <.endoftext.>, <pad>"):
        import_tokenizer_json(gpt2_like[0], eot="</s>")
    content = json.loads(
        gpt2_like[0].read_text()
    )  # older files list no added tokens, their end token is in the vocabulary
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != EOT]
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="first 256 ids are not the bytes|makes the token '<.endoftext.>'"):
        import_tokenizer_json(tmp_path / "t.json")
    assert same(import_tokenizer_json(tmp_path / "t.json", eot=EOT), import_tokenizer_json(gpt2_like[0]))


def test_the_command_names_the_end_token_or_says_that_there_is_none(gpt2_like, tmp_path, monkeypatch, capsys):
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([PROSE[:5000]], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    theirs.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    theirs.save(str(tmp_path / "t.json"))
    command = ["x", "import", str(tmp_path / "t.json"), str(tmp_path / "a.bpe")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="adds </s> to every text"):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--drop", "post_processor"])
    main()
    assert "no token <|endoftext|>, so that nothing will stand between documents" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--drop", "post_processor", "--eot", "</s>"])
    main()
    out, err = capsys.readouterr()
    assert "a.bpe: 400 ids" in out and not err and load_tokenizer(tmp_path / "a.bpe").eot_id == 0


def test_a_vocabulary_to_which_chat_tokens_were_added_is_exported_with_them(tmp_path):
    extended = ExtendedTokenizer(
        BPETokenizer(train([PROSE[:5000]], 400, special_tokens=[EOT])), ["<|user|>", "<|end|>"]
    )
    export_tokenizer_json(vocabulary_of(extended, "x"), tmp_path / "t.json")
    theirs = Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.token_to_id("<|user|>") == 400 and theirs.get_vocab_size() == extended.vocab_size == 402
    assert theirs.encode("a b<|end|>").ids == [*extended.encode("a b"), 401]
    for tokenizer in (CharTokenizer("ab", True), ExtendedTokenizer(CharTokenizer("ab", True), ["<s>"])):
        with pytest.raises(ValueError, match="x holds a char tokenizer, which has no merges"):
            vocabulary_of(tokenizer, "x")


def test_a_token_that_the_merges_do_not_arrive_at_is_refused_by_name(tmp_path):
    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("a", "bc"), ("abc", "d")]  # "abc" is merged to "ab", "c"
    path = saved(tmp_path, merges)
    with pytest.raises(ValueError, match=r"do not arrive at the token 'abc' \(id 259\), but at 'ab' \+ 'c'"):
        import_tokenizer_json(path)
    with pytest.raises(
        ValueError, match="do not arrive at the token 'abc'"
    ):  # "xabc" would be x ab c there, x abc here
        import_tokenizer_json(saved(tmp_path, merges, ignore_merges=True))


def saved(folder, merges: list[tuple[str, str]], ignore_merges: bool = False):
    """A tokenizer.json with these merges, and spaces as chunks of their own."""
    vocab = {character: n for n, character in enumerate(byte_characters().values())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    theirs = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), level])
    theirs.save(str(folder / "t.json"))
    return folder / "t.json"


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_any_merges_are_imported_with_the_same_ids_or_refused(tmp_path, ignore_merges):
    source, imported = random.Random(7), 0
    for _ in range(150):
        tokens, merges = list("abc"), []
        for _ in range(source.randint(2, 9)):
            left, right = source.choice(tokens), source.choice(tokens)
            if (token := left + right) in tokens:
                continue
            cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if source.random() < 0.3]
            merges += [(left, right), *(cut for cut in cuts if cut != (left, right) and {*cut} <= {*tokens})]
            tokens.append(token)
        path = saved(tmp_path, merges, ignore_merges)
        theirs = Tokenizer.from_file(str(path))
        try:
            vocabulary = import_tokenizer_json(path)
        except ValueError as error:
            assert "do not arrive at the token" in str(error)
            continue
        imported += 1
        texts = [*tokens, *("".join(source.choices("abc ", k=source.randint(1, 12))) for _ in range(40))]
        assert [vocabulary.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts], merges
    assert 50 < imported < 145
