"""Files that appear whole, locks between processes, and where the cache is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handscroll.errors import BusyError
from handscroll.files import Lock, cache_folder, discard, lock_file, lock_folder, part_beside, write_whole
from handscroll.jobs.folder import leave_folder, take_folder
from handscroll.runtime.rates import remembered
from permissions import obey_permissions


@contextlib.contextmanager
def holding(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until it is sent a line, or killed."""
    code = (
        f"import sys; from pathlib import Path; from handscroll.files import {kind}\n"
        f"lock = {kind}(Path(sys.argv[1])); print('held', flush=True); sys.stdin.readline(); lock.release()\n"
        "print('released', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def tell_to_release(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "released\n"


# Files


def test_a_file_is_its_owners_alone_where_that_is_asked_for(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_whole(tmp_path / "private", [b"a", memoryview(b"b")], mode=0o600)
        write_whole(tmp_path / "shared", [b"ab"])
    finally:
        os.umask(umask)
    assert (tmp_path / "private").read_bytes() == b"ab"
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "private": 0o600,
        "shared": 0o644,
    }


def test_the_unfinished_file_of_the_longest_name_has_room(tmp_path: Path) -> None:
    path = tmp_path / ("山" * 80 + ".png")
    part = part_beside(path)
    assert part != part_beside(path)
    assert part.name.startswith(".")
    part.touch()


def test_what_is_discarded_is_gone_and_what_a_link_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").touch()
    (tmp_path / "file").touch()
    for name in ("link", "folder", "file", "missing"):
        discard(tmp_path / name)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["kept", "kept/file"]


# Locks


def test_a_file_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path, "lock_file") as process:
        with pytest.raises(BlockingIOError):
            lock_file(path)
        tell_to_release(process)
        with lock_file(path) as lock, pytest.raises(BlockingIOError):
            lock_file(path)
        lock.release()
        lock_file(path).release()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path, "lock_file") as process:
        process.kill()
        process.wait()
        lock_file(path).release()


def test_who_locks_what_is_being_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileNotFoundError):
        lock_file(path)

    def replaced(descriptor: int, operation: int) -> None:
        late(descriptor, operation)
        path.touch()

    monkeypatch.setattr(fcntl, "flock", replaced)
    with pytest.raises(FileNotFoundError):
        lock_file(path)
    monkeypatch.undo()
    lock_file(path).release()
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "gone" / "lock")


def test_a_run_folder_that_its_holder_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "p.png.run"
    first = take_folder(folder)
    with pytest.raises(BusyError, match="another process is working"):
        take_folder(folder)
    flock = fcntl.flock

    def after_the_first_has_left(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        leave_folder(folder, first)
        assert not folder.exists()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_first_has_left)
    second = take_folder(folder)
    assert second.is_on(folder / "lock")
    with pytest.raises(BusyError):
        take_folder(folder)
    leave_folder(folder, second)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_where_there_are_no_locks_work_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    for lock in (lock_file(tmp_path / "lock"), lock_folder(tmp_path)):
        assert lock.is_on(tmp_path / "lock")
        lock.release()
    assert os.listdir(tmp_path) == ["lock"]


def test_a_folder_is_waited_for_and_holds_no_file(tmp_path: Path) -> None:
    taken = threading.Event()

    def take() -> None:
        with lock_folder(tmp_path):
            taken.set()

    with holding(tmp_path, "lock_folder") as process:
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not taken.wait(0.2)
        assert os.listdir(tmp_path) == []
        tell_to_release(process)
        waiting.join(timeout=30)
    assert taken.is_set()
    lock_folder(tmp_path / "missing").release()
    Lock().release()


# Cache


def test_the_cache_is_where_the_user_or_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    for unset in ("", None):
        monkeypatch.delenv("HANDSCROLL_CACHE")
        if unset is not None:
            monkeypatch.setenv("HANDSCROLL_CACHE", unset)
        if sys.platform == "linux":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
            assert cache_folder() == tmp_path / "xdg" / "handscroll"
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setenv("HOME", str(tmp_path))
            assert cache_folder() == tmp_path / ".cache" / "handscroll"
        assert cache_folder().name == "handscroll"
        monkeypatch.setenv("HANDSCROLL_CACHE", "set again")
    assert list(tmp_path.iterdir()) == []


MEASURING = """
import sys
from handscroll.runtime.rates import remembered
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    remembered(f"{sys.argv[1]} {number}", lambda: number)
print(remembered("both", lambda: sys.argv[1]))
"""


def test_processes_that_measure_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURING]
    environment = {**os.environ, "HANDSCROLL_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([*command, name], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert len(answers) == 1, "both go by what was measured first"
    (file,) = (tmp_path / "cache").iterdir()
    assert len(json.loads(file.read_bytes())) == 41


READ_ONLY = """
import torch
from handscroll.runtime.rates import remembered
from handscroll.runtime.text_cache import Text, load_text, save_text
print(remembered("known", lambda: 2), remembered("new", lambda: 3))
save_text("0" * 64, Text(torch.ones(1, 2, 3)))
print(load_text("0" * 64))
"""


def test_a_cache_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HANDSCROLL_CACHE", str(cache))
    assert remembered("known", lambda: 1) == 1
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    cache.chmod(0o555)
    command = [sys.executable, "-c", READ_ONLY]
    ran = subprocess.run(command, preexec_fn=obey_permissions, capture_output=True, text=True, check=False)
    cache.chmod(0o755)
    assert ran.stdout == "1 3\nNone\n", ran
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
