"""A latent becomes rows of uint8: the exact streaming way, and the three others that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handscroll.banded import dcae
from handscroll.errors import NumericsError
from handscroll.plan.plan import Plan
from handscroll.runtime.memory import trim


def decode_rows(autoencoder: Any, latent: Tensor, plan: Plan) -> Iterator[np.ndarray]:
    """latent [1, C, h, w] as the sampler leaves it -> strips [rows, plan.width, 3] uint8, plan.height rows in all.

    autoencoder: an `AutoencoderDC`, of which only the decoder is used. Raises NumericsError for NaN or infinity.
    """
    row = 0
    for strip in _strips(autoencoder, latent, plan):
        strip = strip[..., : plan.height - row, : plan.width]
        if strip.shape[-2]:
            yield _to_uint8(strip)
        row += strip.shape[-2]


def _strips(autoencoder: Any, latent: Tensor, plan: Plan) -> Iterator[Tensor]:
    """Strips [1, 3, rows, W] in the autoencoder's dtype, by the way that the plan names."""
    parameter = next(autoencoder.decoder.parameters())
    scaled = latent.to(parameter.device, parameter.dtype) / autoencoder.config.scaling_factor
    match plan.decode:
        case "rows":
            yield from dcae.decode_rows(autoencoder.decoder, scaled, plan.strip_rows, on_sweep=lambda done, of: trim())
        case "patch":
            from handscroll.banded.patches import decode_by_patches

            yield decode_by_patches(autoencoder.decoder, scaled, plan.patches)
        case "tiled":
            autoencoder.enable_tiling()
            try:
                whole = autoencoder.decode(scaled, return_dict=False)[0]
            finally:
                autoencoder.disable_tiling()
            yield whole
        case _:
            yield autoencoder.decode(scaled, return_dict=False)[0]


def _to_uint8(strip: Tensor) -> np.ndarray:
    """[1, 3, rows, W] in -1 ... 1 -> [rows, W, 3] uint8, rounded as diffusers' image processor rounds."""
    strip = strip[0].permute(1, 2, 0).float()
    if not torch.isfinite(strip.sum()):
        raise NumericsError("the autoencoder gave numbers that are not finite; try --precision fp32")
    pixels = (strip * 0.5 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.cpu().contiguous().numpy()
