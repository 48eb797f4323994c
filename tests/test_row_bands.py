"""Which rows each rank makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from handscroll.bands import Bands, common, covering, messages, whole_nodes

WEIGHTS = some.lists(some.floats(0.5, 2), min_size=1, max_size=2)


@given(rows=some.integers(1, 200), data=some.data())
def test_bands_have_all_rows_once_and_none_is_much_taller(rows: int, data: some.DataObject) -> None:
    ranks = data.draw(some.integers(1, rows))
    bands = Bands.of(rows, ranks)
    assert [row for band in bands for row in band] == list(range(rows))
    assert max(map(len, bands)) - min(map(len, bands)) <= 1
    assert [bands.owner(row) for row in range(rows)] == [rank for rank, band in enumerate(bands) for _ in band]
    assert bands.owner(-1) is bands.owner(rows) is None
    assert bands.scaled(4).height == 4 * rows


def test_shares_are_followed_and_nobody_is_left_out() -> None:
    assert list(map(len, Bands.of(10, 3, [1, 2, 1]))) == [2, 6, 2]
    assert Bands.of(10, 3, [1, 2, 1]).most_rows == 6
    (stacked,) = Bands.stacked(10, [1.0], 3, shares=[0.5, 1, 0.5])
    assert list(map(len, stacked)) == [3, 6, 1]
    assert list(map(len, Bands.of(3, 3, [100, 1, 1]))) == [1, 1, 1]
    with pytest.raises(ValueError, match="4 ranks cannot share 3 rows"):
        Bands.of(3, 4)
    with pytest.raises(ValueError, match=r"no whole rows at 0\.5"):
        Bands.of(6, 4).scaled(0.5)


@given(rows=some.integers(1, 130), weights=WEIGHTS, ranks=some.integers(1, 17), halo=some.floats(0, 0.5))
def test_stacked_maps_are_cut_evenly(rows: int, weights: list[float], ranks: int, halo: float) -> None:
    stacked = Bands.stacked(rows, weights, ranks, halo)
    for bands in stacked:
        assert len(bands) == ranks
        assert [row for band in bands for row in band] == list(range(rows))
    work = [
        sum(len(bands.rows(rank)) * weight for bands, weight in zip(stacked, weights, strict=True))
        for rank in range(ranks)
    ]
    assert max(work) <= sum(weights) * rows / ranks + max(weights) + 2 * halo * len(weights)
    first_of_second = next(rank for rank in range(ranks) if stacked[-1].rows(rank))
    assert all(not stacked[0].rows(rank) for rank in range(first_of_second + 1, ranks)) or len(weights) == 1


@given(
    rows=some.integers(1, 130),
    weights=WEIGHTS,
    shares=some.lists(some.floats(0.1, 1), min_size=1, max_size=9),
    halo=some.floats(0, 0.5),
)
def test_stacked_maps_follow_shares(rows: int, weights: list[float], shares: list[float], halo: float) -> None:
    stacked = Bands.stacked(rows, weights, len(shares), halo, shares)
    for bands in stacked:
        assert [row for band in bands for row in band] == list(range(rows))
    seconds = [
        sum(len(bands.rows(rank)) * weight for bands, weight in zip(stacked, weights, strict=True)) / share
        for rank, share in enumerate(shares)
    ]
    a_row = (max(weights) + 2 * halo * len(weights)) / min(shares)
    assert max(seconds) <= sum(weights) * rows / sum(shares) + len(shares) * a_row
    if len(set(shares)) == 1:
        assert stacked == Bands.stacked(rows, weights, len(shares), halo)


@given(rows=some.integers(1, 60), data=some.data())
def test_messages_bring_what_is_needed_and_nothing_else(rows: int, data: some.DataObject) -> None:
    bands = Bands.of(rows, data.draw(some.integers(1, min(rows, 6))))
    reach = data.draw(some.integers(0, rows))
    needed = [common(range(own.start - reach, own.stop + reach), range(rows)) for own in bands]
    sent = messages(bands, needed)
    for rank, rows_needed in enumerate(needed):
        got = [row for message in sent if message.receiver == rank for row in message.rows]
        assert sorted([*got, *bands.rows(rank)]) == list(rows_needed)
    assert all(set(message.rows) <= set(bands.rows(message.sender)) for message in sent)
    assert covering(needed) == range(rows)


@given(first=some.integers(0, 300), count=some.integers(1, 300))
def test_nodes_cover_their_rows_in_order(first: int, count: int) -> None:
    covered = [
        row
        for level, index in whole_nodes(range(first, first + count))
        for row in range(index << level, (index + 1) << level)
    ]
    assert covered == list(range(first, first + count))
