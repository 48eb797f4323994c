"""Sana's flow matching, as `SanaPipeline` runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from handscroll.runtime.sampling.branches import predictions
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.schedule import SamplerRun, set_timesteps


def _beginning(job: Sampling) -> Tensor:
    """Noise, or a source with the first step's share of noise over it: x_sigma = (1 - sigma) x_0 + sigma noise."""
    if job.source is None:
        return job.noise
    sigma = float(job.scheduler.sigmas[job.first_step])
    return torch.lerp(job.source.cpu(), job.noise, sigma)


def denoise_flow(job: Sampling) -> Tensor:
    """As `SanaPipeline.__call__`."""
    transformer, scheduler, device = job.transformer, job.scheduler, job.transformer.device
    timesteps = set_timesteps(scheduler, job.steps, device=device)
    channels = job.noise.shape[1]
    run = SamplerRun(job, timesteps)
    latent = (_beginning(job) if job.start is None else job.start.latent).to(device)
    if job.source is not None and job.start is None:
        run.begin(latent)
    for index, t in run.steps():
        timestep = t.expand(1) * transformer.config.timestep_scale
        texts = [job.text] if job.negative is None else [job.text, job.negative]
        prediction, *baselines = (each.float() for each in predictions(transformer, latent, texts, timestep))
        for baseline in baselines:
            prediction = baseline + job.guidance * (prediction - baseline)
        if transformer.config.out_channels // 2 == channels:
            prediction = prediction.chunk(2, dim=1)[0]  # a learned variance is not used
        latent = scheduler.step(prediction, t, latent, generator=job.generator, return_dict=False)[0]
        run.step_done(index, latent)
    return latent
