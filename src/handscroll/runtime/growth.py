"""A finished smaller picture becomes the latent that the next size begins from: decoded, enlarged, encoded by rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from handscroll.banded import dcae
from handscroll.plan.plan import Plan
from handscroll.runtime.decode import decode_rows
from handscroll.runtime.memory import trim
from handscroll.runtime.stages import Stages
from handscroll.runtime.weights import DTYPES


def grown(stage: Stages, latent: Tensor, plan: Plan) -> Tensor:
    """The finished latent of a plan's smaller picture -> what that plan's size begins from, [1, C, h, w] fp32."""
    assert plan.smaller is not None
    with stage.at(plan.smaller):
        picture = picture_of(stage, latent)
    with stage.at(plan):
        return latent_of(stage, picture)


def picture_of(stage: Stages, latent: Tensor) -> np.ndarray:
    """latent [1, C, h, w] as the sampler leaves it -> the whole picture of the plan's size, [height, width, 3] uint8.

    Raises as `decode_rows`.
    """
    picture, row = np.empty((stage.plan.height, stage.plan.width, 3), np.uint8), 0
    for strip in decode_rows(stage, latent):
        picture[row : row + len(strip)] = strip
        row += len(strip)
    return picture


def latent_of(stage: Stages, picture: np.ndarray) -> Tensor:
    """picture [h, w, 3] uint8, enlarged to the plan's size -> its latent [1, C, H/32, W/32] fp32, as samplers take it.

    The enlarged picture exists only in strips; its cubic interpolation gives every row the same bytes however rows are
    cut. Raises OutputError where a map finds no room on disk.
    """
    plan, opened = stage.plan, stage.encoder
    autoencoder, dtype = opened.module, DTYPES[plan.precision.autoencoder]
    factor = stage.spec.autoencoder.spatial_compression_ratio
    height, width = plan.latent_height * factor, plan.latent_width * factor
    encoding = plan.encoding
    assert encoding is not None
    latent = dcae.encode_strips(
        autoencoder.encoder,
        lambda rows: _enlarged(picture, height, width, rows, dtype, plan.device),
        height,
        width,
        encoding.strip_rows,
        starts=encoding.starts,
        new_map=stage.new_encoder_map,
        lend=None if opened.kept else lambda modules: opened.stream.lend(*modules),
        on_sweep=lambda done, of: trim(),
    )
    return latent.float() * autoencoder.config.scaling_factor


def _enlarged(
    picture: np.ndarray, height: int, width: int, rows: int, dtype: torch.dtype, device: str
) -> Iterator[Tensor]:
    """Strips [1, rows, width, 3] of a picture made larger, in -1 ... 1."""
    import pyvips

    small = pyvips.Image.new_from_memory(picture.data, picture.shape[1], picture.shape[0], 3, "uchar")
    large = small.resize(width / picture.shape[1], vscale=height / picture.shape[0], kernel="cubic")
    for top in range(0, height, rows):
        strip = large.crop(0, top, width, min(rows, height - top)).numpy()
        yield torch.from_numpy(strip)[None].to(device, dtype).mul_(1 / 127.5).sub_(1)
