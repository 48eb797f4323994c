"""Noise becomes a latent: Sana's samplers as diffusers' pipelines run them, with diffusers' own schedulers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handscroll.banded.transformer import Branch
from handscroll.errors import NumericsError, RunFolderError, UsageError
from handscroll.runtime.stages import Transformer
from handscroll.runtime.text_cache import Text

# SanaSprintPipeline's defaults: the first timestep of the trigonometric flow, pi/2 rounded, and the one between two.
SCM_MAX_TIMESTEP = 1.57080
SCM_INTERMEDIATE_TIMESTEP = 1.3

# A state is worth saving when this much would be lost without it, and saving takes no more than this share of the time.
SAVE_AFTER_SECONDS = 10.0
SAVE_SHARE = 0.02

# Between the seeds of one picture's sizes: odd, and too far apart for the seeds that people count up from.
SEED_STRIDE = 0x9E3779B97F4A7C15

OnStep = Callable[[int], None]


def starting_noise(channels: int, height: int, width: int, seed: int, size: int = 0) -> tuple[Tensor, torch.Generator]:
    """Noise [1, channels, height, width], fp32, drawn on the CPU as diffusers draws it; and its generator.

    size: which of the sizes through which a picture grows. The first has the seed's own noise, so that a small picture
    shows what a large one of the same seed will be; the others each have another.
    """
    generator = torch.Generator("cpu").manual_seed((seed + size * SEED_STRIDE) % 2**63)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32), generator


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


def denoise(job: Sampling) -> Tensor:
    """The sampling loop: the job's noise -> latent [1, C, h, w] fp32, on the transformer's device.

    The sampler's state stays fp32; the transformer sees its own dtype. Raises NumericsError if the latent is not
    finite, RunFolderError if `start` is a state of another schedule.
    """
    latent = _denoise_scm(job) if hasattr(job.scheduler.config, "sigma_data") else _denoise_flow(job)
    if not torch.isfinite(latent).all():
        raise NumericsError("the transformer gave numbers that are not finite", "transformer")
    return latent


def _set_timesteps(scheduler: Any, steps: int, **options: Any) -> Tensor:
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{steps} steps do not suit this model's scheduler: {str(error).splitlines()[0]}") from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # many steps repeat timesteps, and looking one up would then skip a step
    return scheduler.timesteps


def worth_saving(unsaved_seconds: float, last_save_seconds: float, is_last: bool) -> bool:
    """Whether to save after this step, `unsaved_seconds` after the last save, which took `last_save_seconds`."""
    return is_last or unsaved_seconds >= max(SAVE_AFTER_SECONDS, last_save_seconds / SAVE_SHARE)


class _Journey:
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
        same = torch.equal(state.timesteps, scheduler.timesteps.cpu()) and state.steps_before == self.job.steps_before
        if not same or not self.job.first_step <= state.steps_done <= len(self.timesteps):
            raise RunFolderError("the saved state belongs to another schedule; delete the run folder to start over")
        self.steps_done = state.steps_done
        scheduler._step_index = state.steps_done
        if hasattr(scheduler, "model_outputs"):
            outputs = [output.to(self.timesteps.device) for output in state.model_outputs]
            scheduler.model_outputs = [None] * (scheduler.config.solver_order - len(outputs)) + outputs
            scheduler.lower_order_nums = state.lower_order_nums
        self.job.generator.set_state(state.generator)


def _predictions(
    transformer: Transformer, latent: Tensor, texts: Sequence[Text], timestep: Tensor, guidance: Tensor | None = None
) -> list[Tensor]:
    """The transformer's prediction under each text, in its own dtype."""
    dtype = transformer.dtype
    branches = [Branch(latent.to(dtype), text.embeddings.to(dtype), text.mask, timestep, guidance) for text in texts]
    return transformer.predict(branches)


def _beginning(job: Sampling) -> Tensor:
    """Noise, or a source with the first step's share of noise over it: x_sigma = (1 - sigma) x_0 + sigma noise."""
    if job.source is None:
        return job.noise
    sigma = float(job.scheduler.sigmas[job.first_step])
    return torch.lerp(job.source.cpu(), job.noise, sigma)


def _denoise_flow(job: Sampling) -> Tensor:
    """As `SanaPipeline.__call__`."""
    transformer, scheduler, device = job.transformer, job.scheduler, job.transformer.device
    timesteps = _set_timesteps(scheduler, job.steps, device=device)
    channels = job.noise.shape[1]
    journey = _Journey(job, timesteps)
    latent = (_beginning(job) if job.start is None else job.start.latent).to(device)
    if job.source is not None and job.start is None:
        journey.begin(latent)
    for index, t in journey.steps():
        timestep = t.expand(1) * transformer.config.timestep_scale
        texts = [job.text] if job.negative is None else [job.text, job.negative]
        prediction, *baselines = (each.float() for each in _predictions(transformer, latent, texts, timestep))
        for baseline in baselines:
            prediction = baseline + job.guidance * (prediction - baseline)
        if transformer.config.out_channels // 2 == channels:
            prediction = prediction.chunk(2, dim=1)[0]  # a learned variance is not used
        latent = scheduler.step(prediction, t, latent, generator=job.generator, return_dict=False)[0]
        journey.step_done(index, latent)
    return latent


def _denoise_scm(job: Sampling) -> Tensor:
    """As `SanaSprintPipeline.__call__`: the trigonometric flow, converted to and from the transformer's linear one."""
    transformer, scheduler, text, device = job.transformer, job.scheduler, job.text, job.transformer.device
    sigma_data = scheduler.config.sigma_data
    timesteps = _set_timesteps(
        scheduler,
        job.steps,
        device=device,
        max_timesteps=SCM_MAX_TIMESTEP,
        intermediate_timesteps=SCM_INTERMEDIATE_TIMESTEP if job.steps == 2 else None,
    )[:-1]
    journey = _Journey(job, timesteps)
    latent = job.noise.to(device) * sigma_data if job.start is None else job.start.latent.to(device)
    scale = None
    if transformer.config.guidance_embeds:
        scale = torch.full([1], job.guidance, device=device).to(text.embeddings.dtype)
        scale = scale * transformer.config.guidance_embeds_scale
    for index, t in journey.steps():
        timestep = t.expand(1)
        s = torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))
        norm = torch.sqrt(s**2 + (1 - s) ** 2).view(-1, 1, 1, 1)
        model_input = latent / sigma_data * norm
        (prediction,) = _predictions(transformer, model_input, [text], s, scale)
        s = s.view(-1, 1, 1, 1)
        prediction = ((1 - 2 * s) * model_input + (1 - 2 * s + 2 * s**2) * prediction) / norm
        latent, denoised = scheduler.step(
            prediction.float() * sigma_data, timestep, latent, generator=job.generator, return_dict=False
        )
        if index + 1 == len(timesteps):
            latent = denoised
        journey.step_done(index, latent)
    return latent / sigma_data
