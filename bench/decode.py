"""Tokens per second of nanoGPT's generate, transformers' generate and ours, with the same random weights.

    python bench/decode.py [--nanogpt PATH_TO_A_CLONE] [--device=cuda] [--shape=1.5b] [--new=128] [--repeat=5]
    python bench/decode.py --model=out/smollm2

GPT-2's shape, prompts of 16 tokens, greedy and with 4 beams, one prompt and batches; float32 on a CPU, bfloat16 on a
GPU. The engines take turns; medians. The limit is the speed at which memory gives up the weights, measured ten times in
each turn: no decoder that reads them once per step can be faster for long. On a shared machine it changes by a third
within seconds, so that medians are held against its median; in brackets, against the median of each turn's fastest.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.decode_model import measure_model  # noqa: E402
from bench.nanogpt import nanogpt_module  # noqa: E402
from decoding.beam import beam_search  # noqa: E402
from decoding.fast import speed_up  # noqa: E402
from decoding.stream import generate  # noqa: E402
from tests.twins import gpt2_twins  # noqa: E402

SHAPES = {"tiny": (2, 2, 64), "124m": (12, 12, 768), "1.5b": (48, 25, 1600)}  # layers, heads, width
PROMPT, BEAMS = 16, 4


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a run with a real model; see bench/decode_model.py")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT, to run its generate too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="124m", choices=SHAPES)
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--repeat", type=int, default=5)
    return parser.parse_args()


def synchronize(device: str) -> None:
    """Wait until a GPU has done its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def bandwidth(block: torch.Tensor) -> list[float]:
    """Bytes per second at which memory is read: the block is summed, ten rounds.

    A round on a GPU is 20 sums, as the host takes some microseconds to start the first one and to notice the last.
    """
    device, speeds = block.device.type, []
    sums = 1 if device == "cpu" else 20
    for _ in range(10):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(sums):
            block.sum()
        synchronize(device)
        speeds.append(sums * block.nbytes / (time.perf_counter() - begin))
    return speeds


def transformers_engine(model: torch.nn.Module, prompts: torch.Tensor, new: int, **options) -> Callable:
    """Return a function that decodes `new` tokens after each prompt (B, PROMPT) by transformers' generate."""
    model.generation_config.eos_token_id = None  # nobody stops early
    options |= {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def run() -> list[list[int]]:
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, PROMPT:].tolist()

    return run


def nanogpt_engine(clone: str, weights: dict, shape: tuple[int, int, int], prompts: torch.Tensor, new: int) -> Callable:
    """nanoGPT's model with transformers' weights, which it names alike but keeps transposed; top_k=1 is greedy."""
    nanogpt, (n_layer, n_head, n_embd) = nanogpt_module(clone), shape
    with prompts.device, redirect_stdout(sys.stderr):
        config = nanogpt.GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257, bias=True)
        model = nanogpt.GPT(config)
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {name: w.T if name.endswith(transposed) else w for name, w in weights.items()}
    model.load_state_dict(weights, strict=False)
    model = model.eval().to(prompts.device, next(iter(weights.values())).dtype)
    return lambda: model.generate(prompts, new, top_k=1)[:, PROMPT:].tolist()


def main() -> None:
    args = parse()
    if args.model:
        return measure_model(args.model, args.new, args.repeat)
    cpu, shape = args.device == "cpu", SHAPES[args.shape]
    if cpu:
        torch.set_num_threads(2)
    n_layer, n_head, n_embd = shape
    with torch.device(args.device):
        theirs, ours = gpt2_twins(
            vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=1024, implementation="sdpa"
        )
    dtype = torch.float32 if cpu else torch.bfloat16
    theirs, ours = theirs.to(args.device, dtype), ours.to(args.device, dtype)
    read = sum(p.nbytes for p in ours.parameters()) - ours.pos_emb.weight.nbytes
    bytes8 = speed_up(copy.deepcopy(ours), quantize="int8") if cpu else None
    few, many = speed_up(copy.deepcopy(ours), rows=BEAMS), speed_up(ours, rows=16)
    numbers = torch.randint(50257, (64, PROMPT), generator=torch.Generator().manual_seed(0)).to(args.device)
    block = torch.ones(1 << 20 if args.shape == "tiny" else 1 << 28, device=args.device)
    print(f"{args.shape} on {args.device}, {str(dtype).removeprefix('torch.')}: {read / 1e6:,.0f} MB of weights\n")
    print("| | transformers tok/s | ours tok/s | ratio | memory GB/s | of the limit | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for batch, beams in [(1, 1), (1, BEAMS), (16, 1), *([] if cpu else [(64, 1), (16, BEAMS)])]:
        prompts, model = numbers[:batch], few if batch * beams <= BEAMS else many
        rows = prompts.tolist()
        engines = {"transformers": transformers_engine(theirs, prompts, args.new, num_beams=beams)}
        if beams == 1:
            engines["ours"] = lambda rows=rows, model=model: generate(model, rows, args.new, temperature=0)
        else:
            engines["ours"] = lambda rows=rows, model=model: [
                found[0].tokens for found in beam_search(model, rows, args.new, num_beams=BEAMS)
            ]
        if (batch, beams) == (1, 1):
            if bytes8 is not None:
                engines["int8"] = lambda rows=rows: generate(bytes8, rows, args.new, temperature=0)
            if args.nanogpt:
                engines["nanoGPT"] = nanogpt_engine(args.nanogpt, theirs.state_dict(), shape, prompts, args.new)
        label = f"{'greedy' if beams == 1 else f'{beams} beams'}, batch {batch}"
        print_rows(label, batch, args.new, read, *measure(engines, batch * args.new, args.repeat, block))


def print_rows(
    label: str, batch: int, new: int, read: int, speeds: dict[str, float], texts: dict[str, list],
    memory: list[list[float]],
) -> None:  # fmt: skip
    """Print the table's rows for what `measure` returned. read: bytes of weights that a step reads."""
    usual, fastest = statistics.median(sum(memory, [])), statistics.median(map(max, memory))

    def of_limit(speed: float) -> str:
        steps = speed / batch
        return f"{steps * read / usual:.0%} ({steps * read / fastest:.0%})"

    same = sum(a == b for x, y in zip(texts["transformers"], texts["ours"], strict=True)
               for a, b in zip(x, y, strict=True)) / (batch * new)  # fmt: skip
    base, mine = speeds.pop("transformers"), speeds.pop("ours")
    print(f"| {label} | {base:.1f} | {mine:.1f} | {mine / base:.2f}x | {usual / 1e9:,.0f} ({fastest / 1e9:,.0f}) "
          f"| {of_limit(mine)} | {same:.0%} |", flush=True)  # fmt: skip
    for name, other in speeds.items():
        print(f"| {label}: {name} | | {other:.1f} | {other / base:.2f}x | | {of_limit(other)} | |", flush=True)


def measure(engines: dict[str, Callable], count: int, repeat: int, block: torch.Tensor) -> tuple[dict, dict, list]:
    """Median tokens per second of each engine, after one run to warm up; what each generated; and memory's speeds.

    These are `bandwidth` of every round.
    """
    seconds, texts = {name: [] for name in engines}, {name: run() for name, run in engines.items()}
    device, memory = block.device.type, []
    for _ in range(repeat):
        memory.append(bandwidth(block))
        for name, run in engines.items():
            synchronize(device)
            begin = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: count / statistics.median(times) for name, times in seconds.items()}, texts, memory


if __name__ == "__main__":
    main()
