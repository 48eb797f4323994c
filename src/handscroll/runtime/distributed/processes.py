"""`Ranks` that are processes, on one host or several: torch.distributed, with Gloo on CPUs and NCCL on CUDA devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from handscroll.banded.exchange import Ranks, Wait


@dataclass
class ProcessRanks(Ranks):
    """The processes of a torch.distributed group."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> ProcessRanks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def trade(self, sends: Sequence[tuple[int, Tensor]], takes: Sequence[tuple[int, Tensor]]) -> Wait:
        ops = [dist.P2POp(dist.isend, as_bytes(tensor), self._peer(other), self.group) for other, tensor in sends]
        ops += [dist.P2POp(dist.irecv, as_bytes(tensor), self._peer(other), self.group) for other, tensor in takes]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        work = dist.all_gather([as_bytes(part) for part in parts], as_bytes(own), self.group, async_op=True)

        def wait() -> list[Tensor]:
            work.wait()
            return parts

        return wait

    def _peer(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: not every library sends every dtype. Raises for a tensor that is not contiguous."""
    return tensor.view(-1).view(torch.uint8)
