"""Kill training, damage its files and fill its disk, and count what is lost: nothing, if all is well.

    python bench/chaos.py [--kills=50] [--rank_kills=20] [--flips=300] [--disks=10] [--seed=1]        (make chaos)

- kills: SIGKILL at a random moment, a third of them while a checkpoint is being written; each is followed by resuming,
  which is killed again, until a run ends. Its weights, optimizer state and log must be, bit for bit, those of the run
  that was never killed. rank_kills: the same for one of two processes of torchrun.
- flips: one byte of one file of a run or a corpus is changed; `python -m runs.verify` must name that file.
- disks: resuming on a disk that becomes full must end with one line of advice, leave all checkpoints whole, and go on
  when there is room. The disk is a tmpfs where mounting is permitted; elsewhere the size of files is limited.

Prints a table for RESULTS.md; the exit status is 1 if anything was lost.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from common import cli  # noqa: E402
from runs import verify  # noqa: E402
from runs.checkpoint import list_checkpoints  # noqa: E402
from text.corpus import write_corpus  # noqa: E402
from text.tokenizer import CharTokenizer  # noqa: E402

STEPS, WORDS = 240, "the quick brown fox jumps over a lazy dog and sleeps".split()
SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "mlp_dim": 32, "block_size": 16, "dropout": 0.1, "batch_size": 4,
    "gradient_accumulation_steps": 2, "learning_rate": 0.01, "max_iters": STEPS, "eval_interval": 8, "log_interval": 1,
    "eval_iters": 4, "device": '"cpu"',
}  # fmt: skip
AIMS = SAVING, TRAINING, STARTING = ("while saving", "while training", "while starting")
TIMED = ("seconds", "tokens_per_second", "mfu")  # what the clock decides


class Forked:
    """A copy of this process that runs train.py's command: a start without the seconds that importing PyTorch takes."""

    def __init__(self, arguments: list[str]):
        self.pid, self.returncode = os.fork(), None
        if self.pid:
            return
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        torch.set_num_threads(1)
        sys.argv, code = ["train.py", *arguments], 1
        try:
            cli.run_command(train.main)
            code = 0
        finally:
            os._exit(code)

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        """The exit status if the process has ended, else None."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, flags)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def communicate(self) -> None:
        """Wait for the end."""
        self.poll(0)


class Place:
    """A folder with a corpus and runs, and how to train there."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.config, self.corpus = folder / "config.py", folder / "corpus"
        self.config.write_text("".join(f"{key} = {value}\n" for key, value in SETTINGS.items()))
        texts = [" ".join(self.random.choices(WORDS, k=12)) + "." for _ in range(300)]
        documents = [("val" if i % 10 == 0 else "train", text) for i, text in enumerate(texts)]
        write_corpus(self.corpus, documents, CharTokenizer("".join(WORDS) + " .", eot=True), workers=1)

    def arguments(self, run: Path) -> list[str]:
        """Those of train.py: to train, or to resume where there is a run."""
        begin = [str(self.config), f"--dataset={self.corpus}"]
        return [f"--out_dir={run}", *(["--init_from=resume"] if (run / "config.json").exists() else begin)]

    def start(self, run: Path, processes: int, *options: str, limit: int | None = None) -> subprocess.Popen:
        """Start training or resuming; limit: the most bytes of a file."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), "train.py", *self.arguments(run), *options],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip

    def train(self, name: str, processes: int = 1, *options: str) -> Path:
        """Train to the end."""
        process = self.start(self.folder / name, processes, *options)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"training {name} failed: {errors}")
        return self.folder / name


def result(run: Path) -> tuple:
    """What a run came to: its log without times, and its last checkpoint."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = list_checkpoints(run)[-1]
    files = [(last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    return last.name, files, [{k: v for k, v in event.items() if k not in TIMED} for event in events]


def problems(folder: Path) -> tuple[int, str]:
    """The exit status and the errors of `python -m runs.verify folder`, run in this process."""
    errors, argv = io.StringIO(), sys.argv
    sys.argv = ["verify", str(folder)]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            verify.main()
    except SystemExit as ending:
        return int(ending.code or 0), errors.getvalue()
    finally:
        sys.argv = argv
    return 0, ""


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def children(pid: int) -> list[int]:
    """The processes that the process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(place: Place, process: subprocess.Popen | Forked, run: Path, processes: int, aim: str) -> str:
    """Kill training, or one of its ranks, at a random moment of the kind `aim`; returns what kind it was."""
    log = run / "log.jsonl"
    size = log.stat().st_size if log.exists() else 0

    def began() -> bool:  # the log grows, or it has been rewound: training is on its way
        return log.exists() and log.stat().st_size != size

    while process.poll() is None and aim != STARTING and not began():
        time.sleep(0.001)
    until = time.monotonic() + place.random.uniform(0, 0.6 if aim != STARTING else 4.0)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if aim == SAVING:
        while process.poll() is None and not any(run.glob("checkpoints/.step_*.tmp")):
            time.sleep(0.0005)
        time.sleep(place.random.uniform(0, 0.002))
    if process.poll() is not None:
        return "after the end"
    victims = children(process.pid) if processes > 1 else [process.pid]
    victim = place.random.choice(victims or [process.pid])
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(victim, signal.SIGKILL)
    return aim


def kills(place: Place, count: int, processes: int) -> list[str]:
    """Kill and resume `count` times; returns the row of the table."""
    if not count:
        return []
    whole = result(place.train(f"whole{processes}", processes))
    print(f"{processes} processes: the run that is never stopped is done", flush=True)
    moments: Counter[str] = Counter()
    half_saved = completed = wrong = 0
    while moments.total() < count:
        run = place.folder / f"killed{processes}"
        shutil.rmtree(run, ignore_errors=True)
        while not run.exists() or not list_checkpoints(run) or list_checkpoints(run)[-1].name != whole[0]:
            aim, before = place.random.choices(AIMS, (7, 11, 2))[0], set(run.glob("checkpoints/.step_*.tmp"))
            whole_start = processes > 1 or aim == STARTING
            process = place.start(run, processes) if whole_start else Forked(place.arguments(run))
            if moments.total() < count:
                moment = kill(place, process, run, processes, aim)
                moments.update([moment] if moment != "after the end" else [])
            process.communicate()
            half_saved += not before.issuperset(run.glob("checkpoints/.step_*.tmp"))
        completed += 1
        same = result(run) == whole and problems(run)[0] == 0
        wrong += not same
        print(f"{processes} processes: {moments.total()} kills, run {completed} {'is' if same else 'IS NOT'} "
              "that of never stopping", flush=True)  # fmt: skip
        if not same:
            shutil.copytree(run, place.folder / f"wrong{processes}.{completed}")
    told = ", ".join(f"{n} {moment}" for moment, n in sorted(moments.items()))
    who = "one process" if processes == 1 else f"one of {processes} processes"
    left = f"{told}; {half_saved} left a half-written checkpoint"
    return [f"| SIGKILL of {who}, resumed | {count} | {left}; {completed} runs completed | {wrong} |"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flips(place: Place, count: int) -> list[str]:
    """Change one byte at a time, but not in loss.svg, which is drawn from the log; returns the row of the table."""
    if not count:
        return []
    run = place.folder / "whole1"
    run = run if run.exists() else place.train("whole1")
    files = [path for top in (run, place.corpus) for path in sorted(top.rglob("*"))]
    files = [path for path in files if path.is_file() and not path.name.startswith(".") and path.suffix != ".svg"]
    same = missed = 0
    for number in range(count):
        path = place.random.choice(files) if number >= len(files) else files[number]
        content = path.read_bytes()
        changed = bytearray(content)
        changed[place.random.randrange(len(content))] ^= place.random.randrange(1, 256)
        path.write_bytes(changed)
        status, errors = problems(run if path.is_relative_to(run) else place.corpus)
        path.write_bytes(content)
        if status != 1 or str(path) not in errors:
            if same_content(content, bytes(changed)):
                same += 1
            else:
                missed += 1
                where = next(i for i, (a, b) in enumerate(zip(content, changed, strict=True)) if a != b)
                print(f"missed: {path.name}, byte {where}: {content[where]} → {changed[where]}", flush=True)
    harmless = f", {same} of which left a JSON file's content as it was" if same else ""
    return [f"| bytes changed in {len(files)} files | {count} | {count - same - missed} named{harmless} | {missed} |"]


def same_content(before: bytes, after: bytes) -> bool:
    """Whether both are JSON of the same content: 1e-05 may become 1E-05, or a space a line break."""
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@contextlib.contextmanager
def small_disk(folder: Path):
    """Mount a tmpfs on the folder, and yield a function that sets its size; None where that is not permitted."""
    folder.mkdir()

    def mount(*arguments: str) -> bool:
        return not subprocess.run(["mount", *arguments], capture_output=True).returncode

    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)):
        yield None
        return
    try:
        yield lambda size: mount("-o", f"remount,size={size}", str(folder))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disks(place: Place, count: int) -> list[str]:
    """Resume with ever more room; returns the row of the table."""
    if not count:
        return []
    whole, half = place.folder / "whole1", place.folder / "half"
    whole = whole if whole.exists() else place.train("whole1")
    shutil.rmtree(half, ignore_errors=True)
    place.train("half", 1, f"--max_iters={STEPS // 2}", "--lr_schedule=constant")
    reference = place.folder / "reference"
    shutil.copytree(half, reference, dirs_exist_ok=True)
    place.train("reference", 1, f"--max_iters={STEPS}")
    expected, wrong, full = result(reference), 0, 0
    checkpoint = sum(path.stat().st_size for path in list_checkpoints(half)[-1].iterdir())
    with small_disk(place.folder / "disk") as resize:
        for number in range(count):
            run, room = place.folder / "disk" / "run", int(checkpoint * 1.1 * number / count)
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(half, run)
            if resize:
                used = shutil.disk_usage(run).used
                resize(-(-(used + room) // 4096) * 4096)
            limit = None if resize else 500 + room // 3
            process = place.start(run, 1, f"--max_iters={STEPS}", limit=limit)
            _, errors = process.communicate()
            if resize:
                resize("64m")
            told = [line for line in errors.splitlines() if line.startswith("error: ")]
            plain = len(told) == 1 and ("make room" in told[0] or "free some space" in told[0])
            full += process.returncode != 0
            intact = problems(run)[0] == 0 and list_checkpoints(run)
            place.start(run, 1, f"--max_iters={STEPS}").communicate()
            good = (not process.returncode or plain) and intact and result(run) == expected
            wrong += not good
            if not good:
                print(f"disk {number}: status {process.returncode}, {errors[-500:]!r}, {problems(run)}", flush=True)
    kind = "tmpfs" if resize else "limit of the size of files"
    return [f"| full disk ({kind}), resumed | {count} | {full} ended with one line of advice | {wrong} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 50), ("rank_kills", 20), ("flips", 300), ("disks", 10), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given, begin = parser.parse_args(), time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C tidies up, instead of ending at once
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), given.seed)
        rows = kills(place, given.kills, 1) + flips(place, given.flips)
        rows += disks(place, given.disks) + kills(place, given.rank_kills, 2)
    print("\n| what happened | times | found | lost |\n|---|---|---|---|", *rows, sep="\n")
    print(f"\n{(time.monotonic() - begin) / 60:.0f} minutes, seed {given.seed}")
    sys.exit(0 if all(row.endswith("| 0 |") for row in rows) else 1)


if __name__ == "__main__":
    main()
