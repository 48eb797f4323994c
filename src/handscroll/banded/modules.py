"""What is read of diffusers' modules: every attribute that the code of this room names, and its type.

The classes have the names of diffusers' own and hold for whatever is built alike. `tests/banded/test_modules.py`
compares them with the real modules, so that a change of diffusers is found before it is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class RMSNorm(Protocol):
    """`x / sqrt(mean(x^2) + eps) * weight + bias` over the last axis, of sizes `dim`; weight and bias may be None."""

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def eps(self) -> float: ...
    @property
    def dim(self) -> Sequence[int]: ...


class GLUMBConv(Protocol):
    """Mix-FFN: expand to twice the hidden channels, act, convolve each by itself, gate one half by the other, project.

    The decoder's and encoder's has a norm and a shortcut, the transformer's neither.
    """

    @property
    def conv_inverted(self) -> nn.Conv2d: ...
    @property
    def conv_depth(self) -> nn.Conv2d: ...
    @property
    def conv_point(self) -> nn.Conv2d: ...
    @property
    def nonlinearity(self) -> nn.Module: ...
    @property
    def norm(self) -> nn.Module | None: ...
    @property
    def residual_connection(self) -> bool: ...


# ---------------------------------------------------------------------------------------------------------------------
# AutoencoderDC


class ResBlock(Protocol):
    """`x + norm(conv2(act(conv1(x))))`."""

    @property
    def conv1(self) -> nn.Conv2d: ...
    @property
    def conv2(self) -> nn.Conv2d: ...
    @property
    def nonlinearity(self) -> nn.Module: ...
    @property
    def norm(self) -> nn.Module: ...


class SanaMultiscaleAttentionProjection(Protocol):
    """A further scale of q, k and v: a depthwise convolution, and a 1x1 one of groups as wide as a head."""

    @property
    def proj_in(self) -> nn.Conv2d: ...
    @property
    def proj_out(self) -> nn.Conv2d: ...


class SanaMultiscaleLinearAttention(Protocol):
    """ReLU linear attention over several scales of q, k and v (arXiv 2205.14756)."""

    @property
    def to_q(self) -> nn.Linear: ...
    @property
    def to_k(self) -> nn.Linear: ...
    @property
    def to_v(self) -> nn.Linear: ...
    @property
    def to_qkv_multiscale(self) -> nn.ModuleList: ...  # of SanaMultiscaleAttentionProjection
    @property
    def to_out(self) -> nn.Linear: ...
    @property
    def norm_out(self) -> nn.Module: ...
    @property
    def attention_head_dim(self) -> int: ...
    @property
    def eps(self) -> float: ...
    @property
    def residual_connection(self) -> bool: ...
    def __call__(self, map_: Tensor, /) -> Tensor: ...


class EfficientViTBlock(Protocol):
    """An attention, then a Mix-FFN."""

    @property
    def attn(self) -> SanaMultiscaleLinearAttention: ...
    @property
    def conv_out(self) -> GLUMBConv: ...


class DCUpBlock2d(Protocol):
    """Doubles both sides, by nearest upsampling and a convolution (`interpolate`) or by pixel_shuffle of one."""

    @property
    def conv(self) -> nn.Conv2d: ...
    @property
    def interpolate(self) -> bool: ...
    @property
    def shortcut(self) -> bool: ...
    @property
    def repeats(self) -> int: ...


class DCDownBlock2d(Protocol):
    """Halves both sides, by pixel_unshuffle of a convolution (`downsample`) or by a strided one."""

    @property
    def conv(self) -> nn.Conv2d: ...
    @property
    def downsample(self) -> bool: ...
    @property
    def shortcut(self) -> bool: ...
    @property
    def group_size(self) -> int: ...


# Blocks are told apart by what only they have: `isinstance` of a protocol does not see a module's submodules.


def is_efficient_vit_block(block: object) -> TypeIs[EfficientViTBlock]:
    return hasattr(block, "attn")


def is_res_block(block: object) -> TypeIs[ResBlock]:
    return hasattr(block, "conv1")


def is_up_block(block: object) -> TypeIs[DCUpBlock2d]:
    return hasattr(block, "repeats")


def is_down_block(block: object) -> TypeIs[DCDownBlock2d]:
    return hasattr(block, "group_size")


class Decoder(Protocol):
    """From latent to pixels. `in_shortcut_repeats` exists where `in_shortcut` is true."""

    @property
    def conv_in(self) -> nn.Conv2d: ...
    @property
    def in_shortcut(self) -> bool: ...
    @property
    def in_shortcut_repeats(self) -> int: ...
    @property
    def up_blocks(self) -> nn.ModuleList: ...  # for each resolution an nn.Sequential of blocks, the finest first
    @property
    def norm_out(self) -> RMSNorm: ...
    @property
    def conv_act(self) -> nn.Module: ...
    @property
    def conv_out(self) -> nn.Conv2d | DCUpBlock2d | None: ...


class Encoder(Protocol):
    """From pixels to latent. `out_shortcut_average_group_size` exists where `out_shortcut` is true."""

    @property
    def conv_in(self) -> nn.Conv2d | DCDownBlock2d: ...
    @property
    def down_blocks(self) -> nn.ModuleList: ...  # for each resolution an nn.Sequential of blocks, the finest first
    @property
    def conv_out(self) -> nn.Conv2d: ...
    @property
    def out_shortcut(self) -> bool: ...
    @property
    def out_shortcut_average_group_size(self) -> int: ...


# ---------------------------------------------------------------------------------------------------------------------
# SanaTransformer2DModel


class PatchEmbed(Protocol):
    """Patches to tokens; sine-cosine positions where `pos_embed` and `interpolation_scale` are not None."""

    @property
    def proj(self) -> nn.Conv2d: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def layer_norm(self) -> bool: ...
    @property
    def pos_embed(self) -> Tensor | None: ...
    @property
    def pos_embed_max_size(self) -> int | None: ...
    @property
    def base_size(self) -> int: ...
    @property
    def interpolation_scale(self) -> float | None: ...


class Attention(Protocol):
    """Self-attention or attention to the text, as its `processor` says. to_out: the projection, then a dropout."""

    @property
    def to_q(self) -> nn.Module: ...
    @property
    def to_k(self) -> nn.Module: ...
    @property
    def to_v(self) -> nn.Module: ...
    @property
    def to_out(self) -> nn.ModuleList: ...
    @property
    def norm_q(self) -> nn.Module | None: ...
    @property
    def norm_k(self) -> nn.Module | None: ...
    @property
    def heads(self) -> int: ...
    @property
    def rescale_output_factor(self) -> float: ...
    @property
    def processor(self) -> object: ...


class SanaTransformerBlock(Protocol):
    """Self-attention `attn1`, attention to the text `attn2`, Mix-FFN `ff`; scale_shift_table [6, width]."""

    @property
    def norm1(self) -> nn.LayerNorm: ...
    @property
    def norm2(self) -> nn.LayerNorm: ...
    @property
    def attn1(self) -> Attention: ...
    @property
    def attn2(self) -> Attention: ...
    @property
    def ff(self) -> GLUMBConv: ...
    @property
    def scale_shift_table(self) -> Tensor: ...


class SanaModulatedNorm(Protocol):
    """The last norm; its scale and shift are made of `SanaTransformer2DModel.scale_shift_table`."""

    @property
    def norm(self) -> nn.LayerNorm: ...


class SanaTransformerConfig(Protocol):
    """What is read of the configuration."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def attention_head_dim(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def patch_size(self) -> int: ...


class SanaTransformer2DModel(Protocol):
    """The transformer. transformer_blocks: of SanaTransformerBlock; scale_shift_table [2, width]."""

    @property
    def config(self) -> SanaTransformerConfig: ...
    @property
    def patch_embed(self) -> PatchEmbed: ...
    @property
    def time_embed(self) -> nn.Module: ...
    @property
    def caption_projection(self) -> nn.Module: ...
    @property
    def caption_norm(self) -> nn.Module: ...
    @property
    def transformer_blocks(self) -> nn.ModuleList: ...
    @property
    def norm_out(self) -> SanaModulatedNorm: ...
    @property
    def proj_out(self) -> nn.Linear: ...
    @property
    def scale_shift_table(self) -> Tensor: ...
