"""Noise becomes a latent: Sana's samplers as diffusers' pipelines run them, with diffusers' own schedulers."""

from __future__ import annotations

import torch
from torch import Tensor

from handscroll.errors import NumericsError
from handscroll.runtime.sampling.flow import denoise_flow
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.scm import denoise_scm


def denoise(job: Sampling) -> Tensor:
    """The sampling loop: the job's noise -> latent [1, C, h, w] fp32, on the transformer's device.

    The sampler's state stays fp32; the transformer sees its own dtype. Raises NumericsError if the latent is not
    finite, RunFolderError if `start` is a state of another schedule.
    """
    latent = denoise_scm(job) if hasattr(job.scheduler.config, "sigma_data") else denoise_flow(job)
    if not torch.isfinite(latent).all():
        raise NumericsError("the transformer gave numbers that are not finite", "transformer")
    return latent
