import importlib
import os

import pytest
import torch

from model import GPT, GPTConfig

# A real plug-in of tiktoken, the only way to an encoding of its without the network. The pattern is GPT-2's; two ids
# before the end-of-text token stand for nothing, as in some of the published encodings.
TINY_ENCODING = r'''
def tiny():
    words = [b"th", b"he", b"in", b" t", b" th", b" the", b"  ", b"\n\n"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    return {
        "name": "tiny",
        "pat_str": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        "mergeable_ranks": ranks,
        "special_tokens": {"<|endoftext|>": len(ranks) + 2},
    }


ENCODING_CONSTRUCTORS = {"tiny": tiny}
'''


@pytest.fixture(scope="session")
def tiny_encoding(tmp_path_factory):
    """The name of a small tiktoken encoding, found by this process and by those it starts."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "tiktoken_ext").mkdir()
    (folder / "tiktoken_ext" / "tiny.py").write_text(TINY_ENCODING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # for this process
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)  # for others
        importlib.invalidate_caches()
        import tiktoken.registry

        patch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)  # it looks for plug-ins once only
        tiktoken.registry._available_plugin_modules.cache_clear()
        yield "tiny"


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Runs of this process draw no loss.svg: hundreds of them would take a minute. test_plot.py tests that they do."""
    if request.module.__name__.rpartition(".")[2] != "test_plot":
        monkeypatch.setattr("runs.start.can_draw", lambda: False)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A small prepared corpus: sentences over a few words, characters, with end-of-text tokens."""
    import numpy as np

    from text.corpus import write_corpus
    from text.tokenizer import CharTokenizer

    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    words = "the quick brown fox jumps over a lazy dog and sleeps".split()
    documents = [("val" if i % 10 == 0 else "train", " ".join(rng.choice(words, 12)) + ".") for i in range(300)]
    write_corpus(folder, documents, CharTokenizer("".join(words) + " .", eot=True), workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt():
    """A function that builds a small float64 model; all weights are random, norm weights and biases too."""

    def build(seed=0, **options):
        options = {"block_size": 16, "vocab_size": 23, "n_layer": 2, "n_head": 4, "n_embd": 16, "mlp_dim": 24} | options
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = GPT(GPTConfig(**options)).double().eval()
            for weight in model.parameters():
                weight += 0.3 * torch.randn_like(weight)
        return model

    return build


@pytest.fixture(scope="session")
def vocabularies():
    """A vocabulary per named pattern, learned from prose, code and all fixtures."""
    from bpe import train
    from tests.bpe_helpers import FIXTURES, PROSE
    from text.chunks import PATTERNS

    texts = [PROSE, *[text for text in FIXTURES.values() for _ in range(3)]]
    return {pattern: train(texts, 1000, pattern) for pattern in PATTERNS}
