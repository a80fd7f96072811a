"""Prepare FineWeb-Edu's 10-billion-token sample: web pages selected for educational value.

It is streamed from the Hugging Face Hub (HuggingFaceFW/fineweb-edu), which needs pip install datasets, or read from
your own files: --input *.parquet (pip install pyarrow). For a trial, --max_documents takes only the first documents.
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
