"""Noise becomes a latent: Sana's samplers as diffusers' pipelines run them, with diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handscroll.errors import NumericsError
from handscroll.runtime.sampling.flow import denoise_flow
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.schedule import set_timesteps
from handscroll.runtime.sampling.scm import denoise_scm, set_scm_timesteps


def denoise(job: Sampling) -> Tensor:
    """The sampling loop: the job's noise -> latent [1, C, h, w] fp32, on the transformer's device.

    The sampler's state stays fp32; the transformer sees its own dtype. Raises NumericsError if the latent is not
    finite, RunFolderError if `start` is a state of another schedule.
    """
    latent = denoise_scm(job) if _is_scm(job.scheduler) else denoise_flow(job)
    if not torch.isfinite(latent).all():
        raise NumericsError("the transformer gave numbers that are not finite", "transformer")
    return latent


def set_schedule(scheduler: Any, steps: int, device: torch.device | str) -> Tensor:
    """The timesteps of so many steps, as `denoise` goes through them. Raises UsageError for steps that do not suit."""
    return (set_scm_timesteps if _is_scm(scheduler) else set_timesteps)(scheduler, steps, device=device)


def _is_scm(scheduler: Any) -> bool:
    return type(scheduler).__name__ == "SCMScheduler"  # others may have its settings in their files
