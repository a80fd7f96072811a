"""Prepare tiny Shakespeare with a token per character: 1.1 million characters, 65 different ones.

The tokens are those of nanoGPT: the first nine tenths are training, the rest is validation, and there is no end-of-text
token. The file (1.1 MB) is downloaded once and kept beside this script. data/shakespeare has a BPE vocabulary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from data.shakespeare_char.tiny_shakespeare import VAL_FRACTION, shakespeare_parser, tiny_shakespeare
from text.corpus import write_corpus
from text.prepare import report
from text.tokenizer import CharTokenizer


def main() -> None:
    args = shakespeare_parser(__doc__, Path(__file__).resolve().parent).parse_args()
    documents = tiny_shakespeare(args.input)
    tokenizer = CharTokenizer("".join(text for _, text in documents), eot=False)
    report(args.output, write_corpus(args.output, documents, tokenizer), tokenizer, VAL_FRACTION)


if __name__ == "__main__":
    run_command(main)
