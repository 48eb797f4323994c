"""How bytes get from the host to a device, in order with what is computed there."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from handscroll.weights.pinned import pinned_blocks


class Transfer(Protocol):
    """How bytes get from the host to where they are computed with, in order with what is computed there."""

    def allocate(self, n_bytes: int) -> Tensor:
        """Bytes over there."""

    def allocate_host(self, n_bytes: int) -> Tensor:
        """Bytes on the host, to be sent from."""

    def mark(self) -> Any:
        """An event: what was asked for so far by those who compute."""

    def send(self, host: Tensor, there: Tensor, after: Any) -> Any:
        """Copies once `after` has come; the event that it has happened."""

    def follow(self, event: Any) -> None:
        """What is computed from now on comes after `event`."""

    def finish(self, event: Any) -> None:
        """Waits until `event` has come."""


class CudaTransfer:
    """Copies on a stream of its own. Whatever the current device is, this works on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._expected_bytes = 0
        self._blocks: deque[int] = deque()
        self._block: Tensor | None = None
        self._used_bytes = 0

    def allocate(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def expect(self, n_bytes: int) -> None:
        """Says how many bytes of the host's memory will be asked for in pieces of one size, before all others.

        They are cut from blocks that leave little unused of what pinned memory is rounded up to.
        """
        self._expected_bytes = n_bytes
        self._blocks.clear()
        self._block = None

    def allocate_host(self, n_bytes: int) -> Tensor:
        if expected_bytes := self._expected_bytes:
            self._expected_bytes = 0
            self._blocks.extend(pinned_blocks(expected_bytes // n_bytes, n_bytes))
        if self._block is None or self._used_bytes + n_bytes > self._block.numel():
            self._block = None
            if not self._blocks or n_bytes > self._blocks[0]:
                return self._pinned(n_bytes)
            self._block, self._used_bytes = self._pinned(self._blocks.popleft()), 0
        piece = self._block[self._used_bytes : self._used_bytes + n_bytes]
        self._used_bytes += n_bytes
        return piece

    def _pinned(self, n_bytes: int) -> Tensor:
        with torch.cuda.device(self.device):  # pinning makes a context on the current device where there is none
            return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        return self._event_on(torch.cuda.current_stream(self.device))

    def send(self, host: Tensor, there: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            there.copy_(host, non_blocking=True)
            return self._event_on(self.stream)

    def _event_on(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.device(self.device):
            event = torch.cuda.Event()
            event.record(stream)
            return event

    def follow(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()
