"""Prepare the embedded conversations: questions about Python's standard library, answered from its docstrings.

For each public module, class and function, questions ask what it does, how to call it, which arguments it takes and
where to find it. Every answer is the first paragraph of the docstring, or follows from the signature; nothing is made
up, and no network is needed. A hash of its name puts one object in twenty into validation, with all of its questions,
so validation asks only about objects that training never mentions.
"""

import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from data.pydocs.docstrings import ASCII, PLAIN, docstrings
from text.chat import Message
from text.conversations import conversation_parser, write_conversations
from text.documents import split_of

HERE = Path(__file__).resolve().parent
LONGEST = 200  # most characters of an answer, so that question and answer fit into a small model's context

WHAT = {
    "module": ("What is the module {} for?", "What does the module {} do?", "Tell me about the module {}."),
    "class": ("What is {}?", "What is the class {} for?", "Tell me about the class {}."),
    "function": ("What does {} do?", "What is {} for?", "Explain {}."),
}
ARGUMENTS = ("Which arguments does {} take?", "What are the arguments of {}?", "What do I pass to {}?")
CALL = ("How do I call {}?", "How is {} called?", "Show me a call of {}.")
WHERE = ("Which module has {}?", "Where do I find {}?", "Where is {} defined?")
AND_ARGUMENTS = ("Which arguments does it take?", "And its arguments?", "What do I pass to it?")


def objects() -> Iterator[tuple[str, str, str, str]]:
    """Yield (kind, name, arguments, first paragraph or "") of each module, class and function."""
    for title, text in docstrings():
        title = " ".join(title.translate(ASCII).split())
        if not PLAIN.fullmatch(title):
            continue
        if match := re.fullmatch(r"module (\S+)", title):
            yield "module", match[1], "", summary(text)
        elif match := re.fullmatch(r"class ([\w.]+).*", title):
            yield "class", match[1], "", summary(text)
        elif match := re.fullmatch(r"([\w.]+)\((.*)\)", title):
            yield "function", match[1], match[2], summary(text)


def summary(text: str) -> str:
    """Return the first paragraph, or its first sentences if it is longer than LONGEST; "" if neither is usable."""
    text = " ".join(text.translate(ASCII).strip().split("\n\n")[0].split())
    if not PLAIN.fullmatch(text) or len(text.split()) < 3:
        return ""
    while len(text) > LONGEST:
        shorter = re.match(r"(.+[.!?]) .", text[: len(text) - 1])
        if not shorter:
            return ""
        text = shorter[1]
    return text


def arguments_answer(arguments: str) -> str:
    """Return the arguments of a signature as a sentence."""
    names = [name for name in re.split(r", (?![^(\[{]*[)\]}])", arguments) if name not in ("*", "/", "")]
    if not names:
        return "It takes no arguments."
    return f"It takes {', '.join(names[:-1])} and {names[-1]}." if names[1:] else f"It takes {names[0]}."


def conversations() -> Iterator[tuple[str, list[Message]]]:
    """Yield (name of the object, messages), several per object, the same in every call."""
    found = list(objects())
    modules = {name for kind, name, _, _ in found if kind == "module"}
    # "Where is it?" has one answer only if no other object has the same short name.
    places = Counter(name.rpartition(".")[2] for _, name, _, _ in found)
    for kind, name, arguments, about in found:
        pick = zlib.crc32(name.encode())
        parent, _, short = name.rpartition(".")
        asked = []
        if about:
            asked.append((WHAT[kind], name, about))
        if kind == "function" and len(arguments) <= LONGEST:
            asked.append((CALL, name, f"{name}({arguments})"))
            asked.append((ARGUMENTS, name, arguments_answer(arguments)))
        if kind != "module" and parent in modules and places[short] == 1:
            asked.append((WHERE, short, f"{short} is in the module {parent}."))
        for questions, subject, answer in asked:
            yield name, talk(questions[pick % 3].format(subject), answer)
        if kind == "function" and about and pick % 4 == 0 and len(arguments) <= 60:
            follow = AND_ARGUMENTS[pick // 4 % 3], arguments_answer(arguments)
            yield name, talk(WHAT[kind][pick // 4 % 3].format(name), about, *follow)


def talk(*texts: str) -> list[Message]:
    """Make messages of the texts: user and assistant take turns, and the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def main() -> None:
    args = conversation_parser(__doc__, output=HERE, val_fraction=0.05).parse_args()
    found = [(split_of(name, args.val_fraction), messages) for name, messages in conversations()]
    if len(found) < 1000:
        raise ValueError(f"this Python carries no source of its standard library: only {len(found)} questions found")
    write_conversations(args.output, found)


if __name__ == "__main__":
    run_command(main)
