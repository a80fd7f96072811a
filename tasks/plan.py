"""--plan: what a run of train.py or finetune.py will take, printed instead of training. Nothing is written or started.

The memory is counted by training/plan.py, for a GPU unless --device says otherwise; the time is FLOPs by the stated
share of a GPU's peak, without evaluations.
"""

from collections import deque
from dataclasses import dataclass, fields, replace

import torch

from common.config import build, read_arguments
from model import GPTConfig
from runs.run import unseen_tokens
from runs.start import Start
from seq2seq import model_of
from tasks.classify import classify_task
from tasks.pretrain import choose_tokenizer
from tasks.sft import FinetuneConfig, conversation_task, load_conversations, set_length
from tasks.task import dataset_folder
from text.corpus import Corpus
from training.config import TrainConfig
from training.device import PEAK_FLOPS, attention_flops, flops_per_token, peak_flops, pick_device, pick_dtype
from training.lora import LoraConfig
from training.plan import (
    ABSURD,
    GPU_MEMORY,
    HEAP,
    Job,
    Memory,
    by_depth,
    count_memory,
    count_weights,
    gib,
    largest_batch,
    need,
    parse_memory,
    sharded_peaks,
)  # fmt: skip

MFU = 0.4  # the share of a device's peak that the times assume; training prints the real one as mfu
NODE = 8  # GPUs of a usual machine
SHARDS = (2, NODE, 8 * NODE)  # numbers of processes for which the memory of fsdp is told


@dataclass
class PlanOptions:
    """The options of train.py and finetune.py that only plan a run."""

    plan: bool = False  # print the sizes, the memory and the time of this run, and exit
    memory: str = ""  # with --plan: the largest batch_size for this memory per process: 24GB | 24GiB | 24000MB

    def __post_init__(self):
        if self.memory:
            parse_memory(self.memory)
            if not self.plan:
                raise ValueError("--memory belongs to --plan: give both")


def take_options(argv: list[str]) -> tuple[PlanOptions, list[str]]:
    """The options of the plan, which are no keys of a run, and the other arguments."""
    names, own, others, words = {f"--{field.name}" for field in fields(PlanOptions)}, [], [], deque(argv)
    while words:
        word = words.popleft()
        if word.partition("=")[0] not in names:
            others.append(word)
            continue
        own.append(word)
        if word == "--memory" and words and not words[0].startswith("--"):
            own.append(words.popleft())
    (options,) = build(read_arguments(own, PlanOptions), PlanOptions)
    return options, others


# ---------------------------------------------------------------------------------------------------------------------
# The two commands


@dataclass
class Length:
    """How much a run reads: steps in all, tokens per step (on average), and the training data if it is there."""

    steps: int
    done: int  # of them, before a resumed run goes on
    tokens_per_step: int
    data: str  # how much of the training data that is, in words


def plan_pretraining(start: Start, config: TrainConfig, model_config: GPTConfig, options: PlanOptions) -> str:
    """The plan of a run of train.py. ValueError if vocab_size is neither given nor known from a prepared corpus."""
    if config.objective == "translate":
        raise ValueError("--plan counts runs on a corpus, with full rows: leave it out for objective=translate")
    folder = dataset_folder(config.dataset, "meta.json")
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * model_config.block_size
    if config.objective == "classify":
        task, _ = classify_task(start, config, model_config)
        tokens_per_step = task.tokens_per_step
        data = f"{config.max_iters / task.steps_per_pass:,.1f} passes over the texts of {folder}"
    elif (folder / "meta.json").is_file():
        corpus = Corpus(folder)
        choose_tokenizer(corpus, start.known, config.objective, model_config)
        tokens = corpus.num_tokens("train")
        data = f"{config.max_iters * tokens_per_step / tokens:,.1f} passes over the {tokens:,} of {folder}"
    elif model_config.vocab_size:
        data = f"passes unknown: there is no prepared corpus in {folder}"
    else:
        raise ValueError(
            f"vocab_size is not known, for there is no prepared corpus in {str(folder)!r}: prepare it, or give "
            "--vocab_size=N"
        )
    length = Length(config.max_iters, start.state["step"] if start.state else 0, tokens_per_step, data)
    return report(job_of(config, model_config), length, options)


def plan_finetuning(
    start: Start, config: TrainConfig, sft: FinetuneConfig, model_config: GPTConfig, options: PlanOptions
) -> str:
    """The plan of a run of finetune.py; without its conversations, only if max_iters says how long it is."""
    known = start.known
    template = known.template()
    model_config = replace(model_config, vocab_size=max(model_config.vocab_size, template.tokenizer.vocab_size))
    lora = start.resumes.lora if start.resumes else None
    if sft.lora_rank and not start.resumes:
        lora = LoraConfig(sft.lora_rank, sft.lora_alpha, tuple(sft.targets()), unseen_tokens(known, template.tokenizer))
    folder = dataset_folder(config.dataset, "train.jsonl")
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * model_config.block_size
    data = f"at most, in full rows; passes unknown: there are no prepared conversations in {folder}"
    if sft.num_epochs or (folder / "train.jsonl").is_file():
        conversations = load_conversations(config.dataset, template, model_config.block_size)
        task = conversation_task(conversations, config, sft, model_config.block_size)
        set_length(config, sft, task)
        tokens_per_step = task.tokens_per_step
        data = f"{config.max_iters / task.steps_per_pass:,.1f} passes over the conversations of {folder}"
    length = Length(config.max_iters, start.state["step"] if start.state else 0, tokens_per_step, data)
    return report(job_of(config, model_config, lora), length, options)


def job_of(config: TrainConfig, model_config: GPTConfig, lora: LoraConfig | None = None) -> Job:
    """What a process does: on a GPU, in bfloat16, where device and dtype are "auto", whatever machine plans it."""
    gpu = config.device == "auto" or config.device.startswith("cuda")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpu else pick_dtype(dtype, pick_device(config.device))
    return Job(model_config, config, dtype, gpu, lora)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(job: Job, length: Length, options: PlanOptions) -> str:
    """All lines of the plan. ValueError for a model that no machine holds."""
    config, model = job.config, job.model
    weights = count_weights(model)
    if weights > ABSURD**2:
        raise ValueError("no machine holds this model: choose a smaller n_layer, n_embd, vocab_size or block_size")
    total, left = length.steps * length.tokens_per_step, (length.steps - length.done) * length.tokens_per_step
    flops = left * job_flops(job)
    memory = count_memory(job)
    rooms = [size * 1e9 for size in GPU_MEMORY.values()] if job.gpu else []
    rooms += [parse_memory(options.memory)] if options.memory else []
    batches = largest_batch(job, rooms) if rooms else []
    trained = f", {int(memory.saved - memory.optimizer) // 4:,} trained ones of LoRA" if job.lora else ""
    resumed = f", of which {length.done:,} are done" if length.done else ""
    lines = [
        f"model            {weights:,} weights{trained}: {model.n_layer} layers, {model.n_embd} wide, context "
        f"{model.block_size:,}, vocabulary {model.vocab_size:,}",
        f"step             {length.tokens_per_step:,} tokens: batch_size {config.batch_size} in "
        f"{config.gradient_accumulation_steps} micro-steps, over all processes",
        f"run              {length.steps:,} steps{resumed}, {total:,} tokens",
        f"data             {length.data}",
        f"compute          {flops:.2e} FLOPs",
        f"checkpoint       {gib(memory.saved)}; a run keeps up to 3",
        "",
        *memory_lines(job, memory),
        *sharded_lines(job, memory),
        "",
        *time_lines(job, flops, batches[: len(GPU_MEMORY)]),
    ]
    if options.memory:
        lines += ["", fitting_line(job, options.memory, batches[-1])]
    return "\n".join(lines)


def job_flops(job: Job) -> float:
    """Floating-point operations per token, as the log's MFU counts them; frozen matrices get no gradient (LoRA)."""

    def measure(n_layer: int) -> tuple[float]:
        with torch.device("meta"):
            model = model_of(replace(job.model, n_layer=n_layer))
        return (flops_per_token(model),)

    (full,) = by_depth(measure, job.model.n_layer)
    if not job.lora:
        return full
    attention = attention_flops(job.model, job.model.block_size)
    return (full - attention) * 4 / 6 + attention


def memory_lines(job: Job, memory: Memory) -> list[str]:
    """The memory of one process by part, and its peak."""
    config = job.config
    precision = "float32" if job.dtype == "float32" else f"{job.dtype}, with float32 weights"
    frozen = ", most of them frozen" if job.lora else ""
    update = memory.update > memory.passes
    parts = [
        ("weights", memory.weights, f"in float32{frozen}"),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer, "adamw" if job.lora else config.optimizer),
        ("activations", memory.activations, f"of {config.batch_size} x {job.model.block_size:,} tokens"),
        ("logits", memory.logits, "output head and cross-entropy"),
        ("peak", memory.peak, "in the optimizer's step" if update else "in the backward pass"),
    ]
    if not job.gpu:
        parts.append(("process", need(memory, False), f"with {HEAP - 1:.0%} for the heap and a checkpoint's copy"))
    return [f"memory of one process in {precision}, not compiled; not all parts are there at once:"] + [
        f"  {name:<15}{gib(size):>12}  {note}".rstrip() for name, size, note in parts
    ]


def sharded_lines(job: Job, memory: Memory) -> list[str]:
    """The peak of each of several processes that share the weights out among them, if that is less."""
    counts = zip(SHARDS, sharded_peaks(job, memory, SHARDS), strict=True)
    told = ", ".join(f"{gib(size)} on {n}" for n, size in counts if size < memory.peak)
    return [f"  with --parallel=fsdp, at most {told} processes"] if told else []


def time_lines(job: Job, flops: float, batches: list[int]) -> list[str]:
    """Hours on the GPUs of GPU_MEMORY, with the largest batch that each holds; or on this machine's own device."""
    if not job.gpu:
        peak = peak_flops(torch.device(job.config.device), job.dtype)
        hours = f"{flops / (MFU * peak) / 3600:,.2f} hours" if peak else "a time that is not known"
        return [f"training takes {hours} on this {job.config.device} at {MFU:.0%} MFU, without evaluations"]
    several = job.config.gradient_accumulation_steps % NODE == 0
    head = f"  {'GPU':<10}{'memory':>8}{'batch_size':>12}{'GPU-hours':>12}"
    lines = [
        f"time at {MFU:.0%} MFU without evaluations, and the largest batch_size that fits:",
        head + (f"{f'hours on {NODE}':>12}" if several else ""),
    ]
    for (name, size), batch_size in zip(GPU_MEMORY.items(), batches, strict=True):
        hours = flops / (MFU * PEAK_FLOPS[name][job.dtype == "float32"]) / 3600
        on_node = f"{hours / NODE:>12,.1f}" if several else ""
        lines.append(f"  {name:<10}{f'{size} GB':>8}{batch_size or 'none':>12}{hours:>12,.1f}{on_node}")
    return lines


def fitting_line(job: Job, memory: str, batch_size: int) -> str:
    """The largest batch_size for a memory such as "24GB", and how to have the same tokens per step with it."""
    if not batch_size:
        return f"{memory} is too little: batch_size=1 needs {gib(need(count_memory(job.with_batch(1)), job.gpu))}"
    whole = job.config.batch_size * job.config.gradient_accumulation_steps
    divisor = max(n for n in range(1, min(batch_size, whole) + 1) if whole % n == 0)
    return (
        f"{memory} holds a batch_size of {batch_size}; the same step: --batch_size={divisor} "
        f"--gradient_accumulation_steps={whole // divisor}"
    )
