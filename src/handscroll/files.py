"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], *, part: Path | None = None) -> None:
    """Writes a file so that even a power cut leaves the older one or the new one. Raises OSError.

    It is written as `part` first, on the same file system; left out, under a hidden name beside `path`.
    """
    part = part or path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
