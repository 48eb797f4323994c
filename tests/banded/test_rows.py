"""However a map is cut into row blocks, an op gives the rows that the same operator gives on the whole map."""

from __future__ import annotations

import weakref
from collections.abc import Generator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handscroll.banded.rows import (
    Chain,
    Join,
    Pointwise,
    Residual,
    RowBlock,
    RowMap,
    RowOp,
    RowQueue,
    Tee,
    Whole,
    Windowed,
    Workspace,
    cut,
    sweep,
)

settings.register_profile("rows", deadline=None, max_examples=60)
settings.load_profile("rows")

# Heights of row blocks; 0 stands for a push of None.
PARTITIONS = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)
CHANNELS = 2


def numbered(height: int, batch: int = 1, width: int = 2, channels: int = CHANNELS) -> Tensor:
    """A map without two equal values, none zero."""
    return torch.arange(1.0, 1 + batch * height * width * channels).reshape(batch, height, width, channels)


def row_blocks_of(map_: Tensor, partition: list[int]) -> list[RowBlock]:
    return [row_block if row_block.shape[1] else None for row_block in map_.split(partition, dim=1)]


def run(op: RowOp, row_blocks: list[RowBlock], *, late_last: bool = False) -> Tensor | None:
    """Pushes the row blocks; `last` comes with the final one, or with a None after it."""
    row_blocks = [*row_blocks, None] if late_last else row_blocks
    ready = [op.push(row_block, last=index == len(row_blocks) - 1) for index, row_block in enumerate(row_blocks)]
    present = [row_block for row_block in ready if row_block is not None]
    return torch.cat(present, dim=1) if present else None


def windows(map_: Tensor, size: int, step: int, pad: int) -> Tensor:
    """The sum of every window, its rows weighted 1, 10, 100...: tells any row out of place."""
    padded = F.pad(map_.double(), (0, 0, 0, 0, pad, pad))
    if padded.shape[1] < size:
        return padded[:, :0]
    weights = 10.0 ** torch.arange(size, dtype=torch.float64)
    return padded.unfold(1, size, step) @ weights


def window_sum(size: int, step: int) -> Windowed:
    return Windowed(lambda window: windows(window, size, step, 0), size, step)


@given(st.data(), PARTITIONS, st.integers(1, 5), st.integers(0, 6), st.booleans(), st.integers(1, 2))
def test_windows(data: st.DataObject, partition: list[int], size: int, pad: int, late_last: bool, batch: int) -> None:
    step = data.draw(st.integers(1, size), label="step")
    map_ = numbered(sum(partition), batch)
    before = map_.clone()
    op = Windowed(lambda window: windows(window, size, step, 0), size, step, pad)
    result = run(op, row_blocks_of(map_, partition), late_last=late_last)
    expected = windows(map_, size, step, pad)
    if not expected.shape[1]:
        assert result is None
        return
    assert result is not None
    assert torch.equal(result, expected)
    assert torch.equal(map_, before)


@given(PARTITIONS, st.integers(1, 5), st.integers(0, 4))
def test_windows_see_exactly_their_rows(partition: list[int], size: int, pad: int) -> None:
    heights = []

    def function(window: Tensor) -> Tensor:
        heights.append(window.shape[1])
        return window[:, size - 1 :].clone()

    run(Windowed(function, size, 1, pad), row_blocks_of(numbered(sum(partition)), partition))
    made = sum(height - size + 1 for height in heights)
    assert made == max(0, sum(partition) + 2 * pad - size + 1)
    assert all(height >= size for height in heights)


def test_the_default_pad_keeps_the_height() -> None:
    result = run(window_sum(5, 1), row_blocks_of(numbered(4), [1, 3]))
    assert result is not None
    assert result.shape[1] == 4


@given(PARTITIONS)
def test_windows_in_turn_may_share_a_workspace(partition: list[int]) -> None:
    workspace = Workspace()
    ops = [
        Windowed(lambda window: windows(window, 3, 1, 0), 3, workspace=workspace),
        Windowed(lambda window: windows(window, 5, 1, 0), 5, workspace=workspace),
        Windowed(lambda window: windows(window, 4, 2, 0), 4, 2, 1, workspace),
    ]
    map_ = numbered(sum(partition)).double()
    expected = windows(windows(windows(map_, 3, 1, 1), 5, 1, 2), 4, 2, 1)
    result = run(Chain(ops), row_blocks_of(map_, partition))
    assert (torch.empty_like(expected) if result is None else result).shape == expected.shape
    if result is not None:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


@given(PARTITIONS, st.sampled_from([1, 3, 5]), st.booleans())
def test_residual(partition: list[int], size: int, late_last: bool) -> None:
    map_ = numbered(sum(partition)).double()
    before = map_.clone()
    result = run(Residual(window_sum(size, 1)), row_blocks_of(map_, partition), late_last=late_last)
    torch.testing.assert_close(result, windows(map_, size, 1, size // 2) + map_, rtol=1e-12, atol=0)
    assert torch.equal(map_, before)


@given(PARTITIONS, st.booleans())
def test_residual_of_residuals(partition: list[int], late_last: bool) -> None:
    map_ = numbered(sum(partition)).double()

    def whole(x: Tensor) -> Tensor:
        x = windows(x, 3, 1, 1) + x
        return windows(x, 5, 1, 2) + x

    inner = Chain([Residual(window_sum(3, 1)), Residual(window_sum(5, 1))])
    result = run(Residual(inner), row_blocks_of(map_, partition), late_last=late_last)
    torch.testing.assert_close(result, whole(map_) + map_, rtol=1e-12, atol=0)


@given(PARTITIONS, st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=4), st.booleans())
def test_join(partition: list[int], sizes: list[int], late_last: bool) -> None:
    map_ = numbered(sum(partition)).double()
    branches = [window_sum(size, 1) if size > 1 else Pointwise(lambda row_block: row_block) for size in sizes]
    result = run(Join(branches), row_blocks_of(map_, partition), late_last=late_last)
    expected = torch.cat([windows(map_, size, 1, size // 2) for size in sizes], dim=-1)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


@given(PARTITIONS, st.booleans())
def test_whole_waits_and_tee_shows(partition: list[int], late_last: bool) -> None:
    map_ = numbered(sum(partition))
    seen: list[Tensor] = []

    def show(row_block: Tensor) -> Tensor:
        seen.append(row_block)
        return row_block * 0

    op = Chain([Tee(Pointwise(show)), Whole(lambda whole: whole.flip(1))])
    result = run(op, row_blocks_of(map_, partition), late_last=late_last)
    assert result is not None
    assert torch.equal(result, map_.flip(1))
    assert torch.equal(torch.cat(seen, dim=1), map_)


@given(st.data(), PARTITIONS)
def test_row_queue(data: st.DataObject, partition: list[int]) -> None:
    map_ = numbered(sum(partition))
    queue, taken, waiting = RowQueue(), [], 0
    for row_block in row_blocks_of(map_, partition):
        queue.put(row_block)
        waiting += 0 if row_block is None else row_block.shape[1]
        rows = data.draw(st.integers(0, waiting))
        pieces = list(queue.take(rows))
        assert sum(piece.shape[1] for piece in pieces) == rows
        taken += pieces
        waiting -= rows
        queue.settle()
        assert queue.rows == waiting
    taken += queue.take(waiting)
    assert torch.equal(torch.cat(taken, dim=1), map_)
    assert not queue.row_blocks


def test_a_settled_queue_lets_go_of_what_was_taken() -> None:
    queue = RowQueue()
    row_block = numbered(10)
    storage = row_block.untyped_storage().nbytes()
    queue.put(row_block)
    list(queue.take(9))
    queue.settle()
    assert queue.row_blocks[0].untyped_storage().nbytes() == storage // 10
    assert torch.equal(queue.row_blocks[0], row_block[:, 9:])


@given(PARTITIONS, st.integers(1, 9), st.integers(1, 200), st.integers(1, 2))
def test_row_map(partition: list[int], strip_rows: int, chunk_bytes: int, batch: int) -> None:
    map_ = numbered(sum(partition), batch)
    kept = RowMap(map_.shape[1], chunk_bytes)
    for row_block in row_blocks_of(map_, partition):
        kept.write(row_block if row_block is None else row_block.clone())
    row_blocks = list(kept.row_blocks(strip_rows))
    assert torch.equal(torch.cat(row_blocks, dim=1), map_)
    assert [row_block.shape[1] for row_block in row_blocks] == [
        row_block.shape[1] for row_block in cut(map_, strip_rows)
    ]
    assert not kept.chunks


@given(PARTITIONS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 200))
def test_a_kept_row_map_is_read_again(partition: list[int], strip_rows: list[int], chunk_bytes: int) -> None:
    map_ = numbered(sum(partition))
    kept = RowMap(map_.shape[1], chunk_bytes)
    for row_block in row_blocks_of(map_, partition):
        kept.write(row_block)
    for rows in strip_rows:
        assert torch.equal(torch.cat(list(kept.row_blocks(rows, keep=True)), dim=1), map_)
    assert torch.equal(torch.cat(list(kept.row_blocks(strip_rows[0])), dim=1), map_)
    assert not kept.chunks


def test_a_closed_row_map_holds_nothing() -> None:
    kept = RowMap(6)
    kept.write(numbered(6))
    chunk = weakref.ref(kept.chunks[0])
    reader = kept.row_blocks(2, keep=True)
    next(reader)
    assert isinstance(reader, Generator)
    reader.close()
    for _ in range(2):
        kept.close()
        assert chunk() is None


def test_a_row_map_copies_and_frees_as_it_is_read() -> None:
    map_ = numbered(6)
    row_bytes = map_[:, 0].nbytes
    kept = RowMap(6, chunk_bytes=2 * row_bytes)
    row_block = map_.clone()
    kept.write(row_block)
    row_block.zero_()
    chunks = [weakref.ref(chunk) for chunk in kept.chunks]
    assert len(chunks) == 3
    reader = kept.row_blocks(2)
    for index in range(3):
        assert torch.equal(next(reader), map_[:, 2 * index : 2 * index + 2])
        # The row block just given is not held by the reader, not even the last view of its chunk.
        assert [chunk() is None for chunk in chunks] == [earlier <= index for earlier in range(3)]
    assert len(kept.chunks) == 0


def test_a_row_map_is_written_and_read_at_once() -> None:
    """What a sweep does that reads one map and writes the next."""
    first, second = RowMap(7, chunk_bytes=40), RowMap(7, chunk_bytes=100)
    map_ = numbered(7).double()
    first.write(map_)
    for row_block in sweep(first.row_blocks(2), Residual(window_sum(3, 1))):
        second.write(row_block)
    expected = windows(map_, 3, 1, 1) + map_
    torch.testing.assert_close(torch.cat(list(second.row_blocks(3)), dim=1), expected)


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=6))
def test_workspace(joins: list[list[int]]) -> None:
    workspace = Workspace()
    for heights in joins:
        map_ = numbered(sum(heights))
        joined = workspace.join(list(map_.split(heights, dim=1)))
        assert torch.equal(joined, map_)
        assert joined.is_contiguous()


def test_a_workspace_is_allocated_once_for_one_shape() -> None:
    workspace = Workspace()
    addresses = {workspace.join([numbered(3), numbered(rows)]).data_ptr() for rows in (4, 4, 2, 1, 4)}
    assert len(addresses) == 1
    assert workspace.join([numbered(3).double()]).dtype == torch.float64
    assert workspace.join([numbered(3).double(), numbered(9).double()]).shape[1] == 12


@pytest.mark.parametrize("strip_rows", [1, 2, 3, 8])
def test_sweep_says_last_once(strip_rows: int) -> None:
    class Spy(RowOp):
        def __init__(self) -> None:
            self.lasts: list[bool] = []

        def push(self, row_block: RowBlock, last: bool) -> RowBlock:
            self.lasts.append(last)
            return row_block

    spy, map_ = Spy(), numbered(5)
    assert torch.equal(torch.cat(list(sweep(cut(map_, strip_rows), spy)), dim=1), map_)
    assert spy.lasts == [False] * (len(spy.lasts) - 1) + [True]
