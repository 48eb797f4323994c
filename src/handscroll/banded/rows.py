"""The vocabulary of row streaming: row blocks, line buffers, delays and maps.

A *row block* is a few full-width rows of a feature map, `[B, rows, W, C]`: channels last, so that rows are contiguous
and a row block can be cut or joined along its rows without moving anything else. A `RowOp` takes row blocks from top to
bottom and gives row blocks from top to bottom; it may hold rows back until the rows below have arrived. `None` stands
for a row block of no rows: it is what an op returns while its buffers fill, and what it may be given when `last` asks
it to flush.

Every op yields exactly the rows that the same operator yields on the whole map; how the rows were cut into row blocks
changes nothing but the order of evaluation.

A row block is freed as soon as its last reader has it. Python's callers keep alive what they pass in a local variable,
so row blocks are handed down in lists of one, which the receiver empties: `op.push(held.pop(), last)`.

Their heights are options: `strip_rows` in the autoencoder, `band_rows` in the transformer.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handscroll.limits import MAP_CHUNK_BYTES

RowBlock = Tensor | None


class RowOp(ABC):
    """An operator on rows. It is used for one pass from the first row to the last, then thrown away."""

    @abstractmethod
    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        """Takes the next rows `[B, rows, W, C]`, or None; returns the rows that are now ready, or None.

        `last` is true exactly once, with the row block that ends the map (or None if that has passed already).
        """


class Chain(RowOp):
    """Ops one after another."""

    def __init__(self, ops: Iterable[RowOp]) -> None:
        self.ops = list(ops)

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        held = [row_block]
        del row_block
        for op in self.ops:
            held.append(op.push(held.pop(), last))
        return held.pop()


class Pointwise(RowOp):
    """A function of each pixel alone: `[B, rows, W, C] -> [B, rows, W, C']`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        return None if row_block is None else self.function(row_block)


class Workspace:
    """One stretch of memory that the ops of a pass use in turn, so that no row block allocates anew.

    A CPU's allocator keeps what was freed; buffers that live for one call but are of many sizes, mixed with small ones
    that live on, make it keep several times what was ever in use.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def join(self, pieces: list[Tensor]) -> Tensor:
        """Row blocks `[B, rows, W, C]` one below another, in memory that is valid until the next call."""
        batch, _, width, channels = pieces[0].shape
        shape = (batch, sum(piece.shape[1] for piece in pieces), width, channels)
        count = torch.Size(shape).numel()
        if self.memory is None or self.memory.numel() < count or self.memory.dtype != pieces[0].dtype:
            self.memory = None
            self.memory = pieces[0].new_empty(count)
        return torch.cat(pieces, dim=1, out=self.memory[:count].view(shape))


class Windowed(RowOp):
    """A line buffer: output row i is a function of the input rows `i*step - pad ... i*step - pad + size - 1`.

    The function gets `[B, (n-1)*step + size, W, C]` and returns the rows of n windows, in memory of its own. Rows above
    the first and below the last are zeros, as in a zero-padded convolution; with `above` and `below` they are those
    that come first and last, and none are put out for them. Only the `size - step` rows that the next window shares are
    kept between row blocks, so that nothing is computed twice.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        step: int = 1,
        pad: int | None = None,
        workspace: Workspace | None = None,
        above: bool = False,
        below: bool = False,
    ) -> None:
        assert step <= size, "rows between two windows would be lost count of"
        self.function = function
        self.size, self.step = size, step
        self.pad = size // 2 if pad is None else pad
        self.above, self.below = above, below
        self.workspace = Workspace() if workspace is None else workspace
        self.buffer: Tensor | None = None
        self.kept_rows = -1  # before the first row

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        if row_block is None and (not last or self.buffer is None):
            return None
        if self.buffer is None:
            assert row_block is not None
            batch, _, width, channels = row_block.shape
            self.buffer = row_block.new_zeros(batch, max(self.size - 1, self.pad, 1), width, channels)
            self.kept_rows = 0 if self.above else self.pad
        pieces = [self.buffer[:, : self.kept_rows]] if self.kept_rows else []
        if row_block is not None:
            pieces.append(row_block)
        if last and self.pad and not self.below:
            pieces.append(torch.zeros_like(self.buffer[:, : self.pad]))
        if not pieces:
            return None
        rows = pieces[0] if len(pieces) == 1 else self.workspace.join(pieces)
        del pieces, row_block
        windows = max(0, (rows.shape[1] - self.size) // self.step + 1)
        used = windows * self.step
        self.kept_rows = rows.shape[1] - used
        if self.kept_rows and not last:
            # Without a window `rows` may be the buffer's own first rows, and every row is kept where it is.
            self.buffer[:, : self.kept_rows] = rows[:, used:].clone() if not windows else rows[:, used:]
        return self.function(rows[:, : used - self.step + self.size]) if windows else None


class Whole(RowOp):
    """A function of the whole map at once, for maps of a few pixels: holds everything back until the last row."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.held: list[Tensor] = []

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        if row_block is not None:
            self.held.append(row_block)
        return self.function(torch.cat(self.held, dim=1)) if last else None


class RowQueue:
    """Rows that wait for a slower branch; row blocks are kept as they came, nothing is copied to enter."""

    def __init__(self) -> None:
        self.row_blocks: deque[Tensor] = deque()
        self.rows = 0

    def put(self, row_block: RowBlock) -> None:
        if row_block is not None:
            self.row_blocks.append(row_block)
            self.rows += row_block.shape[1]

    def take(self, rows: int) -> Iterator[Tensor]:
        """The next `rows` rows, in as many pieces as they came in."""
        self.rows -= rows
        while rows:
            row_block = self.row_blocks.popleft()
            if row_block.shape[1] > rows:
                self.row_blocks.appendleft(row_block[:, rows:])
                row_block = row_block[:, :rows]
            rows -= row_block.shape[1]
            yield row_block

    def settle(self) -> None:
        """Copies row blocks that are part of something larger, so that rows that wait do not hold all of it."""
        for index, row_block in enumerate(self.row_blocks):
            if row_block.nbytes < row_block.untyped_storage().nbytes():
                self.row_blocks[index] = row_block.clone()


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class Residual(RowOp):
    """`branch(x) + x`, where the branch may lag. Its output must not be kept by the branch: it is added to in place.

    skip_rows: for so many rows the branch has none, because they are those above its first.
    """

    def __init__(self, branch: RowOp, skip_rows: int = 0) -> None:
        self.branch, self.skip_rows = branch, skip_rows
        self.waiting = RowQueue()

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        self.waiting.put(row_block)
        if self.skip_rows:
            skipped = min(self.skip_rows, self.waiting.rows)
            self.skip_rows -= skipped
            for _ in self.waiting.take(skipped):
                pass
        out = self.branch.push(row_block, last)
        del row_block
        if out is None:
            return None
        row = 0
        for piece in self.waiting.take(out.shape[1]):
            out[:, row : row + piece.shape[1]] += piece
            row += piece.shape[1]
        self.waiting.settle()
        return out


class Join(RowOp):
    """Several branches of one input, of different lags, brought back to the same rows and concatenated by channel."""

    def __init__(self, branches: Iterable[RowOp]) -> None:
        self.branches = [(branch, RowQueue()) for branch in branches]

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        for branch, queue in self.branches:
            queue.put(branch.push(row_block, last))
        rows = min(queue.rows for _, queue in self.branches)
        if not rows:
            return None
        columns = [list(queue.take(rows)) for _, queue in self.branches]
        joined = torch.cat([_joined(pieces) for pieces in columns], dim=-1)
        del columns
        for _, queue in self.branches:
            queue.settle()
        return joined


class Cropped(RowOp):
    """Of what an op gives, `rows` rows after the first `skip_rows`."""

    def __init__(self, op: RowOp, skip_rows: int, rows: int) -> None:
        self.op, self.first, self.end = op, skip_rows, skip_rows + rows
        self.row = 0

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        held = [row_block]
        del row_block
        out = self.op.push(held.pop(), last)
        if out is None:
            return None
        first, end = max(self.first - self.row, 0), max(self.end - self.row, 0)
        self.row += out.shape[1]
        return out[:, first:end] if first < min(end, out.shape[1]) else None


class Tee(RowOp):
    """Passes its rows on untouched and shows them to a second op, whose output is dropped (it keeps a sum)."""

    def __init__(self, side: RowOp) -> None:
        self.side = side

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        self.side.push(row_block, last)
        return row_block


class RowMap:
    """A whole feature map `[B, H, W, C]` between two sweeps: this one in memory, in chunks of rows.

    Written from top to bottom and read from top to bottom. A chunk is allocated when its first row is written and freed
    when its last row has been read, so that a sweep that reads one map and writes the next holds little more than one
    of them. Subclasses (runtime/spill.py) hold the rows elsewhere.
    """

    def __init__(self, height: int, chunk_bytes: int = MAP_CHUNK_BYTES) -> None:
        self.height = height
        self.chunk_bytes = chunk_bytes
        self.chunks: deque[Tensor] = deque()
        self.rows_written = 0

    def write(self, row_block: RowBlock) -> None:
        """Appends rows `[B, rows, W, C]`, all of one shape but for their number; the row block is copied."""
        while row_block is not None and row_block.shape[1]:
            batch, rows, width, channels = row_block.shape
            row_bytes = batch * width * channels * row_block.element_size()
            chunk_rows = min(max(1, self.chunk_bytes // row_bytes), self.height)
            offset = self.rows_written % chunk_rows
            if offset == 0:
                kept_rows = min(chunk_rows, self.height - self.rows_written)
                self.chunks.append(self.new_chunk(row_block, kept_rows))
            room = self.chunks[-1].shape[1] - offset
            self.chunks[-1][:, offset : offset + min(room, rows)] = row_block[:, :room]
            self.rows_written += min(room, rows)
            row_block = row_block[:, room:]

    def new_chunk(self, row_block: Tensor, rows: int) -> Tensor:
        """Room for `rows` rows such as the row block's."""
        return row_block.new_empty(row_block.shape[0], rows, *row_block.shape[2:])

    def row_blocks(self, strip_rows: int, keep: bool = False) -> Iterator[Tensor]:
        """Yields the map in row blocks of `strip_rows` rows (the last may be shorter), and frees what was read.

        Row blocks must not be written to: they may be the map's own memory. keep: nothing is freed, and the map may be
        read again.
        """
        queue = RowQueue()
        chunks = deque(self.chunks) if keep else self.chunks
        while chunks or queue.rows:
            while chunks and queue.rows < strip_rows:
                queue.put(chunks.popleft())
            yield _joined(list(queue.take(min(strip_rows, queue.rows))))

    def close(self) -> None:
        """Frees whatever the map holds; it can be neither written nor read any more. May be called again."""
        self.chunks.clear()


@dataclass(frozen=True)
class Stage:
    """An op of a sweep, and the most rows of its output that are passed on at a time."""

    op: RowOp
    max_rows: int


def sweep(row_blocks: Iterable[Tensor], op: RowOp | Sequence[Stage]) -> Iterator[Tensor]:
    """Drives an op, or several one after another, over a map from top to bottom. Yields what comes out.

    At the end every op gives up the rows that it held back, and what all of them held back together may be many row
    blocks tall. They are flushed one after another, and no more than `max_rows` rows go on at a time, so that the end
    takes no more memory than the middle.
    """
    stages = [Stage(op, sys.maxsize)] if isinstance(op, RowOp) else op
    for row_block in row_blocks:
        held = [row_block]
        del row_block
        yield from _cascade(stages, held, sys.maxsize)
    waiting: list[Tensor] = []  # the last rows of the stages above, at most max_rows of them
    for index, stage in enumerate(stages):
        further = stages[index + 1 :]
        # Two calls: a single one with `last` would give the rows that came and those held back at once.
        ready = _push(stage.op, waiting, last=False) if waiting else []
        flushed = _push(stage.op, [], last=True)
        if ready and flushed and ready[0].shape[1] + flushed[0].shape[1] > stage.max_rows:
            yield from _cascade(further, ready, stage.max_rows)
        waiting = [_joined(ready + flushed)] if ready or flushed else []
        del ready, flushed
        while waiting and waiting[0].shape[1] > stage.max_rows:
            yield from _cascade(further, [waiting[0][:, : stage.max_rows]], stage.max_rows)
            waiting[0] = waiting[0][:, stage.max_rows :]
    while waiting:
        yield waiting.pop()


def _push(op: RowOp, held: list[Tensor], last: bool) -> list[Tensor]:
    """Empties `held`, a list of no or one row block, into the op; what comes out is again none or one."""
    out = op.push(held.pop() if held else None, last)
    return [] if out is None else [out]


def _cascade(stages: Sequence[Stage], held: list[Tensor], max_rows: int) -> Iterator[Tensor]:
    """Empties `held`, one row block, through all stages, `max_rows` rows of it at a time."""
    while held[0].shape[1] > max_rows:
        yield from _cascade(stages, [held[0][:, :max_rows]], max_rows)
        held[0] = held[0][:, max_rows:]
    if not stages:
        yield held.pop()
    elif ready := _push(stages[0].op, held, last=False):
        yield from _cascade(stages[1:], ready, stages[0].max_rows)


def cut(map_: Tensor, strip_rows: int) -> Iterator[Tensor]:
    """A whole map `[B, H, W, C]` as row blocks, without copying."""
    for top in range(0, map_.shape[1], strip_rows):
        yield map_[:, top : top + strip_rows]
