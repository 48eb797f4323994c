"""The noise that a picture begins from."""

from __future__ import annotations

import torch
from torch import Tensor

# Between the seeds of one picture's sizes: odd, and too far apart for the seeds that people count up from.
SEED_STRIDE = 0x9E3779B97F4A7C15
SEEDS = 2**64  # of a generator; a CPU's looks at the lowest 32 bits


def starting_noise(channels: int, height: int, width: int, seed: int, size: int = 0) -> tuple[Tensor, torch.Generator]:
    """Noise [1, channels, height, width], fp32, drawn on the CPU as diffusers draws it; and its generator.

    size: which of the sizes through which a picture grows. The first has the seed's own noise, so that a small picture
    shows what a large one of the same seed will be; the others each have another.
    """
    generator = torch.Generator("cpu").manual_seed((seed + size * SEED_STRIDE) % SEEDS)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32), generator
