"""A diffusers scheduler as its config describes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from handscroll.models.config import thaw
from handscroll.units import shown

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
        config = self.config
        if self.class_name == "FlowMatchEulerDiscreteScheduler" and config.get("use_dynamic_shifting"):
            raise ValueError(
                "use_dynamic_shifting shifts by the picture's size, which Sana's pipeline does not give; set it to "
                "false, and shift to the shift that is meant"
            )
        prediction = config.get("prediction_type", "trigflow")
        if self.class_name == "SCMScheduler" and prediction != "trigflow":
            raise ValueError(f"prediction_type {shown(prediction)} is not implemented; a few-step model has trigflow")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From a `class_name` and `settings`. Raises ValueError for what is not implemented."""
        return cls(config["class_name"], config["settings"])

    @property
    def is_flow(self) -> bool:
        """Whether a step begins from x_sigma = (1 - sigma) x_0 + sigma noise, which growth lays over a picture."""
        config = self.config
        if self.class_name == "FlowMatchEulerDiscreteScheduler":
            return not config.get("invert_sigmas")
        others = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
        return bool(config.get("use_flow_sigmas")) and not any(config.get(name) for name in others)

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
