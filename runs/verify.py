"""Verify every file of runs and of prepared data (corpora, conversations, pairs) against its checksum.

    python -m runs.verify out/pydocs data/pydocs

Training verifies the checkpoint that it resumes from, and a corpus of less than 2^28 tokens; sampling verifies the
checkpoint that it reads. This command reads all of it, and names each file that is damaged.
"""

from common import cli  # first: it makes Ctrl-C one line even while the modules below are imported

# isort: split

import sys
from collections.abc import Callable
from pathlib import Path

from common.files import read_json
from runs.checkpoint import read_state, verify
from runs.run import Run
from text.conversations import FORMAT as CONVERSATIONS
from text.conversations import open_conversations
from text.corpus import META, Corpus
from text.pairs import FORMAT as PAIRS
from text.pairs import open_pairs
from training.log import check_log, read_log


def problems_of_run(folder: Path) -> list[str]:
    """Return what is wrong with a run: its config, tokenizer, checkpoints, log, and its base if it has LoRA."""
    try:
        run = Run.open(folder)
    except ValueError as error:
        return [str(error)]
    found = problems(lambda: run.tokenizer)
    seal = None
    for checkpoint in run.checkpoints():
        wrong = problems(lambda path=checkpoint: verify(path)) or problems(lambda path=checkpoint: read_state(path))
        found += wrong
        seal = seal if wrong else read_state(checkpoint)["log"]
    found += problems(lambda: check_log(folder, seal))  # of the newest checkpoint, which knows the most of it
    if not run.checkpoints() and (steps := evaluated_steps(folder)):
        found.append(f"{folder} has no checkpoint, and its log.jsonl tells of {steps:,} steps")
    return found + (problems_of_run(folder / "base") if run.lora else [])


def evaluated_steps(folder: Path) -> int:
    """Return the last step that the log has an evaluation of, at each of which a checkpoint is saved; 0 if none."""
    return max((event["step"] for event in read_log(folder)[1]), default=0)


def problems_of_data(folder: Path) -> list[str]:
    """Return what is wrong with prepared data of any kind: a corpus, conversations, or pairs."""
    try:
        kind = dict(read_json(folder / META, "a data set")).get("format")
    except (ValueError, TypeError):
        kind = None  # the reader of a corpus says what is wrong with its meta.json
    if kind == PAIRS["format"]:
        return problems(lambda: open_pairs(folder))
    if kind == CONVERSATIONS["format"]:
        return problems(lambda: open_conversations(folder))
    return problems(lambda: Corpus(folder).verify()) + problems(lambda: Corpus(folder).tokenizer)


def problems(check: Callable[[], object]) -> list[str]:
    """Return the message of the ValueError that the check raises, in a list; empty if it raises none."""
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or any(str(folder).startswith("-") for folder in folders):
        print("usage: python -m runs.verify FOLDER ...      (runs and prepared data)")
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    damaged = 0
    for folder in folders:
        if (folder / META).exists():
            found = problems_of_data(folder)
        elif (folder / "train.jsonl").exists():
            found = [f"{folder} has no {META}, and so no checksums (labelled texts have none)"]
        else:
            found = problems_of_run(folder)
        for problem in dict.fromkeys(found):  # a damaged meta.json is found twice
            print(f"error: {problem}", file=sys.stderr)
        damaged += bool(found)
        if not found:
            print(f"{folder}: intact")
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    cli.run_command(main)
