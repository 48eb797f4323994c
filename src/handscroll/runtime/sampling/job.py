"""What it takes to denoise one picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handscroll.runtime.sampling.state import OnStep, SamplerState
from handscroll.runtime.session import Transformer
from handscroll.runtime.text_cache import Text


@dataclass(frozen=True)
class Sampling:
    """What it takes to denoise one picture. `noise` [1, C, h, w] fp32 was drawn from `generator`, which goes on.

    With `negative`, classifier-free guidance by two branches a step; without, one. A few-step model (SCMScheduler)
    takes its guidance as an input. `on_step(done)` is told of each step, counted with the `steps_before`. From `start`
    the sampling goes on, with the same bits as if it had never stopped. `on_state` is given a state where that is worth
    saving, and after the last step; it comes before that step's `on_step`.

    With `source` [1, C, h, w] fp32, a finished latent, the schedule begins at `first_step`, where that step's share of
    noise is laid over it (SDEdit, as diffusers' image-to-image pipelines begin). Not for few-step models.
    """

    transformer: Transformer
    scheduler: Any
    noise: Tensor
    generator: torch.Generator
    text: Text
    negative: Text | None
    steps: int
    guidance: float
    on_step: OnStep
    start: SamplerState | None = None
    on_state: Callable[[SamplerState], None] | None = None
    source: Tensor | None = None
    first_step: int = 0
    steps_before: int = 0
