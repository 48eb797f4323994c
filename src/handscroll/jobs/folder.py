"""A run's folder itself: made, locked, tidied and removed."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from handscroll.errors import BusyError, OutputError, RunFolderError
from handscroll.files import Lock, discard, lock_file, sync_folder
from handscroll.jobs.job import FORMAT, load_facts

_OURS = re.compile(r"job\.json|lock|(state|latent)-\d+(\.previous)?\.safetensors|[a-z]+\.(part|rows)")


def latent_path(folder: Path, index: int) -> Path:
    """Of picture `index`, counted from 0, when it is denoised."""
    return folder / f"latent-{index + 1}.safetensors"


def state_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """The newest state of picture `index`, and the one before."""
    return folder / f"state-{index + 1}.safetensors", folder / f"state-{index + 1}.previous.safetensors"


def take_folder(folder: Path) -> Lock:
    """Makes the folder if need be, and holds it against other processes. Raises BusyError where one of them has it."""
    try:
        _refuse_foreign(folder)
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                sync_folder(folder.parent)
            try:
                return lock_file(folder / "lock")
            except FileNotFoundError:
                continue  # whoever had it has just removed it
    except BlockingIOError as error:
        raise BusyError(
            f"{folder}: another process is working on this picture; wait for it, or choose another file name"
        ) from error
    except OSError as error:
        raise OutputError(f"cannot make the run folder {folder}: {error.strerror}") from error


def _refuse_foreign(folder: Path) -> None:
    if os.path.lexists(folder) and not _is_ours(folder):
        raise RunFolderError(
            f"{folder}: in the way, and not a run folder of handscroll; move it or choose another name"
        )
    check_plain(folder)


def check_plain(folder: Path) -> None:
    """Raises RunFolderError where a file of a run is none: a link, which may lead anywhere, or a device.

    No run leaves such a thing. Unfinished pictures may be folders.
    """
    for path in _files(folder):
        if not _OURS.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not (stat.S_ISDIR(mode) and path.suffix == ".part"):
                raise RunFolderError(f"{folder}: {path.name} in it is no plain file; remove it, no run has made it")


def _is_ours(folder: Path) -> bool:
    try:
        facts = load_facts(folder)
        return isinstance(facts, dict) and facts.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        return folder.is_dir() and all(_OURS.fullmatch(path.name) for path in _files(folder))


def leave_folder(folder: Path, lock: Lock) -> None:
    """Removes the folder if nothing of worth is in it, and unlocks it."""
    if not (folder / "job.json").exists():
        tidy_folder(folder)
        discard(folder / "lock")
        if (folder / "lock").exists():  # Windows removes no file that is open; who takes it meanwhile keeps it
            lock.release()
            discard(folder / "lock")
        with contextlib.suppress(OSError):
            folder.rmdir()
        sync_folder(folder.parent)
    lock.release()


def tidy_folder(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in _files(folder):
        if path.suffix in (".part", ".rows") and _OURS.fullmatch(path.name):
            discard(path)


def clear_folder(folder: Path) -> None:
    """Removes states and latents, so that none is there when the next job's name is written."""
    for path in _files(folder):
        if _OURS.fullmatch(path.name) and path.name not in ("job.json", "lock"):
            discard(path)
    sync_folder(folder)


def _files(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(folder.iterdir())
