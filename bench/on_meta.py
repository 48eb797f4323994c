"""What a computation costs, without computing: FLOP, and the bytes that its tensors hold at one time.

It runs on the meta device, where tensors have shapes and no memory, so that a decode of 37 GiB can be weighed in a
second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def flop_of(run: Callable[[], object]) -> int:
    """Of convolutions, matrix products and attention, two for each multiplication with its addition."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def peak_bytes_of(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` hold at one time: no scratch memory of operators, no allocator."""
    with torch.device("meta"), _Live() as live:
        run()
    return live.peak_bytes


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.sum_bytes = 0  # of all in `alive`, some of which may have gone by now
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                known = self.alive.get(storage._cdata)
                if known is None or known[0].expired():
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.sum_bytes += storage.nbytes()
        if self.sum_bytes > self.peak_bytes:
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.sum_bytes = sum(n_bytes for _, n_bytes in self.alive.values())
            self.peak_bytes = max(self.peak_bytes, self.sum_bytes)
        return out
