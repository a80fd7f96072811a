"""Text from a trained model: greedy, drawn at random, or by beam search; a conversation; the likelihood of a text.

    python sample.py --out_dir=out/pydocs --prompt="os.path"
    python sample.py --num_beams=4 --num_samples=2 --prompt="os.path"
    python sample.py --chat
    python sample.py --score=book.txt

How tokens are found is in decoding/stream.py and decoding/beam.py; here they become text.
"""

import codecs
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.config import build, help_text, read_arguments
from common.files import write_whole
from decoding.beam import Hypothesis, beam_search
from decoding.fast import check_int8, speed_up
from decoding.stream import Token, generate, log_likelihood, prompt_tokens, stream
from model import GPT
from runs.run import Run
from text.chat import Template
from text.tokenizer import Tokenizer
from training.device import DTYPES, pick_device, pick_dtype

__all__ = ["Hypothesis", "beam_search", "generate", "stream"]

USAGE = """usage: python sample.py [--key=value ...]

Prints text from a trained model as it is made. Text may grow longer than the model's block_size: when the context is
full, its older half is forgotten and the newer half read again."""

MOST = 4096  # texts or beams at once
CHAT_HELP = "/reset forgets the conversation, /save FILE writes it, /quit leaves; Ctrl-C stops an answer"


@dataclass
class SampleConfig:
    out_dir: str = "out/pydocs"  # the run to sample from
    checkpoint: str = "best"  # best (lowest validation loss) | latest | a name such as step_00001000
    prompt: str = ""  # text to continue, or a question to a fine-tuned model; FILE:path reads it from a file
    max_new_tokens: int = 500  # stop after this many tokens, or when the model ends the document
    num_samples: int = 1  # how many texts; the first is shown as it comes, the others when all are done
    temperature: float = 0.8  # below 1 bolder, above 1 wilder; 0 = greedy, always the most likely token
    top_k: int = 0  # draw among the k most likely tokens only; 0 = all
    top_p: float = 1.0  # draw among the fewest most likely tokens that together reach this probability
    min_p: float = 0.0  # draw among tokens at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that are there already become less likely
    num_beams: int = 1  # above 1: beam search, for the likeliest text; num_samples of them are shown
    length_penalty: float = 1.0  # beams are compared by log-probability / length^this; 0 favours short ones
    stop: str = ""  # end before this string, or before any of a JSON list of strings
    seed: int = 1337  # the same seed gives the same text
    chat: bool = False  # talk with the model in the terminal
    json: bool = False  # print a JSON object per text: tokens, log-probabilities, why it ended
    score: str = ""  # a file: print its log-likelihood and its bits per byte instead of new text
    quantize: str = "none"  # none | int8: weights as bytes, on a CPU: quicker, a little less exact
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16

    def __post_init__(self):
        lowest = {"max_new_tokens": 1, "num_samples": 1, "temperature": 0, "top_k": 0, "seed": 0, "num_beams": 1}
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty must be from 0.01 to 100, not {self.repetition_penalty}")
        for name in ("num_samples", "num_beams"):
            if getattr(self, name) > MOST:
                raise ValueError(f"{name} must be at most {MOST}, not {getattr(self, name)}")
        if not -10 <= self.length_penalty <= 10:
            raise ValueError(f"length_penalty must be from -10 to 10, not {self.length_penalty}")
        if self.quantize not in ("none", "int8"):
            raise ValueError(f"quantize must be none or int8, not {self.quantize!r}")
        if self.num_beams > 1:
            self.check_beams()
        if self.chat and (self.json or self.score or self.prompt or self.num_samples > 1):
            raise ValueError("--chat goes with none of --json, --score, --prompt and --num_samples")
        if self.score and self.prompt:
            raise ValueError("--score measures a text and makes none: it has no use for --prompt")
        self.stops()

    def check_beams(self) -> None:
        """ValueError for what beam search has no use for."""
        for name, default in {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "stop": ""}.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} is for drawing tokens one by one: beam search (num_beams) does not use it")
        if self.num_samples > self.num_beams:
            raise ValueError(f"num_samples={self.num_samples} texts cannot come from num_beams={self.num_beams}")
        if self.chat:
            raise ValueError("--chat shows tokens as they come, beam search (num_beams) finds them at the end")

    def stops(self) -> list[str]:
        """The stop strings. ValueError for a JSON list of anything but strings that are not empty."""
        if not self.stop.startswith("["):
            return [self.stop] if self.stop else []
        try:
            stops = json.loads(self.stop)
        except (ValueError, RecursionError):
            return [self.stop]  # a text that happens to begin with a bracket
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop must be a string, or a JSON list of strings that are not empty: {self.stop}")
        return stops

    def drawing(self) -> dict:
        """The options of `stream` that say how tokens are drawn."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        return {name: getattr(self, name) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Text from tokens, and tokens from text


class Text:
    """The text of tokens as they come, up to a stop string.

    Held back: the bytes of an unfinished character, and text that may be the beginning of a stop string. So a stop
    string is found wherever it begins and ends, and never shown in part.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.held, self.stopped = "", "", False

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before."""
        held = self.search(self.decoder.decode(self.tokenizer.bytes_of(token)))
        begun = [n for stop in self.stops for n in range(len(stop)) if held.endswith(stop[:n])]
        prefix = 0 if self.stopped else max(begun, default=0)
        return self.show(held[: len(held) - prefix], held[len(held) - prefix :])

    def end(self) -> str:
        """What was held back, as nothing more will come."""
        return self.show(self.search(self.decoder.decode(b"", final=True)), "")

    def search(self, piece: str) -> str:
        """The text not yet shown, up to the stop string that begins first in it; nothing follows one."""
        held = "" if self.stopped else self.held + piece
        ends = [held.find(stop) for stop in self.stops if stop in held]
        self.stopped |= bool(ends)
        return held[: min(ends)] if ends else held

    def show(self, text: str, held: str) -> str:
        self.text, self.held = self.text + text, held
        return text


def read_text(path: str, what: str) -> str:
    """A file's text. ValueError if it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # bytes: line ends stay what they are
    except (OSError, ValueError) as error:
        undecoded = isinstance(error, UnicodeDecodeError)
        reason = "it is not UTF-8 text" if undecoded else getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the {what} {path}: {reason}") from None


def read_prompt(prompt: str) -> str:
    """The prompt itself, or the file's text for FILE:path."""
    return read_text(prompt[5:], "prompt file") if prompt.startswith("FILE:") else prompt


def note(message: str) -> None:
    """A line to the user, apart from the text."""
    print(message, file=sys.stderr, flush=True)


@dataclass
class Prompt:
    """What the model is to go on from."""

    text: str  # as the user gave it
    tokens: list[int]
    eos_id: int | None  # the token with which the model ends its text
    shown: str  # what to print before the model's text


def make_prompt(tokenizer: Tokenizer, template: Template | None, text: str) -> Prompt:
    """A document to continue; for a fine-tuned model, a question to answer."""
    if template is None:
        return Prompt(text, prompt_tokens(tokenizer, text), tokenizer.eot_id, text)
    if not text:
        raise ValueError("this model was fine-tuned to answer: give it a --prompt, or talk with it by --chat")
    tokens, _ = template.render([{"role": "user", "content": text}], reply=True)
    return Prompt(text, tokens, template.end_id, "")


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def write_samples(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: Prompt) -> None:
    """Draw num_samples texts as one batch, and print them."""
    texts = [Text(tokenizer, config.stops()) for _ in range(config.num_samples)]
    rows: list[list[Token]] = [[] for _ in texts]
    live = not config.json  # is the first text shown as it comes?

    def ends(i: int, token: int) -> bool:
        new = texts[i].add(token)
        if i == 0 and live:
            print(new, end="", flush=True)
        return texts[i].stopped

    if live:
        print(prompt.shown, end="", flush=True)
    columns = stream(
        model, [prompt.tokens] * config.num_samples, config.max_new_tokens, **config.drawing(), eos_id=prompt.eos_id,
        vocab_size=tokenizer.vocab_size, ends=ends,
    )  # fmt: skip
    for column in columns:
        for row, token in zip(rows, column, strict=True):
            row += [token] if token is not None else []
    for i, (row, new) in enumerate(zip(rows, texts, strict=True)):
        rest = new.end()
        if live:
            print(rest if i == 0 else f"{'-' * 20}\n{prompt.shown}{new.text}")
            continue
        finish = "stop" if new.stopped else "eos" if row[-1].id == prompt.eos_id else "length"
        write_json(prompt.text, new.text, finish, [t.id for t in row], [t.logprob for t in row])


def write_beams(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: Prompt) -> None:
    """Search with num_beams, and print the num_samples best texts with their scores."""
    (found,) = beam_search(
        model, [prompt.tokens], config.max_new_tokens, num_beams=config.num_beams, eos_id=prompt.eos_id,
        length_penalty=config.length_penalty, num_return=config.num_samples, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    for rank, beam in enumerate(found, start=1):
        finish = "eos" if beam.tokens[-1] == prompt.eos_id else "length"
        new = tokenizer.decode(beam.tokens[:-1] if finish == "eos" else beam.tokens)
        if config.json:
            write_json(prompt.text, new, finish, beam.tokens, beam.logprobs, score=beam.score)
        else:
            if config.num_samples > 1:
                counts = f"log-probability {beam.logprob:.4f}, {len(beam.tokens)} tokens"
                print(f"--- {rank}: score {beam.score:.4f}, {counts}")
            print(prompt.shown + new)


def write_json(prompt: str, text: str, finish: str, tokens: list[int], logprobs: list[float], **more: float) -> None:
    """One line. finish: eos (the model ended the text), stop (a stop string came) or length (max_new_tokens did)."""
    line = {"prompt": prompt, "text": text, "finish": finish, **more, "logprob": sum(logprobs)}
    print(json.dumps(line | {"tokens": tokens, "logprobs": logprobs}), flush=True)


def write_score(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Print how likely a file's text is: in nats, and in bits per byte, which compares across tokenizers."""
    text = read_text(config.score, "text")
    tokens = prompt_tokens(tokenizer, text)
    given = 0 if tokenizer.eot_id is not None else len(tokenizer.bytes_of(tokens[0]))  # the first token is given
    counted = len(text.encode()) - given
    if len(tokens) < 2 or counted < 1:
        raise ValueError(f"{config.score} holds too little text to score")

    def measure() -> dict:
        logprob = log_likelihood(model, tokens, tokenizer.vocab_size, progress=True).double().sum().item()
        counts = {"tokens": len(tokens) - 1, "bytes": counted, "log_likelihood": logprob}
        return counts | {"bits_per_byte": -logprob / math.log(2) / counted}

    if config.quantize == "int8":
        check_int8(model)
    plain = measure()
    if config.quantize != "none":
        speed_up(model, quantize=config.quantize)
        plain |= {f"{config.quantize}_bits_per_byte": measure()["bits_per_byte"]}
    if config.json:
        print(json.dumps(plain))
        return
    print(f"{config.score}: {plain['tokens']:,} tokens, {counted:,} bytes")
    per_token = -plain["log_likelihood"] / plain["tokens"]
    print(f"log-likelihood {plain['log_likelihood']:,.2f} nats ({per_token:.4f} lost per token)")
    print(f"bits per byte {plain['bits_per_byte']:.4f}")
    if config.quantize != "none":
        quantized = plain[f"{config.quantize}_bits_per_byte"]
        print(f"{config.quantize}: {quantized:.4f} ({quantized - plain['bits_per_byte']:+.4f})")


class Conversation:
    """What was said so far: messages, or for a base model, which knows no roles, one text that it goes on with."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None, block_size: int):
        self.tokenizer, self.template, self.block_size = tokenizer, template, block_size
        self.reset()

    def reset(self) -> None:
        self.text, self.messages = "", []

    def prompt(self, line: str) -> Prompt:
        """What the model is to read for this line; ValueError for a character that its tokenizer does not know."""
        if self.template is None:
            return make_prompt(self.tokenizer, None, self.text + (line or "\n"))
        messages = [*self.messages, {"role": "user", "content": line}]
        while True:
            tokens, _ = self.template.render(messages, reply=True)
            if len(messages) < 3 or len(tokens) <= self.block_size * 3 // 4:
                return Prompt(line, tokens, self.template.end_id, "")
            messages = messages[2:]  # a question and its answer, the oldest ones, rather than half a message

    def add(self, line: str, answer: str) -> None:
        """Remember a line and the answer to it."""
        self.text += (line or "\n") + answer
        for name in self.tokenizer.special_tokens:  # they are no text, should the model make one
            answer = answer.replace(name, "")
        if answer.strip():  # or it was stopped before it began
            roles = ("user", "assistant")
            self.messages += [{"role": r, "content": c} for r, c in zip(roles, (line, answer), strict=True)]

    def save(self, path: str) -> None:
        """Write it to a file that is not there yet: a line as for data/chat/prepare.py, or the text."""
        try:
            if not path or Path(path).exists():
                raise ValueError("it is there already" if path else "give the name of a file")
            write_whole(path, json.dumps({"messages": self.messages}) if self.template else self.text)
            note(f"saved to {path}")
        except (OSError, ValueError) as error:
            note(f"/save FILE: cannot write {path!r}: {getattr(error, 'strerror', None) or error}")


def chat(model: GPT, tokenizer: Tokenizer, config: SampleConfig, template: Template | None) -> None:
    """Talk in the terminal."""
    base = "a base model: it goes on with the text that you type; Enter alone adds a line end. "
    note(("" if template else base) + CHAT_HELP)
    said = Conversation(tokenizer, template, model.config.block_size)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D leaves")
            continue
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            said.reset()
        elif command == "/save":
            said.save(argument.strip())
        elif command.startswith("/"):
            note(f"there is no {command}: {CHAT_HELP}")
        elif line.strip() or template is None:
            try:
                said.add(line, answer(model, tokenizer, config, said.prompt(line)))
            except ValueError as error:  # a character that the model has never seen
                note(f"error: {error}")


def answer(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: Prompt) -> str:
    """Print one answer as it comes, and return it; Ctrl-C ends it where it is."""
    text = Text(tokenizer, config.stops())

    def ends(_: int, token: int) -> bool:
        print(text.add(token), end="", flush=True)
        return text.stopped

    try:
        for _ in stream(model, [prompt.tokens], config.max_new_tokens, **config.drawing(), eos_id=prompt.eos_id,
                        vocab_size=tokenizer.vocab_size, ends=ends):  # fmt: skip
            pass
    except KeyboardInterrupt:
        pass  # what was said so far is the answer
    print(text.end())
    return text.text


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(USAGE, SampleConfig))
        return
    (config,) = build(read_arguments(sys.argv[1:]), SampleConfig)
    device = pick_device(config.device)
    text = read_prompt(config.prompt)
    run = Run.open(config.out_dir)
    model, tokenizer = run.load_model(config.checkpoint).to(device), run.tokenizer
    for p in model.parameters():  # not the tables of positions: training has them in float32 too
        p.data = p.data.to(DTYPES[pick_dtype(config.dtype, device)])
    if config.score:
        return write_score(model, tokenizer, config)
    rows = 1 if config.chat else max(config.num_samples, config.num_beams)
    model = speed_up(model, rows, config.quantize)
    template = Template(tokenizer) if run.fine_tuned else None
    if config.chat:
        return chat(model, tokenizer, config, template)
    prompt = make_prompt(tokenizer, template, text)
    if len(prompt.tokens) > model.config.block_size:
        note(f"note: the prompt has {len(prompt.tokens)} tokens, and the model sees {model.config.block_size} at most: "
             "the beginning is not seen")  # fmt: skip
    write = write_beams if config.num_beams > 1 else write_samples
    write(model, tokenizer, config, prompt)


if __name__ == "__main__":
    cli.run(main)
