"""Memory: measuring a stage's peak, and giving back what a stage has left behind."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from handscroll.runtime.heap import return_large_blocks
from handscroll.system import peak_resident_bytes, resident_bytes

SAMPLE_SECONDS = 0.01


def release(device: str) -> None:
    """Gives freed memory back to the system: collects cycles, empties the device's cache, trims the C heap."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Gives what the C heap holds of freed memory back to the system; nothing where there is no glibc."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            return  # a C library other than glibc


def enforce(device: str, budget_bytes: int | None) -> None:
    """Makes the allocator keep to a budget, as far as it can be made to; without one, lets it go.

    CUDA: the caching allocator reserves no more than the budget, and raises instead. CPU: every buffer of a row block's
    size goes back to the system when it is freed, at the price of page faults (about a tenth of a decode's time), so
    that what is resident is what is in use; that holds for the rest of the process.
    """
    if device.startswith("cuda"):
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if budget_bytes is None else min(1.0, budget_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, device)
    elif budget_bytes is not None:
        return_large_blocks()


class Meter:
    """Measures stages one after another: `seconds` and `peak_bytes` by stage, added and maximised over its visits.

    On a CUDA device the peak is what the allocator reserved. On a CPU it is the whole process's resident memory: exact
    where a stage raises the process's peak, else sampled every 10 ms.
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
            if on_cuda:
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_reserved(self.device)
            else:
                sampler.stop()
                after = peak_resident_bytes()
                peak = after if after > before else sampler.peak_bytes
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.stage_peak_bytes[name] = max(self.stage_peak_bytes.get(name, 0), peak)

    def fork(self) -> Meter:
        """A meter that goes on from here: for pictures that share a stage and then differ."""
        meter = Meter(self.device)
        meter.seconds, meter.stage_peak_bytes = dict(self.seconds), dict(self.stage_peak_bytes)
        return meter

    @property
    def peak_bytes(self) -> int:
        """The most of any stage; on a CPU the process's peak, which includes what came before the first stage."""
        measured = max(self.stage_peak_bytes.values(), default=0)
        return measured if self.device.startswith("cuda") else max(measured, peak_resident_bytes())


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="handscroll-memory", daemon=True)
        self.peak_bytes = resident_bytes()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def stop(self) -> None:
        self.ended.set()
        self.join()
        self.peak_bytes = max(self.peak_bytes, resident_bytes())
