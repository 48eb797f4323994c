"""Memory: measuring a stage's peak, and giving back what a stage has left behind."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from handscroll.runtime.heap import return_large_blocks
from handscroll.system import peak_resident_bytes, resident_bytes

SAMPLE_SECONDS = 0.01


def release(device: str) -> None:
    """Gives freed memory back to the system: collects cycles, empties the device's caches, trims the C heap."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        empty_pinned_cache()
    trim()


def empty_pinned_cache() -> None:
    """Gives the host's pinned memory back that is not in use, which PyTorch would keep for ever."""
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_initialized():
        empty()


def trim() -> None:
    """Gives what the C heap holds of freed memory back to the system; nothing where there is no glibc."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            return  # a C library other than glibc


@contextmanager
def enforced(device: str, budget_bytes: int | None) -> Iterator[None]:
    """Makes the allocator keep to a budget inside, as far as it can be made to; without one, leaves it alone.

    CUDA: the caching allocator reserves no more than the budget, and raises instead. Where a smaller share was set
    already, that stays; what was set before is put back at the end.

    CPU: every buffer of a row block's size goes back to the system when it is freed, at the price of page faults (about
    a tenth of a decode's time), so that what is resident is what is in use. That holds for the rest of the process: the
    C library does not tell what was set before, so nothing can be put back.
    """
    if budget_bytes is None:
        yield
    elif device.startswith("cuda"):
        fraction = budget_bytes / torch.cuda.get_device_properties(device).total_memory
        _limit(device, add=fraction)
        try:
            yield
        finally:
            _limit(device, remove=fraction)
    else:
        return_large_blocks()
        yield


class _Limits:
    """The shares of each device's memory that jobs keep to now, and the share that was set before the first of them."""

    lock = threading.Lock()
    before: ClassVar[dict[str, float]] = {}
    asked: ClassVar[dict[str, list[float]]] = {}


def _limit(device: str, add: float | None = None, remove: float | None = None) -> None:
    """The least of all shares holds; when the last job has ended, the one from before."""
    with _Limits.lock:
        asked = _Limits.asked.setdefault(device, [])
        if not asked:
            _Limits.before[device] = _memory_fraction(device)
        if add is not None:
            asked.append(add)
        if remove is not None:
            asked.remove(remove)
        torch.cuda.set_per_process_memory_fraction(min([_Limits.before[device], *asked]), device)


def _memory_fraction(device: str) -> float:
    """The share of a device's memory that this process may take; all of it where PyTorch does not tell."""
    told = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if told is None else float(told(device))


class Meter:
    """Seconds and peak memory of each stage of one job.

    On a CUDA device peaks are what PyTorch's allocator reserved; on the CPU they are the process's resident memory,
    exact where a stage raises the process's peak, else sampled every 10 ms. What the system does not tell is left out.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.stage_peak_bytes: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        on_cuda = self.device.startswith("cuda")
        sampler = _Sampler()
        before = peak_resident_bytes()
        if on_cuda:
            torch.cuda.init()  # resetting, unlike reading, does not do it
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            sampler.start()
        try:
            yield
        finally:
            peak: int | None
            if on_cuda:
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_reserved(self.device)
            else:
                sampler.stop()
                after = peak_resident_bytes()
                rose = after is not None and before is not None and after > before
                peak = after if rose else sampler.peak_bytes
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if peak is not None:
                self.stage_peak_bytes[name] = max(self.stage_peak_bytes.get(name, 0), peak)

    def fork(self) -> Meter:
        """A meter that goes on from here: for pictures that share a stage and then differ."""
        meter = Meter(self.device)
        meter.seconds, meter.stage_peak_bytes = dict(self.seconds), dict(self.stage_peak_bytes)
        return meter

    @property
    def peak_bytes(self) -> int | None:
        """The most of any stage; on a CPU the process's peak, which includes what came before the first stage.

        None where the system tells neither.
        """
        measured = max(self.stage_peak_bytes.values(), default=0)
        if self.device.startswith("cuda"):
            return measured
        return max(measured, peak_resident_bytes() or 0) or None


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="handscroll-memory", daemon=True)
        self.peak_bytes = resident_bytes()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self._look()

    def stop(self) -> None:
        self.ended.set()
        self.join()
        self._look()

    def _look(self) -> None:
        held = resident_bytes()
        if held is not None:
            self.peak_bytes = max(self.peak_bytes or 0, held)
