"""Files that appear whole or not at all, locks against other processes, and the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from handscroll.errors import UsageError
from handscroll.units import shown

# Windows would change line ends otherwise; elsewhere there is no such thing.
_BINARY = getattr(os, "O_BINARY", 0)
_CLOSED_IN_CHILDREN = getattr(os, "O_CLOEXEC", getattr(os, "O_NOINHERIT", 0))
LOCK_RETRY_SECONDS = 0.05  # where a system cannot wait for a lock


def as_path(name: str, value: object) -> Path:
    """A path that somebody gave as text or as a path. Raises UsageError, naming what it is for, for anything else."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} {shown(value)} is not a path; give a text or a pathlib.Path")
    try:
        os.lstat(value)
    except ValueError:
        raise UsageError(f"{name} {shown(value)} is not a valid file name") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{name} {shown(value)} is longer than a file name can be") from None
    return Path(value)


def write_whole(
    path: Path, pieces: Iterable[bytes | memoryview], *, part: Path | None = None, mode: int = 0o666
) -> None:
    """Writes a file so that even a power cut leaves the older one or the new one. Raises OSError.

    It is written as `part` first, on the same file system; left out, under a hidden name beside `path`. A new file has
    the permissions `mode`, less what the user's mask forbids.
    """
    part = part or part_beside(path)
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    sync_folder(path.parent)


def move_whole(source: Path, target: Path) -> None:
    """Moves a file to where it appears whole, in place of an older one, also on another disk. Raises OSError."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = part_beside(target)
        try:
            shutil.copyfile(source, part)
            sync_file(part)
            os.replace(part, target)
        finally:
            discard(part)
        source.unlink()
    sync_folder(target.parent)


def write_all(descriptor: int, data: Any) -> None:
    """Writes all bytes of a buffer to what is open, however many the system takes at a time. Raises OSError."""
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def open_to_read(path: Path) -> int:
    """A descriptor for reading bytes as they are, which no child process gets. Raises OSError."""
    return os.open(path, os.O_RDONLY | _BINARY | _CLOSED_IN_CHILDREN)


def open_new(path: Path) -> int:
    """A descriptor of a new empty file of this user alone, to read and write bytes as they are. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY | _CLOSED_IN_CHILDREN, 0o600)


def part_beside(path: Path) -> Path:
    """A hidden name beside a file, for it until it is whole; nobody else has it.

    The file's own name is shortened in it, because the file system may hold no longer one.
    """
    return path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(6)}.part")


def sync_file(path: Path) -> None:
    """Makes what is in a file last through a power cut. Raises OSError."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard(path: Path) -> None:
    """Removes a file, a link or a whole folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class Lock:
    """A file or a folder held against other processes, until it is released or this process ends.

    It is the kernel's own lock on what is open, so nothing has to be removed after a process that was killed: `flock`,
    and on Windows a lock on a byte. Where the file system has no locks it holds nothing, and work goes on without.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    def is_on(self, path: Path) -> bool:
        """Whether that is what it holds, and not something of that name that was removed meanwhile."""
        if self._descriptor is None:
            return True
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        return False

    def release(self) -> None:
        """Lets go; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # no more than that: unlocking would end the hold of the process that forked this one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(path: Path) -> Lock:
    """Holds a file, made if need be, at once or not at all. Its holder may remove it at the end.

    Raises BlockingIOError where another process holds it, FileNotFoundError where it was removed while it was being
    locked (a lock on a removed file keeps nobody out) or where its folder is gone, OSError where it cannot be made.
    """
    lock = _locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), wait=False)
    if not lock.is_on(path):
        lock.release()
        raise FileNotFoundError(errno.ENOENT, "the lock was removed", str(path))
    return lock


def lock_folder(folder: Path) -> Lock:
    """Holds a folder, once others have let it go. No file is put into it: it may be one of the user's own.

    Where a system opens no folders (Windows), a file that stands for it is held, in the user's cache folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return Lock() if _can_flock() else _lock_of_its_own(folder)
    except OSError:
        return Lock()
    return _locked(descriptor, wait=True)


def can_lock() -> bool:
    """Whether this system has locks on files that end with the process that holds them."""
    return _can_flock() or _can_lock_bytes()


def _can_flock() -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    return hasattr(fcntl, "flock")


def _can_lock_bytes() -> bool:
    try:
        importlib.import_module("msvcrt")
    except ImportError:
        return False
    return True


def _lock_of_its_own(folder: Path) -> Lock:
    name = hashlib.sha256(os.path.normcase(os.path.realpath(folder)).encode()).hexdigest()[:32]
    place = cache_folder() / "locks" / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return Lock()
    return _locked(descriptor, wait=True)


def _locked(descriptor: int, *, wait: bool) -> Lock:
    """A lock on what is open; where there are no locks, it is closed. Raises BlockingIOError."""
    try:
        if _can_flock():
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_byte(descriptor, wait=wait)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, ImportError | OSError) and not isinstance(error, BlockingIOError):
            return Lock()
        raise
    return Lock(descriptor)


def _lock_byte(descriptor: int, *, wait: bool) -> None:
    """As Windows locks: the first byte of a file, which need not be there. Raises BlockingIOError, ImportError."""
    windows: Any = importlib.import_module("msvcrt")
    while True:
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            return windows.locking(descriptor, windows.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another process holds it") from error
        time.sleep(LOCK_RETRY_SECONDS)  # its own waiting gives up after ten tries


# Names that Windows keeps for devices, whatever ending follows.
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³])\s*(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def why_not_on_windows(name: str) -> str:
    """Why Windows takes no file of this name, as `it contains ':'`; empty where it does. For one name, not a path.

    Some of them it takes and means something else: `a:b` is a hidden stream of the file `a`, `nul.png` no file at all.
    """
    if found := _FORBIDDEN.search(name):
        return f"it contains {found[0]!r}"
    if name.rstrip(" .") != name:
        return "it ends with a dot or a space"
    if _DEVICES.fullmatch(name):
        return "it is the name of a device there"
    return ""


def cache_folder() -> Path:
    """Where what can be found again is kept: HANDSCROLL_CACHE, or `handscroll` in the user's cache folder."""
    if own := os.environ.get("HANDSCROLL_CACHE"):
        return Path(own)
    from platformdirs import user_cache_path

    return user_cache_path("handscroll")
