"""A diffusers scheduler as its config describes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from handscroll.models.config import shown, thaw

# Steps of training, orders of a solver and the like, of which schedulers make lists; known ones have at most 1000.
MAX_WHOLE_NUMBER, MAX_LIST = 100_000, 100_000


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A diffusers scheduler: its class and its settings, as hashable name and value pairs in file order.

    Raises ValueError for a setting that is a table, or so large that making the scheduler would fill the memory.
    """

    class_name: str = "DPMSolverMultistepScheduler"
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for key, value in self.settings:
            for each in _values_in(value):
                if isinstance(each, dict):
                    raise ValueError(f"{shown(key)} should be a plain value or a list, found {shown(value)}")
                if isinstance(each, int) and abs(each) > MAX_WHOLE_NUMBER:
                    raise ValueError(f"{shown(key)} should be at most {MAX_WHOLE_NUMBER}, found {shown(each)}")

    @property
    def config(self) -> dict[str, Any]:
        return {name: thaw(value) for name, value in self.settings}


def _values_in(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        if len(value) > MAX_LIST:
            raise ValueError(f"a list has {len(value)} values; at most {MAX_LIST} are read")
        for each in value:
            yield from _values_in(each)
    else:
        yield value
