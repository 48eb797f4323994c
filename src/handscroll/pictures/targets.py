"""Where a picture goes: refused before any work if it cannot be written there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handscroll.errors import FormatError, OutOfMemoryError, OutputError, SizeError, is_out_of_memory
from handscroll.files import lock_folder, why_not_on_windows
from handscroll.pictures.formats import FORMATS, Format
from handscroll.system import free_disk_bytes
from handscroll.units import gibibytes, one_line

IS_WINDOWS = os.name == "nt"
EXCHANGING = ".exchanging"  # in a folder of Deep Zoom tiles: its index is gone, or not there yet
MAX_REASON = 120  # characters, of what a library says
TIFF_LEVEL_IN_MEMORY_BYTES = 100 << 20  # libvips keeps larger levels of a pyramid in the temporary folder


@dataclass(frozen=True)
class Target:
    """A file name that can hold the picture. `format` is png, jpeg, webp, tiff or dzi."""

    path: Path
    format: str
    width: int
    height: int

    @property
    def scratch_bytes(self) -> int:
        return self.width * self.height * 3

    @property
    def needed_bytes(self) -> int:
        """Disk wanted while writing: the scratch and an estimate of the file."""
        return self.scratch_bytes + round(self.width * self.height * self._known.bytes_per_pixel)

    @property
    def files_folder(self) -> Path:
        """Where a Deep Zoom picture keeps its tiles."""
        return self.path.with_name(f"{self.path.stem}_files")

    @property
    def final_path(self) -> Path:
        """Where the file really goes: behind a symbolic link, the file it points to is the one to replace."""
        path = self.path.absolute()
        return path if self.format == "dzi" else Path(os.path.realpath(path))

    @property
    def _known(self) -> Format:
        return FORMATS[self.path.suffix.lower()]


def check_format(path: Path, width: int, height: int) -> Format:
    """The format that a file name says. Raises FormatError and SizeError as `check_target`, and looks at no disk."""
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        suffix = f"{path.suffix!r} is not a suffix handscroll writes" if path.suffix else "the file name has no suffix"
        raise FormatError(f"cannot tell the format of {path}: {suffix}; use one of {' '.join(FORMATS)}")
    _check_size(known, width, height)
    return known


def check_target(path: Path, width: int, height: int) -> Target:
    """Refuse a file that could not be written, before any work is done. `width` and `height` are in pixels.

    Raises FormatError (no writer for the suffix), SizeError (no picture, or more pixels a side than the format holds)
    or OutputError (a folder in the way, no such folder, no permission, too little free disk).
    """
    path = Path(path)
    known = check_format(path, width, height)
    target = Target(path, known.name, width, height)
    if IS_WINDOWS and (reason := why_not_on_windows(path.name)):
        raise OutputError(f"cannot write {path}: Windows takes no such file name, {reason}; choose another")
    try:
        str(path).encode()
        _check_place(target)
    except OSError as error:
        raise OutputError(_reason(target, error)) from error
    except ValueError as error:  # a null byte, or bytes that are no text
        raise OutputError(f"cannot write {str(path)!r}: not a valid file name; choose another") from error
    return target


def _check_size(known: Format, width: int, height: int) -> None:
    if min(width, height) < 1:
        raise SizeError(f"{width}x{height} is not a picture: width and height must be at least 1 pixel")
    if max(width, height) > known.max_side_px:
        wide_enough = [suffix for suffix, other in FORMATS.items() if other.max_side_px >= max(width, height)]
        advice = f"use {' '.join(wide_enough)}" if wide_enough else "make it smaller"
        limit = f"{known.title} holds at most {known.max_side_px} pixels a side"
        raise SizeError(f"{limit}, {width}x{height} was asked for: {advice}")


def _check_place(target: Target) -> None:
    path, folder = target.path, target.path.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise OutputError(f"cannot write {path}: the folder {folder} {what}")
    with contextlib.suppress(FileNotFoundError):
        os.lstat(target.files_folder if target.format == "dzi" else path)  # a name too long shows here
    with lock_folder(folder):
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; choose another name")
        if path.exists():
            if not stat.S_ISREG(path.stat().st_mode):
                raise OutputError(f"cannot write {path}: it is not a regular file; choose another name")
            os.close(os.open(path, os.O_WRONLY))
        if target.format == "dzi":
            check_files_folder(target, path)
    # Permission bits say little to root, on network shares and on read-only mounts: try it.
    with tempfile.TemporaryFile(dir=target.final_path.parent):  # without a name, where the system can
        pass
    _check_free(path, folder, target.needed_bytes)
    if target.format == "tiff" and target.scratch_bytes // 4 > TIFF_LEVEL_IN_MEMORY_BYTES:
        _check_free(path, Path(tempfile.gettempdir()), target.scratch_bytes // 3)


def check_files_folder(target: Target, index: Path) -> None:
    files = target.files_folder
    ours = files.is_dir() and not files.is_symlink() and (index.exists() or (files / EXCHANGING).exists())
    if os.path.lexists(files) and not ours:
        raise OutputError(f"cannot write {target.path}: {files} is in the way and is not its older picture; move it")


def _check_free(path: Path, folder: Path, needed_bytes: int) -> None:
    free_bytes = free_disk_bytes(folder)
    if free_bytes is not None and free_bytes < needed_bytes:
        figures = f"needs {gibibytes(needed_bytes)} in {folder}, {gibibytes(free_bytes)} is free"
        raise OutputError(f"not enough disk to write {path}: {figures}; free some space or choose another folder")


@contextlib.contextmanager
def output_errors(target: Target, *library_errors: type[Exception]) -> Iterator[None]:
    caught: tuple[type[Exception], ...] = (OSError, *library_errors)
    try:
        yield
    except caught as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(_no_memory(target, error)) from error
        raise OutputError(_reason(target, error)) from error


def _no_memory(target: Target, error: Exception) -> str:
    """One line on memory that ran out in a writer, and what would take less."""
    path, line = target.path, one_line(error, MAX_REASON)
    smaller = "" if target.format == "png" else ", write a .png, which takes the least,"
    return f"out of memory while writing {path} ({line}); close other programs{smaller} or use a smaller --size"


def _reason(target: Target, error: Exception) -> str:
    """One line on what went wrong. libvips passes the system's reasons on as text only."""
    path, folder, needed = target.path, target.path.parent, gibibytes(target.needed_bytes)
    number = error.errno if isinstance(error, OSError) else None
    text = one_line(error)

    def is_about(*numbers: int) -> bool:
        return number in numbers or (number is None and any(os.strerror(each) in text for each in numbers))

    if is_about(errno.ENOSPC, errno.EDQUOT):
        return f"disk full while writing {path}: needs {needed} free in {folder}; free some or choose another folder"
    if is_about(errno.EFBIG):
        return f"file size limit reached while writing {path}: needs {needed}; raise the limit (ulimit -f)"
    if not folder.is_dir():
        return f"cannot write {path}: the folder {folder} has gone; create it again or choose another"
    if is_about(errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {path}: no permission to write it; change that or choose another folder"
    return f"cannot write {path}: {(error.strerror if isinstance(error, OSError) else None) or text}"
