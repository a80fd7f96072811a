"""Prepare your own pairs of source and target for train.py: two text files that belong together line for line, one
file with source, tab, target in each line, or JSON lines with {"source": ..., "target": ...}.

A hash of the source puts one pair in fifty into validation, so no source is in both splits. A BPE vocabulary is learned
from both sides of the training pairs. For example:

  python data/pairs/prepare.py --input corpus.en corpus.zh --output data/en_zh
  python train.py config/dates.py --dataset=en_zh --out_dir=out/en_zh --max_iters=5000
"""

import sys
from os.path import expanduser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run_command
from text.documents import split_of
from text.pairs import Pair, pair_parser, prepare_pairs, read_pairs
from text.prepare import check_val_fraction


def main() -> None:
    parser = pair_parser(__doc__, None)
    text = "two files with a line for a line, or one file of pairs"
    parser.add_argument("--input", nargs="+", required=True, type=expanduser, metavar="FILE", help=text)
    text = "leave out pairs with an empty side, and count them"
    parser.add_argument("--skip_bad", action="store_true", help=text)
    args = parser.parse_args()
    check_val_fraction(args.val_fraction)
    pairs: dict[str, list[Pair]] = {"train": [], "val": []}
    left_out = []
    for _, pair in read_pairs(args.input, left_out if args.skip_bad else None):
        pairs[split_of(pair[0], args.val_fraction)].append(pair)
    prepare_pairs(args, pairs, sources=args.input)
    if left_out:
        print(f"pairs left out, because a side is empty: {len(left_out):,}, first {left_out[0]}")


if __name__ == "__main__":
    run_command(main)
