"""Which modules rows can run through: the kinds of layers, their settings, and nothing that was put around them.

banded/autoencoder/ reads weights and never calls a layer's `forward`. So whatever would change what that does (another
kind of layer, another padding, a hook, a replaced method) must be found here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import (
    SanaMultiscaleAttentionProjection,
    SanaMultiscaleAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from diffusers.models.autoencoders.autoencoder_dc import (
    DCDownBlock2d,
    DCUpBlock2d,
    Decoder,
    EfficientViTBlock,
    Encoder,
    ResBlock,
)
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn

from handscroll.integrations.diffusers.weights import has_foreign_forward

# Elementwise, so that rows and channels-last layout change nothing.
_ACTIVATIONS = (nn.SiLU, nn.ReLU, nn.GELU, nn.Mish, nn.Identity)
_BLOCKS = (ResBlock, EfficientViTBlock, DCUpBlock2d, DCDownBlock2d)
# Methods beside `forward` that do a part of its work.
_COMPUTING = ("_conv_forward", "apply_linear_attention", "apply_quadratic_attention")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def reason_against(half: nn.Module, name: str) -> str | None:
    """Why rows cannot run through a decoder or encoder called `name`: the first module in the way; None if none is."""
    for path, module in half.named_modules(prefix=name):
        kind = type(module)
        fits = _FITS.get(kind)
        if fits is None:
            return f"{path} is a {kind.__name__}, which rows cannot run through"
        if any(vars(module).get(hooks) for hooks in _HOOKS):
            return f"{path} has hooks of its own"
        if replaced := _replaced_method(module):
            return f"{path}.{replaced} was replaced"
        if hidden := _hidden_attribute(module):
            return f"{path}.{hidden} is no parameter, buffer or layer that PyTorch knows of"
        if (own := _METHODS.get(kind)) is not None and _methods_of(kind) != own:
            return f"a method of {kind.__name__} was replaced, for all of them"
        if not fits(module):
            return f"{path} ({kind.__name__}) is set up in a way that rows cannot run through"
        if isinstance(module, nn.BatchNorm2d) and (module.training or module.running_mean is None):
            return f"{path} is a batch norm in training mode, which needs the whole picture"
    return None


def _replaced_method(module: nn.Module) -> str | None:
    """The first method that was set on the module itself, in place of its class's, other than to move its weights."""
    for name in vars(module):
        if callable(getattr(type(module), name, None)) and (name != "forward" or has_foreign_forward(module)):
            return name
    return None


def _hidden_attribute(module: nn.Module) -> str | None:
    """The first weight or layer that is a plain attribute, so that neither the module's tables nor PyTorch list it."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor | nn.Module) and not name.startswith("_"):
            return name
        if isinstance(value, list | tuple) and any(isinstance(each, nn.Module) for each in value):
            return name
    return None


def _methods_of(kind: type) -> tuple[object, ...]:
    """The functions that compute what a layer of this kind gives."""
    return tuple(getattr(kind, name, None) for name in ("__call__", "forward", *_COMPUTING))


def _is_conv(conv: object, size: int, stride: int = 1) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (size, size)
        and conv.stride == (stride, stride)
        and conv.padding == (size // 2, size // 2)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def _is_norm(norm: object, norm_type: str) -> bool:
    """A norm that the block's `forward` calls in the layout that belongs to it."""
    return type(norm) is (RMSNorm if norm_type == "rms_norm" else nn.BatchNorm2d)


def _res_block(block: Any) -> bool:
    convs = _is_conv(block.conv1, 3) and _is_conv(block.conv2, 3)
    return convs and type(block.nonlinearity) in _ACTIVATIONS and _is_norm(block.norm, block.norm_type)


def _glu_mb_conv(block: Any) -> bool:
    convs = _is_conv(block.conv_inverted, 1) and _is_conv(block.conv_depth, 3) and _is_conv(block.conv_point, 1)
    normed = block.norm is None if block.norm_type != "rms_norm" else type(block.norm) is RMSNorm
    depthwise = block.conv_depth.groups == block.conv_depth.out_channels == block.conv_depth.in_channels
    return convs and depthwise and normed and type(block.nonlinearity) is nn.SiLU


def _attention(attention: Any) -> bool:
    return (
        type(attention.processor) is SanaMultiscaleAttnProcessor2_0
        and _methods_of(SanaMultiscaleAttnProcessor2_0) == _METHODS[SanaMultiscaleAttnProcessor2_0]
        and all(_is_linear(each) and each.bias is None for each in (attention.to_q, attention.to_k, attention.to_v))
        and _is_linear(attention.to_out)
        and type(attention.nonlinearity) is nn.ReLU
        and _is_norm(attention.norm_out, attention.norm_type)
        and all(type(scale) is SanaMultiscaleAttentionProjection for scale in attention.to_qkv_multiscale)
    )


def _is_linear(layer: object) -> bool:
    return type(layer) is nn.Linear


def _projection(scale: Any) -> bool:
    size = scale.proj_in.kernel_size[0] if type(scale.proj_in) is nn.Conv2d else 0
    return (
        size % 2 == 1
        and _is_conv(scale.proj_in, size)
        and scale.proj_in.groups == scale.proj_in.out_channels
        and _is_conv(scale.proj_out, 1)
        and scale.proj_in.bias is None
        and scale.proj_out.bias is None
    )


def _up(block: Any) -> bool:
    dense = _is_conv(block.conv, 3) and block.conv.groups == 1
    return dense and block.factor == 2 and (not block.interpolate or block.interpolation_mode == "nearest")


def _down(block: Any) -> bool:
    return _is_conv(block.conv, 3, stride=1 if block.downsample else 2) and block.factor == 2


def _decoder(decoder: Any) -> bool:
    ends = _is_conv(decoder.conv_in, 3) and (_is_conv(decoder.conv_out, 3) or type(decoder.conv_out) is DCUpBlock2d)
    return ends and type(decoder.norm_out) is RMSNorm and type(decoder.conv_act) in _ACTIVATIONS


def _encoder(encoder: Any) -> bool:
    return _is_conv(encoder.conv_out, 3) and (_is_conv(encoder.conv_in, 3) or type(encoder.conv_in) is DCDownBlock2d)


def _stage(stage: Any) -> bool:
    return all(type(block) in _BLOCKS for block in stage)


def _always(layer: Any) -> bool:
    return True


_FITS: dict[type, Callable[[Any], bool]] = {
    Decoder: _decoder,
    Encoder: _encoder,
    nn.Sequential: _stage,
    nn.ModuleList: _always,
    ResBlock: _res_block,
    EfficientViTBlock: lambda block: (
        type(block.attn) is SanaMultiscaleLinearAttention and type(block.conv_out) is GLUMBConv
    ),
    GLUMBConv: _glu_mb_conv,
    SanaMultiscaleLinearAttention: _attention,
    SanaMultiscaleAttentionProjection: _projection,
    DCUpBlock2d: _up,
    DCDownBlock2d: _down,
    **dict.fromkeys((nn.Conv2d, nn.Linear, RMSNorm, nn.BatchNorm2d, *_ACTIVATIONS), _always),
}


# As they were when this was imported: a class whose method is replaced later computes something else.
_METHODS = {kind: _methods_of(kind) for kind in (*_FITS, SanaMultiscaleAttnProcessor2_0)}


def has_global_hooks() -> bool:
    """Whether somebody listens to every module of the process, whose calls rows would not make."""
    return bool(torch.nn.modules.module._has_any_global_hook())
