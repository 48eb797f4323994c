"""Where in a flat buffer each tensor of a module goes, and who holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handscroll.weights.dtypes import wanted_dtype
from handscroll.weights.header import TensorEntry

CPU_ALIGNMENT_BYTES = 64  # what PyTorch's own allocators give
CUDA_ALIGNMENT_BYTES = 512


@dataclass(eq=False)
class Site:
    """A parameter or buffer of the module: where it hangs, where it is stored, and who holds it now."""

    owner: nn.Module
    leaf: str
    entry: TensorEntry
    dtype: torch.dtype
    empty: Tensor  # the tensor on the meta device, put back after its use
    resident: bool = False
    users: int = 0
    use: Use | None = None

    @property
    def is_real(self) -> bool:
        return self.resident or self.use is not None

    @property
    def n_bytes(self) -> int:
        return self.empty.numel() * self.dtype.itemsize

    def put(self, tensor: Tensor) -> None:
        _put(self.owner, self.leaf, tensor)


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors and the byte at which each begins in a flat buffer of `n_bytes`."""

    places: tuple[tuple[Site, int], ...]
    n_bytes: int


@dataclass(eq=False)
class Use:
    """The slot that a filled buffer goes back to, and how many tensors in it are still in use."""

    slot: Any
    sites: int


def sites_in(owner: nn.Module, path: str, entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> Iterator[Site]:
    for held in (owner._parameters, owner._buffers):
        for leaf, tensor in held.items():
            entry = entries.get(f"{path}.{leaf}".removeprefix("."))
            if tensor is not None and entry is not None:
                yield Site(owner, leaf, entry, wanted_dtype(entry, dtype), tensor)


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)


def tensor_at(flat: Tensor, start: int, site: Site) -> Tensor:
    return flat[start : start + site.n_bytes].view(site.dtype).view(site.entry.shape)
