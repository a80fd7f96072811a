"""Prepare OpenWebText, the open reproduction of GPT-2's training text (8 million documents, 9 billion tokens).

It is streamed from the Hugging Face Hub (Skylion007/openwebtext), which needs pip install datasets, or read from
your own files: --input *.parquet (pip install pyarrow). For a trial, --max_documents takes only the first documents.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from text.prepare import prepare_from_hub


def main() -> None:
    prepare_from_hub(__doc__, Path(__file__).resolve().parent, "Skylion007/openwebtext", None)


if __name__ == "__main__":
    run_command(main)
