"""What a system other than Linux lacks, taken away: nothing of it is needed to run, and `--memory` says why not.

This shows that no module of POSIX alone is imported and no call of it alone is made. It does not show that handscroll
runs on Windows, where nobody has tried it.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import handscroll
from handscroll.errors import BusyError, OutputError
from handscroll.files import Lock, can_lock, lock_file, lock_folder, open_to_read, why_not_on_windows
from handscroll.jobs.folder import leave_folder, take_folder
from handscroll.pictures.naming import free_name
from handscroll.pictures.targets import check_target
from handscroll.request import Request
from handscroll.runtime import health
from handscroll.weights import files as weight_files

Miniature = Callable[..., Path]
# Not all that Windows lacks: what the libraries ask for because they know that this is Linux (uname, SIGKILL) stays.
MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "syslog")
OF_OS = [
    "preadv",
    "pread",
    "pwrite",
    "pwritev",
    "readv",
    "writev",
    "sysconf",
    "posix_fadvise",
    "posix_fallocate",
    "fork",
    "forkpty",
    "sched_getaffinity",
    "sched_setaffinity",
    "geteuid",
    "getuid",
    "getgid",
    "getegid",
    "getgroups",
    "fchmod",
    "fchown",
    "chown",
    "lchown",
    "statvfs",
    "fstatvfs",
    "nice",
    "getloadavg",
    "mkfifo",
    "sync",
    "fdatasync",
    "killpg",
    "getpgid",
    "getpgrp",
    "setsid",
    "wait3",
    "wait4",
    "ctermid",
    "sendfile",
    "splice",
    "copy_file_range",
    "memfd_create",
    "O_CLOEXEC",
    "O_NONBLOCK",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_SYNC",
    "O_NOCTTY",
]
# transformers imports psutil, which asks each system in its own way: here Linux, before all that is taken away.
PSUTIL = "import psutil\n"
PSUTIL_TELLS_NOTHING = PSUTIL + "psutil.Process = psutil.virtual_memory = None\n"
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGPIPE")
TAKEN_AWAY = f"""
import os, signal, sys
for name in {MODULES!r}:
    sys.modules[name] = None
for name in {OF_OS!r}:
    if hasattr(os, name):
        delattr(os, name)
for name in {SIGNALS!r}:
    if hasattr(signal, name):
        delattr(signal, name)
"""


def without(code: str, *arguments: str, before: str = PSUTIL) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that lacks them from its first line on; `before` runs while they are still there."""
    command = [sys.executable, "-c", before + TAKEN_AWAY + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": ""})


def cli(*arguments: str, before: str = PSUTIL) -> subprocess.CompletedProcess[str]:
    return without("from handscroll.cli.main import main; main()", *arguments, before=before)


def test_every_module_is_imported() -> None:
    source = Path(handscroll.__file__).parent
    names = [".".join(file.relative_to(source.parent).with_suffix("").parts) for file in sorted(source.rglob("*.py"))]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    done = without(f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('all')")
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


INTERRUPTED = """
from pathlib import Path
from handscroll import Request, generate
def stop(event):
    if event.stage == "decode" and event.done: raise KeyboardInterrupt
try: generate(Request.of("a lake", model=sys.argv[1], **OPTIONS), Path(sys.argv[2]), on_event=stop)
except KeyboardInterrupt: print("stopped", flush=True)
"""


def test_it_plans_paints_every_format_decodes_and_resumes(miniature: Miniature, tmp_path: Path) -> None:
    """In one process, since each takes seconds to import what it needs."""
    model, options = str(miniature("1.6b")), {"size": "96x64", "steps": 2, "seed": 3, "device": "cpu"}
    made = ["--model", model, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    pictures = [str(tmp_path / f"p{suffix}") for suffix in (".png", ".jpg", ".webp", ".tif", ".dzi")]
    latent, decoded, resumed = (str(tmp_path / name) for name in ("l.safetensors", "q.png", "r.png"))
    before = [["plan", "--model", model, "--size", "256"], ["models"], ["info", model]]
    before += [["generate", "a lake", *made, "-o", picture] for picture in pictures[1:]]
    before += [["generate", "a lake", *made, "-o", pictures[0], "--save-latent", latent]]
    before += [["decode", latent, "-o", decoded]]
    code = (
        f"OPTIONS = {options!r}\n"
        "from handscroll.cli.main import run\n"
        f"codes = [run(command) for command in {before!r}]\n"
        f"{INTERRUPTED}"
        f"print('codes', *codes, run(['resume', {resumed!r}]))"
    )
    done = without(code, model, resumed)
    lines = done.stdout.splitlines()
    assert "stopped" in lines, done.stderr
    assert lines[-1] == "codes" + " 0" * (len(before) + 1), done.stderr
    (here,) = handscroll.generate(handscroll.Request.of("a lake", model=model, **options), tmp_path / "linux.png")
    as_here = here.path.read_bytes()
    assert [Path(path).read_bytes() == as_here for path in (pictures[0], resumed)] == [True, True]
    assert Path(decoded).stat().st_size == len(as_here)
    names = ["l.safetensors", "linux.png", "p.dzi", "p.jpg", "p.png", "p.tif", "p.webp", "p_files", "q.png", "r.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_drop_in_and_the_class_work(miniature: Miniature) -> None:
    code = (
        "import torch, handscroll\n"
        "from diffusers import AutoencoderDC\n"
        "vae = handscroll.attach(AutoencoderDC.from_pretrained(sys.argv[1], subfolder='vae'), memory='64MiB')\n"
        "with torch.no_grad():\n"
        "    picture = vae.decode(torch.randn(1, 32, 3, 2)).sample\n"
        "    print(tuple(picture.shape), tuple(vae.encode(picture).latent.shape))\n"
        "scroll = handscroll.Handscroll.from_pretrained(sys.argv[1], device='cpu')\n"
        "print(scroll('a lake', width=64, height=96, steps=1, seed=1).numpy().shape)\n"
    )
    done = without(code, str(miniature("1.6b")))
    assert done.stdout == "(1, 3, 96, 64) (1, 32, 3, 2)\n(96, 64, 3)\n", done.stderr


def test_a_budget_says_why_not_or_is_kept(miniature: Miniature, tmp_path: Path) -> None:
    """psutil tells what a process holds on Windows too: then a budget is kept."""
    made = ["--model", str(miniature("1.6b")), "--size", "64", "--steps", "1", "--device", "cpu", "--memory", "3GiB"]
    done = cli("generate", "a lake", *made, "-o", str(tmp_path / "p.png"), before=PSUTIL_TELLS_NOTHING)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --memory cannot be kept here")
    assert list(tmp_path.iterdir()) == []
    done = cli("generate", "a lake", *made, "-o", str(tmp_path / "p.png"), "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["memory"]["measured_peak_bytes"] <= 3 * 2**30


def test_doctor_says_what_this_system_does_not_offer() -> None:
    done = cli("doctor", "--json", before=PSUTIL_TELLS_NOTHING)
    parts = {problem["part"]: problem for problem in json.loads(done.stdout)["problems"]}
    assert {"resident memory", "file locks"} <= parts.keys()
    assert "--memory is refused" in parts["resident memory"]["message"]


def test_doctor_says_that_nobody_has_tried_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(health._of_this_system()) == []
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    (found,) = health._of_this_system()
    assert (found.part, found.needed) == ("Windows", False)
    assert "tested on Linux alone" in found.message


def test_no_module_of_posix_alone_is_imported_where_files_begin() -> None:
    for file in Path(handscroll.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & {*MODULES, "posix", "select", "pty", "tty"}, file


# Weights


def test_weights_are_read_without_reading_at_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w"
    file.write_bytes(b"0\r\n\x1a456789" * 100)
    monkeypatch.delattr(os, "preadv")
    descriptor = open_to_read(file)
    try:
        for position, count in ((0, 10), (995, 5), (3, 700), (500, 1)):
            window = bytearray(count)
            weight_files._read_fully(descriptor, memoryview(window), position)
            assert bytes(window) == file.read_bytes()[position : position + count]
        with pytest.raises(EOFError):
            weight_files._read_fully(descriptor, memoryview(bytearray(6)), 995)
    finally:
        os.close(descriptor)


# Locks as Windows has them


@pytest.fixture
def windows_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`msvcrt.locking` in the words of `flock`; no folder can be opened, and no open file be removed."""
    flock, opened, unlink = fcntl.flock, os.open, Path.unlink
    held: dict[int, str] = {}

    def locking(descriptor: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes) == (2, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error
        held[descriptor] = os.path.realpath(f"/proc/self/fd/{descriptor}")

    def open_file(path: Any, *options: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *options, **more)

    def remove(path: Path, missing_ok: bool = False) -> None:
        now = {os.path.realpath(f"/proc/self/fd/{each}") for each in held if os.path.exists(f"/proc/self/fd/{each}")}
        if os.path.realpath(path) in now:
            raise PermissionError(errno.EACCES, "in use")
        unlink(path, missing_ok)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(Path, "unlink", remove)


@pytest.mark.usefixtures("windows_locks")
def test_a_file_is_held_by_its_first_byte(tmp_path: Path) -> None:
    assert can_lock()
    with lock_file(tmp_path / "lock"), pytest.raises(BlockingIOError):
        lock_file(tmp_path / "lock")
    lock_file(tmp_path / "lock").release()


@pytest.mark.usefixtures("windows_locks")
def test_a_run_folder_is_held_and_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "p.png.run"
    lock = take_folder(folder)
    with pytest.raises(BusyError):
        take_folder(folder)
    leave_folder(folder, lock)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("windows_locks")
def test_a_folder_is_held_by_a_file_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    lock = lock_folder(tmp_path / "mine")
    (held,) = (tmp_path / "cache" / "locks").iterdir()
    with pytest.raises(BlockingIOError):
        lock_file(held)
    lock.release()
    lock_folder(tmp_path / "mine" / ".." / "mine").release()
    assert list((tmp_path / "cache" / "locks").iterdir()) == [held]
    assert list((tmp_path / "mine").iterdir()) == []


def test_where_there_are_no_locks_at_all_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    assert not can_lock()
    for lock in (lock_file(tmp_path / "lock"), lock_folder(tmp_path)):
        assert isinstance(lock, Lock)
        assert lock.is_on(tmp_path / "lock")
        lock.release()


# Names


@pytest.mark.parametrize(
    "name",
    [
        "con.png",
        "CON",
        "Nul.jpg",
        "aux.tar.gz",
        "com1.png",
        "COM9",
        "LPT3.x",
        "prn",
        "com².png",
        "a:b.png",
        "a?.png",
        "a*b",
        "a<b",
        "a>b",
        "a|b",
        'a"b',
        "a\\b",
        "tab\t.png",
        "dot.",
        "space.png ",
        "conin$",
        "CONOUT$.png",
        "con .png",
    ],
)
def test_names_that_windows_takes_for_something_else(name: str) -> None:
    assert why_not_on_windows(name)


@pytest.mark.parametrize(
    "name", ["console.png", "com.png", "com10.png", "null.png", "a.con", ".png.part", "é-5.png", "a b.png"]
)
def test_names_that_windows_takes(name: str) -> None:
    assert why_not_on_windows(name) == ""


def test_such_a_picture_is_refused_there_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "aux.png", 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr("handscroll.pictures.targets.IS_WINDOWS", True)
        with pytest.raises(OutputError, match=r"aux\.png: Windows takes no such file name, it is the name of a device"):
            check_target(tmp_path / "aux.png", 8, 8)


@pytest.mark.parametrize(
    "prompt", ["con", "NUL", "aux: a lake.", "a/b\\c", "com1", "...", "what? a <red> sun*", "trailing dots...", "प्रकाश"]
)
def test_names_made_from_prompts_can_be_had_everywhere(
    prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert why_not_on_windows(free_name(Request(prompt, seed=5)).name) == ""
