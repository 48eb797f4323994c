"""Ranks that are threads of one process, for tests of what they exchange; and what each of them sends is counted."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from handscroll.banded.exchange import Ranks, Wait

Result = TypeVar("Result")
Ways = dict[tuple[int, ...], "queue.Queue[Tensor]"]  # sender, receiver, number
LONGEST_S = 60


class ThreadRanks(Ranks):
    """Ranks of one process. `sent` and `gathered`: the bytes of each message that this rank sent to others."""

    def __init__(self, rank: int, ways: Ways, size: int) -> None:
        self.rank, self.size, self._ways = rank, size, ways
        self._asked = 0
        self.sent: list[int] = []
        self.gathered: list[int] = []

    def trade(self, sends: Sequence[tuple[int, Tensor]], takes: Sequence[tuple[int, Tensor]]) -> Wait:
        number = self._next()
        for other, tensor in sends:
            assert tensor.is_contiguous()
            self.sent.append(tensor.nbytes)
            self._way(self.rank, other, number).put(tensor.clone())

        def wait() -> None:
            for other, tensor in takes:
                tensor.copy_(self._way(other, self.rank, number).get(timeout=LONGEST_S))

        return wait

    def gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        assert own.is_contiguous()
        number = self._next()
        others = [rank for rank in range(self.size) if rank != self.rank]
        for other in others:
            self.gathered.append(own.nbytes)
            self._way(self.rank, other, number).put(own.clone())

        def wait() -> list[Tensor]:
            return [
                own.clone() if rank == self.rank else self._way(rank, self.rank, number).get(timeout=LONGEST_S)
                for rank in range(self.size)
            ]

        return wait

    def _way(self, *of: int) -> queue.Queue[Tensor]:
        return self._ways.setdefault(of, queue.Queue())

    def _next(self) -> int:
        """What is asked for is told apart by its number: ranks may wait in another order than they asked in."""
        self._asked += 1
        return self._asked


def on_ranks(size: int, work: Callable[[ThreadRanks], Result]) -> list[Result]:
    """What `work` gives on each of so many ranks, which run at the same time."""
    ways: Ways = {}

    def run(rank: int) -> Result:
        with torch.no_grad():
            return work(ThreadRanks(rank, ways, size))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
