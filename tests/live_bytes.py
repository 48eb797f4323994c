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
        self.now_bytes = 0

    def __enter__(self) -> Self:
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in self.given:
                    self.given[storage._cdata] = StorageWeakRef(storage)
        out = func(*args, **kwargs)
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and not tensor.is_mkldnn:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.now_bytes = sum(n_bytes for _, n_bytes in self.alive.values())
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return out
