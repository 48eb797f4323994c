"""The shape of an `AutoencoderDC`'s encoder as sweeps: a decoder's upside down, with the same arithmetic.

Scales are counted from the latent here too: the first unit is at 32 for an f32 model, the last at 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.unit_shape import UnitShape, conv, efficient_vit, res_block


def encoder_units(spec: AutoencoderSpec) -> Iterator[UnitShape]:
    """The units of the encoder, in the order they run."""
    channels, layers = spec.encoder_block_out_channels, spec.encoder_layers_per_block
    scale = spec.spatial_compression_ratio
    if layers[0] > 0:
        yield conv("conv_out", scale, spec.in_channels, channels[0])
    else:
        yield _down(spec, scale, spec.in_channels, channels[1])
        scale //= 2
    for stage, (width, count) in enumerate(zip(channels, layers, strict=True)):
        if not count:
            continue
        if spec.encoder_block_types[stage] == "ResBlock":
            block = [res_block(scale, width, "rms_norm")]
        else:
            block = efficient_vit(spec, scale, width, spec.encoder_qkv_multiscales[stage], "rms_norm")
        yield from block * count
        if stage < len(channels) - 1:
            yield _down(spec, scale, width, channels[stage + 1])
            scale //= 2
    yield conv("mean_out" if spec.encoder_out_shortcut else "conv_out", scale, channels[-1], spec.latent_channels)


def _down(spec: AutoencoderSpec, scale: int, channels: int, out_channels: int) -> UnitShape:
    made = out_channels // 4 if spec.downsample_block_type == "pixel_unshuffle" else out_channels
    # A stride of two, or a quarter of the channels: as many multiplications a pixel of the input.
    macs = 9 * channels * out_channels // 4
    return UnitShape("down", scale, channels, out_channels, 9 * channels * made + made, macs, factor=0.5)


@dataclass(frozen=True)
class EncoderShape(DecoderShape):
    """The encoder of an image whose latent has `rows` x `columns`. Sweep 0 starts from the image."""

    def units(self) -> Iterator[UnitShape]:
        return encoder_units(self.spec)
