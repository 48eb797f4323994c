"""What decoding and encoding share: the autoencoder of Sana's models with random weights, and what it takes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import on_meta
from handscroll.models.autoencoder import F32C32_SANA
from make_checkpoint import Noise, empty_module, fill
from stages import TILES_PX, Ready, Size, Stage, in_dtype, random_tensor

MINIATURE = replace(
    F32C32_SANA,
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_out_channels=(8, 8, 8, 8, 16, 16),
    decoder_block_out_channels=(8, 8, 8, 8, 16, 16),
    encoder_layers_per_block=(1,) * 6,
    decoder_layers_per_block=(1,) * 6,
)
WARM_UP_PX = 64


class AutoencoderStage(Stage):
    """One half of the autoencoder; the other holds no memory."""

    limit: ClassVar[Literal["convolution"]] = "convolution"
    half: ClassVar[Literal["encoder", "decoder"]]

    @property
    def model_name(self) -> str:
        return "f32c32-sana, miniature" if self.settings.miniature else "f32c32-sana"

    def model(self) -> Any:
        """Random weights of the half that runs."""
        with torch.device("meta"):
            model = empty_module(MINIATURE if self.settings.miniature else F32C32_SANA).eval().requires_grad_(False)
        fill(getattr(model, self.half), self.settings.dtype, self.settings.device, Noise(0))
        return model

    @abstractmethod
    def input(self, model: Any, size: Size) -> Tensor:
        """What the half is given for a picture of this size."""

    def diffusers(self, model: Any, given: Tensor) -> Tensor:
        """The half as diffusers runs it, tiling included."""
        way = model.encode if self.half == "encoder" else model.decode
        return way(given, return_dict=False)[0]

    @abstractmethod
    def handscroll(self, model: Any, given: Tensor, compared: bool) -> Ready:
        """The half by rows."""

    def ready(self, mode: str, size: Size, compared: bool, scratch: Path) -> Ready:
        model = self.model()
        given = self.input(model, size)
        if mode == "rows":
            return self.handscroll(model, given, compared)
        if mode in TILES_PX:
            tile_px, stride_px = TILES_PX[mode]
            model.enable_tiling(tile_px, tile_px, stride_px, stride_px)
        if mode == "compiled":
            getattr(model, self.half).compile(dynamic=False)
            return Ready(lambda: self.diffusers(model, given), lambda: None)
        small = self.input(model, (WARM_UP_PX, WARM_UP_PX))
        return Ready(lambda: self.diffusers(model, given), lambda: self.diffusers(model, small))

    def on_meta(self, size: Size) -> tuple[Any, Tensor]:
        """A model and its input without memory, in the dtype that is computed in."""
        with torch.device("meta"):
            model = in_dtype(empty_module(MINIATURE if self.settings.miniature else F32C32_SANA), self.settings.dtype)
            ratio = model.spatial_compression_ratio
            width, height, channels = *size, 3
            if self.half == "decoder":
                width, height, channels = width // ratio, height // ratio, model.config.latent_channels
            return model, torch.empty(1, channels, height, width, dtype=self.settings.dtype)

    def flop(self, size: Size) -> int:
        model, given = self.on_meta(size)
        return on_meta.flop_of(lambda: self.diffusers(model, given))

    def needed_bytes(self, mode: str, size: Size) -> int | None:
        if mode == "rows":
            return None
        width, height = size
        if mode in TILES_PX:
            tile_px, stride_px = TILES_PX[mode]
            one = self.needed_bytes("whole", (min(tile_px, width), min(tile_px, height))) or 0
            return one + self.tiles_bytes(size, (tile_px / stride_px) ** 2)
        model, given = self.on_meta(size)
        half = getattr(model, self.half)
        weights_bytes = sum(parameter.nbytes for parameter in half.parameters())
        return weights_bytes + given.nbytes + on_meta.peak_bytes_of(lambda: self.on_meta_run(mode, half, given))

    def on_meta_run(self, mode: str, half: Any, given: Tensor) -> Tensor:
        return half(given)

    def tiles_bytes(self, size: Size, overlap: float) -> int:
        """What diffusers' tiling keeps beside the tile that it works on. `overlap`: pixels of all tiles over the
        picture's."""
        return 0

    def small(self, model: Any) -> Tensor:
        return self.input(model, (WARM_UP_PX, WARM_UP_PX))

    def noise(self, *shape: int) -> Tensor:
        return random_tensor(*shape, settings=self.settings)
