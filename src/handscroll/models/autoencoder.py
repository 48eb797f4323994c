"""An `AutoencoderDC` as its config describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from handscroll.models.config import (
    MAX_CHANNELS,
    MAX_HEADS,
    MAX_LAYERS,
    default_of,
    require_a_stage,
    require_known,
    require_positive,
    require_within,
    spec_from_config,
)
from handscroll.models.parameters import convolution_parameters, linear_parameters
from handscroll.units import shown

BLOCK_TYPES = frozenset({"ResBlock", "EfficientViTBlock"})
NORM_TYPES = frozenset({"rms_norm", "layer_norm", "batch_norm"})
MAX_STAGES, MAX_KERNEL, MAX_SCALES = 10, 63, 8
# As diffusers reads them: whatever is not the first of each is taken for the second.
UPSAMPLE_TYPES = frozenset({"interpolate", "pixel_shuffle"})
DOWNSAMPLE_TYPES = frozenset({"pixel_unshuffle", "Conv", "conv"})
ACTIVATIONS = frozenset({"silu", "swish", "mish", "gelu", "relu"})


@dataclass(frozen=True, slots=True)
class AutoencoderSpec:
    """An `AutoencoderDC`: every field of its config, what may be one value or one a stage spelled out a stage.

    The defaults are diffusers', except that stages are listed; `F32C32_SANA` is the one that Sana ships.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "in_channels", "latent_channels", "attention_head_dim", "scaling_factor")
        for half in ("encoder", "decoder"):
            channels = getattr(self, f"{half}_block_out_channels")
            if not 2 <= len(channels) <= MAX_STAGES or min(channels) < 1:
                raise ValueError(f"{half}_block_out_channels {shown(list(channels))} describe no stages")
            for field in ("block_types", "layers_per_block", "qkv_multiscales"):
                require_a_stage(f"{half}_{field}", getattr(self, f"{half}_{field}"), len(channels))
            require_known(f"{half}_block_types", getattr(self, f"{half}_block_types"), BLOCK_TYPES)
            self._check_sizes(half)
        if len(self.encoder_block_out_channels) != len(self.decoder_block_out_channels):
            raise ValueError("encoder and decoder have different numbers of stages")
        for field in ("decoder_norm_types", "decoder_act_fns"):
            require_a_stage(field, getattr(self, field), len(self.decoder_block_out_channels))
        require_known("decoder_norm_types", self.decoder_norm_types, NORM_TYPES)
        require_known("decoder_act_fns", tuple(each.lower() for each in self.decoder_act_fns), ACTIVATIONS)
        require_known("decoder_conv_act_fn", (self.decoder_conv_act_fn.lower(),), ACTIVATIONS)
        require_known("upsample_block_type", (self.upsample_block_type,), UPSAMPLE_TYPES)
        require_known("downsample_block_type", (self.downsample_block_type,), DOWNSAMPLE_TYPES)
        require_within(
            self,
            in_channels=(1, MAX_CHANNELS),
            latent_channels=(1, MAX_CHANNELS),
            attention_head_dim=(1, MAX_HEADS),
            scaling_factor=(1e-6, 1e6),
        )

    def _check_sizes(self, half: str) -> None:
        """Raises ValueError for sizes of one half that no autoencoder has."""
        ranges = {"block_out_channels": (1, MAX_CHANNELS), "layers_per_block": (0, MAX_LAYERS // MAX_STAGES)}
        ranges["qkv_multiscales"] = (1, MAX_KERNEL)
        require_within(self, **{f"{half}_{field}": bounds for field, bounds in ranges.items()})
        for scales in getattr(self, f"{half}_qkv_multiscales"):
            if len(scales) > MAX_SCALES:
                raise ValueError(f"{half}_qkv_multiscales has {len(scales)} scales for a stage; at most {MAX_SCALES}")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the contents of `vae/config.json`. Raises ValueError naming the field."""
        config = dict(config)
        for half in ("encoder", "decoder"):
            stages = config.get(f"{half}_block_out_channels", (0,) * 6)
            count = len(stages) if isinstance(stages, list | tuple) else 0
            fields = ["block_types"] if half == "encoder" else ["block_types", "norm_types", "act_fns"]
            for field in (f"{half}_{field}" for field in fields):
                value = config.get(field, default_of(cls, field)[0])
                if isinstance(value, str):
                    config[field] = [value] * count
        return spec_from_config(cls, config)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels a side for each latent position."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def encoder_parameter_count(self) -> int:
        channels, layers = self.encoder_block_out_channels, self.encoder_layers_per_block
        pixel_unshuffle = self.downsample_block_type == "pixel_unshuffle"
        if layers[0] > 0:
            total = convolution_parameters(self.in_channels, channels[0], 3)
        else:
            total = convolution_parameters(self.in_channels, channels[1] // 4 if pixel_unshuffle else channels[1], 3)
        for stage, (width, count) in enumerate(zip(channels, layers, strict=True)):
            scales = self.encoder_qkv_multiscales[stage]
            total += count * self._layer(self.encoder_block_types[stage], width, scales, "rms_norm")
            if stage < len(channels) - 1 and count > 0:
                below = channels[stage + 1]
                total += convolution_parameters(width, below // 4 if pixel_unshuffle else below, 3)
        return total + convolution_parameters(channels[-1], self.latent_channels, 3)

    @property
    def decoder_parameter_count(self) -> int:
        channels, layers = self.decoder_block_out_channels, self.decoder_layers_per_block
        spread = 1 if self.upsample_block_type == "interpolate" else 4  # pixel shuffle makes four pixels of channels
        total = convolution_parameters(self.latent_channels, channels[-1], 3)
        for stage, (width, count) in enumerate(zip(channels, layers, strict=True)):
            scales, norm = self.decoder_qkv_multiscales[stage], self.decoder_norm_types[stage]
            total += count * self._layer(self.decoder_block_types[stage], width, scales, norm)
            if stage < len(channels) - 1 and count > 0:
                total += convolution_parameters(channels[stage + 1], spread * width, 3)
        last = channels[0] if layers[0] > 0 else channels[1]
        total += 2 * last  # norm_out
        return total + convolution_parameters(last, self.in_channels if layers[0] > 0 else spread * self.in_channels, 3)

    @property
    def parameter_count(self) -> int:
        return self.encoder_parameter_count + self.decoder_parameter_count

    def _layer(self, block_type: str, width: int, scales: tuple[int, ...], norm: str) -> int:
        affine = 2 * width  # every norm type has a weight and a bias
        if block_type == "ResBlock":
            return (
                convolution_parameters(width, width, 3) + convolution_parameters(width, width, 3, bias=False) + affine
            )
        head_dim = self.attention_head_dim
        inner = width // head_dim * head_dim
        attention = 3 * width * inner + inner * (1 + len(scales)) * width + affine
        attention += sum(3 * inner * size**2 + 3 * inner * head_dim for size in scales)
        hidden = 4 * width
        feed_forward = (
            linear_parameters(width, 2 * hidden) + convolution_parameters(1, 2 * hidden, 3) + hidden * width + affine
        )
        return attention + feed_forward


# The autoencoder that every Sana checkpoint ships.
F32C32_SANA = AutoencoderSpec(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
