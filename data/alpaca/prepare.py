"""Prepare Stanford Alpaca: 52,002 instructions with answers, downloaded from its authors (23 MB), or read from --input.

python data/alpaca/prepare.py
torchrun --nproc_per_node=8 finetune.py config/sft_alpaca.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run
from text.chat import read_conversations
from text.prepare import by_question, conversation_parser, download, write_conversations

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


def main() -> None:
    parser = conversation_parser(__doc__, output=HERE, val_fraction=0.02)
    parser.add_argument("--input", metavar="FILE", help="read alpaca_data.json from FILE instead of downloading it")
    args = parser.parse_args()
    path = Path(args.input or HERE / "alpaca_data.json")
    if not args.input and not path.exists():
        path.write_bytes(download(URL))
    found = list(by_question(read_conversations(path, skip_empty=True), args.val_fraction))
    write_conversations(args.output, found)


if __name__ == "__main__":
    run(main)
