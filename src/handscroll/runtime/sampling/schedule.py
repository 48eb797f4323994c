"""Where a sampler is on its schedule."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from handscroll.errors import RunFolderError, UsageError
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.state import SamplerState
from handscroll.units import first_line

# A state is worth saving when this much would be lost without it, and saving takes no more than this share of the time.
SAVE_AFTER_SECONDS = 10.0
SAVE_SHARE = 0.02

_BROKEN = "the saved state is broken; delete the run folder to start over"


def set_timesteps(scheduler: Any, steps: int, **options: Any) -> Tensor:
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{steps} steps do not suit this model's scheduler: {first_line(error)}") from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # many steps repeat timesteps, and looking one up would then skip a step
    return scheduler.timesteps


def worth_saving(unsaved_seconds: float, last_save_seconds: float, is_last: bool) -> bool:
    """Whether to save after this step, `unsaved_seconds` after the last save, which took `last_save_seconds`."""
    return is_last or unsaved_seconds >= max(SAVE_AFTER_SECONDS, last_save_seconds / SAVE_SHARE)


class SamplerRun:
    """Where a sampler is on its schedule: puts it back where it was, and hands out its states."""

    def __init__(self, job: Sampling, timesteps: Tensor) -> None:
        self.job, self.timesteps = job, timesteps
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0
        self.steps_done = job.first_step
        if job.first_step:
            job.scheduler.set_begin_index(job.first_step)
        if job.start is not None:
            self._return_to(job.start)

    def steps(self) -> list[tuple[int, Tensor]]:
        """The steps still to do: each one's number from 0, and its timestep."""
        return list(enumerate(self.timesteps))[self.steps_done :]

    def begin(self, latent: Tensor) -> None:
        """Saves what a grown size begins from, which took a decode and an encode to make."""
        if self.job.on_state is not None and torch.isfinite(latent).all():
            self.job.on_state(self._state(self.job.first_step, latent))
            self.saved_at = time.perf_counter()

    def step_done(self, index: int, latent: Tensor) -> None:
        """Step `index` gave `latent`: save it if that is worth it, and tell."""
        done, total = index + 1, len(self.timesteps)
        unsaved_seconds = time.perf_counter() - self.saved_at
        # A state that is not finite is no use to anybody: going on from it would fail again.
        if (
            self.job.on_state is not None
            and worth_saving(unsaved_seconds, self.save_seconds, done == total)
            and torch.isfinite(latent).all()
        ):
            start = time.perf_counter()
            self.job.on_state(self._state(done, latent))
            self.saved_at = time.perf_counter()
            self.save_seconds = self.saved_at - start
        self.job.on_step(self.job.steps_before + done)

    def _state(self, steps_done: int, latent: Tensor) -> SamplerState:
        scheduler = self.job.scheduler
        # The next step first drops the oldest output: of a solver of order n, n - 1 matter.
        outputs = [output for output in getattr(scheduler, "model_outputs", [])[1:] if output is not None]
        return SamplerState(
            steps_done,
            latent.float().cpu(),
            scheduler.timesteps.cpu(),
            self.job.generator.get_state(),
            tuple(output.cpu() for output in outputs),
            getattr(scheduler, "lower_order_nums", 0),
            self.job.steps_before,
        )

    def _return_to(self, state: SamplerState) -> None:
        scheduler = self.job.scheduler
        timesteps = scheduler.timesteps.cpu()
        same = state.timesteps.dtype == timesteps.dtype and torch.equal(state.timesteps, timesteps)
        same = same and state.steps_before == self.job.steps_before
        if not same or not self.job.first_step <= state.steps_done <= len(self.timesteps):
            raise RunFolderError("the saved state belongs to another schedule; delete the run folder to start over")
        order = scheduler.config.solver_order if hasattr(scheduler, "model_outputs") else 0
        if not 0 <= state.lower_order_nums <= order or len(state.model_outputs) != min(
            state.lower_order_nums, max(0, order - 1)
        ):
            raise RunFolderError(_BROKEN)
        self.steps_done = state.steps_done
        scheduler._step_index = state.steps_done
        if hasattr(scheduler, "model_outputs"):
            outputs = [output.to(self.timesteps.device) for output in state.model_outputs]
            scheduler.model_outputs = [None] * (scheduler.config.solver_order - len(outputs)) + outputs
            scheduler.lower_order_nums = state.lower_order_nums
        try:
            self.job.generator.set_state(state.generator)
        except RuntimeError as error:
            raise RunFolderError(_BROKEN) from error
