"""Tensors from weight files: read at positions, or mapped."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handscroll.errors import CheckpointError
from handscroll.limits import STAGING_BYTES
from handscroll.units import first_line
from handscroll.weights.dtypes import DTYPES, is_mappable, wanted_dtype
from handscroll.weights.header import TensorEntry, read_header
from handscroll.weights.layout import Layout, tensor_at

ADVICE_GAP_BYTES = 2**20  # ranges of a file that lie closer are read ahead as one


class TensorReader:
    """Reads whole tensors into `dtype` on `device` through one small staging buffer, or maps those that fit.

    On the CPU, tensors that the file holds in `dtype` already are not copied: they are the file's pages, mapped
    privately, which enter memory when first touched (and count as resident then); writing to one changes this
    process's copy and not the file.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._files = OpenFiles()
        self._maps: dict[Path, Any] = {}

    def read(self, entry: TensorEntry) -> Tensor:
        """One tensor. Raises CheckpointError naming file and tensor."""
        dtype = wanted_dtype(entry, self.dtype)
        if self.device.type == "cpu" and is_mappable(entry, dtype):
            return self._map(entry, dtype)
        filled = torch.empty(entry.shape, dtype=dtype, device=self.device)
        self._files.read(entry, filled.view(-1))
        return filled

    def _map(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        try:
            if entry.file not in self._maps:
                n_bytes = entry.file.stat().st_size
                if n_bytes < entry.start + entry.n_bytes:
                    raise EOFError("the file has become shorter")
                self._maps[entry.file] = torch.UntypedStorage.from_file(str(entry.file), shared=False, nbytes=n_bytes)
        except (OSError, EOFError, RuntimeError) as error:
            raise _unreadable(entry, error) from error
        strides = torch.empty(entry.shape, device="meta").stride()
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(self._maps[entry.file], entry.start // dtype.itemsize, entry.shape, strides)


def read_rows(entry: TensorEntry, rows: Tensor) -> Tensor:
    """Rows of a stored matrix [N, C]: [*rows.shape, C] in its published dtype. No more than these rows is read.

    rows: integers on the CPU. Raises CheckpointError for a row that is not there.
    """
    count, channels = entry.shape
    dtype = DTYPES[entry.dtype]
    filled = torch.empty((rows.numel(), channels), dtype=dtype)
    row_bytes = channels * dtype.itemsize
    files = OpenFiles()
    for row, target in zip(rows.flatten().tolist(), filled, strict=True):
        if not 0 <= row < count:
            raise CheckpointError(f"{entry.file}: the tensor {entry.name} has {count} rows, and row {row} is asked for")
        one = TensorEntry(entry.name, entry.file, entry.dtype, (channels,), entry.start + row * row_bytes, row_bytes)
        files.read(one, target)
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
            part = TensorEntry(entry.name, entry.file, entry.dtype, (count,), entry.start + first, piece.nbytes)
            files.read(part, piece)
            if not torch.isfinite(piece).all():
                return entry
    return None


def promised_entries(entries: Iterable[TensorEntry]) -> dict[Path, list[TensorEntry]]:
    promised: dict[Path, list[TensorEntry]] = {}
    for entry in entries:
        promised.setdefault(entry.file, []).append(entry)
    return promised


class OpenFiles:
    """Weight files, opened when they are first read from and read at positions. For one thread at a time.

    `promised` gives the entries that an opened file's header must still have.
    """

    def __init__(self, promised: Mapping[Path, Collection[TensorEntry]] | None = None) -> None:
        self._promised = promised or {}
        self._opened: dict[Path, tuple[int, tuple[int, int]]] = {}
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
            self.read(site.entry, tensor_at(flat, start, site).view(-1))

    def read(self, entry: TensorEntry, target: Tensor) -> None:
        """Reads one tensor into `target`, flat and of any dtype and device. Raises CheckpointError."""
        if not entry.n_bytes:
            return
        stored = DTYPES[entry.dtype]
        try:
            descriptor = self._open(entry)
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
        for file, start, end in _ranges(site.entry for site, _ in layout.places):
            try:
                descriptor, _ = self._opened.get(file) or self._open_file(file)
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
            except (OSError, EOFError):
                return  # whoever reads it will say so

    def _open(self, entry: TensorEntry) -> int:
        """The descriptor of an entry's file, which is still the one that was opened first."""
        descriptor, facts = self._opened.get(entry.file) or self._open_file(entry.file)
        now = os.fstat(descriptor)
        if now.st_size < entry.start + entry.n_bytes:
            raise EOFError("the file has become shorter")
        if (now.st_size, now.st_mtime_ns) != facts:
            raise EOFError("the file has changed")
        return descriptor

    def _open_file(self, file: Path) -> tuple[int, tuple[int, int]]:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        facts = os.fstat(descriptor)
        self._opened[file] = descriptor, (facts.st_size, facts.st_mtime_ns)
        if file in self._promised:
            try:
                same = set(self._promised[file]) <= set(read_header(file))
            except CheckpointError:
                same = False
            if not same:
                os.close(self._opened.pop(file)[0])
                raise EOFError("the file has changed since the checkpoint was opened")
        return self._opened[file]


def _read_fully(descriptor: int, window: memoryview, position: int) -> None:
    while len(window):
        count = os.preadv(descriptor, [window], position)
        if not count:
            raise EOFError("the file has become shorter")
        window, position = window[count:], position + count


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
