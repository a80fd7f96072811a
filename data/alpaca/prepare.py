"""Prepare Stanford Alpaca: 52,002 instructions with answers, downloaded from its authors (23 MB) or read from --input.

Instructions with an empty answer (there are a few) are left out. On several GPUs, the number of processes must divide
gradient_accumulation_steps, which is 4 in config/sft_alpaca.py:

  python data/alpaca/prepare.py
  python finetune.py config/sft_alpaca.py --init_from=out/x
  torchrun --nproc_per_node=4 finetune.py config/sft_alpaca.py --init_from=out/x       on 4 GPUs
"""

import json
import sys
from os.path import expanduser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from common.files import write_whole
from text.conversations import conversation_parser, prepare_conversations
from text.prepare import download

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
INSTRUCTIONS = 52_002


def check_whole(content: bytes, source: str) -> str:
    """Return the text of alpaca_data.json. Raises ValueError if it is not the whole list of instructions."""
    try:
        text = content.decode()
        rows = json.loads(text)
    except ValueError:  # neither UTF-8 nor JSON
        rows = None
    if not isinstance(rows, list) or len(rows) != INSTRUCTIONS:
        found = f"holds {len(rows):,} instructions" if isinstance(rows, list) else "is not a whole JSON list"
        advice = (
            f"delete it if it is on your disk and run this again, or get {URL} yourself and pass it by --input FILE"
        )
        raise ValueError(f"{source} {found} instead of {INSTRUCTIONS:,} instructions: {advice}")
    return text


def alpaca_data() -> Path:
    """Return the path of alpaca_data.json; download it in the first call. Raises ValueError if it is not whole."""
    path = HERE / "alpaca_data.json"
    if path.exists():
        check_whole(path.read_bytes(), str(path))
    else:
        write_whole(path, check_whole(download(URL), f"the download of {URL}").removesuffix("\n"))
    return path


def main() -> None:
    parser = conversation_parser(__doc__, output=HERE, val_fraction=0.02, reads=True)
    parser.add_argument(
        "--input", type=expanduser, metavar="FILE", help="read FILE instead of downloading alpaca_data.json"
    )
    args = parser.parse_args()
    prepare_conversations(args, [args.input or alpaca_data()], skip_empty=True)


if __name__ == "__main__":
    run_command(main)
