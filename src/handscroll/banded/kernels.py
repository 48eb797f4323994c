"""Which kernels oneDNN has compiled in this process: it keeps them, and each takes memory once."""

from __future__ import annotations

import threading
from collections import OrderedDict

# oneDNN keeps so many, those that ran last.
KEPT = 1024
# Channels in and out, groups, size and whether an activation is in it; rows and columns of the result, bytes of an
# element: as plan/kernels.py predicts them.
CompiledKernel = tuple[int, int, int, int, bool, int, int, int]


class KernelsMet:
    """The kernels that oneDNN has compiled for convolutions in this process, those that ran last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: OrderedDict[CompiledKernel, None] = OrderedDict()

    def add(self, kernel: CompiledKernel) -> None:
        with self._lock:
            self._kernels[kernel] = None
            self._kernels.move_to_end(kernel)
            if len(self._kernels) > KEPT:
                self._kernels.popitem(last=False)

    def all(self) -> list[CompiledKernel]:
        """The oldest first."""
        with self._lock:
            return list(self._kernels)


MET = KernelsMet()
