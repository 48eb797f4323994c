"""`Ranks` that are processes, on one host or several: torch.distributed, with Gloo on CPUs and NCCL on CUDA devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from handscroll.banded.exchange import Ranks, Wait


@dataclass
class Sent:
    """What this rank has sent to others: bytes, and messages of how many they were.

    A gathered tensor counts once for every other rank, whichever way the library sends it.
    """

    traded_bytes: int = 0
    traded_messages: int = 0
    gathered_bytes: int = 0
    gathered_messages: int = 0

    def __sub__(self, before: Sent) -> Sent:
        return Sent(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))


@dataclass
class ProcessRanks(Ranks):
    """The processes of a torch.distributed group. `sent` counts, from the beginning on."""

    group: Any
    rank: int
    size: int
    sent: Sent = field(default_factory=Sent)

    @classmethod
    def of(cls, group: Any) -> ProcessRanks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def trade(self, sends: Sequence[tuple[int, Tensor]], takes: Sequence[tuple[int, Tensor]]) -> Wait:
        ops = [dist.P2POp(dist.isend, _bytes_of(tensor), self._peer(other), self.group) for other, tensor in sends]
        ops += [dist.P2POp(dist.irecv, _bytes_of(tensor), self._peer(other), self.group) for other, tensor in takes]
        self.sent.traded_bytes += sum(tensor.nbytes for _, tensor in sends)
        self.sent.traded_messages += len(sends)
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        work = dist.all_gather([_bytes_of(part) for part in parts], _bytes_of(own), self.group, async_op=True)
        self.sent.gathered_bytes += own.nbytes * (self.size - 1)
        self.sent.gathered_messages += self.size - 1

        def wait() -> list[Tensor]:
            work.wait()
            return parts

        return wait

    def _peer(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes: not every library sends every dtype. Raises for a tensor that is not contiguous."""
    return tensor.view(-1).view(torch.uint8)
