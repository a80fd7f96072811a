"""Files that are there whole or not at all, locks on folders, JSON, and an even choice."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.files import checksum, locked, making, read_json, replacing, write_json, write_whole
from common.spread import evenly

ROOT = Path(__file__).parent.parent


@contextmanager
def longest_file(size: int):
    """Within this block no file of this process can grow past `size` bytes, as on a disk that is full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_of_many_writers_one_wins_whole_and_nothing_else_is_left(tmp_path):
    texts = [letter * 300_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as writers:
        for _ in range(5):
            list(writers.map(lambda text: write_whole(tmp_path / "x", text), texts))
            assert (tmp_path / "x").read_text().removesuffix("\n") in texts
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_that_open_gives(tmp_path, umask):
    previous = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("")
        (tmp_path / "old").write_text("")
        (tmp_path / "old").chmod(0o604)
        for name in ("new", "old"):
            write_whole(tmp_path / name, "text")
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"plain": 0o666 & ~umask, "new": 0o666 & ~umask, "old": 0o604}


def test_the_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), sorted(os.listdir(tmp_path))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(tmp_path / "x", "text")
    (of_file, before), (of_folder, after) = synced
    assert (of_file, of_folder) == (False, True) and "x" not in before and after == ["x"]


def test_a_full_disk_names_the_file_and_what_to_do_and_keeps_the_old_content(tmp_path):
    write_whole(tmp_path / "x", "old")
    with longest_file(1000), pytest.raises(OSError) as told:
        write_whole(tmp_path / "x", "new" * 1000)
    assert str(told.value).startswith(f"cannot write {tmp_path / 'x'}: ")
    assert str(told.value).endswith("free some space there, or choose another place, and run the command again")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old\n")]
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device; free some space there"):
        write_whole("/dev/full", "text")


def test_what_cannot_be_written_is_named_whatever_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "x", tmp_path / "file" / "x", tmp_path):
        with pytest.raises(OSError, match=f"^cannot write {path}: "):
            write_whole(path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_in_place_of_a_folder_is_told_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/x.gguf: .*; a part of this path is a file, not a folder"):
        with making(tmp_path / "file" / "x.gguf"):
            pytest.fail("nothing can be made there")
    with pytest.raises(OSError, match="aaa: File name too long; choose a shorter one"):
        write_whole(tmp_path / ("a" * 300), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_block_that_fails_leaves_the_old_file_and_its_own_error(tmp_path):
    write_whole(tmp_path / "x", "old")
    for failure, error in [(lambda: 1 // 0, ZeroDivisionError), (lambda: open("/none/y"), FileNotFoundError)]:
        with pytest.raises(error), replacing(tmp_path / "x") as file:
            file.write("new")
            failure()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old\n")]


def test_bytes_and_line_ends_are_written_as_they_are(tmp_path):
    with replacing(tmp_path / "bytes", "wb") as file:
        file.write(b"\xff\r\n")
    write_whole(tmp_path / "text", "a\r\nb\u2028ü")
    assert (tmp_path / "bytes").read_bytes() == b"\xff\r\n"
    assert (tmp_path / "text").read_bytes() == "a\r\nb\u2028ü\n".encode()


def test_the_longest_name_that_a_disk_allows_can_be_written(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        write_whole(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text\n"


# --- locks -----------------------------------------------------------------------------------------------------------


def test_a_locked_folder_names_who_holds_it_until_that_process_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    holding = f"from common.files import locked\nwith locked({str(folder)!r}, ''): print('held', flush=True), input()"
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", holding], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError) as told, locked(folder, "choose another --out_dir"):
            pass
        assert f"{folder} is in use by process {process.pid} on " in str(told.value)
        assert str(told.value).endswith("): stop it, or choose another --out_dir")
        process.kill()  # its lock goes with it, and what it wrote of itself does not count any more
        process.wait()
        with locked(folder, ""), pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
            with locked(folder, ""):
                pass
    with locked(folder, ""):
        pass


def test_a_lock_is_released_by_an_error_too_and_one_without_a_name_is_told(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path, ""):
        raise KeyError
    with locked(tmp_path, ""):
        (tmp_path / ".lock.json").write_text("{")
        with pytest.raises(ValueError, match="in use by another process: stop it, or wait"), locked(tmp_path, "wait"):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file"), locked(tmp_path / "file", ""):
        pass


# --- JSON, choice ----------------------------------------------------------------------------------------------------


def test_json_is_read_as_it_was_written_and_its_faults_are_told(tmp_path):
    content = {"b": [1, 2.5, None], "a": "ü"}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content == json.loads((tmp_path / "x.json").read_text())
    assert checksum(content) == checksum({"a": "ü", "b": [1, 2.5, None]}) != checksum({"a": "u"})
    (tmp_path / "mark.json").write_text("\ufeff[]", encoding="utf-8")  # as some editors on Windows begin a file
    assert read_json(tmp_path / "mark.json") == []
    with pytest.raises(ValueError, match="cannot read .*none.json: No such file"):
        read_json(tmp_path / "none.json")
    for damage in (b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "x.json").write_bytes(damage)
        with pytest.raises(ValueError, match="x.json is damaged, or not the config of a run: it is not JSON"):
            read_json(tmp_path / "x.json", "the config of a run")


def test_an_even_choice_is_in_order_without_repeats_and_its_gaps_differ_by_one_at_most():
    assert evenly(3, 10) == [0, 3, 6] and evenly(5, 2) == [0, 1] and evenly(0, 4) == evenly(4, 0) == []
    for total in range(1, 40):
        for n in range(1, total + 1):
            chosen = evenly(n, total)
            gaps = {b - a for a, b in zip(chosen, [*chosen[1:], total], strict=True)}
            assert len(chosen) == n and chosen[0] == 0 and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
