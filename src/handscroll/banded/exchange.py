"""What ranks that make bands of one picture tell each other: the rows next to a band, and the sums of the whole map.

A local operator needs a few rows above and below its band (the halo); a ReLU linear attention needs the sums over all
rows. Nothing else of a map ever leaves the rank that made it, and the values are those of one rank alone, to the bit:
rows are computed each by itself, and sums are put together from the nodes of a tree that knows no bands (sums.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handscroll.banded.rows import RowMap, cut
from handscroll.banded.sums import LinearAttentionSums, Node, RowTree
from handscroll.bands import Bands, Message, common, messages, whole_nodes

# Waits until what was asked for is here.
Wait = Callable[[], None]


class Ranks(ABC):
    """The way between `size` processes or threads, of which this is number `rank`. All of them ask for the same things
    in the same order.
    """

    rank: int
    size: int

    @abstractmethod
    def trade(self, sends: Sequence[tuple[int, Tensor]], takes: Sequence[tuple[int, Tensor]]) -> Wait:
        """Begins to send tensors to ranks, and to fill others with what ranks send; all of them are contiguous.

        Between two ranks tensors come in the order in which they are sent. None of them may be written to before the
        wait is over.
        """

    @abstractmethod
    def gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        """Begins to gather a tensor of every rank, all of one shape and contiguous; the call that is returned waits."""


@dataclass(frozen=True)
class Exchange:
    """A rank's part of a network's run: which rows it makes, and how it gets what others have.

    `bands` are in rows of the latent, or of the transformer's token map.
    """

    ranks: Ranks
    bands: Bands

    @property
    def rows(self) -> range:
        """The own band."""
        return self.bands.rows(self.ranks.rank)

    def scaled(self, scale: float) -> Exchange:
        """The same for a map `scale` times as tall."""
        return Exchange(self.ranks, self.bands.scaled(scale))

    def merge(self, parts: Sequence[LinearAttentionSums]) -> Wait:
        """Begins to make sums over the own band those over the whole map.

        Each rank adds a slice of them for all: it gets that slice of every rank's nodes, and sends what they come to.
        So a rank sends hardly twice what it has, however many there are.
        """
        by_rows = parts[0].by_rows
        nodes_of_ranks = [whole_nodes(rows) if by_rows else [(0, 0)] * bool(rows) for rows in self.bands]
        counts = [part.count for part in parts]
        own = torch.empty(len(nodes_of_ranks[self.ranks.rank]), sum(counts), device=parts[0].device)
        for row, nodes in zip(own, zip(*(part.nodes for part in parts), strict=True), strict=True):
            torch.cat([node.sum for node in nodes], out=row)
        slices = list(own.split(-(-own.shape[1] // self.ranks.size), dim=1))
        mine = slices[self.ranks.rank] if self.ranks.rank < len(slices) else own[:, :0]
        takes = [own.new_empty(len(each), mine.shape[1]) for each in nodes_of_ranks]
        takes[self.ranks.rank].copy_(mine)
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        arrived = self.ranks.trade(
            [(rank, slices[rank].contiguous()) for rank in others if rank < len(slices)],
            [(rank, takes[rank]) for rank in others if mine.shape[1]],
        )

        def wait() -> None:
            arrived()
            padded = own.new_zeros(slices[0].shape[1])
            padded[: mine.shape[1]] = _total(takes, nodes_of_ranks) if by_rows else torch.cat(takes).sum(dim=0)
            total = torch.cat(self.ranks.gather(padded)())
            for part, sums in zip(parts, total[: sum(counts)].split(counts), strict=True):
                part.become(sums)

        return wait

    def whole(self, own: Tensor, dim: int) -> Tensor:
        """A map whose rows lie along `dim`, of which every rank has its own band: all of it, on every rank."""
        rows = own.transpose(0, dim)
        most = max(map(len, self.bands))
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.ranks.gather(padded)()
        of_bands = [part[: len(band)] for part, band in zip(parts, self.bands, strict=True)]
        return torch.cat(of_bands).transpose(0, dim).contiguous()


def _total(sums_of_ranks: Sequence[Tensor], nodes_of_ranks: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """The sum of all nodes of a tree, given as the rows of a tensor for each rank, which are written over."""
    tree = RowTree()
    for of_rank, nodes in zip(sums_of_ranks, nodes_of_ranks, strict=True):
        for (level, index), sums in zip(nodes, of_rank, strict=True):
            tree.add(Node(level, index, sums))
    return tree.total()


class Halo:
    """The rows of a map `[B, H, W, C]` that this rank needs beside its own, on their way.

    needed: for every rank, the rows that it needs of the map, its own among them. While the own rows are written,
    `keep` copies those that others need; `send` begins the exchange once all are.
    """

    def __init__(self, exchange: Exchange, needed: Sequence[range]) -> None:
        self.ranks, self.own = exchange.ranks, exchange.rows
        wanted = messages(exchange.bands, needed)
        self._sends = [(message, list[Tensor]()) for message in wanted if message.sender == self.ranks.rank]
        self._takes = [message for message in wanted if message.receiver == self.ranks.rank]
        self._taken: list[tuple[Message, Tensor]] = []
        self._wait: Wait | None = None
        self._row = self.own.start
        self._like: Tensor | None = None

    def keep(self, row_block: Tensor) -> None:
        """Takes the next of the own rows, `[B, rows, W, C]`."""
        rows = range(self._row, self._row + row_block.shape[1])
        self._row = rows.stop
        self._like = row_block[:, :0]
        for message, kept in self._sends:
            if shared := common(rows, message.rows):
                kept.append(row_block[:, shared.start - rows.start : shared.stop - rows.start].clone())

    def send(self) -> None:
        assert self._like is not None
        assert self._row == self.own.stop, "sent before all rows were there"
        batch, _, columns, channels = self._like.shape
        sends = [(message.receiver, torch.cat(kept, dim=1).contiguous()) for message, kept in self._sends]
        for message in self._takes:
            self._taken.append((message, self._like.new_empty(batch, len(message.rows), columns, channels)))
        self._wait = self.ranks.trade(sends, [(message.sender, taken) for message, taken in self._taken])
        self._sends, self._like = [], None

    def around(self, own: Iterable[Tensor], needed: range, strip_rows: int) -> Iterator[Tensor]:
        """Row blocks of the rows `needed`, given those of all own ones; others are cut into `strip_rows` at a time."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        yield from self._beside(range(needed.start, self.own.start), strip_rows)
        yield from own
        yield from self._beside(range(self.own.stop, needed.stop), strip_rows)

    def _beside(self, needed: range, strip_rows: int) -> Iterator[Tensor]:
        for message, taken in self._taken:
            rows = common(message.rows, needed)
            if rows:
                yield from cut(taken[:, rows.start - message.rows.start : rows.stop - message.rows.start], strip_rows)


class BandMap:
    """The own band of a map, and the rows beside it that other ranks send. Without a halo the map is all there is."""

    def __init__(self, map_: RowMap, halo: Halo | None) -> None:
        self._map, self._halo = map_, halo

    def write(self, row_block: Tensor) -> None:
        """Appends rows of the band, `[B, rows, W, C]`."""
        self._map.write(row_block)
        if self._halo is not None:
            self._halo.keep(row_block)

    def finish(self) -> None:
        """All rows are written."""
        if self._halo is not None:
            self._halo.send()

    def row_blocks(self, strip_rows: int, needed: range, keep: bool) -> Iterator[Tensor]:
        """The rows `needed` of the map; as `RowMap.row_blocks`."""
        own = self._map.row_blocks(strip_rows, keep=keep)
        return own if self._halo is None else self._halo.around(own, needed, strip_rows)

    def close(self) -> None:
        self._map.close()
        self._halo = None
