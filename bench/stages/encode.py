"""Pixels to latent, the input in memory before.

whole       diffusers' AutoencoderDC.encode; compiled: the same under torch.compile
tiled       with enable_tiling, tiles of 512 px every 448 px, or of 1024 every 896: another latent
rows        handscroll: row by row
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from handscroll.banded.autoencoder import encode
from handscroll.runtime.memory import trim
from stages import MODES, Ready, Size
from stages.autoencoder import AutoencoderStage


class Encode(AutoencoderStage):
    modes = tuple(mode for mode in MODES if mode != "patch")
    half: ClassVar[Literal["encoder"]] = "encoder"

    def input(self, model: Any, size: Size) -> Tensor:
        return self.noise(1, 3, size[1], size[0])

    def handscroll(self, model: Any, given: Tensor, compared: bool) -> Ready:
        def run(image: Tensor) -> Tensor:
            return encode(model.encoder, image, self.settings.strip_rows, on_sweep=lambda done, of: trim())

        small = self.small(model)
        return Ready(lambda: run(given), lambda: run(small))


STAGE = Encode
