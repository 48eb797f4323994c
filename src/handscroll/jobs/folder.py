"""A run's folder itself: made, locked, tidied and removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from handscroll.errors import BusyError, OutputError, RunFolderError
from handscroll.files import sync_folder

if TYPE_CHECKING:
    pass
from handscroll.jobs.job import FORMAT

_OURS = re.compile(r"job\.json|lock|(state|latent)-\d+(\.previous)?\.safetensors|[a-z]+\.(part|rows)")


def latent_path(folder: Path, index: int) -> Path:
    """Of picture `index`, counted from 0, when it is denoised."""
    return folder / f"latent-{index + 1}.safetensors"


def state_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """The newest state of picture `index`, and the one before."""
    return folder / f"state-{index + 1}.safetensors", folder / f"state-{index + 1}.previous.safetensors"


# The folder itself
def take_folder(folder: Path) -> int | None:
    """Makes the folder if need be, and locks it. Returns the lock's descriptor, or None where there are no locks."""
    try:
        _refuse_foreign(folder)
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                sync_folder(folder.parent)
            try:
                return _lock(folder)
            except FileNotFoundError:
                continue  # whoever had it has just removed it
    except OSError as error:
        raise OutputError(f"cannot make the run folder {folder}: {error.strerror}") from error


def _refuse_foreign(folder: Path) -> None:
    if os.path.lexists(folder) and not _is_ours(folder):
        raise RunFolderError(
            f"{folder}: in the way, and not a run folder of handscroll; move it or choose another name"
        )


def _is_ours(folder: Path) -> bool:
    try:
        facts = json.loads((folder / "job.json").read_bytes())
        return isinstance(facts, dict) and facts.get("format") == FORMAT
    except (OSError, ValueError):
        return folder.is_dir() and all(_OURS.fullmatch(path.name) for path in _files(folder))


def _lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    path = folder / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino != os.fstat(lock).st_ino:
            raise FileNotFoundError(errno.ENOENT, "the lock was removed", str(path))
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise BusyError(
                f"{folder}: another process is working on this picture; wait for it, or choose another file name"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise
        return None  # a file system without locks
    return lock


def unlock_folder(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def leave_folder(folder: Path, lock: int | None) -> None:
    """Removes the folder if nothing of worth is in it, and unlocks it."""
    if not (folder / "job.json").exists():
        tidy_folder(folder)
        unlink(folder / "lock")
        with contextlib.suppress(OSError):
            folder.rmdir()
        sync_folder(folder.parent)
    unlock_folder(lock)


def tidy_folder(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in _files(folder):
        if path.suffix in (".part", ".rows") and _OURS.fullmatch(path.name):
            unlink(path)


def clear_folder(folder: Path) -> None:
    """Removes states and latents, so that none is there when the next job's name is written."""
    for path in _files(folder):
        if _OURS.fullmatch(path.name) and path.name not in ("job.json", "lock"):
            unlink(path)
    sync_folder(folder)


def _files(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(folder.iterdir())


def unlink(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
