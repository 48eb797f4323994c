"""The kernels that oneDNN compiles for an autoencoder in row blocks: one for each operator and each of its shapes.

It keeps what it has compiled, so that a kernel takes memory the first time, and none when its shape comes again. Shapes
differ at the edges: the first rows that an operator gives are fewer, since it lags, and so are the last. How many come
when follows from the rules of a sweep (banded/rows.py), which are repeated here on numbers of rows alone; a test holds
the two together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from handscroll.plan.decode import DecodeStage
from handscroll.plan.decoder_shape import DecoderShape, rows_at
from handscroll.plan.unit_shape import UnitShape

# Measured for fp32 and bf16: 560 to 670 KiB, 50 to 190, and 50 to 150.
MATRIX_BYTES, CONVOLUTION_BYTES, GROUPED_BYTES = 610 * 2**10, 140 * 2**10, 80 * 2**10
# oneDNN keeps 1,024, of which more than a hundred are no convolutions. Of what it drops not all is given back.
KEPT, MOST_FREED = 850, 0.5
# Row blocks in which no lag is left, before the last.
_STEADY = 4


class Kernel(NamedTuple):
    """An operator and a shape of its result: the tuple by which banded/backend.py remembers what has run.

    size: of the convolution's kernel. rows, columns: of the result, those of all pictures of a batch side by side; a
    matrix, that is a 1x1 convolution without groups, has all positions in one column.
    """

    channels: int
    out_channels: int
    groups: int
    size: int
    activated: bool
    rows: int
    columns: int
    element_bytes: int

    @property
    def bytes(self) -> int:
        if self.groups > 1:
            return GROUPED_BYTES
        return MATRIX_BYTES if self.size == 1 else CONVOLUTION_BYTES


def compiled_bytes(shape: DecoderShape, stage: DecodeStage, met: Sequence[Kernel]) -> list[int]:
    """What the kernels that were not `met` take by the end of each sweep, less those of the oldest that make room.

    met: what has run in this process, the oldest first.
    """
    needed: set[Kernel] = set()
    known = frozenset(met)
    taken = []
    for index, sweep in enumerate(stage.sweeps):
        needed |= kernels_of(shape, sweep.start, index, sweep.strip_rows)
        new = needed - known
        too_many = max(0, len(met) + len(new) - KEPT)
        dropped = (kernel for kernel in met if kernel not in needed)
        freed_bytes = sum(kernel.bytes for kernel in islice(dropped, too_many))
        new_bytes = sum(kernel.bytes for kernel in new)
        taken.append(new_bytes - min(freed_bytes, int(new_bytes * MOST_FREED)))
    return taken


@lru_cache(maxsize=4096)
def kernels_of(shape: DecoderShape, start: int, index: int, strip_rows: int) -> frozenset[Kernel]:
    """Those of the pass that makes sweep `index` from map `start`, `strip_rows` rows of map `index` at a time."""
    own = shape.sweeps[index][0].scale
    units = [unit for sweep in shape.sweeps[start : index + 1] for unit in sweep]
    if index + 1 < len(shape):
        units.append(replace(shape.sweeps[index + 1][0], kind="sums"))
    steps = []
    for unit in units:
        most_rows = sys.maxsize if unit.kind == "sums" else rows_at(strip_rows, int(unit.scale * unit.factor), own)
        steps.append(_Step(unit, most_rows, tuple(_operators(unit))))
    first, smallest = units[0].scale, min(int(unit.scale * unit.factor) for unit in units)
    lag_rows = sum(-(-step.operators[-1].lag_rows * first // step.unit.scale) for step in steps)
    block_rows = rows_at(strip_rows, first, own)
    _run(_row_blocks(shape.rows * first, block_rows, -(-lag_rows // block_rows), max(1, first // smallest)), steps)
    return frozenset(
        operator.kernel(rows, shape, step.unit)
        for step in steps
        for operator, rows in step.made
        if operator.out_channels
    )


@dataclass(frozen=True, slots=True)
class _Operator:
    """A convolution of a unit. Of the first n rows that come, less a lag, it makes `times` for each `step` of them.

    One without channels stands for what a unit gives, where that are other numbers of rows.
    """

    channels: int
    out_channels: int
    size: int
    lag_rows: int = 0
    groups: int = 1
    activated: bool = False
    step: int = 1
    times: int = 1
    columns: float = 1  # of its result over those of its input
    extra_columns: int = 0

    def rows_of(self, taken_rows: int, last: bool) -> int:
        return max(0, taken_rows - (0 if last else self.lag_rows)) // self.step * self.times

    def kernel(self, rows: int, shape: DecoderShape, unit: UnitShape) -> Kernel:
        columns = int(shape.columns * unit.scale * self.columns) + self.extra_columns * shape.batch
        if self.size == 1 and self.groups == 1:
            rows, columns = rows * columns, 1
        operator = (self.channels, self.out_channels, self.groups, self.size, self.activated)
        return Kernel(*operator, rows, columns, shape.element_bytes)


def _operators(unit: UnitShape) -> Iterator[_Operator]:
    """The operators of a unit (banded/autoencoder/blocks.py and attention.py), the one that gives its result last."""
    channels, out_channels, inner = unit.channels, unit.out_channels, unit.inner
    match unit.kind:
        case "conv_in" | "conv_out" | "mean_out":
            yield _Operator(channels, out_channels, 3, 1)
        case "res_block":
            yield _Operator(channels, channels, 3, 1, activated=True)
            yield _Operator(channels, channels, 3, 2)
        case "mix_ffn":
            yield _Operator(channels, 8 * channels, 1, activated=True)
            yield _Operator(8 * channels, 8 * channels, 3, 1, groups=8 * channels)
            yield _Operator(4 * channels, channels, 1, 1)
        case "attention" | "sums":
            thirds = 1 if unit.kind == "attention" else 2
            made = thirds * inner
            yield _Operator(channels, made, 1)
            for size in unit.scales:
                yield _Operator(made, made, size, size // 2, groups=made)
                yield _Operator(made, made, 1, size // 2, groups=made // unit.head_dim)
            if unit.kind == "sums":
                yield _Operator(0, 0, 1)
            else:
                yield _Operator(inner * (1 + len(unit.scales)), channels, 1, unit.lag_rows)
        case "up" if unit.folded:
            yield _Operator(channels, 2 * out_channels, 2, 1, extra_columns=1)
            yield _Operator(0, 0, 1, 1, times=2)
        case "up" if unit.parameters == 9 * channels * out_channels + out_channels:
            yield _Operator(channels, out_channels, 3, 1, times=2, columns=2)
        case "up":
            yield _Operator(channels, 4 * out_channels, 3, 1)
            yield _Operator(0, 0, 1, 1, times=2)
        case "down" if unit.parameters == 9 * channels * out_channels + out_channels:
            yield _Operator(channels, out_channels, 3, step=2, columns=0.5)
        case "down":
            yield _Operator(channels, out_channels // 4, 3, 1, step=2, times=2)
            yield _Operator(0, 0, 1, 1, step=2)
        case "norm_out":
            yield _Operator(0, 0, 1)


@dataclass(slots=True)
class _Step:
    """A unit at work on numbers of rows. made: which of its operators gave how many rows at a time."""

    unit: UnitShape
    max_rows: int
    operators: tuple[_Operator, ...]
    taken_rows: int = 0
    made: set[tuple[_Operator, int]] = field(default_factory=set)

    def push(self, rows: int, last: bool = False) -> int:
        """The rows that come out."""
        before, self.taken_rows = self.taken_rows, self.taken_rows + rows
        made = 0
        for operator in self.operators:
            made = operator.rows_of(self.taken_rows, last) - operator.rows_of(before, False)
            if made:
                self.made.add((operator, made))
        return made


def _run(row_blocks: Iterable[int], steps: Sequence[_Step]) -> None:
    """`banded.rows.sweep` with numbers of rows in place of rows."""

    def cascade(index: int, rows: int, most: int) -> None:
        while rows > most:
            cascade(index, most, most)
            rows -= most
        if index < len(steps) and (made := steps[index].push(rows)):
            cascade(index + 1, made, steps[index].max_rows)

    for rows in row_blocks:
        cascade(0, rows, sys.maxsize)
    waiting = 0
    for index, step in enumerate(steps):
        ready = step.push(waiting) if waiting else 0
        flushed = step.push(0, last=True)
        if ready and flushed and ready + flushed > step.max_rows:
            cascade(index + 1, ready, step.max_rows)
            ready = 0
        waiting = ready + flushed
        while waiting > step.max_rows:
            cascade(index + 1, step.max_rows, step.max_rows)
            waiting -= step.max_rows


def _row_blocks(rows: int, block_rows: int, lag: int, period: int) -> Iterator[int]:
    """The row blocks of a map, without those in the middle that are like others.

    lag: how many go in before the last step has given rows without interruption. After `period` of them, what the steps
    hold back is the same again, even where rows are halved on the way.
    """
    whole, enough = rows // block_rows, lag + _STEADY
    yield from [block_rows] * (whole if whole <= enough else enough + (whole - enough) % period)
    if rows % block_rows:
        yield rows % block_rows
