"""Score a text: the log-probability of each of its tokens, and what follows for the whole."""

import json
import math

import torch
from torch import Tensor
from tqdm import tqdm

from decoding.fast import speed_up
from decoding.kernels import read_tokens
from decoding.prompt import TextModel
from decoding.stream import check_finite, check_prompts, context_start, prompt_tokens
from model import GPT
from text.tokenizer import start_id

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


def write_score(model: TextModel, text: str, name: str, as_json: bool, quantize: str) -> None:
    """Print the log-likelihood of a text, its perplexity per token, and its bits per byte, which compare tokenizers.

    name: of the text's file. quantize: if it is not "none", print the same of weights that are quantized so.
    Raises ValueError for a text that is too short.
    """
    tokens = prompt_tokens(model.tokenizer, text)
    given = 0 if start_id(model.tokenizer) is not None else len(model.tokenizer.bytes_of(tokens[0]))  # not predicted
    counted = len(text.encode()) - given
    if len(tokens) < 2 or counted < 1:
        raise ValueError(f"{name} holds too little text to score")

    def measure() -> dict:
        logprob = log_likelihood(model.gpt, tokens, model.tokenizer.vocab_size, progress=True).double().sum().item()
        n = len(tokens) - 1
        return {"tokens": n, "bytes": counted, "log_likelihood": logprob, "perplexity": perplexity(-logprob / n),
                "bits_per_byte": -logprob / math.log(2) / counted}  # fmt: skip

    found = measure()
    if quantize != "none":
        speed_up(model.gpt, quantize=quantize)
        quantized = measure()
        found |= {f"{quantize}_{key}": quantized[key] for key in ("perplexity", "bits_per_byte")}
    if as_json:
        print(json.dumps(found))
        return
    first = f" (the first token, {given} bytes, is only read)" if given else ""
    print(f"{name}: {found['tokens']:,} tokens, {counted:,} bytes{first}")
    per_token = -found["log_likelihood"] / found["tokens"]
    print(f"log-likelihood {found['log_likelihood']:,.2f} nats, {per_token:.4f} nats lost per token")
    print(f"perplexity {found['perplexity']:,.4f} per token")
    print(f"bits per byte {found['bits_per_byte']:.4f}")
    if quantize != "none":
        change = quantized["bits_per_byte"] - found["bits_per_byte"]
        print(f"{quantize}: bits per byte {quantized['bits_per_byte']:.4f} ({change:+.4f})")


def perplexity(nats: float) -> float:
    """exp of the mean loss per token; infinite where it is too large to be written."""
    return math.exp(nats) if nats < 709 else math.inf
