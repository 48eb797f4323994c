"""Where in a flat buffer each tensor of a module goes, and who holds it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handscroll.weights.forms import SCALE
from handscroll.weights.quantised import views, widen
from handscroll.weights.sources import Read, Source

CPU_ALIGNMENT_BYTES = 64  # what PyTorch's own allocators give
CUDA_ALIGNMENT_BYTES = 512


@dataclass(eq=False)
class Site:
    """A parameter or buffer of the module: where it hangs, where it comes from, and who holds it now.

    native: a quantised matrix is computed with in its parts; else it is made wide for its use. kept: its parts, where
    it is resident and made wide for every use.
    """

    owner: nn.Module
    leaf: str
    source: Source
    dtype: torch.dtype
    empty: Tensor  # the tensor on the meta device, put back after its use
    native: bool = False
    resident: bool = False
    kept: Tensor | None = None
    users: int = 0
    use: Use | None = None

    @property
    def is_real(self) -> bool:
        return (self.resident and self.kept is None) or self.use is not None

    @property
    def is_widened(self) -> bool:
        return self.source.form is not None and not self.native

    @property
    def n_bytes(self) -> int:
        """At work."""
        return self.source.packed_bytes if self.native else self.source.wide_bytes(self.dtype)

    @property
    def kept_bytes(self) -> int:
        """Resident."""
        return self.n_bytes if self.source.form is None else self.source.packed_bytes

    def put(self, tensor: Tensor) -> None:
        """Puts one plain tensor, or the bytes of a native one's parts, in the place of the parameter."""
        if not self.native:
            _put(self.owner, self.leaf, tensor)
            return
        assert self.source.form is not None
        numbers, scale = views(self.source.form, self.source.shape, tensor).values()
        _put(self.owner, self.leaf, numbers)
        setattr(self.owner, SCALE, scale)

    def take_away(self) -> None:
        """Puts the tensor without memory back."""
        _put(self.owner, self.leaf, self.empty)
        if self.native:
            delattr(self.owner, SCALE)


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors and the byte at which each begins in a flat buffer of `n_bytes`.

    packed: quantised matrices lie there in their parts, also those that are made wide afterwards.
    """

    places: tuple[tuple[Site, int], ...]
    n_bytes: int
    packed: bool = False

    def bytes_at(self, flat: Tensor, start: int, site: Site) -> Tensor:
        return flat[start : start + size_of(site, self.packed)]

    def fill(self, site: Site, start: int, flat: Tensor, read: Read) -> None:
        """Reads one of them to its place, on the CPU. Raises CheckpointError."""
        here, source = self.bytes_at(flat, start, site), site.source
        if source.form is not None and (self.packed or site.native):
            source.fill_packed(read, here)
        elif site.kept is not None:
            widen_site(site, site.kept, here)
        else:
            source.fill(read, wide(site, here))

    def put(self, flat: Tensor) -> None:
        """Hangs all of them into the module."""
        for site, start in self.places:
            here = self.bytes_at(flat, start, site)
            site.put(here if site.native else wide(site, here))


@dataclass(eq=False)
class Use:
    """The slot that a filled buffer goes back to, None for none, and how many tensors in it are still in use."""

    slot: Any
    sites: int


def size_of(site: Site, packed: bool) -> int:
    return site.source.packed_bytes if packed and site.source.form is not None else site.n_bytes


def wide(site: Site, here: Tensor) -> Tensor:
    """Bytes as one plain tensor."""
    return here.view(site.source.wide_dtype(site.dtype)).view(site.source.shape)


def widen_site(site: Site, packed: Tensor, here: Tensor) -> None:
    """Makes the parts of a matrix wide, on the device where both are."""
    assert site.source.form is not None
    widen(site.source.form, views(site.source.form, site.source.shape, packed), wide(site, here))


def sites_in(
    owner: nn.Module, path: str, sources: Mapping[str, Source], dtype: torch.dtype, native: Collection[str]
) -> Iterator[Site]:
    """native: the forms of storage that are computed with as they are."""
    for held in (owner._parameters, owner._buffers):
        for leaf, tensor in held.items():
            source = sources.get(f"{path}.{leaf}".removeprefix("."))
            if tensor is not None and source is not None:
                is_native = source.form is not None and source.form.storage in native
                yield Site(owner, leaf, source, source.wide_dtype(dtype), tensor, is_native)


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)
