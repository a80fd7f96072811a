"""Blanks in unseen text: a masked model, which sees both sides of a blank, against a causal one, which sees the left.

    python bench/cloze.py [--masked=out/bert_pydocs] [--causal=out/pydocs] [--count=4000]

Each blank is one token of the corpus's validation text, in a window of as many tokens as the models see; both models
get the same blanks, one at a time. Whole words are tokens that begin with a space and are followed by no letter.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decoding.kernels import read_tokens  # noqa: E402
from model import IGNORE  # noqa: E402
from runs.run import Run, same_tokens  # noqa: E402
from tasks.pretrain import open_corpus  # noqa: E402
from text.corpus import Corpus  # noqa: E402
from text.tokenizer import MASK, Tokenizer  # noqa: E402

BATCH = 64  # windows that are read at once
SHOWN = (1, 5)  # a blank is found if the truth is the likeliest token, or among the five likeliest


def choose_blanks(corpus: Corpus, T: int, count: int) -> tuple[Tensor, Tensor]:
    """Windows (N, T) of the validation text, and the place of the blank in each (N,): never its first token."""
    whole = torch.cat([idx for idx, targets in corpus.windows("val", T, 1) if not (targets == IGNORE).any()])
    rng = np.random.default_rng(0)
    chosen, places = rng.integers(len(whole), size=count), rng.integers(1, T, size=count)
    return whole[torch.from_numpy(chosen)], torch.from_numpy(places)


def whole_words(windows: Tensor, places: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which blanks (N,) are whole words."""
    texts = [tokenizer.bytes_of(token).decode(errors="replace") for token in range(tokenizer.vocab_size)]
    begins = torch.tensor([bool(re.fullmatch(" [A-Za-z]+", text)) for text in texts])
    goes_on = torch.tensor([text[:1].isalpha() for text in texts])
    rows, following = torch.arange(len(windows)), (places + 1).clamp(max=windows.size(1) - 1)
    inside = places + 1 < windows.size(1)
    return begins[windows[rows, places]] & inside & ~goes_on[windows[rows, following]]


@torch.inference_mode()
def ranks(run: Run, windows: Tensor, places: Tensor) -> Tensor:
    """The rank (N,) of the true token among the model's guesses at each blank; 0 for the likeliest."""
    model, V, found = run.load_model(), run.tokenizer.vocab_size, []
    for idx, at in zip(windows.split(BATCH), places.split(BATCH), strict=True):
        rows = torch.arange(len(idx))
        truth, idx = idx[rows, at], idx.clone()
        if not model.config.causal:
            idx[rows, at] = run.tokenizer.special_tokens[MASK]
        logits = read_tokens(model, idx)[rows, at - int(model.config.causal), :V]
        found.append((logits > logits.gather(1, truth[:, None])).sum(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", default="out/bert_pydocs")
    parser.add_argument("--causal", default="out/pydocs")
    parser.add_argument("--dataset", default="pydocs")
    parser.add_argument("--count", type=int, default=4000)
    args = parser.parse_args()
    masked, causal, corpus = Run.open(args.masked), Run.open(args.causal), open_corpus(args.dataset)
    if masked.model_config.causal or not causal.model_config.causal:
        raise ValueError("--masked must be a run with causal=False, and --causal one with causal=True")
    if not same_tokens(causal.tokenizer, masked.tokenizer) or not same_tokens(corpus.tokenizer, causal.tokenizer):
        raise ValueError("both runs must have the tokens of the corpus: their blanks would not be the same")
    T = min(masked.model_config.block_size, causal.model_config.block_size)
    windows, places = choose_blanks(corpus, T, args.count)
    words = whole_words(windows, places, corpus.tokenizer)
    found = {name: ranks(run, windows, places) for name, run in (("causal", causal), ("masked", masked))}
    print("| blanks | count | model | " + " | ".join(f"top-{n}" for n in SHOWN) + " |\n|---|---|---|---|---|")
    for kind, chosen in (("any token", torch.ones_like(words)), ("whole words", words)):
        if chosen.sum() < 2:
            continue  # no whole words: a tokenizer of characters
        for name, rank in found.items():
            shares = [f"{(rank[chosen] < n).double().mean():.1%}" for n in SHOWN]
            print(f"| {kind} | {int(chosen.sum()):,} | {name} | {' | '.join(shares)} |")
        gain = (found["masked"][chosen] < 1).double() - (found["causal"][chosen] < 1).double()
        error = gain.std() / len(gain) ** 0.5
        print(f"| {kind} | {len(gain):,} | masked - causal | {100 * gain.mean():+.1f} ± {100 * error:.1f} points | |")


if __name__ == "__main__":
    main()
