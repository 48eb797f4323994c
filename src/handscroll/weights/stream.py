"""Weights from safetensors files into modules: resident, or materialized for as long as a computation needs them.

A module that is built on the meta device has names and shapes and no memory. `WeightStream` materializes chosen
submodules for the length of a `with` block, in one flat buffer that the next ones use again, so that a network of any
depth runs in the memory of its largest layer. Files are read at positions and not mapped: what is resident is the
buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handscroll.weights.buffers import InPlaceBuffer, ReadAheadBuffers
from handscroll.weights.dtypes import is_mappable
from handscroll.weights.file_state import FileState, promises_of
from handscroll.weights.files import OpenFiles, TensorReader, check_mapped
from handscroll.weights.header import TensorEntry
from handscroll.weights.layout import (
    CPU_ALIGNMENT_BYTES,
    CUDA_ALIGNMENT_BYTES,
    Layout,
    Site,
    Use,
    sites_in,
    size_of,
    wide,
    widen_site,
)
from handscroll.weights.sources import Source, sources_of
from handscroll.weights.transfer import CudaTransfer, Transfer


class WeightStream:
    """Fills parameters and persistent buffers of a module's submodules from its files, for a while or for good.

    Made by `modules.open_module`, which has compared every name and shape: `entries` gives, for each tensor name of
    `module` that may be filled, where it is stored. Floating-point tensors come in `dtype`, all on `device`. Values
    are those of `modules.load_module`, bit for bit.

    Memory: one buffer as large as what is materialized at a time (two of them on a CUDA device, and two pinned ones on
    the host), 16 MiB where dtypes are converted, and what is resident. A tensor that is wanted beyond its `with` block
    must be copied: the buffer is used again. For one thread.

    A matrix that is kept in 8 or 4 bits (`Source.form`) is made wide while it is materialized, unless its storage is
    one of `native`: then its owner has its numbers as `weight`, and beside it `weight_scale`. Resident, it takes no
    more than its parts either way. On a CUDA device parts are what is read and sent, and are made wide there.

    Files must stay as they are: a file that has changed since the checkpoint was opened raises CheckpointError, whether
    its tensors are read or resident already. `states` says how the checkpoint found them.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: Mapping[str, TensorEntry | Source],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        transfer: Transfer | None = None,
        states: Mapping[Path, FileState] | None = None,
        native: Collection[str] = (),
    ) -> None:
        self.entries, self.dtype, self.device = sources_of(entries), dtype, torch.device(device)
        self._sites = {
            owner: list(sites_in(owner, path, self.entries, dtype, native)) for path, owner in module.named_modules()
        }
        on_cuda = self.device.type == "cuda"
        self._alignment_bytes = CUDA_ALIGNMENT_BYTES if on_cuda else CPU_ALIGNMENT_BYTES
        if transfer is None and on_cuda:
            transfer = CudaTransfer(self.device)
        self._transfer = transfer
        read = (entry for source in self.entries.values() for entry in source.entries)
        self._promised = promises_of(read, states or {})
        self._mapped: dict[Path, FileState] = {}
        files = OpenFiles(self._promised)
        self._memory: InPlaceBuffer | ReadAheadBuffers = (
            InPlaceBuffer(files) if transfer is None else ReadAheadBuffers(files, transfer)
        )
        # Beside quantised matrices nothing lies as in its file, so that the bits do not depend on which file that is:
        # the one that was quantised, or the original.
        self._maps = all(source.is_plain for source in self.entries.values())
        self._as_in_the_file = isinstance(self._memory, InPlaceBuffer) and self._maps

    @contextmanager
    def materialize(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> Iterator[None]:
        """`modules`, without those in `but`, are real inside and as they were before afterwards.

        What is resident, or materialized already, is used as it is, after a look whether its file has changed. Raises
        CheckpointError naming file and tensor; then nothing has been materialized.
        """
        sites = self._sites_of(modules, but)
        self._take(sites)
        try:
            yield
        finally:
            self._give_back(sites)

    def make_resident(
        self, *modules: nn.Module, but: Iterable[nn.Module] = (), before_each: Callable[[], None] = lambda: None
    ) -> None:
        """Makes `modules`, without those in `but`, real for good; to materialize them costs nothing from then on.

        On the CPU, tensors that the file holds in `dtype` already are the file's pages, as `TensorReader` says.
        before_each: called before each tensor; what it raises ends this, and then nothing has been made real.
        """
        reader = TensorReader(self.dtype, self.device, self._promised, maps=self._maps)
        sites = [site for site in self._sites_of(modules, but) if not site.resident]
        tensors = []
        for site in sites:
            before_each()
            tensors.append(reader.read(site.source))
        for site, tensor in zip(sites, tensors, strict=True):
            if site.is_widened:
                site.kept = tensor
            else:
                site.put(tensor)
            site.resident = True
        self._mapped |= reader.mapped

    def prefetch(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> None:
        """Begins to read what `materialize` with the same arguments will need next, and returns at once.

        On a CPU the system is asked to have the file's pages at hand, which takes no memory of this process. On a CUDA
        device a thread reads and copies into the second slot; while none is free the call does nothing. What goes
        wrong is raised by `materialize`.
        """
        sites = [site for site in self._sites_of(modules, but) if not site.is_real and site.kept is None]
        if sites:
            self._memory.prefetch(self._layout(sites, self._is_sent))

    def pin(self, n_bytes: int) -> None:
        """Lets a CUDA device's stream hold so many bytes of what it has read in pinned host memory, to send it again.

        What was read first is held. On a CPU this does nothing: the system's page cache does as much.
        """
        if isinstance(self._memory, ReadAheadBuffers):
            self._memory.room_bytes = n_bytes
        if isinstance(self._transfer, CudaTransfer):
            self._transfer.expect(n_bytes)

    def bytes_of(self, *modules: nn.Module, but: Iterable[nn.Module] = ()) -> int:
        """Bytes of `modules`, without those in `but`, in `dtype`: what they take, materialized or resident."""
        return sum(site.n_bytes for site in self._sites_of(modules, but))

    def sent_bytes_of(self, *modules: nn.Module) -> int:
        """Bytes of `modules` as a CUDA device is sent them: quantised matrices in their parts."""
        return sum(size_of(site, packed=True) for site in self._sites_of(modules, ()))

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is resident, and of the buffers that are not in use."""
        sites = (site for owned in self._sites.values() for site in owned)
        return sum(site.kept_bytes for site in sites if site.resident) + self.buffer_bytes

    @property
    def buffer_bytes(self) -> int:
        """What the buffers hold that are not in use."""
        return self._memory.idle_bytes

    def free_buffers(self) -> None:
        """Frees the buffer of a CPU that is not in use."""
        if isinstance(self._memory, InPlaceBuffer):
            self._memory.free()

    def close(self) -> None:
        """Frees the buffers that are not in use, and closes the files; the next `materialize` opens them again."""
        self._memory.close()
        if isinstance(self._memory, ReadAheadBuffers):
            self.pin(self._memory.room_bytes)

    def check(self) -> None:
        """Raises CheckpointError where a file has changed whose pages are resident."""
        check_mapped(self._mapped)

    def _sites_of(self, modules: Iterable[nn.Module], but: Iterable[nn.Module]) -> list[Site]:
        left_out = {owner for module in but for owner in module.modules()}
        found: dict[Site, None] = {}
        for module in modules:
            for owner in module.modules():
                if owner not in self._sites and (owner._parameters or owner._buffers):
                    raise ValueError(f"a {type(owner).__name__} is no part of the module that this stream fills")
                if owner not in left_out:
                    found.update(dict.fromkeys(self._sites.get(owner, ())))
        return list(found)

    @property
    def _is_sent(self) -> bool:
        """Whether what is read goes to a device, quantised matrices in their parts."""
        return isinstance(self._memory, ReadAheadBuffers)

    def _layout(self, sites: Iterable[Site], packed: bool = False) -> Layout:
        """Where in a flat buffer each tensor goes, in the order of the files.

        Which kernel computes a product can depend on how its operands are aligned. So that materialized weights give
        the same bits as mapped ones, they are aligned as they are in the file; neighbours in the file are neighbours
        here.
        """
        places, end = [], 0
        for site in sorted(sites, key=lambda site: site.source.place):
            phase, source = 0, site.source
            if self._as_in_the_file and source.is_plain and is_mappable(source.first, site.dtype):
                phase = source.first.start % self._alignment_bytes
            start = end + (phase - end) % self._alignment_bytes
            end = start + size_of(site, packed)
            places.append((site, start))
        return Layout(tuple(places), end, packed)

    def _take(self, sites: Sequence[Site]) -> None:
        used = {site.source.first.file for site in sites if site.resident}
        check_mapped({file: state for file, state in self._mapped.items() if file in used})
        lacking = [site for site in sites if not site.is_real]
        if lacking:
            use = self._load_and_widen(lacking) if self._is_sent else self._load(lacking)
            for site in lacking:
                site.use = use
        for site in sites:
            site.users += 1

    def _load(self, sites: list[Site]) -> Use:
        layout = self._layout(sites)
        slot, flat = self._memory.load(layout)
        layout.put(flat)
        return Use(slot, len(sites))

    def _load_and_widen(self, sites: list[Site]) -> Use:
        """What is not there comes in its parts; all that is to be wide is made so, in memory for this use alone."""
        sent = [site for site in sites if site.kept is None]
        slot: Any = None
        parts = {site: site.kept for site in sites if site.kept is not None}
        if sent:
            layout = self._layout(sent, packed=True)
            slot, flat = self._memory.load(layout)
            for site, start in layout.places:
                here = layout.bytes_at(flat, start, site)
                if site.is_widened:
                    parts[site] = here
                else:
                    site.put(here if site.native else wide(site, here))
        if parts:
            layout = self._layout(parts)
            with torch.inference_mode(False):
                flat = torch.empty(layout.n_bytes, dtype=torch.uint8, device=self.device)
            for site, start in layout.places:
                widen_site(site, parts[site], layout.bytes_at(flat, start, site))
            layout.put(flat)
        return Use(slot, len(sites))

    def _give_back(self, sites: Sequence[Site]) -> None:
        for site in sites:
            site.users -= 1
            if site.users or site.use is None:
                continue
            use, site.use = site.use, None
            if not site.resident or site.kept is not None:
                site.take_away()
            use.sites -= 1
            if not use.sites and use.slot is not None:
                self._memory.give_back(use.slot)
