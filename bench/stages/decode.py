"""Latent to pixels.

whole       diffusers' AutoencoderDC.decode; compiled: the same under torch.compile
tiled       with enable_tiling, tiles of 512 px every 448 px, or of 1024 every 896: another picture
patch       every convolution split into 32 patches of rows: whole activations
rows        handscroll: rows of the picture as they are made. They go into memory that stands for the file and is laid
            out before, in the model's own precision beside a whole decode and else in 8 bits; untuned:
            without its Triton kernels
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from handscroll.banded.autoencoder import decode_rows
from handscroll.banded.patches import decode_by_patches
from handscroll.runtime.memory import trim
from stages import MODES, Ready, Size
from stages.autoencoder import AutoencoderStage

PATCHES = 32


class Decode(AutoencoderStage):
    modes = MODES
    half: ClassVar[Literal["decoder"]] = "decoder"

    def input(self, model: Any, size: Size) -> Tensor:
        ratio = model.spatial_compression_ratio
        return self.noise(1, model.config.latent_channels, size[1] // ratio, size[0] // ratio)

    def ready(self, mode: str, size: Size, compared: bool, scratch: Path) -> Ready:
        if mode != "patch":
            return super().ready(mode, size, compared, scratch)
        model = self.model()
        given, small = self.input(model, size), self.small(model)
        return Ready(
            lambda: decode_by_patches(model.decoder, given, PATCHES),
            lambda: decode_by_patches(model.decoder, small, PATCHES),
        )

    def handscroll(self, model: Any, given: Tensor, compared: bool) -> Ready:
        def into(picture: Tensor, latent: Tensor) -> Tensor:
            top = 0
            rows = decode_rows(model.decoder, latent, self.settings.strip_rows, on_sweep=lambda done, of: trim())
            for row_block in rows:
                if picture.dtype == torch.uint8:
                    row_block = (row_block * 127.5 + 127.5).clamp_(0, 255)
                picture[:, :, top : top + row_block.shape[2]] = row_block
                top += row_block.shape[2]
            return picture

        small = self.small(model)
        small_picture, picture = self.blank(model, small, compared), self.blank(model, given, compared)
        return Ready(lambda: into(picture, given), lambda: into(small_picture, small))

    def blank(self, model: Any, latent: Tensor, compared: bool) -> Tensor:
        """Memory for a picture, all of it touched."""
        ratio = model.spatial_compression_ratio
        dtype = self.settings.dtype if compared else torch.uint8
        rows, columns = latent.shape[2] * ratio, latent.shape[3] * ratio
        return torch.zeros(1, 3, rows, columns, dtype=dtype, device=latent.device).fill_(1)

    def on_meta_run(self, mode: str, half: Any, given: Tensor) -> Tensor:
        return decode_by_patches(half, given, PATCHES) if mode == "patch" else half(given)

    def tiles_bytes(self, size: Size, overlap: float) -> int:
        # All tiles, then rows of them blended, then the picture.
        return round(3 * size[0] * size[1] * self.settings.dtype.itemsize * (overlap + 2))


STAGE = Decode
