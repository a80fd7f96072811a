"""Prepare tiny Shakespeare, character by character: 1.1 million characters, 65 different ones.

The same tokens as nanoGPT's: the first nine tenths are train, the rest val, there is no end-of-text token. The file is
downloaded once, 1.1 MB, and kept beside this script.
"""

import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.cli import run
from common.dataset import write_corpus
from common.prepare import report
from common.tokenizer import CharTokenizer

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
KEPT = HERE / "input.txt"


def download() -> bytes:
    """The file from the network; ValueError when it does not come, or is not the one we know."""
    try:
        with urllib.request.urlopen(URL, timeout=20) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            content = b""
            with tqdm(total=size, unit="B", unit_scale=True, desc="download", disable=None) as bar:
                while block := response.read(1 << 16):
                    content += block
                    bar.update(len(block))
    except OSError as error:
        raise ValueError(f"no download ({error}): get the file from {URL} and pass it with --input FILE") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(
            f"what {URL} sent is not tiny Shakespeare (its SHA-256 differs): pass a copy with --input FILE"
        )
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="FILE", help="read the text from FILE instead of downloading it")
    parser.add_argument("--output", default=HERE, metavar="DIR", help="corpus folder; default: %(default)s")
    args = parser.parse_args()

    if args.input:
        content = Path(args.input).read_bytes()
    elif KEPT.exists():
        content = KEPT.read_bytes()
    else:
        content = download()
        KEPT.write_bytes(content)
    if hashlib.sha256(content).hexdigest() != SHA256:
        print(f"note: {args.input or KEPT} is not the usual tiny Shakespeare (its SHA-256 differs)", file=sys.stderr)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.input or KEPT}: not UTF-8 text (byte {error.start}: {error.reason})") from None

    n = int(len(text) * 0.9)
    documents = [("train", text[:n]), ("val", text[n:])]
    report(args.output, write_corpus(args.output, documents, CharTokenizer(text, eot=False)))


if __name__ == "__main__":
    run(main)
