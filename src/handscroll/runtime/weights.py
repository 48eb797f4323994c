"""Weights from safetensors files into modules: all at once, or lent for as long as a computation needs them.

A module that is built on the meta device has names and shapes and no memory. `WeightStream` makes chosen submodules
real for the length of a `with` block, in one flat buffer that the next ones use again, so that a network of any depth
runs in the memory of its largest layer. Files are read at positions and not mapped: what is resident is the buffer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from handscroll.errors import CheckpointError
from handscroll.limits import SLOTS, STAGING_BYTES
from handscroll.weight_files import TensorEntry, read_header

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}

CPU_ALIGNMENT_BYTES = 64  # what PyTorch's own allocators give
CUDA_ALIGNMENT_BYTES = 512
ADVICE_GAP_BYTES = 2**20  # ranges of a file that lie closer are read ahead as one


class WeightStream:
    """Fills parameters and persistent buffers of a module's submodules from its files, for a while or for good.

    Made by `checkpoint.open_module`, which has compared every name and shape: `entries` gives, for each tensor name of
    `module` that may be filled, where it is stored. Floating-point tensors come in `dtype`, all on `device`. Values
    are those of `checkpoint.load_module`, bit for bit.

    Memory: one buffer as large as what is lent at a time (two of them on a CUDA device, and two pinned ones on the
    host), 16 MiB where dtypes are converted, and what is kept. Whoever wants a lent tensor beyond its `with` block
    must copy it: the buffer is used again. For one thread.

    Files must stay as they are: a file that has changed since the checkpoint was opened raises CheckpointError.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: Mapping[str, TensorEntry],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        lane: Lane | None = None,
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._sites = {owner: list(_sites_in(owner, path, entries, dtype)) for path, owner in module.named_modules()}
        on_cuda = self.device.type == "cuda"
        self._alignment_bytes = CUDA_ALIGNMENT_BYTES if on_cuda else CPU_ALIGNMENT_BYTES
        if lane is None and on_cuda:
            lane = _CudaLane(self.device)
        files = _Files(_promised(entries.values()))
        self._memory: _InPlace | _ReadAhead = _InPlace(files) if lane is None else _ReadAhead(files, lane)
        self._as_in_the_file = isinstance(self._memory, _InPlace)

    @contextmanager
    def lend(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> Iterator[None]:
        """`modules`, without those in `but`, are real inside and as they were before afterwards.

        What is kept, or lent already, is lent as it is and at no cost. Raises CheckpointError naming file and tensor;
        then nothing has been lent.
        """
        sites = self._sites_of(modules, but)
        self._take(sites)
        try:
            yield
        finally:
            self._give_back(sites)

    def keep(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> None:
        """Makes `modules`, without those in `but`, real once and for all; lending them costs nothing from then on.

        On the CPU, tensors that the file holds in `dtype` already are the file's pages, as `TensorReader` says.
        """
        reader = TensorReader(self.dtype, self.device)
        sites = [site for site in self._sites_of(modules, but) if not site.kept]
        tensors = [reader.read(site.entry) for site in sites]
        for site, tensor in zip(sites, tensors, strict=True):
            site.put(tensor)
            site.kept = True

    def prefetch(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> None:
        """Begins to read what `lend` with the same arguments will need next, and returns at once.

        On a CPU the system is asked to have the file's pages at hand, which takes no memory of this process. On a CUDA
        device a thread reads and copies into the second slot; while none is free the call does nothing. What goes
        wrong is raised by `lend`.
        """
        sites = [site for site in self._sites_of(modules, but) if not site.is_real]
        if sites:
            self._memory.prefetch(self._layout(sites))

    def remember(self, n_bytes: int) -> None:
        """Lets a CUDA device's stream keep so many bytes of what it has read in pinned host memory, to send it again.

        What was read first is kept. On a CPU this does nothing: the system's page cache does as much.
        """
        if isinstance(self._memory, _ReadAhead):
            self._memory.room_bytes = n_bytes

    def bytes_of(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> int:
        """Bytes of `modules`, without those in `but`, in `dtype`: what lending them fills, or keeping them holds."""
        return sum(site.n_bytes for site in self._sites_of(modules, but))

    def close(self) -> None:
        """Frees the buffers that are not lent, and closes the files; the next `lend` opens them again."""
        self._memory.close()

    def _sites_of(self, modules: Iterable[nn.Module], but: Iterable[nn.Module]) -> list[_Site]:
        left_out = {owner for module in but for owner in module.modules()}
        found: dict[_Site, None] = {}
        for module in modules:
            for owner in module.modules():
                if owner not in self._sites and (owner._parameters or owner._buffers):
                    raise ValueError(f"a {type(owner).__name__} is no part of the module that this stream fills")
                if owner not in left_out:
                    found.update(dict.fromkeys(self._sites.get(owner, ())))
        return list(found)

    def _layout(self, sites: Iterable[_Site]) -> _Layout:
        """Where in a flat buffer each tensor goes, in the order of the files.

        Which kernel computes a product can depend on how its operands are aligned. So that lent weights give the same
        bits as mapped ones, they are aligned as they are in the file; neighbours in the file are neighbours here.
        """
        places, end = [], 0
        for site in sorted(sites, key=lambda site: (site.entry.file, site.entry.start)):
            phase = 0
            if self._as_in_the_file and _is_mappable(site.entry, site.dtype):
                phase = site.entry.start % self._alignment_bytes
            start = end + (phase - end) % self._alignment_bytes
            end = start + site.n_bytes
            places.append((site, start))
        return _Layout(tuple(places), end)

    def _take(self, sites: Sequence[_Site]) -> None:
        lacking = [site for site in sites if not site.is_real]
        if lacking:
            layout = self._layout(lacking)
            slot, flat = self._memory.load(layout)
            loan = _Loan(slot, len(lacking))
            for site, start in layout.places:
                site.put(_tensor_at(flat, start, site))
                site.loan = loan
        for site in sites:
            site.borrowers += 1

    def _give_back(self, sites: Sequence[_Site]) -> None:
        for site in sites:
            site.borrowers -= 1
            if site.borrowers or site.loan is None:
                continue
            loan, site.loan = site.loan, None
            if not site.kept:
                site.put(site.empty)
            loan.sites -= 1
            if not loan.sites:
                self._memory.give_back(loan.slot)


class TensorReader:
    """Reads whole tensors into `dtype` on `device` through one small staging buffer, or maps those that fit.

    On the CPU, tensors that the file holds in `dtype` already are not copied: they are the file's pages, mapped
    privately, which enter memory when first touched (and count as resident then); writing to one changes this
    process's copy and not the file.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._files = _Files()
        self._maps: dict[Path, Any] = {}

    def read(self, entry: TensorEntry) -> Tensor:
        """One tensor. Raises CheckpointError naming file and tensor."""
        dtype = _wanted(entry, self.dtype)
        if self.device.type == "cpu" and _is_mappable(entry, dtype):
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
    files = _Files()
    for row, target in zip(rows.flatten().tolist(), filled, strict=True):
        if not 0 <= row < count:
            raise CheckpointError(f"{entry.file}: the tensor {entry.name} has {count} rows, and row {row} is asked for")
        one = TensorEntry(entry.name, entry.file, entry.dtype, (channels,), entry.start + row * row_bytes, row_bytes)
        files.read(one, target)
    return filled.view(*rows.shape, channels)


# What a stream fills.


@dataclass(eq=False)
class _Site:
    """A parameter or buffer of the module: where it hangs, where it is stored, and who holds it now."""

    owner: nn.Module
    leaf: str
    entry: TensorEntry
    dtype: torch.dtype
    empty: Tensor  # the tensor on the meta device, put back after a loan
    kept: bool = False
    borrowers: int = 0
    loan: _Loan | None = None

    @property
    def is_real(self) -> bool:
        return self.kept or self.loan is not None

    @property
    def n_bytes(self) -> int:
        return self.empty.numel() * self.dtype.itemsize

    def put(self, tensor: Tensor) -> None:
        _put(self.owner, self.leaf, tensor)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Tensors and the byte at which each begins in a flat buffer of `n_bytes`."""

    places: tuple[tuple[_Site, int], ...]
    n_bytes: int


@dataclass(eq=False)
class _Loan:
    """The slot that a filled buffer goes back to, and how many tensors are still lent from it."""

    slot: Any
    sites: int


def _sites_in(owner: nn.Module, path: str, entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> Iterator[_Site]:
    for held in (owner._parameters, owner._buffers):
        for leaf, tensor in held.items():
            entry = entries.get(f"{path}.{leaf}".removeprefix("."))
            if tensor is not None and entry is not None:
                yield _Site(owner, leaf, entry, _wanted(entry, dtype), tensor)


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)


def _tensor_at(flat: Tensor, start: int, site: _Site) -> Tensor:
    return flat[start : start + site.n_bytes].view(site.dtype).view(site.entry.shape)


def _wanted(entry: TensorEntry, dtype: torch.dtype) -> torch.dtype:
    stored = DTYPES[entry.dtype]
    return dtype if stored.is_floating_point else stored


def _is_mappable(entry: TensorEntry, wanted: torch.dtype) -> bool:
    """Whether a tensor can be the file's bytes as they are."""
    return DTYPES[entry.dtype] == wanted and entry.start % wanted.itemsize == 0 and entry.n_bytes > 0


# Files.


def _promised(entries: Iterable[TensorEntry]) -> dict[Path, list[TensorEntry]]:
    promised: dict[Path, list[TensorEntry]] = {}
    for entry in entries:
        promised.setdefault(entry.file, []).append(entry)
    return promised


class _Files:
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

    def fill(self, layout: _Layout, flat: Tensor) -> None:
        """Reads every tensor of a layout to its place in a flat buffer of bytes on the CPU. Raises CheckpointError."""
        for site, start in layout.places:
            self.read(site.entry, _tensor_at(flat, start, site).view(-1))

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
                self._staging = _allocate(STAGING_BYTES)
            for first in range(0, entry.n_bytes, STAGING_BYTES):
                piece = self._staging[: min(STAGING_BYTES, entry.n_bytes - first)]
                _read_fully(descriptor, _bytes_of(piece), entry.start + first)
                begin, count = first // stored.itemsize, len(piece) // stored.itemsize
                target[begin : begin + count].copy_(piece.view(stored))
        except (OSError, EOFError) as error:
            raise _unreadable(entry, error) from error

    def advise(self, layout: _Layout) -> None:
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
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return CheckpointError(f"{entry.file}: the tensor {entry.name} cannot be read: {reason}")


def _allocate(n_bytes: int) -> Tensor:
    """Bytes that may be written in and out of inference mode, which a tensor born inside it may not."""
    with torch.inference_mode(False):
        return torch.empty(n_bytes, dtype=torch.uint8)


# Buffers.


class _InPlace:
    """Files are read straight into the one buffer that is computed with: for a CPU."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._idle: Tensor | None = None

    def load(self, layout: _Layout) -> tuple[Tensor, Tensor]:
        """The slot and the filled buffer, which are the same here."""
        flat, self._idle = self._idle, None
        if flat is None or not _fits(layout, flat):
            flat = None  # freed before the next is made
            flat = _allocate(layout.n_bytes)
        try:
            self._files.fill(layout, flat)
        except BaseException:
            self._idle = flat
            raise
        return flat, flat

    def prefetch(self, layout: _Layout) -> None:
        self._files.advise(layout)

    def give_back(self, slot: Tensor) -> None:
        self._idle = slot

    def close(self) -> None:
        self._idle = None
        self._files.close()


class Lane(Protocol):
    """How bytes get from the host to where they are computed with, in order with what is computed there."""

    def allocate(self, n_bytes: int) -> Tensor:
        """Bytes over there."""

    def allocate_host(self, n_bytes: int) -> Tensor:
        """Bytes on the host, to be sent from."""

    def mark(self) -> Any:
        """An event: what was asked for so far by those who compute."""

    def send(self, host: Tensor, there: Tensor, after: Any) -> Any:
        """Copies once `after` has come; the event that it has happened."""

    def follow(self, event: Any) -> None:
        """What is computed from now on comes after `event`."""

    def finish(self, event: Any) -> None:
        """Waits until `event` has come."""


class _CudaLane:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def allocate(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def allocate_host(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def send(self, host: Tensor, there: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            there.copy_(host, non_blocking=True)
            return self.stream.record_event()

    def follow(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()


@dataclass(eq=False)
class _Slot:
    """A buffer over there and one on the host, and what has to have happened before each is written again."""

    there: Tensor
    released: Any  # those who computed with `there` are done
    host: Tensor | None = None  # made when it is first needed
    copied: Any = None  # what was sent last has been copied
    arriving: Future[None] = field(default_factory=Future)


class _ReadAhead:
    """A thread reads into one slot while the other is computed with: for a device with its own memory.

    What was read once may be remembered on the host, so that it is only sent the next time. Buffers are made by the
    thread that computes, since an allocator's memory belongs to the order of its work.
    """

    def __init__(self, files: _Files, lane: Lane) -> None:
        self._files, self._lane = files, lane
        self.room_bytes = 0  # for what is remembered
        self._remembered: dict[tuple[tuple[_Site, int], ...], Tensor] = {}
        self._idle: deque[_Slot] = deque()
        self._coming: dict[tuple[tuple[_Site, int], ...], _Slot] = {}
        self._lent = 0
        self._reader: ThreadPoolExecutor | None = None

    def load(self, layout: _Layout) -> tuple[_Slot, Tensor]:
        """The slot and its filled buffer. Raises CheckpointError, from here or from the reading ahead."""
        slot = self._coming.pop(layout.places, None)
        if slot is None:
            if not self._idle and len(self._coming) + self._lent >= SLOTS and self._coming:
                self._forget(next(iter(self._coming)))
            slot = self._start(layout)
        try:
            slot.arriving.result()
        except BaseException:
            self._settle(slot)
            self._idle.append(slot)
            raise
        self._lane.follow(slot.copied)
        self._lent += 1
        return slot, slot.there

    def prefetch(self, layout: _Layout) -> None:
        if layout.places not in self._coming and len(self._coming) + self._lent < SLOTS:
            self._coming[layout.places] = self._start(layout)

    def give_back(self, slot: _Slot) -> None:
        self._lent -= 1
        slot.released = self._lane.mark()
        if len(self._idle) + len(self._coming) + self._lent < SLOTS:
            self._idle.append(slot)

    def close(self) -> None:
        for key in list(self._coming):
            self._forget(key)
        self._idle.clear()
        self.room_bytes += sum(host.numel() for host in self._remembered.values())
        self._remembered.clear()
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None
        self._files.close()

    def _start(self, layout: _Layout) -> _Slot:
        slot = next((slot for slot in self._idle if _fits(layout, slot.there)), None)
        if slot is not None:
            self._idle.remove(slot)
        else:
            if self._idle:
                self._idle.popleft()  # freed before the next is made
            with torch.inference_mode(False):  # the thread that fills it is in no mode
                slot = _Slot(self._lane.allocate(layout.n_bytes), released=self._lane.mark())
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="handscroll-weights")
        remembered = self._remembered.get(layout.places)
        host = remembered
        if host is None:
            host = self._host_for(slot, layout)
        slot.arriving = self._reader.submit(self._bring, slot, layout, host, remembered is None)
        return slot

    def _host_for(self, slot: _Slot, layout: _Layout) -> Tensor:
        """Where to read to: memory that is remembered while there is room, else the slot's own."""
        n_bytes = layout.n_bytes
        with torch.inference_mode(False):
            if n_bytes <= self.room_bytes:
                self.room_bytes -= n_bytes
                return self._lane.allocate_host(n_bytes)
            if slot.host is None or slot.host.numel() < n_bytes:
                slot.host = self._lane.allocate_host(slot.there.numel())
            return slot.host

    def _bring(self, slot: _Slot, layout: _Layout, host: Tensor, read: bool) -> None:
        if slot.copied is not None:
            self._lane.finish(slot.copied)
        if read:
            self._files.fill(layout, host)
            if host is not slot.host:
                self._remembered[layout.places] = host
        n_bytes = layout.n_bytes
        slot.copied = self._lane.send(host[:n_bytes], slot.there[:n_bytes], slot.released)

    def _forget(self, key: tuple[tuple[_Site, int], ...]) -> None:
        """What was read ahead and not asked for."""
        slot = self._coming.pop(key)
        self._settle(slot)
        self._idle.append(slot)

    def _settle(self, slot: _Slot) -> None:
        """Waits until nobody writes to the slot."""
        try:
            slot.arriving.exception()
        finally:
            if slot.copied is not None:
                self._lane.finish(slot.copied)


def _fits(layout: _Layout, flat: Tensor) -> bool:
    """Whether a buffer is large enough, and not so large that a new one would hold much less."""
    return layout.n_bytes <= flat.numel() <= 2 * layout.n_bytes
