"""Tensors from weight files: read at positions, or mapped."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handscroll.errors import CheckpointError
from handscroll.files import open_to_read
from handscroll.limits import STAGING_BYTES
from handscroll.units import first_line
from handscroll.weights.dtypes import DTYPES, STORED_DTYPES, is_mappable, wanted_dtype
from handscroll.weights.file_state import FileState, Promise
from handscroll.weights.header import TensorEntry, read_header
from handscroll.weights.layout import Layout
from handscroll.weights.sources import Source

ADVICE_GAP_BYTES = 2**20  # ranges of a file that lie closer are read ahead as one
_CHANGED = "the file has changed since the checkpoint was opened"


class TensorReader:
    """Reads whole tensors into `dtype` on `device` through one small staging buffer, or maps those that fit.

    On the CPU, tensors that the file holds in `dtype` already are not copied: they are the file's pages, mapped
    privately, which enter memory when first touched (and count as resident then); writing to one changes this
    process's copy and not the file. `promised` says what each file must be, as for `OpenFiles`. `mapped` gives the
    files whose pages are in use, as they were when they were mapped. maps: else all are copied.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        promised: Mapping[Path, Promise] | None = None,
        maps: bool = True,
    ) -> None:
        self.dtype, self.device, self.maps = dtype, device, maps
        self.mapped: dict[Path, FileState] = {}
        self._files = OpenFiles(promised)
        self._maps: dict[Path, Any] = {}

    def read(self, source: Source) -> Tensor:
        """One tensor, or the bytes of a quantised matrix's parts. Raises CheckpointError naming file and tensor."""
        if source.form is not None:
            packed = allocate_bytes(source.packed_bytes)
            source.fill_packed(self._files.read, packed)
            return packed.to(self.device)
        if not source.is_plain:
            wide = torch.empty(source.shape, dtype=self.dtype)
            source.fill(self._files.read, wide)
            return wide.to(self.device)
        entry = source.first
        dtype = wanted_dtype(entry, self.dtype)
        if self.maps and self.device.type == "cpu" and is_mappable(entry, dtype):
            return self._map(entry, dtype)
        filled = torch.empty(entry.shape, dtype=dtype, device=self.device)
        self._files.read(entry, filled.view(-1))
        return filled

    def _map(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        try:
            n_bytes = self._files.checked(entry).n_bytes
            if entry.file not in self._maps:
                self._maps[entry.file] = torch.UntypedStorage.from_file(str(entry.file), shared=False, nbytes=n_bytes)
                # Again: it is mapped by its name, which may have been given to another file meanwhile.
                self.mapped[entry.file] = self._files.checked(entry)
        except (OSError, EOFError, RuntimeError) as error:
            raise _unreadable(entry, error) from error
        strides = torch.empty(entry.shape, device="meta").stride()
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(self._maps[entry.file], entry.start // dtype.itemsize, entry.shape, strides)


def check_mapped(mapped: Mapping[Path, FileState]) -> None:
    """Raises CheckpointError where a file whose pages are in use has been written to, or another has its name.

    A file that was only removed is there for as long as its pages are used.
    """
    for file, state in mapped.items():
        with contextlib.suppress(OSError):
            if FileState.of(file) != state:
                raise CheckpointError(f"{file}: {_CHANGED}; open the model again")


def read_rows(entry: TensorEntry, rows: Tensor, promised: Mapping[Path, Promise] | None = None) -> Tensor:
    """Rows of a stored matrix [N, C]: [*rows.shape, C] in its published dtype. No more than these rows is read.

    rows: integers on the CPU. Raises CheckpointError for a row that is not there.
    """
    count, channels = entry.shape
    dtype = DTYPES[entry.dtype]
    filled = torch.empty((rows.numel(), channels), dtype=dtype)
    row_bytes = channels * dtype.itemsize
    files = OpenFiles(promised)
    for row, target in zip(rows.flatten().tolist(), filled, strict=True):
        if not 0 <= row < count:
            raise CheckpointError(f"{entry.file}: the tensor {entry.name} has {count} rows, and row {row} is asked for")
        files.read(entry.part(row * row_bytes, row_bytes, (channels,)), target)
    return filled.view(*rows.shape, channels)


def first_not_finite(entries: Iterable[TensorEntry]) -> TensorEntry | None:
    """The first tensor that holds NaN or infinity, in the numbers that are stored; None where all are finite.

    Every tensor is read, in pieces of STAGING_BYTES. Raises CheckpointError.
    """
    files = OpenFiles()
    for entry in entries:
        stored = DTYPES.get(entry.dtype)
        if stored is None or not stored.is_floating_point:
            continue
        for first in range(0, entry.n_bytes, STAGING_BYTES):
            count = min(STAGING_BYTES, entry.n_bytes - first) // stored.itemsize
            piece = torch.empty(count, dtype=stored)
            files.read(entry.part(first, piece.nbytes, (count,)), piece)
            if not torch.isfinite(piece).all():
                return entry
    return None


class OpenFiles:
    """Weight files, opened when they are first read from and read at positions. For one thread at a time.

    `promised` says what each of them must be when it is opened. From then on it must stay what it was.
    """

    def __init__(self, promised: Mapping[Path, Promise] | None = None) -> None:
        self._promised = promised or {}
        self._opened: dict[Path, tuple[int, FileState]] = {}
        self._staging: Tensor | None = None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        opened, self._opened = self._opened, {}
        for descriptor, _ in opened.values():
            os.close(descriptor)
        self._staging = None

    def fill(self, layout: Layout, flat: Tensor) -> None:
        """Reads every tensor of a layout to its place in a flat buffer of bytes on the CPU. Raises CheckpointError."""
        for site, start in layout.places:
            layout.fill(site, start, flat, self.read)

    def read(self, entry: TensorEntry, target: Tensor) -> None:
        """Reads one tensor into `target`, flat and of any dtype and device. Raises CheckpointError."""
        if not entry.n_bytes:
            return
        stored = STORED_DTYPES[entry.dtype]
        try:
            self.checked(entry)
            descriptor, _ = self._opened[entry.file]
            if target.device.type == "cpu" and target.dtype == stored:
                _read_fully(descriptor, _bytes_of(target), entry.start)
                return
            if self._staging is None:
                self._staging = allocate_bytes(STAGING_BYTES)
            for first in range(0, entry.n_bytes, STAGING_BYTES):
                piece = self._staging[: min(STAGING_BYTES, entry.n_bytes - first)]
                _read_fully(descriptor, _bytes_of(piece), entry.start + first)
                begin, count = first // stored.itemsize, len(piece) // stored.itemsize
                target[begin : begin + count].copy_(piece.view(stored))
        except (OSError, EOFError) as error:
            raise _unreadable(entry, error) from error

    def advise(self, layout: Layout) -> None:
        """Asks the system to have the pages of a layout's tensors at hand; where it cannot be asked, nothing."""
        if not hasattr(os, "posix_fadvise"):
            return
        read = (entry for site, _ in layout.places if site.kept is None for entry in site.source.entries)
        for file, start, end in _ranges(sorted(read, key=lambda entry: (entry.file, entry.start))):
            try:
                descriptor, _ = self._opened.get(file) or self._open_file(file)
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
            except (OSError, EOFError):
                return  # whoever reads it will say so

    def checked(self, entry: TensorEntry) -> FileState:
        """The state of an entry's file, which is still the one that was opened first. Raises OSError, EOFError.

        Of one that was removed, what is open can still be read.
        """
        descriptor, state = self._opened.get(entry.file) or self._open_file(entry.file)
        now = FileState.of(descriptor)
        if now.n_bytes < entry.start + entry.n_bytes:
            raise EOFError("the file has become shorter")
        if now != state:
            raise EOFError("the file has changed")
        with contextlib.suppress(OSError):
            if FileState.of(entry.file) != state:
                raise EOFError("the file has changed: another has taken its place")
        return state

    def _open_file(self, file: Path) -> tuple[int, FileState]:
        descriptor = open_to_read(file)
        self._opened[file] = descriptor, FileState.of(descriptor)
        if file in self._promised and not self._keeps(file, self._promised[file]):
            os.close(self._opened.pop(file)[0])
            raise EOFError(_CHANGED)
        return self._opened[file]

    def _keeps(self, file: Path, promise: Promise) -> bool:
        if promise.state is not None and promise.state != self._opened[file][1]:
            return False
        try:
            return promise.entries <= set(read_header(file))
        except CheckpointError:
            return False


def _read_fully(descriptor: int, window: memoryview, position: int) -> None:
    while len(window):
        count = _read_at(descriptor, window, position)
        if not count:
            raise EOFError("the file has become shorter")
        window, position = window[count:], position + count


def _read_at(descriptor: int, window: memoryview, position: int) -> int:
    """Bytes read into `window` from a position on, at most as many as it holds; 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [window], position)
    with io.FileIO(descriptor, closefd=False) as file:  # the same in two steps, as for Windows
        file.seek(position)
        return file.readinto(window)


def _bytes_of(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _ranges(entries: Iterable[TensorEntry]) -> list[tuple[Path, int, int]]:
    """Byte ranges (file, start, end) of entries in file order, merged where they lie close."""
    merged: list[tuple[Path, int, int]] = []
    for entry in entries:
        file, start, end = entry.file, entry.start, entry.start + entry.n_bytes
        if merged and merged[-1][0] == file and start - merged[-1][2] <= ADVICE_GAP_BYTES:
            merged[-1] = file, merged[-1][1], max(end, merged[-1][2])
        else:
            merged.append((file, start, end))
    return merged


def _unreadable(entry: TensorEntry, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return CheckpointError(f"{entry.file}: the tensor {entry.name} cannot be read: {reason}")


def allocate_bytes(n_bytes: int) -> Tensor:
    """Bytes that may be written in and out of inference mode, which a tensor born inside it may not."""
    with torch.inference_mode(False):
        return torch.empty(n_bytes, dtype=torch.uint8)
