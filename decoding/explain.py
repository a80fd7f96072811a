"""What `sample.py --explain` prints, for teaching: how each token was chosen, and the tree of a beam search.

`Step` of decoding/stream.py and `Candidate` of decoding/beam.py record what the decoding code saw and did; here they
become lines of text.
"""

import math

from bpe import shown
from decoding.beam import Candidate
from decoding.stream import Step, weigh
from text.tokenizer import Tokenizer

LIKELIEST = 5  # tokens that are shown at each step
MOST_BEAMS = 16  # more of them make no tree that could be read
ROOT = -1


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """A readable form of a token on one line: 'the', or <e4 b8> for part of a character."""
    return shown(tokenizer.bytes_of(token)) or "''"


def decimals(p: float) -> str:
    """A probability with three decimals."""
    return f"{p:.3f}" if p == 0 or p >= 0.0005 else "<0.001"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing tokens


def changes(drawing: dict) -> dict:
    """Those of the drawing options by which a token's chance differs from the model's probability."""
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    found = {name: drawing[name] for name in plain if drawing[name] != plain[name]}
    if drawing["temperature"] == 0:  # greedy: only the penalty matters
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
    return found


def steps_heading(drawing: dict) -> str:
    """The line above the steps. drawing: the options of `stream` that say how tokens are drawn."""
    heading = f"each step: the {LIKELIEST} likeliest tokens with their probabilities, and → the chosen one"
    changed = ", ".join(f"{name}={value}" for name, value in changes(drawing).items())
    return heading + (f"; in brackets the probabilities with {changed}" if changed else "")


def step_line(tokenizer: Tokenizer, step: Step, row: int, number: int, token: int, drawing: dict) -> str:
    """One step of a row: its likeliest tokens, and the chosen one, which may be none of these.

    The line `3: → ' is' 0.412 (0.530)   ' was' 0.203 (0.219)   …` says: the third token is " is", to which the model
    gave the probability 0.412, and which was drawn with the probability 0.530.
    """
    logits, probs, drawn = step.logits[row].float(), step.logits[row].float().softmax(-1), None
    if changes(drawing):
        options = [drawing[name] for name in ("top_k", "top_p", "min_p")] if drawing["temperature"] else []
        weights, order = weigh(step.scores[row : row + 1].cpu(), drawing["temperature"] or 1, *options)
        weights = (weights / weights.sum(-1, keepdim=True))[0]
        drawn = weights if order is None else weights.new_zeros(logits.numel()).scatter(0, order[0], weights)

    def cell(i: int) -> str:
        bracket = "" if drawn is None else f" ({decimals(drawn[i].item())})"
        return f"{'→ ' if i == token else '  '}{spelling(tokenizer, i)} {decimals(probs[i].item())}{bracket}"

    best = probs.topk(min(LIKELIEST, len(probs))).indices.tolist()
    cells = [cell(i).ljust(18 if drawn is None else 26) for i in best]
    if token not in best:
        cells.append(f"… {cell(token)}, number {(logits > logits[token]).sum().item() + 1:,}")
    return f"{number:>4}: {' '.join(cells)}".rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# Beam search


def grow(record: list[Candidate]) -> dict[int, list[int]]:
    """The tree of a search: from each candidate, by its index in the record, to those that continue it.

    The parent of a candidate is a number among those that the step before kept, in their order.
    """
    children: dict[int, list[int]] = {ROOT: [], **{i: [] for i in range(len(record))}}
    kept = {0: [ROOT]}  # of each step
    for i, candidate in enumerate(record):
        children[kept[candidate.step - 1][candidate.parent]].append(i)
        if candidate.fate == "kept":
            kept.setdefault(candidate.step, []).append(i)
    return children


def tree(tokenizer: Tokenizer, record: list[Candidate], num_beams: int) -> list[str]:
    """The lines of a search's tree.

    Each text that was kept or finished has a line, below the text that it continues; where two or more continue the
    same text, the tree branches. Dropped candidates share one line.
    """
    children = grow(record)
    before = {child: record[i].logprob if i != ROOT else 0.0 for i, nodes in children.items() for child in nodes}
    last = max(candidate.step for candidate in record)
    lines = [f"{num_beams} beams; each line: a token, its probability, and the log-probability of the text up to it; "
             "✗ was dropped"]  # fmt: skip

    def text(i: int) -> str:
        here = record[i]
        return f"{spelling(tokenizer, here.token)} {decimals(math.exp(here.logprob - before[i]))}  {here.logprob:.2f}"

    def end(i: int) -> str:
        here = record[i]
        if here.fate == "finished":
            return f"  ■ finished, score {here.score:.4f}"
        if here.step == last:
            return "  … still open, but it can no longer win"
        going_on = any(record[child].fate != "dropped" for child in children[i])
        return "" if going_on else f"  ✗ none of its continuations is among the best {num_beams}"

    waiting = [(ROOT, "", "")]  # nodes to draw: what stands before them, and before the lines below them
    while waiting:
        i, lead, below = waiting.pop()
        if i != ROOT:
            lines.append(lead + text(i) + end(i))
        alive = [child for child in children[i] if record[child].fate != "dropped"]
        dropped = [text(child) for child in children[i] if record[child].fate == "dropped"]
        if dropped:
            lines.append(f"{below}{'│ ' if alive else '  '} ✗ {', '.join(dropped)}")
        if len(alive) == 1:
            waiting.append((alive[0], below, below))
        else:
            branches = [(child, f"{below}├─ ", f"{below}│  ") for child in alive[:-1]]
            branches += [(child, f"{below}└─ ", f"{below}   ") for child in alive[-1:]]
            waiting += reversed(branches)
    return lines
