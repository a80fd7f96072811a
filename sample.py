"""Use a trained model: sample text (at random, greedily or by beam search), chat, score a text, or fill its blanks.

    python sample.py --out_dir=out/pydocs --prompt="os.path"
    python sample.py --num_beams=4 --num_samples=2 --prompt="os.path"
    python sample.py --out_dir=out/sft_pydocs --prompts=questions.jsonl --json > answers.jsonl
    python sample.py --out_dir=out/sft_pydocs --chat
    python sample.py --score=book.txt
    python sample.py --explain --num_beams=3 --max_new_tokens=8 --prompt="os.path"
    python sample.py --out_dir=out/bert_pydocs --fill="Return the <|mask|> of the string."

decoding/stream.py and decoding/beam.py choose tokens, decoding/explain.py shows how they did it,
decoding/prompt.py turns prompts into tokens, decoding/text.py turns tokens into text, and decoding/chat.py holds the
conversation.
"""

from common import cli  # first: it makes Ctrl-C one line even while the modules below are imported

# isort: split

import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from common.config import UserPath, above, at_least, build, check_ranges, help_text, read_arguments
from decoding.beam import Candidate, Hypothesis, beam_search
from decoding.chat import chat
from decoding.classify import write_class
from decoding.explain import MOST_BEAMS, step_line, steps_heading, tree
from decoding.fast import check_int8, speed_up
from decoding.fill import write_filled
from decoding.prompt import (
    Prompt,
    Question,
    TextModel,
    make_prompts,
    read_questions,
    read_text,
    text_or_file,
    typed_text,
)
from decoding.score import write_score
from decoding.stream import Step, Token, generate, stream
from decoding.text import Text, note, read_stops, show, text_of
from runs.run import Run
from training.device import DTYPES, pick_device, pick_dtype

__all__ = ["Hypothesis", "beam_search", "generate", "stream"]

USAGE = """usage: python sample.py [--key=value ...]

Prints text from a trained model while it is generated. A text may become longer than the model's block_size: when the
context is full, its older half is dropped and the newer half read again. On a terminal, control characters in the text
are shown as escapes such as \\x1b; a file or a pipe gets the text exactly as the model wrote it."""

OUT_OF_MEMORY = "lower num_samples, num_beams or max_new_tokens, or try --dtype=bfloat16 or, on a CPU, --quantize=int8"
MOST = 4096  # most texts or beams at once

# The ways to use a model, and the options that each of them reads. Any other option is an error.
CHAT, SCORE, FILL, CLASSIFY = "--chat", "--score", "--fill", "--classify"
BEAMS, DRAW = "--num_beams above 1", "--num_beams=1, which draws tokens one by one"
DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
TEXTS = ("prompt", "prompts", "batch_size", "system", "max_new_tokens", "num_samples", "json", "explain")
ALWAYS = ("out_dir", "checkpoint", "quantize", "device", "dtype")
READS = {
    CHAT: ("chat", "system", "max_new_tokens", "stop", *DRAWING, *ALWAYS),
    SCORE: ("score", "json", *ALWAYS),
    FILL: ("fill", "json", *ALWAYS),
    CLASSIFY: ("classify", "json", *ALWAYS),
    BEAMS: ("num_beams", "length_penalty", *TEXTS, *ALWAYS),
    DRAW: ("num_beams", "stop", *DRAWING, *TEXTS, *ALWAYS),
}
# Those whose default means that they are off
SWITCHES = "chat score fill classify json explain prompt prompts system stop num_samples num_beams".split()


@dataclass
class SampleConfig:
    """The options of sample.py."""

    out_dir: UserPath = "out/pydocs"  # the run to sample from
    checkpoint: str = "best"  # best (lowest validation loss) | latest | a name such as step_00001000
    prompt: str = ""  # text to continue, or a question to a fine-tuned model; FILE:path reads it from a file
    prompts: UserPath = ""  # a file of prompts: .jsonl with {"prompt": ...} or {"messages": [...]} per line, or .txt
    system: str = ""  # a system message for a fine-tuned model; FILE:path reads it from a file
    max_new_tokens: int = 500  # stop after this many tokens, or when the model ends the document
    num_samples: int = 1  # texts per prompt; with --prompt, the first one is shown while it is generated
    batch_size: int = 16  # with --prompts: number of texts or beams to generate at once
    temperature: float = 0.8  # below 1 makes likely tokens likelier still, above 1 less so; 0 = greedy
    top_k: int = 0  # sample from the k most likely tokens only; 0 = all
    top_p: float = 1.0  # sample from the fewest most likely tokens whose probabilities sum to this
    min_p: float = 0.0  # sample from tokens whose probability is at least this times that of the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens that already occur become less likely
    num_beams: int = 1  # above 1: beam search for the most likely texts, of which num_samples are shown
    length_penalty: float = 1.0  # beams are compared by log-probability / length^this; 0 favours short texts
    stop: str = ""  # stop before this string (\n is a line break), or before any of a JSON list of strings
    seed: int = 1337  # the same seed gives the same text; text i (from 0) uses seed + i
    chat: bool = False  # talk with the model in the terminal
    json: bool = False  # print one JSON object per text: tokens, log-probabilities, reason for ending
    explain: bool = False  # for teaching: show each step's likeliest tokens, or the tree of the beams, before a text
    score: UserPath = ""  # a file: print its log-likelihood, perplexity and bits per byte instead of new text
    fill: str = ""  # a text with <|mask|> for some words: show a masked model's likeliest tokens there; or FILE:path
    classify: str = ""  # a text: print its class, by a classifier; or FILE:path
    quantize: Literal["none", "int8"] = "none"  # int8: weights as bytes, on a CPU: faster, slightly less exact
    device: str = "auto"  # auto (CUDA if there is a GPU, else CPU) | cpu | cuda | cuda:1 | mps (an Apple GPU)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU, else the fastest

    def __post_init__(self):
        few = at_least(1).at_most(MOST)
        check_ranges(
            self, max_new_tokens=at_least(1), temperature=at_least(0), top_k=at_least(0), seed=at_least(0),
            top_p=above(0).at_most(1), min_p=at_least(0).at_most(1), repetition_penalty=at_least(0.01).at_most(100),
            length_penalty=at_least(-10).at_most(10), num_samples=few, num_beams=few, batch_size=few,
        )  # fmt: skip
        if self.explain and self.num_beams > MOST_BEAMS:
            raise ValueError(f"--explain draws the tree of at most {MOST_BEAMS} beams, not {self.num_beams}")
        if 1 < self.num_beams < self.num_samples:
            raise ValueError(f"num_samples={self.num_samples} texts cannot come from num_beams={self.num_beams}")
        self.stops()

    def way(self) -> str:
        """Return how the model is used, as a key of READS."""
        ways = {CHAT: self.chat, SCORE: self.score, FILL: self.fill, CLASSIFY: self.classify, BEAMS: self.num_beams > 1}
        return next((way for way, wanted in ways.items() if wanted), DRAW)

    def check_use(self, given: set[str]) -> None:
        """Raise ValueError if an option in `given` would have no effect, even if it has its default value."""
        for name in given & {"fill", "classify", "score"}:
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty: give it a text")
        way = self.way()
        for name in sorted(given.difference(READS[way])):
            if name not in SWITCHES or getattr(self, name) != getattr(SampleConfig, name):
                raise ValueError(f"--{name} has no effect with {way}: leave it out")
        if "batch_size" in given and not self.prompts:
            raise ValueError("--batch_size has no effect without --prompts: leave it out")
        if self.prompts and self.prompt:
            raise ValueError("--prompt and --prompts were both given: leave one of them out")
        if self.explain and self.json:
            raise ValueError("--json has no effect with --explain, which is for people: leave one of them out")
        greedy = way in (DRAW, CHAT) and self.temperature == 0
        if greedy and self.num_samples > 1:
            raise ValueError(f"temperature=0 always takes the most likely token, so num_samples={self.num_samples} "
                             "texts would all be the same: raise it, or use --num_beams")  # fmt: skip
        idle = sorted(given & {"top_k", "top_p", "min_p", "seed"}) if greedy else []
        if idle:
            note(f"note: temperature=0 always takes the most likely token: {', '.join(idle)} cannot change the text")

    def rows(self, prompts: int) -> int:
        """Return the number of texts or beams to generate at once, for so many prompts."""
        if self.chat:
            return 1
        if self.num_beams > 1:
            return self.num_beams * min(prompts, self.batch(prompts))
        texts = prompts * self.num_samples
        return min(texts, self.batch(texts))

    def batch(self, texts: int) -> int:
        """Return how many of so many texts, or of so many prompts' beam searches, make a batch."""
        if self.num_beams > 1:
            return max(1, self.batch_size // self.num_beams)
        return self.batch_size if self.prompts else texts

    def stops(self) -> list[str]:
        """Return the stop strings."""
        return read_stops(typed_text(self.stop, "stop"))

    def drawing(self) -> dict:
        """Return the options of `stream` that say how tokens are drawn."""
        return {name: getattr(self, name) for name in DRAWING}


def read_options(argv: list[str]) -> SampleConfig:
    """Return the options of the command line. Raises ValueError for a wrong option and for one without effect."""
    given = read_arguments(argv, SampleConfig)
    (config,) = build(given, SampleConfig)
    config.check_use(set(given))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# What to read


def open_model(config: SampleConfig, prompts: int) -> TextModel:
    """Return the run's model on its device, in its dtype, sped up for decoding so many prompts. Raises ValueError."""
    device = pick_device(config.device)
    run = Run.open(config.out_dir)
    if run.model_config.classes and not config.classify:
        raise ValueError(f"{config.out_dir}: this model is a classifier: give it a text by --classify")
    if not run.model_config.causal and config.way() not in (FILL, CLASSIFY):
        raise ValueError(f"{config.out_dir}: this model (causal=False) sees the tokens that it would have to predict: "
                         "it can neither continue a text nor score one, but fill its blanks, by --fill")  # fmt: skip
    if run.model_config.n_encoder_layer and (config.score or config.chat or config.fill):
        raise ValueError(f"{config.out_dir}: this model translates: give it a source by --prompt or --prompts")
    dtype = DTYPES[pick_dtype(config.dtype, device, trains=False)]
    if config.quantize == "int8":
        check_int8(device, dtype)
    # int8 rounds what is stored, layer by layer: no float32 copy of all weights is made
    stored = config.quantize == "int8" and not config.score
    gpt, tokenizer = run.load_model(config.checkpoint, None if stored else dtype).to(device), run.tokenizer
    # --score also measures the model without quantization; what fills and classifies reads its text at once
    if not config.score and (config.quantize != "none" or config.way() not in (FILL, CLASSIFY)):
        gpt = speed_up(gpt, config.rows(prompts), config.quantize)
    if not run.fine_tuned:
        return TextModel(gpt, tokenizer, None)
    template = run.template()
    if template.tokenizer is not tokenizer:
        raise ValueError(f"{config.out_dir}: its tokenizer lacks the tokens of conversations, so it is not the one "
                         "that this model was fine-tuned with")  # fmt: skip
    return TextModel(gpt, tokenizer, template)


@dataclass
class Given:
    """The input that the options name."""

    questions: list[Question]  # of --prompt or --prompts
    system: str  # of --system
    text: str  # of --fill or --classify, or of the file of --score


def read_input(config: SampleConfig) -> Given:
    """Read all files that the options name. This happens before the model is loaded, so a wrong name fails at once."""
    if config.prompts:
        questions = read_questions(config.prompts)
    else:
        questions = [Question({"prompt": text_or_file(config.prompt, "the prompt")})]
    system = without_last_line_break(text_or_file(config.system, "the system message"))
    text = read_text(config.score, "text") if config.score else text_or_file(config.fill or config.classify, "the text")
    return Given(questions, system, text if config.score else without_last_line_break(text))


def without_last_line_break(text: str) -> str:
    """Return a file's text without the line break that every editor puts at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def prompts_for(model: TextModel, config: SampleConfig, given: Given) -> list[Prompt]:
    """Return the prompts for the model, and print a note if some of them are longer than its context."""
    questions = given.questions
    if (model.template or model.translates) and config.prompt.startswith("FILE:"):
        questions = [Question({"prompt": without_last_line_break(questions[0].fields["prompt"])})]
    prompts = make_prompts(model, questions, given.system)
    long = [prompt for prompt in prompts if len(prompt.tokens) > model.block_size]
    if long:
        place = f"{long[0].question.place}: " if config.prompts else ""
        more = f" (and {len(long) - 1:,} more)" if len(long) > 1 else ""
        size = f"the prompt has {len(long[0].tokens)} tokens, and the model sees {model.block_size} at most"
        note(f"note: {place}{size}: it does not see the beginning{more}")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# What to print


def batches(prompts: list, size: int) -> Iterator[list]:
    """Yield the prompts, `size` at a time, with a progress bar if the texts do not go to the terminal."""
    quiet = True if len(prompts) <= size or sys.stdout.isatty() else None  # None: if stderr is a terminal
    with tqdm(total=len(prompts), unit=" texts", disable=quiet) as bar:
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size]
            bar.update(len(prompts[start : start + size]))


def write_samples(model: TextModel, config: SampleConfig, prompts: list[Prompt]) -> None:
    """Sample num_samples texts for each prompt, and print them batch by batch, in order."""
    rows = [(prompt, n) for prompt in prompts for n in range(config.num_samples)]
    done, live = 0, not (config.prompts or config.json)  # live: show the first text while it is generated
    if config.explain:
        show(steps_heading(config.drawing()))
    for batch in batches(rows, config.batch(len(rows))):
        drawn = draw(model, config, [prompt for prompt, _ in batch], config.seed + done, live)
        for (prompt, n), (text, finish, tokens, steps) in zip(batch, drawn, strict=True):
            if config.json:
                print_json(prompt, text, finish, [t.id for t in tokens], [t.logprob for t in tokens])
            elif not live or n > 0:
                show(header(config, prompt, n + 1) if config.prompts else "-" * 20)
                show("\n".join([*steps, prompt.shown + text]))
        done += len(batch)


def draw(
    model: TextModel, config: SampleConfig, prompts: list[Prompt], seed: int, live: bool
) -> list[tuple[str, str, list[Token], list[str]]]:
    """Sample one text per prompt: (text, reason for ending, tokens, with --explain a line for each step).

    live: print the first while it is generated, with --explain its steps and then the text.
    """
    texts = [Text(model.tokenizer, config.stops(), prompt.begins) for prompt in prompts]
    rows: list[list[Token]] = [[] for _ in texts]
    steps: list[list[str]] = [[] for _ in texts]
    record: deque[Step] | None = deque(maxlen=1) if config.explain else None

    def ends(i: int, token: int) -> bool:
        new = texts[i].add(token)
        if i == 0 and live and not config.explain:
            show(new, end="")
        return texts[i].stopped

    if live and not config.explain:
        show(prompts[0].shown, end="")
    columns = stream(
        model.gpt, [prompt.tokens for prompt in prompts], config.max_new_tokens, **config.drawing() | {"seed": seed},
        eos_id=model.eos_id, vocab_size=model.tokenizer.vocab_size, ends=ends, record=record,
    )  # fmt: skip
    for column in columns:
        for i, token in enumerate(column):
            rows[i] += [token] if token is not None else []
            if record and token is not None:
                steps[i].append(step_line(model.tokenizer, record[0], i, len(rows[i]), token.id, config.drawing()))
                if i == 0 and live:
                    show(steps[0][-1])
    drawn = []
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        rest = text.end()
        if i == 0 and live:
            show(prompts[0].shown + text.text if config.explain else rest)
        finish = "stop" if text.stopped else "eos" if row[-1].id == model.eos_id else "length"
        drawn.append((text.text, finish, row, steps[i]))
    return drawn


def write_beams(model: TextModel, config: SampleConfig, prompts: list[Prompt]) -> None:
    """Search with num_beams, and print the num_samples best texts for each prompt with their scores."""
    for batch in batches(prompts, config.batch(len(prompts))):
        record: list[list[Candidate]] = [[] for _ in batch] if config.explain else []
        found = beam_search(
            model.gpt, [prompt.tokens for prompt in batch], config.max_new_tokens, num_beams=config.num_beams,
            eos_id=model.eos_id, length_penalty=config.length_penalty, num_return=config.num_samples,
            vocab_size=model.tokenizer.vocab_size, record=record,
        )  # fmt: skip
        for i, (prompt, beams) in enumerate(zip(batch, found, strict=True)):
            if config.explain:
                where = [f"--- {prompt.question.place}: the search"] if config.prompts else []
                show("\n".join([*where, *tree(model.tokenizer, record[i], config.num_beams)]))
            for rank, beam in enumerate(beams, start=1):
                write_beam(model, config, prompt, rank, beam)


def write_beam(model: TextModel, config: SampleConfig, prompt: Prompt, rank: int, beam: Hypothesis) -> None:
    """Print one text of beam search; rank: 1 for the best text of its prompt."""
    finish = "eos" if beam.tokens[-1] == model.eos_id else "length"
    tokens = beam.tokens[:-1] if finish == "eos" else beam.tokens
    text = text_of(model.tokenizer, tokens, prompt.begins)
    if config.json:
        print_json(prompt, text, finish, beam.tokens, beam.logprobs, score=beam.score)
        return
    if config.num_samples > 1 or config.prompts:
        counts = f"log-probability {beam.logprob:.4f}, {len(beam.tokens)} tokens"
        show(f"{header(config, prompt, rank)}: score {beam.score:.4f}, {counts}")
    show(prompt.shown + text)


def header(config: SampleConfig, prompt: Prompt, number: int) -> str:
    """Return the line above a text: the place of its prompt, and its number among the texts of that prompt."""
    place = prompt.question.place
    if not place:
        return f"--- {number}"
    return f"--- {place}, text {number}" if config.num_samples > 1 else f"--- {place}"


def print_json(prompt: Prompt, text: str, finish: str, tokens: list[int], logprobs: list[float], **more: float) -> None:
    """Print one line of JSON: the fields of the prompt and those of the answer.

    finish: eos (the model ended the text), stop (a stop string occurred) or length (max_new_tokens were generated).
    """
    answer = {"text": text, "finish": finish, **more, "logprob": sum(logprobs), "tokens": tokens, "logprobs": logprobs}
    print(json.dumps(prompt.question.fields | answer), flush=True)


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, SampleConfig))
        return
    config = read_options(sys.argv[1:])
    given = read_input(config)
    model = open_model(config, len(given.questions))
    if config.score:
        write_score(model, given.text, config.score, config.json, config.quantize)
    elif config.fill:
        write_filled(model, given.text, config.json)
    elif config.classify:
        write_class(model, given.text, config.json)
    elif config.chat:
        chat(model, given.system, config.stops(), config.max_new_tokens, **config.drawing())
    else:
        prompts = prompts_for(model, config, given)
        write = write_beams if config.num_beams > 1 else write_samples
        write(model, config, prompts)


if __name__ == "__main__":
    cli.run_command(main, if_out_of_memory=OUT_OF_MEMORY)
