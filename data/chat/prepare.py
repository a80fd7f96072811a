"""Prepare your own conversations: .jsonl files (one per line) or .json files (a list), in either of two forms.

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}      system may come first
  {"instruction": "...", "input": "...", "output": "..."}                                          the Alpaca form

A hash of the first user message decides what is for validation, so that the same question is never on both sides. For
example:

  python data/chat/prepare.py --input mine.jsonl --output data/mine
  python finetune.py --dataset=mine --init_from=out/x --out_dir=out/mine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run
from text.chat import read_conversations
from text.prepare import by_question, conversation_parser, write_conversations


def main() -> None:
    parser = conversation_parser(__doc__, output=None, val_fraction=0.05)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="what to read, in this order")
    args = parser.parse_args()
    conversations = (messages for path in args.input for messages in read_conversations(path))
    write_conversations(args.output, by_question(conversations, args.val_fraction))


if __name__ == "__main__":
    run(main)
