"""A network's units cut into sweeps at its attentions, and how tall the row blocks of each sweep are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from handscroll.banded.autoencoder.units import Attention, Unit
from handscroll.limits import CUDA_STRIP_BYTES, STRIP_BYTES, few_heights_below


@dataclass(frozen=True)
class Sweep:
    """One pass over the rows: the attention that it applies first (none in the first sweep), then local units."""

    attention: Attention | None
    local: tuple[Unit, ...]

    @property
    def in_scale(self) -> float:
        return self.attention.in_scale if self.attention is not None else self.local[0].in_scale

    @property
    def out_scale(self) -> float:
        last = self.local[-1] if self.local else self.attention
        assert last is not None
        return last.in_scale * last.factor

    def row_bytes(self, width: int, element_bytes: int) -> int:
        """What the largest activation of the sweep holds for one row of its input; `width` is the network input's."""
        units = [*self.local, self.attention] if self.attention is not None else self.local
        return max(
            round(unit.channels * width * (unit.in_scale * unit.factor) ** 2 / self.in_scale) * element_bytes
            for unit in units
        )

    def map_bytes(self, height: int, width: int, element_bytes: int) -> int:
        """The map that the sweep starts from; nothing for the first, whose input is the caller's."""
        if self.attention is None:
            return 0
        return round(height * width * self.in_scale**2) * self.attention.module.to_out.out_features * element_bytes

    @property
    def weight_bytes(self) -> int:
        """The weights that the sweep uses, which it holds once more in a layout of its own."""
        units = [*self.local, self.attention] if self.attention is not None else self.local
        return sum(p.numel() * p.element_size() for unit in units for p in unit.module.parameters())


def cut_at_barriers(units: Sequence[Unit], height: int, width: int) -> list[Sweep]:
    """The sweeps that a network needs on an input of this size."""
    sweeps: list[tuple[Attention | None, list[Unit]]] = [(None, [])]
    for unit in units:
        if isinstance(unit, Attention) and unit.is_linear(height * width):
            sweeps.append((unit, []))
        else:
            sweeps[-1][1].append(unit)
    return [Sweep(attention, tuple(local)) for attention, local in sweeps]


def strip_heights(sweeps: Sequence[Sweep], given: Tensor, strip_rows: int | None) -> list[int]:
    """Rows of its own input that each sweep takes at a time; the network is `given` [B, C, H, W].

    `strip_rows` is the height in the last sweep, that is in rows of the map at the last barrier; the others get row
    blocks of the same bytes. None stands for what makes the largest activation about as big as is best on the device.
    """
    if strip_rows is not None and strip_rows < 1:
        raise ValueError(f"row blocks of {strip_rows} rows end nowhere")
    row_bytes = [sweep.row_bytes(given.shape[-1], len(given) * given.element_size()) for sweep in sweeps]
    default_bytes = STRIP_BYTES if given.device.type == "cpu" else CUDA_STRIP_BYTES
    strip_bytes = default_bytes if strip_rows is None else strip_rows * row_bytes[-1]
    heights = [max(1, strip_bytes // one_row) for one_row in row_bytes]
    if given.is_cuda:
        heights = [few_heights_below(height) for height in heights]
    return heights if strip_rows is None else [*heights[:-1], strip_rows]
