"""Which rows of a picture each of several devices makes: bands of whole rows, one below another. A leaf.

Rows are those of the latent (of the token map, where patches are larger); a map `scale` times as tall has as many rows
of a band times `scale`. Everything here is a pure function of heights, so every rank knows the rows of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

# Enough to tell apart any two ways to cut.
BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Bands:
    """`ends`: the row behind the last one of each rank, from top to bottom. A rank may have no row."""

    ends: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, ranks: int, shares: Sequence[float] | None = None) -> Bands:
        """As equal as whole rows allow, or in proportion to `shares`, at least one row each.

        Raises ValueError for more ranks than rows.
        """
        if ranks > rows:
            raise ValueError(f"{ranks} ranks cannot share {rows} rows: at most one rank for each row")
        parts = [Fraction(1)] * ranks if shares is None else [Fraction(share) for share in shares]
        total, before, ends = sum(parts), Fraction(0), list[int]()
        for index, part in enumerate(parts):
            before += part
            end = round(rows * before / total)
            first = ends[-1] if ends else 0
            ends.append(min(max(end, first + 1), rows - (ranks - 1 - index)))
        return cls(tuple(ends))

    @classmethod
    def stacked(
        cls,
        rows: int,
        weights: Sequence[float],
        ranks: int,
        halo: float = 0.0,
        shares: Sequence[float] | None = None,
    ) -> list[Bands]:
        """Of several maps of `rows` rows: they are laid one below another and cut for the ranks. So a rank has rows of
        one map, seldom of two, and the one that needs longest needs as little as can be.

        weights: the work of a row of each map; halo: that of a row of another rank next to a band. shares: how fast
        each rank is, beside the others.
        """
        parts = [1.0] * ranks if shares is None else list(shares)
        least = sum(weights) * rows / sum(parts)
        most = 2 * (max(weights) + 2 * halo) * rows * len(weights) / min(parts)
        for _ in range(BISECTIONS):
            middle = (least + most) / 2
            if _packed(rows, weights, parts, halo, middle) is None:
                least = middle
            else:
                most = middle
        found = _packed(rows, weights, parts, halo, most)
        assert found is not None
        return [cls(tuple(ends)) for ends in found]

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[range]:
        return map(self.rows, range(len(self)))

    @property
    def height(self) -> int:
        return self.ends[-1]

    @property
    def most_rows(self) -> int:
        """Of the rank with most of them."""
        return max(map(len, self))

    def rows(self, rank: int) -> range:
        return range(self.ends[rank - 1] if rank else 0, self.ends[rank])

    def owner(self, row: int) -> int | None:
        """The rank that has a row; None where there is no such row."""
        return next((rank for rank, rows in enumerate(self) if row in rows), None)

    def neighbours(self, rank: int) -> tuple[int | None, int | None]:
        """The ranks that have the row above a band and the row below it; None where there is none."""
        own = self.rows(rank)
        return (self.owner(own.start - 1), self.owner(own.stop)) if own else (None, None)

    def scaled(self, scale: float) -> Bands:
        """The same bands of a map `scale` times as tall. Raises ValueError where rows are cut."""
        ends = [end * scale for end in self.ends]
        if any(end != int(end) for end in ends):
            raise ValueError(f"bands that end at rows {list(self.ends)} have no whole rows at {scale} times the height")
        return Bands(tuple(map(int, ends)))


def _packed(
    rows: int, weights: Sequence[float], shares: Sequence[float], halo: float, most: float
) -> list[list[int]] | None:
    """For each map the ends of its bands, where every rank takes as many rows as are at most its share of so much work;
    None where rows are left over.
    """
    ends: list[list[int]] = [[] for _ in weights]
    index = row = 0
    for share in shares:
        left = most * share
        while index < len(weights):
            left -= halo * (row > 0)
            to_end = rows - row
            if left >= to_end * weights[index]:
                taken = to_end
            else:
                taken = min(to_end - 1, max(0, int((left - halo) / weights[index])))
            left -= taken * weights[index]
            row += taken
            if row < rows:
                break
            index, row = index + 1, 0
        for number, each in enumerate(ends):
            each.append(rows if number < index else row if number == index else 0)
    return ends if index == len(weights) else None


@dataclass(frozen=True, slots=True)
class Message:
    """Rows of a map that one rank has and another one needs."""

    sender: int
    receiver: int
    rows: range


def messages(bands: Bands, needed: Sequence[range]) -> list[Message]:
    """What is sent for every rank to have the rows that it needs, each from the rank whose band they are in."""
    found = []
    for receiver, rows in enumerate(needed):
        for sender, own in enumerate(bands):
            shared = common(rows, own)
            if sender != receiver and shared:
                found.append(Message(sender, receiver, shared))
    return found


def common(one: range, other: range) -> range:
    """The rows that are in both; an empty range where none is."""
    first = max(one.start, other.start)
    return range(first, max(first, min(one.stop, other.stop)))


def covering(ranges: Iterable[range]) -> range:
    """The smallest range that all of them are in."""
    found = list(ranges)
    return range(min(each.start for each in found), max(each.stop for each in found))


def whole_nodes(rows: range) -> list[tuple[int, int]]:
    """Level and index of what `banded.sums.RowTree` keeps of these rows, from top to bottom: nodes of the tree that
    adds rows in pairs, pairs in pairs, ..., which are whole in these rows, and in no other such node."""
    found, first = [], rows.start
    while first < rows.stop:
        level = 0
        while first % (2 << level) == 0 and first + (2 << level) <= rows.stop:
            level += 1
        found.append((level, first >> level))
        first += 1 << level
    return found
