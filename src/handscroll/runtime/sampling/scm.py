"""Sana-Sprint's trigonometric flow, as `SanaSprintPipeline` runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handscroll.runtime.sampling.branches import predictions
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.schedule import SamplerRun, set_timesteps

# SanaSprintPipeline's defaults: the first timestep of the trigonometric flow, pi/2 rounded, and the one between two.
SCM_MAX_TIMESTEP = 1.57080
SCM_INTERMEDIATE_TIMESTEP = 1.3


def set_scm_timesteps(scheduler: Any, steps: int, *, device: torch.device | str) -> Tensor:
    """[steps] timesteps, the last 0 left out. Raises UsageError as `set_timesteps`."""
    return set_timesteps(
        scheduler,
        steps,
        device=device,
        max_timesteps=SCM_MAX_TIMESTEP,
        intermediate_timesteps=SCM_INTERMEDIATE_TIMESTEP if steps == 2 else None,
    )[:-1]


def denoise_scm(job: Sampling) -> Tensor:
    """As `SanaSprintPipeline.__call__`: the trigonometric flow, converted to and from the transformer's linear one."""
    transformer, scheduler, text, device = job.transformer, job.scheduler, job.text, job.transformer.device
    sigma_data = scheduler.config.sigma_data
    timesteps = set_scm_timesteps(scheduler, job.steps, device=device)
    run = SamplerRun(job, timesteps)
    latent = job.noise.to(device) * sigma_data if job.start is None else job.start.latent.to(device)
    scale = None
    if transformer.config.guidance_embeds:
        scale = torch.full([1], job.guidance, device=device).to(text.embeddings.dtype)
        scale = scale * transformer.config.guidance_embeds_scale
    for index, t in run.steps():
        timestep = t.expand(1)
        s = torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))
        norm = torch.sqrt(s**2 + (1 - s) ** 2).view(-1, 1, 1, 1)
        model_input = latent / sigma_data * norm
        (prediction,) = predictions(transformer, model_input, [text], s, scale)
        s = s.view(-1, 1, 1, 1)
        prediction = ((1 - 2 * s) * model_input + (1 - 2 * s + 2 * s**2) * prediction) / norm
        latent, denoised = scheduler.step(
            prediction.float() * sigma_data, timestep, latent, generator=job.generator, return_dict=False
        )
        if index + 1 == len(timesteps):
            latent = denoised
        run.step_done(index, latent)
    return latent / sigma_data
