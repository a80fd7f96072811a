"""Score a text: the log-probability of each of its tokens."""

import torch
from torch import Tensor
from tqdm import tqdm

from decoding.kernels import read_tokens
from decoding.stream import check_finite, check_prompts, context_start
from model import GPT

SCORE_BATCH = 8  # windows of a text that are read at once


@torch.inference_mode()
def log_likelihood(model: GPT, tokens: list[int], vocab_size: int | None = None, progress: bool = False) -> Tensor:
    """Return the log-probability of each token but the first, (n - 1,), given the context that `stream` would use.

    vocab_size: the tokenizer's, where the model's is rounded up. progress: show a bar.
    Raises ValueError for a model with causal=False.
    """
    if not model.config.causal:
        raise ValueError("causal=False: a model that sees its future gives no probabilities of a text")
    check_prompts([tokens], model.config.vocab_size)
    block_size, device = model.config.block_size, model.tok_emb.weight.device
    windows, start, done = [], 0, 1  # done: number of tokens that need no more log-probability
    while done < len(tokens):
        end = min(start + block_size, len(tokens) - 1)  # the last token is predicted, never read
        windows.append((start, done, end))
        done = end + 1
        start = context_start(done, block_size)
    parts = [torch.zeros(0)]
    for i in tqdm(range(0, len(windows), SCORE_BATCH), desc="score", disable=None if progress else True):
        batch = windows[i : i + SCORE_BATCH]
        T = max(end - start for start, _, end in batch)
        idx = [tokens[start:end] + [0] * (T - end + start) for start, _, end in batch]
        logits = read_tokens(model, torch.tensor(idx, device=device))
        for row, (start, done, end) in zip(logits, batch, strict=True):
            logprobs = row[done - start - 1 : end - start, :vocab_size].float().log_softmax(-1)
            targets = torch.tensor(tokens[done : end + 1], device=device)
            parts.append(logprobs.gather(1, targets[:, None])[:, 0].cpu())
    check_finite(torch.cat(parts).sum().item())
    return torch.cat(parts)
