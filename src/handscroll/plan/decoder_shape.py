"""The shape of an `AutoencoderDC`'s decoder as sweeps: bytes, FLOPs and weights of each, from the spec alone.

It mirrors what banded/autoencoder/ builds from the module itself; tests hold the two together. A pass holds what its
units hold (unit_shape.py), has one workspace as large as its largest window, and keeps the sums of its attentions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from handscroll.bands import Bands
from handscroll.limits import tree_nodes
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.plan.inputs import MIB
from handscroll.plan.unit_shape import UnitShape, decoder_units

# Norms and gates of half precision are made in fp32, a piece of this size at a time.
FP32_PIECES_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class PassShape:
    """What one pass over the rows takes beside maps: while it runs, and before that, while weights are laid out.

    scratch_bytes: what a library takes in a call, of which PyTorch makes no tensor.
    """

    running_bytes: int
    scratch_bytes: int
    weight_bytes: int
    layout_bytes: int
    flops: float
    calls: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + max(self.running_bytes + self.scratch_bytes, self.layout_bytes)


@dataclass(frozen=True)
class DecoderShape:
    """The decoder of a latent of `rows` x `columns`, cut at its attentions as banded/autoencoder/ cuts it.

    Sweep i begins with attention i, but for sweep 0; a latent of a few pixels has fewer barriers. `columns` are those
    of all pictures of a batch together. fused: whether the device has fused kernels, such as oneDNN's, for the type.
    resident: the weights are there anyway, laying them out brings none; and maps are counted to less than a chunk.
    ranks: so many devices make a band of the rows each, in proportion to `speeds` where there are any; memory and work
    are those of the one with most rows.
    """

    spec: AutoencoderSpec
    rows: int
    columns: int
    element_bytes: int
    batch: int = 1
    fused: bool = True
    resident: bool = False
    ranks: int = 1
    speeds: tuple[float, ...] = ()

    @cached_property
    def bands(self) -> Bands:
        """Of the latent."""
        return Bands.of(self.rows, self.ranks, self.speeds or None)

    @cached_property
    def own_rows(self) -> int:
        """Of the latent, those that a device makes."""
        return self.bands.most_rows

    def units(self) -> Iterator[UnitShape]:
        """The network's units, in the order they run."""
        return decoder_units(self.spec)

    @cached_property
    def sweeps(self) -> tuple[tuple[UnitShape, ...], ...]:
        sweeps: list[list[UnitShape]] = [[]]
        for unit in self.units():
            if unit.kind == "attention" and self.rows * self.columns * unit.scale**2 > unit.head_dim * self.batch:
                sweeps.append([])
            sweeps[-1].append(unit)
        return tuple(map(tuple, sweeps))

    def __len__(self) -> int:
        return len(self.sweeps)

    def map_rows(self, index: int) -> int:
        """Of the map that sweep `index` starts from, those that a device makes."""
        return self.own_rows * self.sweeps[index][0].scale

    def halo_rows(self, start: int, index: int) -> list[int]:
        """What sweep `index` needs above its own rows, and below: of the input of each unit that it passes from map
        `start`, and last of what comes out. None is needed by a device that makes all rows.
        """
        following = self.sweeps[index + 1][0].reach if index + 1 < len(self) else 0
        found = [following if self.ranks > 1 else 0]
        for unit in [unit for sweep in self.sweeps[start : index + 1] for unit in sweep][::-1]:
            reach = unit.reach if unit.factor >= 1 else 2
            found.append(-int(-found[-1] / unit.factor // 1) + reach if self.ranks > 1 else 0)
        return found[::-1]

    def map_halo_rows(self, index: int, starts: Sequence[int]) -> int:
        """What is needed of map `index` above the own rows, and below, by all sweeps that start from it."""
        readers = [reader for reader, start in enumerate(starts) if start == index]
        return max((self.halo_rows(index, reader)[0] for reader in readers), default=0)

    def halo_bytes(self, index: int, starts: Sequence[int]) -> int:
        """The rows of map `index` beside the own ones, which are sent or received; none are of the first."""
        if not index:
            return 0
        rows = min(self.rows * self.sweeps[index][0].scale, 2 * self.map_halo_rows(index, starts))
        return rows * self.map_bytes(index) // self.map_rows(index)

    def map_bytes(self, index: int) -> int:
        """The map that sweep `index` starts from; nothing for the first, whose input is the latent."""
        first = self.sweeps[index][0]
        return self.map_rows(index) * self.columns * first.scale * first.channels * self.element_bytes if index else 0

    def row_bytes(self, index: int) -> int:
        """What the largest activation of sweep `index` holds for one row of its map."""
        own = self.sweeps[index][0].scale
        widest = max(unit.widest_channels * (unit.scale * unit.factor) ** 2 for unit in self.sweeps[index])
        return int(widest * self.columns * self.element_bytes // own)

    @cached_property
    def _parts(self) -> tuple[tuple[tuple[_Part, ...], _Part | None], ...]:
        """Of every sweep its units, and the sums that it makes for the next one's attention."""
        given = (self.element_bytes, self.resident, self.fused)
        parts = {
            id(unit): _Part.of(unit, *given, leads=index > 0 and unit is sweep[0])
            for index, sweep in enumerate(self.sweeps)
            for unit in sweep
        }
        sums = [_Part.of(replace(sweep[0], kind="sums"), *given, leads=True) for sweep in self.sweeps[1:]]
        return tuple(
            (tuple(parts[id(unit)] for unit in sweep), side)
            for sweep, side in zip(self.sweeps, [*sums, None], strict=True)
        )

    def pass_shape(self, start: int, index: int, strip_rows: int) -> PassShape:
        """The pass that makes sweep `index` from map `start`, `strip_rows` rows of map `index` at a time."""
        own, element_bytes = self.sweeps[index][0].scale, self.element_bytes
        parts = [part for each, _ in self._parts[start : index + 1] for part in each]
        if (side := self._parts[index][1]) is not None:
            parts.append(side)
        working = workspace = waiting = 0
        for part in dict.fromkeys(parts):  # layers of the same shape on the same map are one
            unit = part.unit
            columns, row_block = self.columns * unit.scale, rows_at(strip_rows, unit.scale, own)
            rows = self.rows * unit.scale if part.called else min(row_block, self.own_rows * unit.scale)
            for size, channels in part.windows:
                workspace = max(workspace, (size - 1 + max(rows, size // 2)) * channels * columns * element_bytes)
            bytes_of = unit.called_bytes if part.called else unit.working_bytes
            at_work = bytes_of(rows, columns, element_bytes)
            if not self.fused:
                at_work += max(unit.unfused_bytes(rows, columns, element_bytes), min(FP32_PIECES_BYTES, at_work))
            working = max(working, waiting + at_work)
            if rows * unit.factor > rows_at(strip_rows, int(unit.scale * unit.factor), own):
                # What comes out is cut to fewer rows; the others wait above the units that follow.
                waiting += int(rows * unit.out_channels * columns * unit.factor**2) * element_bytes
        attentions = [sweep[0] for sweep in self.sweeps[1 : index + 2]]
        sums = [4 * unit.inner * (unit.head_dim + 1) * (1 + len(unit.scales)) for unit in attentions]
        # The last are being made, for the next sweep.
        tree = 0 if side is None else (tree_nodes(self.own_rows * attentions[-1].scale) - 1) * sums[-1]
        if self.ranks > 1 and side is not None:  # of all devices, as they are put together
            tree += 4 * tree_nodes(self.own_rows * attentions[-1].scale) * sums[-1]
        if element_bytes == 2 and self.fused:
            working += min(FP32_PIECES_BYTES, working)
        held = sum(part.held_channels for part in parts) * self.columns * element_bytes
        return PassShape(
            running_bytes=held + workspace + sum(sums) + tree + working,
            scratch_bytes=max(part.called_row_bytes * self.rows * part.unit.scale * self.batch for part in parts),
            weight_bytes=sum(part.laid_out_bytes for part in parts),
            layout_bytes=max(part.layout_bytes for part in parts) + sum(sums),
            flops=2.0 * self.columns * self._macs_of_column(start, index, parts),
            calls=8 * len(parts),
        )

    def _macs_of_column(self, start: int, index: int, parts: Sequence[_Part]) -> float:
        """Of a column of the latent, in the units of a pass: each works on its own rows and on the halo's."""
        halos = self.halo_rows(start, index)
        return sum(
            part.macs * min(self.rows, self.own_rows + 2 * halo_rows / part.unit.scale)
            for part, halo_rows in zip(parts, halos, strict=False)
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A unit and what it takes whatever the row blocks: the same of every unit of this shape on this map.

    held_channels: rows x channels of line buffers and queues, and macs, both for one pixel of the latent's width or
    area. called: as the module that it is, on the whole map at once; called_row_bytes: for each row of that.
    """

    unit: UnitShape
    windows: tuple[tuple[int, int], ...]
    held_channels: int
    laid_out_bytes: int
    layout_bytes: int
    called_row_bytes: int
    macs: int
    called: bool

    @staticmethod
    def of(unit: UnitShape, element_bytes: int, resident: bool, fused: bool, leads: bool) -> _Part:
        """leads: whether a sweep begins with it; an attention that does not is called as it is."""
        lent_bytes = 0 if resident else unit.parameters * element_bytes
        called = unit.kind == "attention" and not leads
        as_it_is = resident and (called or (not fused and unit.laid_out == unit.parameters))
        # In half precision PyTorch's product with `to_out` copies its matrix for every row of such an attention's map.
        repeated = unit.inner * (1 + len(unit.scales)) * unit.channels if called and element_bytes == 2 else 0
        buffered = sum((size - 1) * channels for size, channels in unit.windows)
        return _Part(
            unit,
            tuple(unit.windows),
            (buffered + unit.queued_channels) * unit.scale,
            0 if as_it_is else unit.laid_out * element_bytes,
            (0 if as_it_is else unit.layout_bytes(element_bytes)) + lent_bytes,
            repeated * element_bytes,
            unit.macs * unit.scale**2,
            called,
        )


def rows_at(strip_rows: int, scale: int, own: int) -> int:
    """A row block's rows where the map is `scale` times the latent's size, given those at `own`; at least one."""
    return max(1, -(-strip_rows * scale // own))
