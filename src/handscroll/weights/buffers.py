"""The buffers that materialized weights live in, on a CPU and on a device with memory of its own."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from handscroll.limits import SLOTS
from handscroll.weights.files import OpenFiles, allocate_bytes
from handscroll.weights.layout import Layout, Site
from handscroll.weights.transfer import Transfer


class InPlaceBuffer:
    """Files are read straight into the one buffer that is computed with: for a CPU."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._idle: Tensor | None = None

    def load(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The slot and the filled buffer, which are the same here."""
        flat, self._idle = self._idle, None
        if flat is None or not _fits(layout, flat):
            flat = None  # freed before the next is made
            flat = allocate_bytes(layout.n_bytes)
        try:
            self._files.fill(layout, flat)
        except BaseException:
            self._idle = flat
            raise
        return flat, flat

    def prefetch(self, layout: Layout) -> None:
        self._files.advise(layout)

    def give_back(self, slot: Tensor) -> None:
        self._idle = slot

    @property
    def idle_bytes(self) -> int:
        return 0 if self._idle is None else self._idle.nbytes

    def free(self) -> None:
        self._idle = None

    def close(self) -> None:
        self.free()
        self._files.close()


@dataclass(eq=False)
class Slot:
    """A buffer over there and one on the host, and what has to have happened before each is written again."""

    there: Tensor
    released: Any  # those who computed with `there` are done
    host: Tensor | None = None  # made when it is first needed
    copied: Any = None  # what was sent last has been copied
    arriving: Future[None] = field(default_factory=Future)


class ReadAheadBuffers:
    """A thread reads into one slot while the other is computed with: for a device with its own memory.

    What was read once may stay pinned on the host, so that it is only sent the next time. Buffers are made by the
    thread that computes, since an allocator's memory belongs to the order of its work.
    """

    def __init__(self, files: OpenFiles, transfer: Transfer) -> None:
        self._files, self._transfer = files, transfer
        self.room_bytes = 0  # for what stays pinned
        self._pinned: dict[tuple[tuple[Site, int], ...], Tensor] = {}
        self._idle: deque[Slot] = deque()
        self._coming: dict[tuple[tuple[Site, int], ...], Slot] = {}
        self._lent = 0
        self._reader: ThreadPoolExecutor | None = None

    def load(self, layout: Layout) -> tuple[Slot, Tensor]:
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
        self._transfer.follow(slot.copied)
        self._lent += 1
        return slot, slot.there

    def prefetch(self, layout: Layout) -> None:
        if layout.places not in self._coming and len(self._coming) + self._lent < SLOTS:
            self._coming[layout.places] = self._start(layout)

    def give_back(self, slot: Slot) -> None:
        self._lent -= 1
        slot.released = self._transfer.mark()
        if len(self._idle) + len(self._coming) + self._lent < SLOTS:
            self._idle.append(slot)

    @property
    def idle_bytes(self) -> int:
        return sum(slot.there.nbytes for slot in self._idle)

    def close(self) -> None:
        for key in list(self._coming):
            self._forget(key)
        self._idle.clear()
        self.room_bytes += sum(host.numel() for host in self._pinned.values())
        self._pinned.clear()
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None
        self._files.close()

    def _start(self, layout: Layout) -> Slot:
        slot = next((slot for slot in self._idle if _fits(layout, slot.there)), None)
        if slot is not None:
            self._idle.remove(slot)
        else:
            if self._idle:
                self._idle.popleft()  # freed before the next is made
            with torch.inference_mode(False):  # the thread that fills it is in no mode
                slot = Slot(self._transfer.allocate(layout.n_bytes), released=self._transfer.mark())
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="handscroll-weights")
        pinned = self._pinned.get(layout.places)
        host = pinned
        if host is None:
            host = self._host_for(slot, layout)
        slot.arriving = self._reader.submit(self._bring, slot, layout, host, pinned is None)
        return slot

    def _host_for(self, slot: Slot, layout: Layout) -> Tensor:
        """Where to read to: memory that stays pinned while there is room, else the slot's own."""
        n_bytes = layout.n_bytes
        with torch.inference_mode(False):
            if n_bytes <= self.room_bytes:
                self.room_bytes -= n_bytes
                return self._transfer.allocate_host(n_bytes)
            if slot.host is None or slot.host.numel() < n_bytes:
                slot.host = self._transfer.allocate_host(slot.there.numel())
            return slot.host

    def _bring(self, slot: Slot, layout: Layout, host: Tensor, read: bool) -> None:
        if slot.copied is not None:
            self._transfer.finish(slot.copied)
        if read:
            self._files.fill(layout, host)
            if host is not slot.host:
                self._pinned[layout.places] = host
        n_bytes = layout.n_bytes
        slot.copied = self._transfer.send(host[:n_bytes], slot.there[:n_bytes], slot.released)

    def _forget(self, key: tuple[tuple[Site, int], ...]) -> None:
        """What was read ahead and not asked for."""
        slot = self._coming.pop(key)
        self._settle(slot)
        self._idle.append(slot)

    def _settle(self, slot: Slot) -> None:
        """Waits until nobody writes to the slot."""
        try:
            slot.arriving.exception()
        finally:
            if slot.copied is not None:
                self._transfer.finish(slot.copied)


def _fits(layout: Layout, flat: Tensor) -> bool:
    """Whether a buffer is large enough, and not so large that a new one would hold much less."""
    return layout.n_bytes <= flat.numel() <= 2 * layout.n_bytes
