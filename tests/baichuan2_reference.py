"""Baichuan 2 from the equations of its report (arXiv 2309.10305, section 2) in numpy, token by token; the oracle.

It shares no code with model.py: one row, no batches, loops where the product has tensors.
"""

import numpy as np


def rms_norm(x, weight, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def turned(x, position, theta=10000.0):
    """RoPE: channels i and i + D/2 form a pair, which turns by position · theta^(-2i/D)."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[i], x[i + half]
        y[i], y[i + half] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return y


def slopes(n_head):
    """ALiBi's slopes; for 3 heads those of 2, and every second one of 4."""
    power = 1
    while power * 2 <= n_head:
        power *= 2
    first = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    second = [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return (first + second)[:n_head]


def logits(weights, tokens, n_layer, n_head, alibi):
    """The logits of every token. weights: the tensors of Baichuan 2's files, as float64 arrays."""
    x = weights["model.embed_tokens.weight"][tokens]
    T, C = x.shape
    D = C // n_head
    for layer in range(n_layer):
        name = f"model.layers.{layer}."
        h = rms_norm(x, weights[name + "input_layernorm.weight"])
        q, k, v = (
            part.reshape(T, n_head, D) for part in np.split(h @ weights[name + "self_attn.W_pack.weight"].T, 3, 1)
        )
        y = np.zeros((T, n_head, D))
        for head in range(n_head):
            for t in range(T):
                scores = np.empty(t + 1)
                for s in range(t + 1):
                    if alibi:
                        scores[s] = q[t, head] @ k[s, head] / np.sqrt(D) - slopes(n_head)[head] * (t - s)
                    else:
                        scores[s] = turned(q[t, head], t) @ turned(k[s, head], s) / np.sqrt(D)
                y[t, head] = softmax(scores) @ v[: t + 1, head]
        x = x + y.reshape(T, C) @ weights[name + "self_attn.o_proj.weight"].T
        h = rms_norm(x, weights[name + "post_attention_layernorm.weight"])
        gate, up = (h @ weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[name + "mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    return rms_norm(x, weights["model.norm.weight"]) @ (head / np.linalg.norm(head, axis=1, keepdims=True)).T
