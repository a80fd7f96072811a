"""A published model, imported, against transformers' own reading of the same GGUF file: ids, logits, texts, bits.

    python convert.py import MODEL.gguf --out_dir=out/smol
    python bench/real_model.py out/smol MODEL.gguf [--new=24]

Both compute in float32 on a CPU. transformers' reading of a GGUF file forgets that the tokenizer of SmolLM2 takes each
digit by itself: for such a file, its tokenizer is corrected, and "uncorrected" says what its own reading gives.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decoding.beam import beam_search  # noqa: E402
from decoding.fast import speed_up  # noqa: E402
from decoding.score import log_likelihood  # noqa: E402
from decoding.stream import generate, prompt_tokens  # noqa: E402
from formats.gguf import GGUF  # noqa: E402
from runs.run import Run  # noqa: E402

BEAMS = 4
PIECES = {
    "prose": (ROOT / "README.md").read_text()[:3000],
    "code": (ROOT / "positions.py").read_text()[:3000],
    "numbers": "1 12 123 1234567 3.14159 -2e-5 0x1F 1,000,000 2024-11-29 ½ ² Ⅻ ٣٤٥ a1b22c333 " * 6,
    "Chinese": "从前有座山,山里有座庙。庙里有个老和尚在讲故事:2024年、\u3000全角\u3000 空格。" * 6,
    "emoji": "🙂🙂 👩\u200d👩\u200d👧 👍🏽 1️⃣ 🇩🇪 é e\u0301 ﬁ Ａ \u200b\u2028 \t\r\n\n  x " * 6,
    "special": "<|endoftext|> <|im_start|>user\nHello<|im_end|>\n <s> </s> [INST] <unk>",
}
QUESTIONS = [
    "Who are you?", "What is the capital of France?", "Name three primary colours.", "What is 12 + 30?",
    "Write a Python function that adds two numbers.", "Translate 'good morning' into Spanish.", "Why is the sky blue?",
    "Give me a recipe for pancakes.", "Who wrote Hamlet?", "What is photosynthesis?", "Tell me a joke.",
    "How many legs has a spider?", "Write a short poem about the sea.", "什么是人工智能?", "🙂?",
]  # fmt: skip
BEGINNINGS = [
    "Once upon a time", "The capital of Germany is", "def fibonacci(n):\n", "1, 2, 3, 4,", "The quick brown fox",
    "In 1969, two men", "Water boils at", "import numpy as np\n", "To be or not to be,", "从前有座山",
    "Dear Sir or Madam,", "The three laws of motion", "for i in range(10):\n    ", "A B C D E", "🙂🙂🙂",
]  # fmt: skip


def read_theirs(path: Path) -> tuple:
    """Return the model and the tokenizer as transformers reads them, and the tokenizer corrected."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    plain, digits = (AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name) for _ in range(2))
    if GGUF(path).metadata.get("tokenizer.ggml.pre") != "smollm":
        return model, plain, digits
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    return model, plain, digits


@torch.inference_mode()
def their_texts(model: torch.nn.Module, prompts: list[list[int]], new: int, eos: int, beams: int) -> list[list[int]]:
    """The new tokens of transformers' generate for each prompt, in one batch, up to and with the end."""
    T = max(map(len, prompts))
    rows = torch.tensor([[eos] * (T - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(rows, attention_mask=mask, max_new_tokens=new, do_sample=False, num_beams=beams,
                           eos_token_id=eos, pad_token_id=eos)[:, T:].tolist()  # fmt: skip
    return [row[: row.index(eos) + 1] if eos in row else row for row in found]


def our_texts(run: Run, prompts: list[list[int]], new: int, eos: int, beams: int) -> list[list[int]]:
    """The new tokens of the run for each prompt."""
    model, V = speed_up(run.load_model(), rows=len(prompts) * beams), run.tokenizer.vocab_size
    if beams == 1:
        return generate(model, prompts, new, temperature=0, eos_id=eos, vocab_size=V)
    found = beam_search(model, prompts, new, num_beams=beams, eos_id=eos, vocab_size=V)
    return [best.tokens for best, *_ in found]


def prompts_of(run: Run, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of all prompts, ours and theirs: conversations by the chat template, and texts to continue."""
    ours, theirs = [], []
    for question in QUESTIONS if run.fine_tuned else []:
        talk = [{"role": "user", "content": question}]
        ours.append(run.template().render(talk, reply=True)[0])
        theirs.append(tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False))
    for text in BEGINNINGS:
        ours.append(prompt_tokens(run.tokenizer, text))
        theirs.append(tokenizer.encode(text))
    return ours, theirs


@torch.inference_mode()
def their_logits(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """The logits (T, V) of a text."""
    return model(torch.tensor([tokens])).logits[0]


def share(a: list, b: list) -> str:
    """How many items are equal."""
    return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run that convert.py made of the file")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--new", type=int, default=24, help="new tokens after each prompt")
    args = parser.parse_args()
    run, (model, plain, digits) = Run.open(args.run), read_theirs(args.gguf)
    ours, tokenizer = run.load_model(), run.tokenizer
    end = run.template().end_id if run.fine_tuned else tokenizer.eot_id

    print("| comparison | text | ours | transformers | agreement |\n|---|---|---|---|---|")
    for name, text in PIECES.items():
        ids = tokenizer.encode(text)
        theirs, fixed = (t.encode(text, add_special_tokens=False, split_special_tokens=True) for t in (plain, digits))
        agreement = ("same" if ids == fixed else "other") + " ids"
        agreement += ", others uncorrected" if theirs != fixed else ""
        print(f"| ids | {name} | {len(ids)} | {len(fixed)} | {agreement} |")
    for name, text in PIECES.items():
        tokens = prompt_tokens(tokenizer, text)[: min(512, run.model_config.block_size)]
        with torch.inference_mode():
            a, b = ours(torch.tensor([tokens]))[0][0], their_logits(model, tokens)
        same = f"{(a.argmax(-1) == b.argmax(-1)).float().mean():.1%} same first choice"
        print(f"| logits | {name}, {len(tokens)} tokens | {a.abs().max():.3f} largest | {b.abs().max():.3f} largest | "
              f"{(a - b).abs().max():.1e} apart, {same} |", flush=True)  # fmt: skip
        bits = [-log_likelihood(ours, tokens).double().sum().item(),
                -b[:-1].double().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None]).sum().item()]  # fmt: skip
        size = math.log(2) * sum(len(tokenizer.bytes_of(token)) for token in tokens[1:])
        ours_bits, their_bits = bits[0] / size, bits[1] / size
        print(f"| bits per byte | {name} | {ours_bits:.5f} | {their_bits:.5f} | "
              f"{abs(ours_bits - their_bits):.0e} apart |")  # fmt: skip
    mine, other = prompts_of(run, digits)
    print(f"| prompts | ids of {len(mine)} | | | {share(mine, other)} the same |", flush=True)
    for label, beams in (("greedy", 1), (f"{BEAMS} beams", BEAMS)):
        a = our_texts(run, mine, args.new, end, beams)
        b = their_texts(model, other, args.new, end, beams)
        ended = [sum(row[-1] == end for row in rows) for rows in (a, b)]
        print(f"| {label} | {len(a)} prompts, {args.new} new tokens | {ended[0]} ended | {ended[1]} ended | "
              f"{share(a, b)} texts the same |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
