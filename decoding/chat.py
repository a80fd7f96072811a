"""A conversation in the terminal: its messages, its commands, and the part that fits into the model's context."""

import importlib.util
import json
import sys
from contextlib import suppress
from pathlib import Path

from common.files import write_whole
from decoding.prompt import Prompt, Question, TextModel, make_prompt, typed_text
from decoding.stream import stream
from decoding.text import Text, note, show
from text.chat import Message

COMMANDS = """\
/system TEXT   set the system message, which stands before the conversation; /system alone removes it
/reset         forget the conversation; the system message stays
/save FILE     write the conversation to a new file: a name in .json gets a list, any other one line of JSON
/help          show this
/quit          leave, as Ctrl-D does
//TEXT         say /TEXT: a message that begins with a slash
Ctrl-C         stop an answer"""
BASE_COMMANDS = """\
/reset         forget the text
/save FILE     write the text to a new file: a name in .json or .jsonl gets JSON, any other the text itself
/help          show this
/quit          leave, as Ctrl-D does
//TEXT         type /TEXT: text that begins with a slash
Ctrl-C         stop the model"""


class Conversation:
    """The conversation so far: messages, or for a base model, which knows no roles, one text that it continues.

    Both are kept whole for /save; `prompt` uses the part that fits into the model's context.
    """

    def __init__(self, model: TextModel, system: str = ""):
        self.model, self.system = model, system
        if system and model.template is None:
            raise ValueError("this is a base model, which knows no system message: leave --system out")
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.text = ""
        self.messages: list[Message] = []
        self.forgotten = 0  # messages that the model no longer sees

    def prompt(self, line: str) -> Prompt:
        """Return the prompt for the user's line. Raises ValueError for a character that the tokenizer lacks.

        To leave a quarter of the context for the answer, the oldest turns (a question and its answer) are dropped. A
        note tells the user that turns are dropped, or that the line alone does not fit.
        """
        limit = self.model.block_size
        if self.model.template is None:
            prompt = make_prompt(self.model, Question({"prompt": self.text + (line or "\n")}))
            if len(prompt.tokens) > limit and not self.forgotten:
                self.forgotten = 1
                note(f"note: the text has {len(prompt.tokens)} tokens, and the model sees {limit} at most: from now on "
                     "it does not see the beginning")  # fmt: skip
            return prompt
        said = [*self.messages, {"role": "user", "content": line}]
        forgotten = self.forgotten
        while True:
            prompt = make_prompt(self.model, Question({"messages": said[forgotten:]}), self.system)
            if len(prompt.tokens) <= limit * 3 // 4 or forgotten == len(said) - 1:
                break
            forgotten += 2
        if forgotten > self.forgotten:
            self.forgotten = forgotten
            turns = "turn is" if forgotten == 2 else f"{forgotten // 2} turns are"
            note(f"note: the model sees {limit} tokens at most: the first {turns} forgotten (/save still has them)")
        if len(prompt.tokens) > limit:
            note(f"note: this message does not fit: the model reads {len(prompt.tokens)} tokens for it, and sees "
                 f"{limit} at most: it does not see the beginning")  # fmt: skip
        return prompt

    def add(self, line: str, answer: str) -> None:
        """Add a line and its answer to the conversation; without an answer, print a note instead."""
        if self.model.template is None:
            self.text += (line or "\n") + answer
            return
        for name in self.model.tokenizer.special_tokens:  # if the model wrote one: they are not text
            answer = answer.replace(name, "")
        if self.model.template.style.strip:  # Llama 2 writes a space before and after its answer
            answer = answer.strip()
        if answer.strip():
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        else:
            note("note: there was no answer, so this message is not remembered")

    def save(self, name: str) -> None:
        """Write the conversation to a new file, which data/chat/prepare.py (for a base model data/text) can read."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        row = {"messages": [*system, *self.messages]} if self.model.template else {"text": self.text}
        try:
            if not name:
                raise ValueError("give the name of a file")
            if not (self.messages or self.text):
                raise ValueError("nothing was said yet")
            path = Path(name).expanduser()
            if path.exists():
                raise ValueError("it is there already")
            as_text = self.model.template is None and path.suffix.lower() not in (".json", ".jsonl")
            written = [row] if path.suffix.lower() == ".json" else row
            write_whole(path, self.text if as_text else json.dumps(written, ensure_ascii=False))
            note(f"saved to {path}")
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder for ~
            note(f"/save FILE: cannot write {name!r}: {getattr(error, 'strerror', None) or error}")

    def set_system(self, text: str) -> None:
        """Set the system message for the next answers; an empty text removes it."""
        if self.model.template is None:
            note("this is a base model, which knows no system message: go on with its text instead")
            return
        self.system = text
        without = "there is no system message now"
        if self.model.template.default_system:
            without = "the system message is the model's own again"
        note("the system message is set" if text else without)


def chat(model: TextModel, system: str, stops: list[str], max_new_tokens: int, **drawing) -> None:
    """Talk in the terminal until /quit or the end of the input. drawing: options of `stream`."""
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):  # Windows has none
        import readline  # noqa: F401  gives input() arrow keys and a history
    said = Conversation(model, system)
    if model.template is None:
        note("A base model: it goes on with the text that you type; Enter alone adds a line break.")
    note("/help lists the commands, /quit leaves, Ctrl-C stops an answer.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            if sys.stdin.isatty():
                print()  # Ctrl-D leaves the cursor after the "> "
            return
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D leaves")
            continue
        if line.startswith("/") and not line.startswith("//"):
            if obey(said, line):
                return
            continue
        line = line[1:] if line.startswith("//") else line
        if not line.strip() and model.template is not None:
            continue
        try:
            line = typed_text(line, "this line")
            said.add(line, answer(model, said.prompt(line), stops, max_new_tokens, **drawing))
        except ValueError as error:  # a character that the model has never seen
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("\nnote: stopped before the answer began, so this message is not remembered")


def obey(said: Conversation, line: str) -> bool:
    """Obey a command, a line that begins with a slash; returns True for /quit."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    alone = command in ("/quit", "/reset", "/help")
    if alone and argument:
        note(f"{command} stands alone; to say the line itself, begin it with //")
    elif command == "/quit":
        return True
    elif command == "/reset":
        said.reset()
        note("the text is forgotten" if said.model.template is None else "the conversation is forgotten")
    elif command == "/help":
        note(BASE_COMMANDS if said.model.template is None else COMMANDS)
    elif command == "/save":
        said.save(argument)
    elif command == "/system":
        said.set_system(argument)
    else:
        note(f"there is no command {command}: /help lists them; to say the line itself, begin it with //")
    return False


def answer(model: TextModel, prompt: Prompt, stops: list[str], max_new_tokens: int, **drawing) -> str:
    """Print one answer while it is generated, and return it; Ctrl-C ends it early."""
    text, length = Text(model.tokenizer, stops, prompt.begins), len(prompt.tokens)

    def ends(_: int, token: int) -> bool:
        show(text.add(token), end="")
        return text.stopped

    with suppress(KeyboardInterrupt):  # the text so far is the answer
        for _ in stream(model.gpt, [prompt.tokens], max_new_tokens, **drawing, eos_id=model.eos_id,
                        vocab_size=model.tokenizer.vocab_size, ends=ends):  # fmt: skip
            length += 1
    show(text.end())
    if model.template is not None and len(prompt.tokens) <= model.block_size < length - 1:
        note(f"note: message and answer have {length} tokens together, and the model sees {model.block_size} at most: "
             "the answer's end was written without the beginning in sight")  # fmt: skip
    return text.text
