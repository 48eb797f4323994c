"""How bytes get from the host to a device, in order with what is computed there."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


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
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def allocate(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def allocate_host(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def send(self, host: Tensor, there: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            there.copy_(host, non_blocking=True)
            return self.stream.record_event()

    def follow(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()
