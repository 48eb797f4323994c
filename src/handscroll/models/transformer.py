"""A `SanaTransformer2DModel` as its config describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from handscroll.models.config import (
    MAX_CHANNELS,
    MAX_HEADS,
    MAX_LAYERS,
    require_positive,
    require_within,
    spec_from_config,
)
from handscroll.models.parameters import convolution_parameters, linear_parameters

# What a step calls once, before its layers.
EMBEDDERS = ("time_embed", "caption_projection")


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """A `SanaTransformer2DModel`. The defaults are diffusers', and are those of Sana 1.6B at 1024 pixels."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "in_channels", "out_channels", "num_attention_heads", "attention_head_dim")
        require_positive(self, "num_layers", "num_cross_attention_heads", "cross_attention_head_dim", "mlp_ratio")
        require_positive(self, "caption_channels", "sample_size", "patch_size")
        require_within(
            self,
            num_layers=(1, MAX_LAYERS),
            in_channels=(1, MAX_CHANNELS),
            out_channels=(1, MAX_CHANNELS),
            num_attention_heads=(1, MAX_HEADS),
            attention_head_dim=(1, MAX_HEADS),
            num_cross_attention_heads=(1, MAX_HEADS),
            cross_attention_head_dim=(1, MAX_HEADS),
            width=(1, MAX_CHANNELS),
            cross_width=(1, MAX_CHANNELS),
            caption_channels=(1, MAX_CHANNELS),
            mlp_ratio=(1 / self.width, 64),
            dropout=(0, 1),
            sample_size=(1, 2**14),
            patch_size=(1, 64),
            norm_eps=(0, 1),
            interpolation_scale=(1e-3, 1e3),
            guidance_embeds_scale=(-1e6, 1e6),
            timestep_scale=(-1e6, 1e6),
        )
        if self.cross_attention_dim != self.width:
            raise ValueError(f"cross_attention_dim is {self.cross_attention_dim}, but the width is {self.width}")
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f"qk_norm {self.qk_norm!r} is not one that Sana uses (null, rms_norm_across_heads)")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the contents of `transformer/config.json`. Raises ValueError naming the field."""
        if config.get("out_channels", 32) is None:  # diffusers: as many as come in
            config = {**config, "out_channels": config.get("in_channels", 32)}
        return spec_from_config(cls, config)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_width(self) -> int:
        """Channels of the queries, keys and values of the attention to the text."""
        return self.num_cross_attention_heads * self.cross_attention_head_dim

    @property
    def hidden_channels(self) -> int:
        """Channels inside a Mix-FFN after its gate; the two convolutions before the gate have twice as many."""
        return int(self.mlp_ratio * self.width)

    @property
    def block_parameter_count(self) -> int:
        """Parameters of one of the `num_layers` blocks."""
        width, cross, hidden = self.width, self.cross_width, self.hidden_channels
        self_attention = 3 * linear_parameters(width, width, self.attention_bias) + linear_parameters(width, width)
        cross_attention = (
            linear_parameters(width, cross)
            + 2 * linear_parameters(self.cross_attention_dim, cross)
            + linear_parameters(cross, width)
        )
        if self.qk_norm is not None:
            self_attention += 2 * width
            cross_attention += 2 * cross
        feed_forward = (
            linear_parameters(width, 2 * hidden)
            + convolution_parameters(1, 2 * hidden, 3)
            + linear_parameters(hidden, width, bias=False)
        )
        norms = 2 * width if self.norm_elementwise_affine else 0
        return self_attention + cross_attention + feed_forward + norms + 6 * width  # the last: scale_shift_table

    def block_matrices(self) -> list[tuple[str, tuple[int, int]]]:
        """Names and shapes `[N, K]` of the first block's matrices, 1x1 convolutions among them."""
        width, cross, hidden = self.width, self.cross_width, self.hidden_channels
        shapes = {f"attn1.to_{name}": (width, width) for name in ("q", "k", "v", "out.0")}
        shapes |= {"attn2.to_q": (cross, width), "attn2.to_out.0": (width, cross)}
        shapes |= {f"attn2.to_{name}": (cross, self.cross_attention_dim) for name in ("k", "v")}
        shapes |= {"ff.conv_inverted": (2 * hidden, width), "ff.conv_point": (width, hidden)}
        return [(f"transformer_blocks.0.{name}.weight", shape) for name, shape in shapes.items()]

    @property
    def embedder_units(self) -> list[int]:
        """Parameters of each matrix of `EMBEDDERS`, with its bias."""
        width = self.width
        of_number = [linear_parameters(256, width), linear_parameters(width, width)]
        time_embed = [*of_number * (2 if self.guidance_embeds else 1), linear_parameters(width, 6 * width)]
        return [*time_embed, linear_parameters(self.caption_channels, width), linear_parameters(width, width)]

    @property
    def parameter_count(self) -> int:
        width = self.width
        patch_embed = convolution_parameters(self.in_channels, width, self.patch_size)
        output = 2 * width + linear_parameters(width, self.patch_size**2 * self.out_channels)
        embedders = sum(self.embedder_units) + width  # the norm of the captions
        return patch_embed + embedders + self.num_layers * self.block_parameter_count + output
