"""A picture of uint8 becomes a latent, enlarged on the way, by rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from handscroll.banded.autoencoder import encode_row_blocks
from handscroll.errors import NumericsError
from handscroll.pictures.resizing import enlarged
from handscroll.plan.plan import Plan
from handscroll.plan.stages import ENCODE_PART
from handscroll.runtime.decode import whole_picture
from handscroll.runtime.maps import map_maker
from handscroll.runtime.memory import trim
from handscroll.runtime.session import Session
from handscroll.weights.dtypes import DTYPES


def encode_picture(session: Session, plan: Plan, picture: np.ndarray) -> Tensor:
    """picture [h, w, 3] uint8, enlarged to the plan's size -> its latent [1, C, H/32, W/32] fp32, as samplers take it.

    The enlarged picture exists only in row blocks. Raises OutputError where a map finds no room on disk,
    NumericsError for NaN or infinity.
    """
    if session.team is not None:
        session.team.tell("encode", plan, picture=torch.from_numpy(picture))
    opened, encoding = session.open_autoencoder(plan, "encoder"), plan.encoding
    assert encoding is not None
    autoencoder, dtype = opened.module, DTYPES[plan.precision.autoencoder]
    factor = session.spec.autoencoder.spatial_compression_ratio
    height, width = plan.latent_height * factor, plan.latent_width * factor
    latent = encode_row_blocks(
        autoencoder.encoder,
        lambda rows, of: enlarged(picture, height, width, rows, dtype, plan.device, of),
        height,
        width,
        encoding.strip_rows,
        starts=encoding.starts,
        new_map=map_maker(encoding, session.scratch),
        materialize=opened.materialize,
        on_sweep=lambda done, of: trim(),
        on_rows=lambda *_: session.pulse(ENCODE_PART.name),
        exchange=session.exchange(plan),
    )
    if not torch.isfinite(latent).all():
        raise NumericsError("the autoencoder gave numbers that are not finite", "autoencoder")
    return latent.float() * autoencoder.config.scaling_factor


def enlarge_latent(session: Session, plan: Plan, latent: Tensor) -> Tensor:
    """The finished latent of a plan's smaller picture -> what that plan's size begins from, [1, C, h, w] fp32.

    It is decoded, enlarged and encoded. Raises as `encode_picture`.
    """
    assert plan.smaller is not None
    return encode_picture(session, plan, whole_picture(session, plan.smaller, latent))
