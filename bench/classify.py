"""The class of a text: classifiers on top of pretrained models against a bag of words, on the same split.

    python data/pydocs_kinds/prepare.py
    python train.py config/classify_pydocs.py
    python bench/classify.py out/classify_pydocs [more runs] [--dataset=pydocs_kinds] [--corpus=pydocs]

The bag of words is multinomial logistic regression on log(1 + count) of each word and each pair of neighbours, with the
L2 penalty that is best on a tenth of the training texts, and then trained on all of them. "Unseen" are the validation
texts that do not occur in the training split of the corpus that the models were pretrained on. Balanced: the mean of
the accuracies of the classes.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from classifier import class_names  # noqa: E402
from runs.run import Run  # noqa: E402
from tasks.classify import collate, make_examples, open_texts  # noqa: E402
from tasks.pretrain import open_corpus  # noqa: E402
from text.labelled import Labelled, Texts  # noqa: E402

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of the squared weights, per text
BATCH = 64


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, and its pairs of neighbours."""
    words = re.findall(r"[a-z]+|[^a-z\s]", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def bags(texts: list[Labelled], vocabulary: dict[str, int]) -> Tensor:
    """log(1 + count) of each known word: (N, V)."""
    found = torch.zeros(len(texts), len(vocabulary))
    for row, (text, _) in zip(found, texts, strict=True):
        for word, count in Counter(words_of(text)).items():
            if word in vocabulary:
                row[vocabulary[word]] = count
    return found.log1p()


def logistic_regression(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """The weights (V + 1, classes) that minimise mean cross-entropy + penalty·‖W‖², the last row being the bias."""
    x = F.pad(x, (0, 1), value=1.0)
    W = torch.zeros(x.size(1), classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W, y) + penalty * W[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return W.detach()


def bag_of_words(texts: Texts) -> tuple[Tensor, str]:
    """The classes that the bag of words tells of the validation texts, and what it is."""
    train, val = texts.splits["train"], texts.splits["val"]
    counts = Counter(word for text in train for word in set(words_of(text.text)))
    vocabulary = {word: i for i, word in enumerate(sorted(word for word, n in counts.items() if n >= 3))}
    y = torch.tensor([texts.labels.index(text.label) for text in train])
    x, held = bags(train, vocabulary), torch.arange(len(train)) % 10 == 0

    def told(W: Tensor, x: Tensor) -> Tensor:
        return (F.pad(x, (0, 1), value=1.0) @ W).argmax(-1)

    scores = {}
    for penalty in PENALTIES:
        W = logistic_regression(x[~held], y[~held], len(texts.labels), penalty)
        scores[penalty] = (told(W, x[held]) == y[held]).double().mean().item()
    best = max(scores, key=scores.__getitem__)
    W = logistic_regression(x, y, len(texts.labels), best)
    return told(W, bags(val, vocabulary)), f"bag of words: {len(vocabulary):,} words and pairs, L2 {best:g}"


@torch.inference_mode()
def by_run(run: Run, texts: Texts) -> tuple[Tensor, str]:
    """The classes that a run's last checkpoint tells of the validation texts, and what it is."""
    if class_names(run.model_config) != texts.labels:
        raise ValueError(f"{run.folder} does not tell apart {', '.join(texts.labels)}")
    model = run.load_model("latest")
    examples, _ = make_examples(texts, "val", run.tokenizer, run.model_config.block_size)
    batches = [collate(examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)]
    told = [model(batch["idx"], padding=batch["padding"])[0].argmax(-1) for batch in batches]
    return torch.cat(told), f"{run.folder}, from {run.origin.source}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--dataset", default="pydocs_kinds")
    parser.add_argument("--corpus", default="pydocs")
    args = parser.parse_args()
    _, texts = open_texts(args.dataset)
    corpus = open_corpus(args.corpus)
    seen = "".join(corpus.tokenizer.decode(idx[0]) for idx, _ in corpus.windows("train", 2**14, 1))
    unseen = torch.tensor([text.text not in seen for text in texts.splits["val"]])
    y = torch.tensor([texts.labels.index(text.label) for text in texts.splits["val"]])
    rows = [bag_of_words(texts), *(by_run(Run.open(folder), texts) for folder in args.runs)]
    commonest = torch.full_like(y, int(y.bincount().argmax()))
    header = f"all {len(y):,} | balanced | the {int(unseen.sum()):,} unseen | balanced"
    print(f"| classifier | {header} |\n|---|---|---|---|---|")
    for told, name in [(commonest, "the commonest class"), *rows]:
        cells = []
        for chosen in (torch.ones_like(unseen), unseen):
            right = (told == y).double()
            balanced = torch.stack([right[chosen & (y == label)].mean() for label in range(len(texts.labels))]).mean()
            cells += [f"{right[chosen].mean():.1%}", f"{balanced:.1%}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
