"""Prepare your own text, from files, from folders (with their subfolders), or from standard input (-).

  .txt .md .rst            plain text: one document, or many with --document_separator
  .jsonl .json             a document per line, or per item of a list: strings, or objects with a field "text"
  .parquet                 a document per row, in a column "text" (needs pip install pyarrow)
  .gz .bz2 .xz .zst        after the first two kinds, as in book.txt.gz (.zst needs pip install zstandard)

--text_field names another field, --text_suffix further text files (--text_suffix .py .log). Text is UTF-8, unless its
byte order mark says otherwise. Every document ends with the end-of-text token. Files may be larger than memory.

Validation is the end of a large text file. Small text files, such as a folder of articles, and all other documents go
whole to one split, by a hash of their text. If it is interrupted, the same command goes on where it stopped. --part
and --join spread a corpus over machines (docs/scale.md). Examples:

  python data/text/prepare.py --input book1.txt book2.txt.gz --output data/books
  python data/text/prepare.py --input articles/ --output data/articles --vocab_size 4096
  python data/text/prepare.py --input web/*.jsonl --output data/web --tokenizer gpt2 --val_fraction 0.001
  python data/text/prepare.py --input stories.txt --output data/stories --document_separator '<|endoftext|>'
"""

import sys
from os.path import expanduser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from text.documents import add_reading_options
from text.prepare import add_part_options, corpus_parser, prepare_files


def main() -> None:
    parser = corpus_parser(__doc__, output=None, tokenizer="char", val_fraction=0.01)
    text = "files, folders or - (standard input), in this order"
    parser.add_argument("--input", nargs="+", type=expanduser, metavar="FILE", help=text)
    add_reading_options(parser)
    add_part_options(parser)
    prepare_files(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
