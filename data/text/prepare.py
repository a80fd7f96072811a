"""Prepare your own text: .txt, .jsonl (field "text") or .parquet (column "text") files.

A .txt file is one document, the end of which is kept for validation; the documents of the other kinds go to train or
val one by one, by a hash of their text. Every document ends with the end-of-text token. Files larger than memory are
fine. For example:

  python data/text/prepare.py --input book1.txt book2.txt --output data/books
  python data/text/prepare.py --input web/*.jsonl --output data/web --tokenizer gpt2 --val_fraction 0.001
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run
from text.documents import read_documents
from text.prepare import corpus_parser, prepare


def main() -> None:
    parser = corpus_parser(__doc__, output=None, tokenizer="char", val_fraction=0.01)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="what to read, in this order")
    args = parser.parse_args()
    read_documents(args.input, args.val_fraction)  # refuses a wrong name now, before anything is read
    # A .parquet file is compressed, and then nobody knows how much text there is to come.
    known = not any(path.endswith(".parquet") for path in args.input)
    total_bytes = sum(map(os.path.getsize, args.input)) if known else None
    prepare(lambda: read_documents(args.input, args.val_fraction), args, total_bytes)


if __name__ == "__main__":
    run(main)
