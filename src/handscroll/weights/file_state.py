"""Whether a weight file is still the one that a checkpoint was opened with. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from handscroll.weights.header import TensorEntry


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells a file from one that took its place, or from itself after it was written to: bytes and time.

    Inode numbers would tell more, but some network file systems change them while a file stays the same.
    """

    n_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, place: Path | int) -> Self:
        """Of a path, or of a file by its descriptor. Raises OSError."""
        status = os.stat(place)
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Promise:
    """What an opened file must be: its header has these entries, and its state is this, where it was noted (None)."""

    entries: frozenset[TensorEntry]
    state: FileState | None = None


def promises_of(entries: Iterable[TensorEntry], states: Mapping[Path, FileState]) -> dict[Path, Promise]:
    """For every file of these entries what it must be."""
    by_file: dict[Path, set[TensorEntry]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, set()).add(entry)
    return {file: Promise(frozenset(its), states.get(file)) for file, its in by_file.items()}
