"""Prepare FineWeb-Edu's 10-billion-token sample: web pages chosen for what they teach.

It is streamed from the Hugging Face Hub (HuggingFaceFW/fineweb-edu), which needs pip install datasets, or read from
files you have: --input *.parquet (pip install pyarrow). With --max_documents a first part is enough to try things out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from text.prepare import prepare_from_hub


def main() -> None:
    prepare_from_hub(__doc__, Path(__file__).resolve().parent, "HuggingFaceFW/fineweb-edu", "sample-10BT")


if __name__ == "__main__":
    run_command(main)
