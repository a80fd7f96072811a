"""All that needs a GPU, in one command and within nine minutes: the tests, training, time to nanoGPT's loss, decoding.

    python bench/gpu.py [--nanogpt PATH_TO_A_CLONE] [--input tinyshakespeare.txt] [--minutes=9] [--parts=train,decode]

`make gpu NANOGPT=path INPUT=path` is the same. Each part is a command of its own with a limit of time; training comes
last and fits into what is left. A part that is stopped, that fails or that is left out says so, and the exit status is
1 if one that began is not whole. A dated section of RESULTS.md, the newest first, takes all that was measured.
"""

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import cli  # noqa: E402
from common.files import replacing  # noqa: E402
from data.shakespeare_char.tiny_shakespeare import SHAKESPEARE, tiny_shakespeare  # noqa: E402

PARTS = ("tests", "attention", "decode", "loss", "train")
SPARE = 20  # seconds that training leaves for ending and writing


class Part(NamedTuple):
    """A command, and the seconds after which it is stopped. A part that measures no times may run beside the next."""

    name: str
    title: str
    command: list[str]
    seconds: float
    timed: bool = True


class Ended(NamedTuple):
    """What is known of a part that has run."""

    part: Part
    seconds: float
    status: int | None  # the exit status; None if it was stopped
    output: str
    errors: str


# ---------------------------------------------------------------------------------------------------------------------
# What is to be run


def cuda_tests() -> list[str]:
    """The test files that have tests for a GPU; the others need not be imported."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.cuda" in path.read_text(encoding="utf-8")]


def plan(args: argparse.Namespace) -> tuple[list[Part], list[str]]:
    """The parts, in the order in which they run, and in words what is left out of them."""
    left_out, tiny, device = [], args.tiny, f"--device={args.device}"
    nanogpt = [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    if not nanogpt:
        left_out.append("nanoGPT's rows: give a clone of it with --nanogpt (make gpu NANOGPT=path)")
    text = shakespeare(args.input, left_out) if "loss" in args.parts else None
    workers = ["-n", "4"] if find_spec("xdist") and not tiny else []
    files = ["tests/test_device.py"] if tiny else cuda_tests()
    lengths = "32,64" if tiny else "4096,8192,16384"
    decode = ["--shape=tiny", "--new=2", "--repeat=1"] if tiny else ["--new=64", "--repeat=2"]
    parts = [
        Part("tests", "Tests", ["-m", "pytest", "-q", "-rfE", "-m", "not cuda" if tiny else "cuda", *workers, *files],
             150, timed=False),
        Part("attention", "Memory of attention", ["bench/attention_memory.py", device, f"--lengths={lengths}",
             *(["--one_process"] if tiny else [])], 150, timed=False),
    ]  # fmt: skip
    for shape, seconds in (("124m", 50), ("1.5b", 90)):
        options = decode if tiny else [f"--shape={shape}", *decode]
        parts.append(Part("decode", f"Decoding, {shape}", ["bench/decode.py", device, *options, *nanogpt], seconds))
    if text:
        options = ["--tiny"] if tiny else ["--gpu"]
        command = ["bench/time_to_loss.py", *options, "--short", f"--input={text}", *nanogpt]
        parts.append(Part("loss", "Time to nanoGPT's loss", command, 180))
    options = ["--shapes=tiny", "--no-compile"] if tiny else []
    parts.append(Part("train", "Training", ["bench/gpu_train.py", device, *options, *nanogpt], 60 * args.minutes))
    return [part for part in parts if part.name in args.parts], left_out


def shakespeare(path: Path | None, left_out: list[str]) -> Path | None:
    """Tiny Shakespeare: the file that was given, or the one that is downloaded once; None if it does not come."""
    if path:
        tiny_shakespeare(str(path))
        return path
    try:
        tiny_shakespeare(None)
    except ValueError as error:
        left_out.append(f"the time to nanoGPT's loss: {error} (make gpu INPUT=path)")
        return None
    return SHAKESPEARE


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Running:
    """A part that runs, in a group of processes of its own, so that all of them can be stopped."""

    def __init__(self, part: Part):
        print(f"… {part.title}, for up to {part.seconds:.0f} s: {shown(part.command)}", flush=True)
        self.part, self.begin = part, time.perf_counter()
        self.files = [tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") for _ in range(2)]
        output, errors = self.files
        self.process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=output, stderr=errors, start_new_session=True
        )

    def is_over(self) -> bool:
        """Whether it has ended by itself, or its time has."""
        return self.process.poll() is not None or time.perf_counter() - self.begin > self.part.seconds

    def kill(self) -> None:
        """Kill the process and all that it started."""
        with suppress(ProcessLookupError):  # all of the group have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> Ended:
        """Stop what still runs of it; prints what it has written."""
        seconds, status = time.perf_counter() - self.begin, self.process.poll()
        self.kill()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().strip())
            file.close()
        ended = Ended(self.part, seconds, status, *texts)
        print(ended.output, "" if status == 0 else ended.errors[-3000:], verdict(ended), sep="\n", flush=True)
        return ended


def run_together(parts: list[Part]) -> list[Ended]:
    """Run these parts at the same time, each to its end or to the end of its time."""
    pending, done = [Running(part) for part in parts], []
    try:
        while pending:
            time.sleep(0.1)
            over = [running for running in pending if running.is_over()]
            pending = [running for running in pending if running not in over]
            done += [running.stop() for running in over]
    finally:
        for running in pending:  # Ctrl-C does not reach other groups of processes
            running.kill()
    return done


def run_all(parts: list[Part], minutes: float) -> list[Ended]:
    """Run all parts: those that measure no times together, then the others one by one, training in what is left."""
    begin = time.perf_counter()
    done = run_together([part for part in parts if not part.timed])
    for part in [part for part in parts if part.timed]:
        left = 60 * minutes - (time.perf_counter() - begin)
        if left < SPARE:
            done.append(Ended(part, 0.0, None, "", "left out: no time was left for it"))
            continue
        if part.name == "train":
            part = part._replace(command=[*part.command, f"--seconds={left - SPARE:.0f}"])
        done += run_together([part._replace(seconds=min(part.seconds, left))])
    return done


def shown(command: list[str]) -> str:
    """The command as a user would type it, with the names of files and folders, but not where they lie."""
    words = [re.sub(r"=.*/", "=", word) if word.startswith(("--nanogpt=", "--input=")) else word for word in command]
    return " ".join(["python", *(f'"{word}"' if " " in word else word for word in words)])


def verdict(ended: Ended) -> str:
    """In words, how a part ended."""
    if ended.status is None:
        return f"stopped after {ended.seconds:.0f} s, the end of its time" if ended.seconds else ended.errors
    return f"{ended.seconds:.0f} s" if ended.status == 0 else f"failed after {ended.seconds:.0f} s: {last_line(ended)}"


def last_line(ended: Ended) -> str:
    """Return the last line that a part printed, of its errors if it printed some, or its exit status."""
    return ((ended.errors or ended.output).splitlines() or [f"exit status {ended.status}"])[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Writing it down


def report(done: list[Ended], left_out: list[str], device: str) -> str:
    """The section for RESULTS.md."""
    import torch

    gpu = torch.cuda.get_device_name() if device != "cpu" else "a CPU, at a tiny size"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPU cores, {commit()}"
    lines = [f"## {date.today()} · on a GPU: {gpu}", "", f"`make gpu`, {versions}."]
    lines += [f"Left out: {words}." for words in left_out]
    for ended in done:
        output = ended.output
        if ended.part.name == "tests":  # without the line of dots
            output = "\n".join(re.findall(r"^(?:FAILED .*|ERROR .*|\d+ \w+.* in [\d.]+s.*)$", output, re.MULTILINE))
        lines += ["", f"**{ended.part.title}**: `{shown(ended.part.command)}`; {verdict(ended)}.", "", output]
    return "\n".join(lines).strip() + "\n"


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = [*git, "status", "--porcelain", "--", ".", ":!RESULTS.md"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"
    return f"commit {head.strip()}{' with changes' if changed.strip() else ''}"


def with_section(results: str, section: str) -> str:
    """The text of RESULTS.md with the section below its introduction, before all older ones."""
    intro, heading, rest = results.partition("\n## ")
    return f"{intro.rstrip()}\n\n{section}{heading}{rest}".lstrip()


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--input", type=Path, help="tinyshakespeare.txt, instead of downloading it")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of %(default)s (the default)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "RESULTS.md", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu is for --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a check that all of it runs")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if unknown := [name for name in args.parts if name not in PARTS]:
        raise ValueError(f"--parts takes {', '.join(PARTS)}, not {', '.join(unknown)}")
    if args.device == "cpu" and not args.tiny:
        raise ValueError("--device=cpu takes --tiny: what is measured here needs a GPU")
    args.nanogpt, args.input = (path and path.expanduser().resolve() for path in (args.nanogpt, args.input))
    return args


def main() -> None:
    args = parse()
    import torch  # after the arguments, as it takes seconds

    if args.device == "cuda" and not torch.cuda.is_available():
        why = "" if torch.version.cuda or torch.version.hip else " (this PyTorch was built without CUDA)"
        raise ValueError(f"this needs a CUDA GPU, and PyTorch finds none on this machine{why}")
    parts, left_out = plan(args)
    for words in left_out:
        print(f"left out: {words}", flush=True)
    done = run_all(parts, args.minutes)
    old = args.results.read_text(encoding="utf-8") if args.results.exists() else ""
    with replacing(args.results) as file:
        file.write(with_section(old, report(done, left_out, args.device)))
    print(f"written: {args.results}")
    broken = [ended.part.title for ended in done if ended.status != 0]
    if broken:
        raise ValueError(f"not whole: {', '.join(broken)}")


if __name__ == "__main__":
    cli.run_command(main)
