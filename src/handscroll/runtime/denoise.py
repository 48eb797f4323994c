"""A seed's noise becomes a picture's latent, through every size that its plan names."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from handscroll.events import OnEvent, Progress
from handscroll.plan.plan import Plan
from handscroll.plan.stages import DENOISE
from handscroll.runtime.encode import enlarge_latent
from handscroll.runtime.modules import load_scheduler
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.loop import denoise
from handscroll.runtime.sampling.noise import starting_noise
from handscroll.runtime.sampling.state import SamplerState
from handscroll.runtime.session import Session
from handscroll.runtime.text import Texts


class SavedStates(Protocol):
    """Where a picture's sampler is kept between two steps; `precision` is the transformer's, each has its states."""

    def load(self, precision: str) -> SamplerState | None:
        """Where the picture goes on; None for its beginning."""

    def save(self, state: SamplerState, precision: str) -> None:
        """Keeps a state in place of the one before."""


def denoise_picture(
    session: Session, plan: Plan, texts: Texts, index: int, on_event: OnEvent, saved: SavedStates | None = None
) -> Tensor:
    """Picture `index` of the plan: its seed's noise to its latent [1, C, h, w] fp32, by way of its saved states.

    A picture that grows is first made small, and each size begins from the one before.
    """
    precision = plan.precision.told("transformer")
    state = saved.load(precision) if saved is not None else None
    latent: Tensor | None = None

    def on_step(done: int, detail: str = "") -> None:
        on_event(Progress(DENOISE.name, done, plan.total_steps, index, detail))

    def on_state(state: SamplerState) -> None:
        if saved is not None:
            saved.save(state, precision)

    on_step(0 if state is None else state.total_done)
    for number, size in enumerate(plan.sizes):
        if state is not None and size.steps_before < state.steps_before:
            continue  # a larger size was begun already
        if state is not None and size is not plan and state.steps_done == size.steps:
            latent, state = state.latent, None  # this one was finished
            continue
        source = None
        if latent is not None:
            on_step(size.steps_before + size.first_step, f"enlarging to {size.width}x{size.height}")
            source = enlarge_latent(session, size, latent)
        channels = session.spec.transformer.in_channels
        noise, generator = starting_noise(channels, size.latent_height, size.latent_width, plan.seeds[index], number)
        latent = denoise(
            Sampling(
                session.open_transformer(size),
                load_scheduler(session.spec),
                noise,
                generator,
                texts.prompt,
                texts.negative,
                steps=size.steps,
                guidance=size.guidance,
                on_step=on_step,
                start=state,
                on_state=on_state if saved is not None else None,
                source=source,
                first_step=size.first_step,
                steps_before=size.steps_before,
            )
        )
        state = None
    assert latent is not None
    return latent
