"""A sampler between two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

OnStep = Callable[[int], None]


@dataclass(frozen=True)
class SamplerState:
    """A sampler between two steps, on the CPU: all that its next steps depend on beside the `Sampling` itself.

    `latent` [1, C, h, w] fp32 is the sample after `steps_done` steps. `timesteps` is the whole schedule, kept to be
    compared. `model_outputs` are the newest of a multistep solver, oldest first (none for others), `lower_order_nums`
    counts its steps up to its order. `generator` is the noise generator's state, uint8. `steps_before`: how many steps
    of the picture come before step 0 of this schedule, where it grows through several.
    """

    steps_done: int
    latent: Tensor
    timesteps: Tensor
    generator: Tensor
    model_outputs: tuple[Tensor, ...] = ()
    lower_order_nums: int = 0
    steps_before: int = 0

    @property
    def total_done(self) -> int:
        """Of the picture's steps at all sizes."""
        return self.steps_before + self.steps_done
