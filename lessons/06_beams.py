"""Lesson 6: greedy decoding against beam search.

A model gives probabilities of the next token; a text needs a whole sequence. Greedy decoding takes the likeliest token
at every step, and may walk into a place from which nothing likely follows. Beam search keeps K texts alive.
"""

import math
from itertools import product
from types import SimpleNamespace

import torch
from lesson import BLUE, GREEN, GREY, claim, expect, figure, run, save, table

from decoding.beam import beam_search
from decoding.explain import grow, tree
from decoding.stream import generate
from model import GPT, GPTConfig

WORDS = ["■", "start", "the", "a", "cat", "dog", "sleeps", "barks"]  # ■ ends a text
NEXT = {  # the chain: the probability of each next word depends on the last word alone
    "start": {"the": 0.5, "a": 0.4, "dog": 0.04, "cat": 0.03, "barks": 0.02, "sleeps": 0.01},
    "the": {"cat": 0.4, "dog": 0.35, "sleeps": 0.15, "barks": 0.1},
    "a": {"dog": 0.8, "cat": 0.15, "barks": 0.05},
    "cat": {"sleeps": 0.5, "■": 0.3, "barks": 0.2},
    "dog": {"barks": 0.85, "sleeps": 0.1, "■": 0.05},
    "sleeps": {"■": 0.9, "the": 0.1},
    "barks": {"■": 0.9, "a": 0.1},
    "■": {"■": 1.0},
}
TOKENIZER = SimpleNamespace(bytes_of=lambda token: WORDS[token].encode())
CHAIN = [[NEXT[last].get(word, 0.0) for word in WORDS] for last in WORDS]


def chain(rows: list[list[float]]) -> GPT:
    """A GPT whose next token has the probabilities rows[last token].

    Embeddings are one-hot, attention and MLP add nothing, RMSNorm multiplies by √V, and the head holds log p/√V.
    """
    V = len(rows)
    model = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=1, n_embd=V, position="none", qk_norm=False,
                          tie_embeddings=False, norm_eps=1e-12)).eval()  # fmt: skip
    with torch.no_grad():
        for weight in (model.blocks[0].attention.out.weight, model.blocks[0].mlp.down.weight):
            weight.zero_()
        model.tok_emb.weight.copy_(torch.eye(V))
        model.head.weight.copy_(torch.tensor(rows).clamp(min=1e-30).log().T / math.sqrt(V))
    return model


def by_hand(rows: list[list[float]], start: int, K: int, T: int) -> tuple[list[tuple[float, list[int]]], int]:
    """Beam search written down: the K best texts (log p, tokens) of T tokens, and how many candidates it compared.

    Of one beam's continuations no more than K can be among the K best, so K of each beam are enough: K² per step.
    """
    beams, compared = [(0.0, [start])], 0
    for _ in range(T):
        candidates = []
        for logp, tokens in beams:
            best = sorted(enumerate(rows[tokens[-1]]), key=lambda pair: -pair[1])[:K]
            candidates += [(logp + math.log(p), [*tokens, token]) for token, p in best]
        compared += len(candidates)
        beams = sorted(candidates, reverse=True)[:K]
    return [(logp, tokens[1:]) for logp, tokens in beams], compared


def main(small: bool):
    model, start, options = chain(CHAIN), [WORDS.index("start")], {"eos_id": 0}
    (greedy,) = generate(model, [start], 5, temperature=0, **options)
    record: list[list] = [[]]
    ((best, *_),) = beam_search(model, [start], 5, num_beams=3, length_penalty=0, **options, record=record)
    logp = sum(math.log(CHAIN[last][token]) for last, token in zip([*start, *greedy], greedy, strict=False))
    print("\n".join(tree(TOKENIZER, record[0], 3)) + "\n")
    texts = {"greedy": (greedy, logp), "beam of 3": (best.tokens, best.logprob)}
    rows = [[name, " ".join(WORDS[t] for t in tokens), math.exp(total)] for name, (tokens, total) in texts.items()]
    table(["search", "text", "p"], rows)
    claim("greedy takes the likelier first word and ends with the less likely text", logp < best.logprob - 0.5)

    V, T = 5, 3 if small else 4
    random = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=16, tie_embeddings=False)).double().eval()
    with torch.no_grad():
        random.head.weight.mul_(40)  # a model that has opinions
        texts = torch.tensor([[1, *text] for text in product(range(V), repeat=T)])
        scores = random(texts)[0].log_softmax(-1)[:, :-1].gather(2, texts[:, 1:, None])[..., 0].sum(1)
    (full,) = beam_search(random, [[1]], T, num_beams=V**T, length_penalty=0, num_return=V**T)
    order = scores.argsort(descending=True)
    claim(f"a full beam, of {V}^{T} = {V**T}, finds every text in the order of an exhaustive search",
          [beam.tokens for beam in full] == texts[order, 1:].tolist())  # fmt: skip

    V, T, chains = 16, 6, 10 if small else 100
    tables = torch.softmax(3 * torch.randn(chains, V, V), -1)
    best_of_all, rows, same = viterbi(tables.log(), T), [], True
    for K in (1, 2, 3, 4, 8):
        hand = [by_hand(one.tolist(), 0, K, T) for one in tables]
        logps, counts = torch.tensor([beams[0][0] for beams, _ in hand]), {compared for _, compared in hand}
        ours = [beam_search(chain(one.tolist()), [[0]], T, num_beams=K, length_penalty=0)[0][0] for one in tables]
        same &= torch.allclose(logps, torch.tensor([beam.logprob for beam in ours]), atol=1e-4)
        same &= counts == {K + K * K * (T - 1)}
        rows.append([str(K), *counts, logps.mean().item(), 100 * (logps > best_of_all - 1e-4).float().mean().item()])
    rows.append(["all", V**T, best_of_all.mean().item(), 100.0])
    print(f"\n{chains} chains of {V} tokens, texts of {T}:")
    table(["K", "candidates compared", "mean log p found", "best text found, % of chains"], rows)
    claim("decoding/beam.py finds what a search by hand finds, which compares K + K²·(T - 1) candidates", same)
    claim("a beam of 8 finds the best text of more chains than greedy", rows[4][3] > rows[0][3])
    return record[0], rows, greedy


def viterbi(logp: torch.Tensor, T: int) -> torch.Tensor:
    """The largest log p of T tokens after token 0, for each chain (n, V, V): dynamic programming, no search."""
    best = logp[:, 0]
    for _ in range(T - 1):
        best = (best[:, :, None] + logp).amax(1)
    return best.amax(1)


def draw(record, rows, greedy) -> None:
    fig, (ax, right) = figure(1, 2, height=4.4, width_ratios=(3.6, 1))
    children, places, y = grow(record), {-1: (0, 0.0)}, 0.0

    def place(i: int) -> float:
        """Give each text its height: leaves one below the other, the others in the middle of what continues them."""
        nonlocal y
        below = [place(child) for child in children[i]]
        if not below:
            y -= 1
        places[i] = (record[i].step if i >= 0 else 0, (below[0] + below[-1]) / 2 if below else y)
        return places[i][1]

    place(-1)
    parent = {child: i for i, nodes in children.items() for child in nodes}

    def path(i: int) -> list[int]:
        return [*path(parent[i]), i] if i >= 0 else []

    best = path(max((i for i, c in enumerate(record) if c.fate == "finished"), key=lambda i: record[i].score))
    ax.text(*places[-1], "start", ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": GREY})
    for i, here in enumerate(record):
        (x0, y0), (x1, y1) = places[parent[i]], places[i]
        colour = {"kept": BLUE, "finished": GREEN, "dropped": GREY}[here.fate]
        p = math.exp(here.logprob - (record[parent[i]].logprob if parent[i] >= 0 else 0))
        ax.plot([x0, x1], [y0, y1], color=colour, zorder=0, linewidth=3 if i in best else 1,
                linestyle=":" if here.fate == "dropped" else "-")  # fmt: skip
        label = f"{WORDS[here.token]}  {p:.2f}" + (f"   log p {here.logprob:.2f}" if here.fate == "finished" else "")
        label += "  = greedy" if [record[j].token for j in path(i)] == greedy else ""
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": colour}
        x, side = (x1 - 0.15, "left") if here.fate == "finished" else (x1, "center")
        ax.text(x, y1, label, ha=side, va="center", color=colour, fontsize=7.5, bbox=box)
    ax.set(title="Beam of 3: kept (blue), dropped (grey), finished (green)", xlabel="step", xticks=range(1, 5),
           yticks=[], xlim=(-0.3, 5.7))  # fmt: skip
    ax.spines["left"].set_visible(False)
    right.plot(range(5), [row[3] for row in rows[:5]], "o-", color=BLUE)
    for i, row in enumerate(rows[:5]):
        right.annotate(f"{row[1]}", (i, row[3]), (0, -12), textcoords="offset points", ha="center", fontsize=7.5)
    right.set(title="Best text found", xlabel="beams K\n(small: candidates)", ylabel="% of chains",
              xticks=range(5), xticklabels=[row[0] for row in rows[:5]], ylim=(0, 105), xlim=(-0.4, 4.4))  # fmt: skip
    save(fig, "06_beams.svg")


def check(trap) -> None:
    """The exercise: trap() → a chain of 4 tokens on which a beam of 2 misses what a beam of 3 finds."""
    rows = torch.as_tensor(trap(), dtype=torch.float64)
    expect("the shape of trap()", tuple(rows.shape), (4, 4))
    expect("whether trap() has a negative number", bool((rows < 0).any()), False)
    expect("the sums of the rows of trap()", rows.sum(1), torch.ones(4).double(), 1e-6)
    found = [beam_search(chain(rows.tolist()), [[0]], 3, num_beams=K, length_penalty=0)[0][0].logprob for K in (2, 3)]
    if found[1] - found[0] < 1e-3:
        p, q = (math.exp(logp) for logp in found)
        raise ValueError(f"on your chain a beam of 2 finds a text of p = {p:.4f}, and one of 3 a text of {q:.4f}; "
                         "right is a chain on which the beam of 3 finds a likelier one")  # fmt: skip


if __name__ == "__main__":
    run(main, draw, check, asks="trap")
