import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import bpe
from common import cli
from data.shakespeare_char import tiny_shakespeare as shakespeare
from text.corpus import Corpus
from text.documents import Documents, Reading, split_of
from text.prepare import download
from text.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]


def process(name, *arguments, cwd=ROOT, **environment):
    """Run data/<name>/prepare.py as a user does, in a process of its own."""
    run = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, arguments)]
    return subprocess.run(run, cwd=cwd, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def refused(result):
    """The one line that tells the user what is wrong."""
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def here(monkeypatch, capfd):
    """data/<name>/prepare.py's main in this process: returns stdout and stderr, raises what it raises."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        script(name).main()
        return capfd.readouterr()

    return call


@pytest.fixture
def command(monkeypatch, capfd):
    """The whole command in this process: its exit status, stdout and stderr."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        code = 0
        try:
            cli.run_command(script(name).main)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return call


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in documents))
    return path


# --- data/text ---------------------------------------------------------------------------------------------------


def test_text_prepares_files_from_anywhere(tmp_path):
    (tmp_path / "a.txt").write_text("to be\nor not\nto be\n")
    jsonl(tmp_path / "b.jsonl", ["that", "is", "the", "question"])
    result = process("text", "--input", "a.txt", "b.jsonl", "--output", "out", "--val_fraction", "0.3", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert "out: vocabulary of" in result.stdout
    corpus = Corpus(tmp_path / "out")
    corpus.verify()
    assert f"{corpus.num_tokens('train'):,} tokens" in result.stdout
    decoded = corpus.tokenizer.decode(np.fromfile(tmp_path / "out" / "train.bin", "<u2"))
    assert decoded.startswith("to be\nor not\n<|endoftext|>")


def test_text_takes_tiktoken_names_and_saved_tokenizers(command, tmp_path, tiny_encoding):
    (tmp_path / "a.txt").write_text("the thin tin\n" * 20)
    result = command("text", "--input", tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tiny_encoding)
    assert result.returncode == 0, result.stderr
    again = command("text", "--input", tmp_path / "a.txt", "--output", tmp_path / "b", "--tokenizer", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "b.txt").write_text("çà\n" * 20)
    command("text", "--input", tmp_path / "a.txt", "--output", tmp_path / "chars")
    wrong = command(
        "text", "--input", tmp_path / "b.txt", "--output", tmp_path / "c", "--tokenizer", tmp_path / "chars"
    )
    assert "'ç' (U+00E7) at position 0" in refused(wrong)


def test_text_learns_a_vocabulary_from_its_training_split(command, tmp_path):
    data = "".join(f"the cat number {i} sat on the mat\n" for i in range(400)) + "zzzzzzzz " * 300 + "\n"
    (tmp_path / "a.txt").write_text(data)
    options = ("--input", tmp_path / "a.txt", "--val_fraction", "0.2")
    result = command("text", *options, "--output", tmp_path / "out", "--vocab_size", "300")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    corpus = Corpus(tmp_path / "out")
    train, val = ("".join(text) for _, text in Documents([tmp_path / "a.txt"], 0.2))
    assert corpus.tokenizer.bpe.ranks == bpe.train([train], 300).ranks and "zz" not in train and "zz" in val
    ids = np.fromfile(tmp_path / "out" / "train.bin", "<u2").tolist()
    assert ids == [*corpus.tokenizer.encode(train), corpus.tokenizer.eot_id]
    # The same vocabulary as a file, and two processes: the same corpus
    corpus.tokenizer.bpe.save(tmp_path / "a.bpe")
    again = command("text", *options, "--output", tmp_path / "b", "--tokenizer", tmp_path / "a.bpe", "--workers", "2")
    assert again.returncode == 0, again.stderr
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for wrong, message in (
        (("--vocab_size", "100"), "too small"),
        (("--tokenizer", tmp_path / "c.bpe"), "no tokenizer"),
    ):
        assert message in refused(command("text", *options, "--output", tmp_path / "c", *wrong))
    assert (
        command("text", *options, "--output", tmp_path / "c", "--vocab_size", 300, "--tokenizer", "char").returncode
        == 2
    )


def test_a_mistake_is_one_line_and_exit_status_1(command, tmp_path):
    good = tmp_path / "a.txt"
    good.write_text("one\ntwo\nthree\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\noops\n')
    output = ("--output", tmp_path / "out")
    assert "nothing.txt: no such file" in refused(command("text", "--input", "nothing.txt", *output))
    assert "bad.jsonl, line 2: not valid JSON" in refused(command("text", "--input", tmp_path / "bad.jsonl", *output))
    assert "between 0 and 1" in refused(command("text", "--input", good, *output, "--val_fraction", "1.5"))
    assert "did you mean 'gpt2'" in refused(command("text", "--input", good, *output, "--tokenizer", "gpt-2"))
    assert "at least 1" in refused(command("text", "--input", good, *output, "--workers", "0"))
    assert not (tmp_path / "out" / "meta.json").exists()


def train_text(folder):
    corpus = Corpus(folder)
    corpus.verify()
    return corpus.tokenizer.decode(np.fromfile(folder / "train.bin", corpus.meta["dtype"]))


def test_a_folder_of_articles_is_prepared(here, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(200):
        (tmp_path / "in" / f"{i}.txt").write_text(f"article {i}\n" + "some words\n" * (i % 7 + 3))
    out = here("text", "--input", tmp_path / "in", "--output", tmp_path / "out", "--val_fraction", "0.1")
    splits = Corpus(tmp_path / "out").meta["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 200 and not out.err
    assert splits["val"]["bytes"] == pytest.approx(0.1 * sum(split["bytes"] for split in splits.values()), rel=0.1)


def test_options_choose_the_field_the_separator_and_further_endings(here, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": f"text {i}"}) + "\n" for i in range(40)))
    options = ("--output", tmp_path / "out", "--val_fraction", "0.3")
    here("text", "--input", tmp_path / "a.jsonl", "--text_field", "content", *options)
    assert train_text(tmp_path / "out").startswith("text ")
    (tmp_path / "a.log").write_text("".join(f"story {i}\n---\n" for i in range(40)))
    here("text", "--input", tmp_path / "a.log", "--text_suffix", "log", "--document_separator", "\\n---\\n", *options)
    splits = Corpus(tmp_path / "out").meta["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 40
    assert train_text(tmp_path / "out").startswith("story ") and "-" not in train_text(tmp_path / "out")
    with pytest.raises(ValueError, match="--document_separator is empty"):
        here("text", "--input", tmp_path / "a.jsonl", "--document_separator", "", *options)


def test_what_a_user_may_not_expect_is_told(here, tmp_path):
    path, options = tmp_path / "a.jsonl", ("--output", tmp_path / "out", "--val_fraction", "0.3")
    jsonl(path, ["a" * 9 + str(i % 9) for i in range(40)] + ["<|endoftext|>" + "b" * 5000])
    told = here("text", "--input", path, *options).err
    assert "of the text is for validation, not 30.00%" in told
    assert "the text spells out '<|endoftext|>' 1 time;" in told
    assert "--document_separator '<|endoftext|>'" in told and "no end-of-text" not in told
    jsonl(path, [f"a{i % 10}{i}" for i in range(400)])
    CharTokenizer("a0123456789", eot=False).save(tmp_path)
    told = here("text", "--input", path, *options, "--tokenizer", tmp_path).err
    assert "the tokenizer 'char' has no end-of-text token, so nothing separates the documents" in told
    assert "spells out" not in told and "for validation" not in told


def test_a_run_and_a_folder_in_use_are_refused_before_a_vocabulary_is_learned(here, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "busy").mkdir()
    for folder, complaint in (("run", "is a run"), ("busy", "is in use by")):
        with FileLock(tmp_path / "busy" / ".lock"), pytest.raises(ValueError, match=complaint):
            here("text", "--input", tmp_path / "a.txt", "--output", tmp_path / folder, "--vocab_size", "100")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["text", "chat", "pairs", "shakespeare_char"])
def test_an_empty_name_is_not_the_folder_one_is_in(command, tmp_path, name):
    done = command(name, "--input", tmp_path / "a", *[tmp_path / "b"] * (name == "pairs"), "--output", "")
    assert done.returncode == 2 and done.stderr.endswith("--output: the name is empty: name a folder\n")


def test_bpe_learns_from_the_documents_that_prepare_reads(tmp_path, monkeypatch, capsys):
    documents = [f'the "cat" number {i}\nsat on the mät' for i in range(50)]
    jsonl(tmp_path / "a.jsonl", documents)
    rows = [{"content": text} for text in documents]
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    expected = bpe.train(documents, 300)
    for arguments in (["a.jsonl"], ["b.json.gz", "--text_field", "content"]):
        arguments[0] = str(tmp_path / arguments[0])
        output = str(tmp_path / "a.bpe")
        options = ["--vocab_size", "300", "--output", output]
        monkeypatch.setattr(sys, "argv", ["bpe.py", "train", *options, "--input", *arguments])
        bpe.main()
        assert bpe.BPE.load(output).merges == expected.merges
    (tmp_path / "c.txt").write_text("<>".join(documents))
    reading = Reading(separator="<>")
    assert list(bpe.read_texts([str(tmp_path / "c.txt")], reading=reading)) == documents


def test_ctrl_c_exits_with_130_and_leaves_no_corpus(tmp_path):
    endless = tmp_path / "endless.txt"
    with open(endless, "wb") as file:
        file.truncate(20 << 30)  # 20 GB of zeros that take no space: it cannot be through before the signal
    CharTokenizer("\0", eot=True).save(tmp_path)
    options = ["--input", endless, "--output", tmp_path / "out", "--tokenizer", tmp_path, "--workers", "2"]
    run = [sys.executable, ROOT / "data/text/prepare.py", *options]
    # Ctrl-C works also where whoever started the tests ignores it, as a shell does for its background jobs.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    try:
        while not any(path.stat().st_size for path in tmp_path.glob("out/.unfinished/train_*.bin")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "interrupted\n" and process.returncode == 130
    finally:
        process.kill()
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_help_tells_about_every_option(command):
    for name in ("text", "openwebtext", "fineweb_edu", "pydocs", "shakespeare_char", "shakespeare"):
        result = command(name, "--help")
        assert result.returncode == 0 and "--output" in result.stdout and "Prepare " in result.stdout


# --- the other corpora -------------------------------------------------------------------------------------------


def test_shakespeare_is_split_as_nanogpt_splits_it(command, tmp_path):
    data = "".join(f"First Citizen {i}:\nSpeak, spëak.\n\n" for i in range(997))
    (tmp_path / "input.txt").write_text(data)
    result = command("shakespeare_char", "--input", tmp_path / "input.txt", "--output", tmp_path)
    assert result.returncode == 0 and "not the usual tiny Shakespeare" in result.stderr
    # nanoGPT's data/shakespeare_char/prepare.py, in its own words: sorted characters, 90/10 by characters, uint16.
    stoi = {ch: i for i, ch in enumerate(sorted(set(data)))}
    for split, part in (("train", data[: int(len(data) * 0.9)]), ("val", data[int(len(data) * 0.9) :])):
        assert (tmp_path / f"{split}.bin").read_bytes() == np.array([stoi[c] for c in part], dtype=np.uint16).tobytes()
    corpus = Corpus(tmp_path)
    assert (corpus.vocab_size, corpus.tokenizer.eot_id) == (len(stoi), None)


def test_shakespeare_learns_its_tokens_from_the_training_split(command, tmp_path):
    data = "".join(f"First Citizen {i}:\nSpeak, spëak.\n\n" for i in range(997)) + "zzzzzzzz " * 300
    (tmp_path / "input.txt").write_text(data)
    options = ("--input", tmp_path / "input.txt", "--output")
    result = command("shakespeare", *options, tmp_path, "--vocab_size", "300")
    assert result.returncode == 0, result.stderr
    corpus, n = Corpus(tmp_path), int(len(data) * 0.9)
    assert corpus.vocab_size == 300 and corpus.tokenizer.bpe.ranks == bpe.train([data[:n]], 300).ranks
    for split, part in (("train", data[:n]), ("val", data[n:])):
        tokens = np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist()
        assert tokens == [*corpus.tokenizer.encode(part), corpus.tokenizer.eot_id]
        assert corpus.num_bytes(split) == len(part.encode())
    again = command("shakespeare", *options, tmp_path / "b", "--tokenizer", tmp_path)
    assert again.returncode == 0 and (tmp_path / "b/train.bin").read_bytes() == (tmp_path / "train.bin").read_bytes()


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_shakespeare_without_network_says_where_to_get_it(tmp_path, monkeypatch, name):
    module = script(name)
    monkeypatch.setattr(shakespeare, "SHAKESPEARE", tmp_path / "input.txt")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--output", str(tmp_path / "out")])
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(ValueError, match="get the file from http://.* and pass it with --input FILE"):
        module.main()


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    module = script("shakespeare_char")
    (tmp_path / "served.txt").write_text("to be or not to be\n" * 50)
    kept = tmp_path / "input.txt"
    monkeypatch.setattr(shakespeare, "SHAKESPEARE", kept)
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_URL", (tmp_path / "served.txt").as_uri())
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--output", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="sent another file than expected"):
        module.main()
    assert not kept.exists()
    digest = hashlib.sha256((tmp_path / "served.txt").read_bytes()).hexdigest()
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_SHA256", digest)
    module.main()
    (tmp_path / "served.txt").unlink()
    module.main()  # from the kept copy
    assert Corpus(tmp_path / "out").num_tokens("train") == int(50 * 19 * 0.9)


def test_a_part_of_shakespeare_is_not_taken_for_the_whole(here, tmp_path, monkeypatch):
    kept = tmp_path / "input.txt"
    kept.write_text("First Citizen:\nBefore we proceed\n" * 20)
    monkeypatch.setattr(shakespeare, "SHAKESPEARE", kept)
    for name in ("shakespeare", "shakespeare_char"):
        with pytest.raises(ValueError, match="input.txt is not the whole of tiny Shakespeare.* delete it"):
            here(name, "--output", tmp_path / "out")
        here(name, "--output", tmp_path / "out", "--input", kept, *(["--vocab_size", "270"] if "_" not in name else []))


class HalfAnAnswer(http.server.BaseHTTPRequestHandler):
    """A server that announces 100 bytes, sends 50, and hangs up."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 50)

    def log_message(self, *_):
        pass


def test_a_download_is_there_whole_or_not_at_all(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), HalfAnAnswer) as server:
        threading.Thread(target=server.handle_request).start()
        with pytest.raises(ValueError, match="broke off after 50 of 100 bytes|download failed"):
            download(f"http://127.0.0.1:{server.server_port}/", tmp_path / "a")
    (tmp_path / "served").write_bytes(b"content")
    with pytest.raises(ValueError, match="sent another file than expected"):
        download((tmp_path / "served").as_uri(), tmp_path / "a", "0" * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    digest = hashlib.sha256(b"content").hexdigest()
    assert download((tmp_path / "served").as_uri(), tmp_path / "a", digest) == b"content"
    assert (tmp_path / "a").read_bytes() == b"content" and len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def pydocs():
    return script("pydocs").pydocs()


def test_pydocs_is_always_the_same_readable_ascii(tmp_path, pydocs):
    result = process("pydocs", "--output", tmp_path, "--tokenizer", "char", PYTHONHASHSEED="1")
    assert result.returncode == 0, result.stderr
    corpus = Corpus(tmp_path)
    for split in ("train", "val"):
        text = corpus.tokenizer.decode(np.fromfile(tmp_path / f"{split}.bin", "<u2"))
        assert text == "".join(text + "<|endoftext|>" for text in pydocs if split_of(text, 0.05) == split)
    assert corpus.vocab_size <= 97
    assert set(corpus.tokenizer.characters) <= {"\n", *map(chr, range(32, 127))}
    assert corpus.num_bytes("train") > 1_000_000 and corpus.num_bytes("val") > 40_000


def test_pydocs_can_have_a_vocabulary_of_its_own(command, tmp_path, pydocs):
    result = command("pydocs", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    corpus = Corpus(tmp_path)
    text = "".join(text + "<|endoftext|>" for text in pydocs if split_of(text, 0.05) == "val")
    assert corpus.tokenizer.decode(np.fromfile(tmp_path / "val.bin", "<u2")) == text
    assert corpus.vocab_size == 1024 and corpus.num_bytes("val") / corpus.num_tokens("val") > 2.5


def test_pydocs_documents_are_public_objects_and_none_is_there_twice(pydocs):
    bodies = [document.partition("\n\n")[2] for document in pydocs]
    assert len(set(bodies)) == len(bodies)
    titles = {document.partition("\n")[0] for document in pydocs}
    assert {"textwrap.fill(text, width=70, **kwargs)", 'The "if" statement', "module json"} <= titles
    assert not [title for title in titles if "._" in title.partition("(")[0] or ".test." in title]


def test_signatures_read_like_calls():
    import ast

    from data.pydocs.docstrings import members

    source = """
class Shelf(Base, metaclass=Meta):
    "A shelf that holds as many books as you like."
    def put(self, book: "Book", *others, at: int = 0) -> None: "Put a book on the shelf."
    @classmethod
    async def of(cls): "A shelf."
    def _hidden(self): "Nobody sees me."
if windows:
    def drive(letter, /): "The drive."
else:
    def _private(): "No."
"""
    assert list(members(ast.parse(source).body, "library")) == [
        ("class library.Shelf(Base)", "A shelf that holds as many books as you like."),
        ("library.Shelf.put(book, *others, at=0)", "Put a book on the shelf."),
        ("library.Shelf.of()", "A shelf."),
        ("library.drive(letter, /)", "The drive."),
    ]


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_hub_corpora_can_be_read_from_files(command, tmp_path, name):
    path = jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(300)])
    options = ("--input", path, "--output", tmp_path / "out", "--tokenizer", "char", "--val_fraction", "0.2")
    result = command(name, *options, "--max_documents", "200")
    assert result.returncode == 0, result.stderr
    counts = Corpus(tmp_path / "out").meta["splits"]
    assert counts["train"]["documents"] + counts["val"]["documents"] == 200
    assert "--max_documents=0" in refused(command(name, *options, "--max_documents", "0"))


def test_hub_corpora_say_what_to_do_without_the_datasets_package(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError")  # stands for its absence, where it is installed
    result = process("openwebtext", "--output", tmp_path / "o", "--tokenizer", "char", PYTHONPATH=str(tmp_path))
    assert "pip install datasets, or download its .parquet files from https://" in refused(result)


def test_hub_corpora_stream_what_the_datasets_package_gives(tmp_path):
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(name, subset, *, split, streaming):\n"
        "    assert (name, subset, split, streaming) == ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', True)\n"
        "    yield from ({'text': f'document {i}'} for i in range(100))\n"
        "    raise ConnectionError('the line\\nbroke')\n"
    )
    options = ("--output", tmp_path / "out", "--tokenizer", "char", "--val_fraction", "0.3")
    result = process("fineweb_edu", *options, "--max_documents", "50", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and Corpus(tmp_path / "out").num_tokens("train") > 100
    broken = refused(process("fineweb_edu", *options, PYTHONPATH=str(tmp_path)))
    assert "failed (ConnectionError: the line broke): try again, or download" in broken


def test_preparing_does_not_import_torch():
    code = "import sys; import text.prepare, common.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
