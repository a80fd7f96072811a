"""Prepare tiny Shakespeare with a BPE vocabulary that is learned from its training split.

Training has the first nine tenths, as in data/shakespeare_char, so bits per byte are comparable. Each split ends with
the end-of-text token. The file (1.1 MB) is downloaded once, and shared with data/shakespeare_char.
"""

import sys
from os.path import expanduser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from data.shakespeare_char.tiny_shakespeare import VAL_FRACTION, shakespeare_parser, tiny_shakespeare
from text.corpus import write_corpus
from text.prepare import add_vocab_size, learned_tokenizer, report
from text.tokenizer import tokenizer_from_name


def main() -> None:
    parser = shakespeare_parser(__doc__, Path(__file__).resolve().parent)
    either = parser.add_mutually_exclusive_group()
    add_vocab_size(either, 1024)
    text = "a saved tokenizer, a .bpe file, or a tiktoken encoding's name"
    either.add_argument("--tokenizer", type=expanduser, metavar="T", help=text)
    args = parser.parse_args()
    documents = tiny_shakespeare(args.input)
    if args.tokenizer:
        tokenizer = tokenizer_from_name(args.tokenizer, (text for _, text in documents))
    else:
        tokenizer = learned_tokenizer(documents, args.vocab_size)
    report(args.output, write_corpus(args.output, documents, tokenizer), tokenizer, VAL_FRACTION)


if __name__ == "__main__":
    run_command(main)
