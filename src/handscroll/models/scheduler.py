"""A diffusers scheduler as its config describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from handscroll.models.config import thaw


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A diffusers scheduler: its class and its settings, as hashable name and value pairs in file order."""

    class_name: str = "DPMSolverMultistepScheduler"
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        return {name: thaw(value) for name, value in self.settings}
