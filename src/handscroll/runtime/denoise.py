"""Noise becomes a latent: Sana's samplers as diffusers' pipelines run them, with diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handscroll.errors import NumericsError, UsageError
from handscroll.runtime.text import Text

# SanaSprintPipeline's defaults: the first timestep of the trigonometric flow, pi/2 rounded, and the one between two.
SCM_MAX_TIMESTEP = 1.57080
SCM_INTERMEDIATE_TIMESTEP = 1.3

OnStep = Callable[[int, int], None]


def starting_noise(channels: int, height: int, width: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Noise [1, channels, height, width], fp32, drawn on the CPU as diffusers draws it; and its generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32), generator


@dataclass(frozen=True)
class Sampling:
    """What it takes to denoise one picture. `noise` [1, C, h, w] fp32 was drawn from `generator`, which goes on.

    With `negative`, classifier-free guidance by two forwards a step; without, one. A few-step model (SCMScheduler)
    takes its guidance as an input. `on_step(done, of)` is told of each step.
    """

    transformer: Any
    scheduler: Any
    noise: Tensor
    generator: torch.Generator
    text: Text
    negative: Text | None
    steps: int
    guidance: float
    on_step: OnStep


def denoise(job: Sampling) -> Tensor:
    """The sampling loop: the job's noise -> latent [1, C, h, w] fp32, on the transformer's device.

    The sampler's state stays fp32; the transformer sees its own dtype. Raises NumericsError if the latent is not
    finite.
    """
    latent = _denoise_scm(job) if hasattr(job.scheduler.config, "sigma_data") else _denoise_flow(job)
    if not torch.isfinite(latent).all():
        raise NumericsError(
            "the transformer gave numbers that are not finite; try --precision fp32 (in fp16 some overflow)"
        )
    return latent


def _set_timesteps(scheduler: Any, steps: int, **options: Any) -> Tensor:
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{steps} steps do not suit this model's scheduler: {str(error).splitlines()[0]}") from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # many steps repeat timesteps, and looking one up would then skip a step
    return scheduler.timesteps


def _forward(transformer: Any, latent: Tensor, text: Text, timestep: Tensor, guidance: Tensor | None = None) -> Tensor:
    dtype = transformer.dtype
    return transformer(
        latent.to(dtype),
        encoder_hidden_states=text.embeddings.to(dtype),
        encoder_attention_mask=text.mask,
        timestep=timestep,
        guidance=guidance,
        return_dict=False,
    )[0]


def _denoise_flow(job: Sampling) -> Tensor:
    """As `SanaPipeline.__call__`."""
    transformer, scheduler, text, device = job.transformer, job.scheduler, job.text, job.transformer.device
    timesteps = _set_timesteps(scheduler, job.steps, device=device)
    channels = job.noise.shape[1]
    latent = job.noise.to(device)
    for index, t in enumerate(timesteps):
        timestep = t.expand(1) * transformer.config.timestep_scale
        prediction = _forward(transformer, latent, text, timestep).float()
        if job.negative is not None:
            baseline = _forward(transformer, latent, job.negative, timestep).float()
            prediction = baseline + job.guidance * (prediction - baseline)
        if transformer.config.out_channels // 2 == channels:
            prediction = prediction.chunk(2, dim=1)[0]  # a learned variance is not used
        latent = scheduler.step(prediction, t, latent, generator=job.generator, return_dict=False)[0]
        job.on_step(index + 1, len(timesteps))
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
    latent = job.noise.to(device) * sigma_data
    denoised = latent
    scale = None
    if transformer.config.guidance_embeds:
        scale = torch.full([1], job.guidance, device=device).to(text.embeddings.dtype)
        scale = scale * transformer.config.guidance_embeds_scale
    for index, t in enumerate(timesteps):
        timestep = t.expand(1)
        s = torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))
        norm = torch.sqrt(s**2 + (1 - s) ** 2).view(-1, 1, 1, 1)
        model_input = latent / sigma_data * norm
        prediction = _forward(transformer, model_input, text, s, scale)
        s = s.view(-1, 1, 1, 1)
        prediction = ((1 - 2 * s) * model_input + (1 - 2 * s + 2 * s**2) * prediction) / norm
        latent, denoised = scheduler.step(
            prediction.float() * sigma_data, timestep, latent, generator=job.generator, return_dict=False
        )
        job.on_step(index + 1, len(timesteps))
    return denoised / sigma_data
