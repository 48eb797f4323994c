"""Which rows of every map a rank needs to make its band: a pure function of the network's units and of heights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handscroll.banded.autoencoder.sweeps import Sweep
from handscroll.banded.autoencoder.units import Attention, Unit
from handscroll.bands import common, covering


@dataclass(frozen=True)
class Route:
    """The sweeps of a network, for each the number of the sweep whose map it starts from, and the input's height and
    width. `own` is everywhere a band, in rows of the network's input.
    """

    sweeps: Sequence[Sweep]
    starts: Sequence[int]
    height: int
    width: int

    def units(self, index: int) -> list[Unit]:
        """What sweep `index` runs, from the map that it starts from."""
        found: list[Unit] = []
        for sweep in self.sweeps[self.starts[index] : index + 1]:
            found += [*([] if sweep.attention is None else [sweep.attention]), *sweep.local]
        return found

    def barrier(self, unit: Unit) -> int | None:
        """The number of the sweep that begins with a unit; None for those within one."""
        return next((index for index, sweep in enumerate(self.sweeps) if sweep.attention is unit), None)

    def made(self, index: int, own: range) -> range:
        """The own rows of what sweep `index` makes."""
        return scaled(own, self.sweeps[index].out_scale)

    def needed(self, index: int, own: range) -> list[range]:
        """The rows that go into each unit of sweep `index`, and last those that come out of it.

        They are the own rows and those that sums and later units need beside them.
        """
        rows = self.made(index, own)
        if index + 1 < len(self.sweeps):
            following = self.sweeps[index + 1].attention
            assert following is not None
            rows = self._within(rows, following.reach, following.in_scale)
        found = [rows]
        for unit in reversed(self.units(index)):
            rows = scaled(rows, 1 / unit.factor)
            if isinstance(unit, Attention) and not unit.is_linear(self.height * self.width):
                rows = range(round(self.height * unit.in_scale))
            else:
                # A window that halves begins at an even row.
                rows = self._within(rows, unit.reach + (unit.reach % 2 if unit.factor < 1 else 0), unit.in_scale)
            found.append(rows)
        return found[::-1]

    def of_map(self, index: int, own: range) -> range:
        """The rows that are needed of map `index` by all sweeps that start from it."""
        readers = [reader for reader, start in enumerate(self.starts) if start == index]
        return covering(self.needed(reader, own)[0] for reader in readers)

    def _within(self, rows: range, reach: int, scale: float) -> range:
        return common(range(rows.start - reach, rows.stop + reach), range(round(self.height * scale)))


def scaled(rows: range, scale: float) -> range:
    """The same stretch of a map `scale` times as tall, rows that are cut among it."""
    return range(int(rows.start * scale), -int(-rows.stop * scale // 1))
