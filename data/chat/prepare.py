"""Prepare your own conversations for finetune.py, from JSON lines, a JSON list (both may be .gz) or .parquet.

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}          OpenAI
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}              ShareGPT
  {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}  Alpaca
  {"prompt": "...", "completion": "..."}                                                               pairs
  {"data": ["question", "answer", "question", "answer"]}                                               UltraChat

Similar forms are read too: {"instruction", "context", "response"}, {"question", "answer"}, a list of text parts as
content, a system message beside the messages. An assistant message with "weight": 0 is read, but not trained on.

A hash of the first user message chooses the validation conversations, so no question is in both splits; or --val
names files for validation. For example:

  python data/chat/prepare.py --input mine.jsonl --output data/mine
  python finetune.py --dataset=mine --init_from=out/x --out_dir=out/mine
"""

import sys
from os.path import expanduser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from text.conversations import conversation_parser, prepare_conversations


def main() -> None:
    parser = conversation_parser(__doc__, output=None, val_fraction=0.05, reads=True)
    text = "files to read, in this order; - for standard input"
    parser.add_argument("--input", nargs="+", required=True, type=expanduser, metavar="FILE", help=text)
    args = parser.parse_args()
    prepare_conversations(args, args.input)


if __name__ == "__main__":
    run_command(main)
