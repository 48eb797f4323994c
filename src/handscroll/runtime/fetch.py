"""Bring a checkpoint from the Hugging Face hub to this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FetchProgress:
    hub_id: str
    done_bytes: int
    total_bytes: int


def fetch(
    hub_id: str, *, on_progress: Callable[[FetchProgress], None] | None = None, offline: bool | None = None
) -> Path:
    raise NotImplementedError
