"""Answers to the exercises of lessons/: for each lesson a right one, and a wrong one that a student may well give."""

ENCODE = """
def encode(word, merges):
    tokens = list(word)
    for new, pair in enumerate(merges, 256):
        i = 0
        while i < len(tokens) - 1:
            if (tokens[i], tokens[i + 1]) == pair:
                tokens[i : i + 2] = [new]
            i += 1
    return tokens
"""
LONGEST_FIRST = """
def encode(word, merges):
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    ids = []
    while word:
        longest = max((token for token in tokens if word.startswith(token)), key=len)
        ids.append(tokens.index(longest))
        word = word[len(longest) :]
    return ids
"""
TRAP = """
def trap():
    return [[0.0, 0.4, 0.35, 0.25], [0.3, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1], [0.01, 0.01, 0.01, 0.97]]
"""
GREEDY_TRAP = """
def trap():
    return [[0.0, 0.6, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
"""
SMOOTH = """
def loss(z, targets, share):
    logp = z.log_softmax(-1)[targets != -100]
    right = logp.gather(1, targets[targets != -100][:, None])[:, 0]
    return -((1 - share) * right + share * logp.mean(1)).mean()
"""
SHARED_BY_THE_OTHERS = """
def loss(z, targets, share):  # the target gets 1 - ε, and only the others share ε
    logp = z.log_softmax(-1)[targets != -100]
    right = logp.gather(1, targets[targets != -100][:, None])[:, 0]
    return -((1 - share) * right + share * (logp.sum(1) - right) / (logp.size(1) - 1)).mean()
"""
MASK = """
def mask(tokens, end, assistant):
    found, speaks = [], False
    for token in tokens:
        found.append(int(speaks))
        if token in (assistant, end):
            speaks = token == assistant
    return found
"""
MASK_WITHOUT_END = MASK.replace("int(speaks)", "int(speaks and token != end)")

VISIBLE = """
def visible(padding, window):
    T = len(padding)
    return [[i - window < j <= i and padding[j] for j in range(T)] for i in range(T)]
"""

ATTEND = """
import math, torch

def attend(q, k, v, visible):
    scores = (q @ k.T / math.sqrt(q.size(-1))).masked_fill(~visible, -math.inf)
    return torch.softmax(scores, dim=-1) @ v
"""
RMS_NORM_GRADIENT = """
def rms_norm_gradient(x, g, eps):
    root = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = x / root
    return (g - y * (g * y).mean(-1, keepdim=True)) / root
"""
ROPE = """
import torch

def rope(x, t, theta):
    D = len(x)
    out = torch.empty(D)
    for i in range(D // 2):
        angle = torch.tensor(t * theta ** (-2 * i / D))
        a, b = x[i], x[i + D // 2]
        out[i] = a * angle.cos() - b * angle.sin()
        out[i + D // 2] = b * angle.cos() + a * angle.sin()
    return out
"""
MERGE = """
import math

def merge(a, b):
    m = max(a[0], b[0])
    x, y = math.exp(a[0] - m), math.exp(b[0] - m)
    return m, x * a[1] + y * b[1], x * a[2] + y * b[2]
"""
SLOPES = """
def slopes(H):
    power = 2 ** (H.bit_length() - 1)
    first = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return first + between[: H - power]
"""

CROSS_MASK = """
def cross_mask(documents, source_documents, padding):
    return (documents[:, None] == source_documents[None]) & padding[None]
"""

HIDE = """
def hide(tokens, chosen, fates, mask_id):
    idx, targets = list(tokens), [-100] * len(tokens)
    for place, fate in zip(chosen, fates):
        targets[place] = tokens[place]
        if fate != "keep":
            idx[place] = mask_id if fate == "mask" else fate
    return idx, targets
"""

ANSWERS = {  # the lesson's name → (a right answer, a wrong one)
    "01_bpe": (ENCODE, LONGEST_FIRST),
    "06_beams": (TRAP, GREEDY_TRAP),
    "07_label_smoothing": (SMOOTH, SHARED_BY_THE_OTHERS),
    "02_masks": (VISIBLE, VISIBLE.replace("i - window <", "i - window <=")),
    "03_attention": (ATTEND, ATTEND.replace("math.sqrt(q.size(-1))", "1")),
    "04_translation": (CROSS_MASK, CROSS_MASK.replace(" & padding[None]", "")),
    "05_norms": (RMS_NORM_GRADIENT, RMS_NORM_GRADIENT.replace("(g - y * (g * y).mean(-1, keepdim=True))", "g")),
    "08_sft": (MASK, MASK_WITHOUT_END),
    "09_bert": (HIDE, HIDE.replace("[-100] * len(tokens)", "list(tokens)")),
    "10_positions": (ROPE, ROPE.replace("x[i + D // 2]", "x[D - 1 - i]")),
    "11_flash": (MERGE, MERGE.replace("x * a[2] + y * b[2]", "a[2] + b[2]")),
    "12_baichuan2": (SLOPES, SLOPES.replace("2 ** (H.bit_length() - 1)", "H")),
}
