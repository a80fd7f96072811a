"""Speed of learning a BPE vocabulary, against rustbpe and Hugging Face tokenizers, and of encoding, against tiktoken.

    python bench/bpe.py --input FILES [--sizes 5,12,100] [--vocab_sizes 4096,32768] [--repeat 3]

All learn from the first N megabytes of the files, in the same documents of about 100 kB, with the same pattern and
vocabulary size. Each run is a process of its own. The table shows the median time without imports, and the peak memory
including child processes. Peers that are not installed are left out (pip install rustbpe tokenizers).
"""

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# rustbpe and tokenizers lack some possessive quantifiers; without these, the pattern makes the same chunks, more slowly
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def learn_ours(documents: list[str], vocab_size: int) -> None:
    """Learn a vocabulary with bpe.py."""
    import bpe

    bpe.train(documents, vocab_size, "gpt4", special_tokens=())


def learn_rustbpe(documents: list[str], vocab_size: int) -> None:
    """Learn a vocabulary with rustbpe."""
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(documents, vocab_size=vocab_size, pattern=GPT4)


def learn_tokenizers(documents: list[str], vocab_size: int) -> None:
    """Learn a vocabulary with Hugging Face's tokenizers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT4.replace("?+", "?").replace("++", "+")), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)


LEARNERS = {"ours": learn_ours, "rustbpe": learn_rustbpe, "tokenizers": learn_tokenizers}


def documents_of(files: list[str], megabytes: int) -> list[str]:
    """Return the first megabytes of the files, cut into documents at line breaks."""
    documents, wanted = [], megabytes * 1_000_000
    for path in files:
        with open(path, encoding="utf-8", errors="replace") as file:
            while wanted > 0 and (text := file.read(min(wanted, 100_000))):
                documents.append(text + file.readline())
                wanted -= len(documents[-1])
    return documents


def measure(name: str, files: list[str], megabytes: int, vocab_size: int, pipe) -> None:
    """Send the seconds and the MiB that learning takes through the pipe; None if the files are too short."""
    documents = documents_of(files, megabytes)
    if sum(map(len, documents)) < 0.99e6 * megabytes:
        pipe.send(None)
        return
    LEARNERS[name](["a few words for a start, so that imports are done"], 260)
    begin = time.perf_counter()
    LEARNERS[name](documents, vocab_size)
    seconds = time.perf_counter() - begin
    memory = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    pipe.send((seconds, sum(memory) / 1024))


def compare_encoding(files: list[str]) -> None:
    """Print the speed of encoding 10 MB with 50,000 tokens: tiktoken itself, and ours."""
    import tiktoken

    import bpe

    documents = documents_of(files, 10)
    ours = bpe.train(documents, 50_000, special_tokens=())
    theirs = tiktoken.Encoding("peer", pat_str=bpe.PATTERNS["gpt4"], mergeable_ranks=ours.ranks, special_tokens={})
    ways = {
        "tiktoken, a document at a time": lambda: [theirs.encode_ordinary(text) for text in documents],
        "ours, a document at a time": lambda: [ours.encode(text) for text in documents],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, encode in ways.items():
            begin = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        print(f"encoding, {name}: {sum(map(len, documents)) / 1e6 / statistics.median(times):.1f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="UTF-8 text files")
    parser.add_argument("--sizes", default="5,12,100", help="megabytes of text")
    parser.add_argument("--vocab_sizes", default="4096,32768")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    names = [name for name in LEARNERS if name == "ours" or importlib.util.find_spec(name)]
    print(
        f"{'MB':>4} {'vocabulary':>10}  "
        + "  ".join(f"{name:>10} s {'MiB':>6}" for name in names)
        + "   slower than ours"
    )
    context = multiprocessing.get_context("spawn")
    for megabytes in map(int, arguments.sizes.split(",")):
        for vocab_size in map(int, arguments.vocab_sizes.split(",")):
            runs: dict[str, list] = {name: [] for name in names}
            for _ in range(arguments.repeat):
                for name in names:
                    here, there = context.Pipe()
                    process = context.Process(
                        target=measure, args=(name, arguments.input, megabytes, vocab_size, there)
                    )
                    process.start()
                    there.close()
                    runs[name].append(here.recv())
                    process.join()
            if None in runs["ours"]:
                print(f"{megabytes:4} MB: the files hold less text than that")
                continue
            seconds = {name: statistics.median(run[0] for run in runs[name]) for name in names}
            memory = {name: max(run[1] for run in runs[name]) for name in names}
            cells = "  ".join(f"{seconds[name]:12.2f} {memory[name]:6.0f}" for name in names)
            ratios = ", ".join(f"{name} {seconds[name] / seconds['ours']:.2f}x" for name in names[1:])
            print(f"{megabytes:4} {vocab_size:10,}  {cells}   {ratios}", flush=True)
    compare_encoding(arguments.input)


if __name__ == "__main__":
    main()
