"""Measures what a computation holds: every tensor storage that is alive, after each of PyTorch's operations."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live: ...` then `live.peak_bytes`: the most bytes that tensors made inside held at one time.

    Exact and repeatable, unlike resident memory: it knows nothing of allocators. What an operation allocates and frees
    within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: dict[int, StorageWeakRef] = {}  # a reference keeps the address from being used again
        self.peak_bytes = 0
        self.most_bytes = 0  # of all in `alive`, some of which may have gone by now

    @property
    def now_bytes(self) -> int:
        """What is alive of what was made inside."""
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most_bytes = sum(n_bytes for _, n_bytes in self.alive.values())
        return self.most_bytes

    def __enter__(self) -> Self:
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive and storage._cdata not in self.given:
                self.given[storage._cdata] = StorageWeakRef(storage)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage._cdata not in self.given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.most_bytes += storage.nbytes()
        if self.most_bytes > self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]
