"""A finished smaller picture becomes the latent that the next size begins from: decoded, enlarged, encoded by rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from handscroll.banded import dcae
from handscroll.errors import NumericsError
from handscroll.pictures.resizing import enlarged
from handscroll.plan.plan import Plan
from handscroll.runtime.decode import whole_picture
from handscroll.runtime.memory import trim
from handscroll.runtime.session import Stages
from handscroll.weights.dtypes import DTYPES


def grown(stage: Stages, latent: Tensor, plan: Plan) -> Tensor:
    """The finished latent of a plan's smaller picture -> what that plan's size begins from, [1, C, h, w] fp32."""
    assert plan.smaller is not None
    with stage.at(plan.smaller):
        picture = whole_picture(stage, latent)
    with stage.at(plan):
        return latent_of(stage, picture)


def latent_of(stage: Stages, picture: np.ndarray) -> Tensor:
    """picture [h, w, 3] uint8, enlarged to the plan's size -> its latent [1, C, H/32, W/32] fp32, as samplers take it.

    The enlarged picture exists only in strips. Raises OutputError where a map finds no room on disk,
    NumericsError for NaN or infinity.
    """
    plan, opened = stage.plan, stage.encoder
    autoencoder, dtype = opened.module, DTYPES[plan.precision.autoencoder]
    factor = stage.spec.autoencoder.spatial_compression_ratio
    height, width = plan.latent_height * factor, plan.latent_width * factor
    encoding = plan.encoding
    assert encoding is not None
    latent = dcae.encode_strips(
        autoencoder.encoder,
        lambda rows: enlarged(picture, height, width, rows, dtype, plan.device),
        height,
        width,
        encoding.strip_rows,
        starts=encoding.starts,
        new_map=stage.new_encoder_map,
        lend=None if opened.kept else lambda modules: opened.stream.lend(*modules),
        on_sweep=lambda done, of: trim(),
    )
    if not torch.isfinite(latent).all():
        raise NumericsError("the autoencoder gave numbers that are not finite", "autoencoder")
    return latent.float() * autoencoder.config.scaling_factor
