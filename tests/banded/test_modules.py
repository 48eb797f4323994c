"""The protocols of banded/modules.py against diffusers' own modules.

Twice: mypy compares them with what diffusers writes (the functions below, which are never called), and the tests with
modules that are built. mypy sees types, but not what hangs on a configuration or comes from base classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from diffusers.models import attention_processor, embeddings, normalization
from diffusers.models.autoencoders import autoencoder_dc
from diffusers.models.transformers import sana_transformer
from torch import nn

import miniatures
from handscroll.banded import modules


def rms_norm(module: normalization.RMSNorm) -> modules.RMSNorm:
    return module


def glu_mb_conv(module: sana_transformer.GLUMBConv) -> modules.GLUMBConv:
    return module


def res_block(module: autoencoder_dc.ResBlock) -> modules.ResBlock:
    return module


def projection(
    module: attention_processor.SanaMultiscaleAttentionProjection,
) -> modules.SanaMultiscaleAttentionProjection:
    return module


def multiscale_attention(
    module: attention_processor.SanaMultiscaleLinearAttention,
) -> modules.SanaMultiscaleLinearAttention:
    return module


def efficient_vit_block(module: autoencoder_dc.EfficientViTBlock) -> modules.EfficientViTBlock:
    return module


def up_block(module: autoencoder_dc.DCUpBlock2d) -> modules.DCUpBlock2d:
    return module


def down_block(module: autoencoder_dc.DCDownBlock2d) -> modules.DCDownBlock2d:
    return module


def decoder(module: autoencoder_dc.Decoder) -> modules.Decoder:
    return module


def encoder(module: autoencoder_dc.Encoder) -> modules.Encoder:
    return module


def patch_embed(module: embeddings.PatchEmbed) -> modules.PatchEmbed:
    return module


def attention(module: attention_processor.Attention) -> modules.Attention:
    return module


def transformer_block(module: sana_transformer.SanaTransformerBlock) -> modules.SanaTransformerBlock:
    return module


def modulated_norm(module: sana_transformer.SanaModulatedNorm) -> modules.SanaModulatedNorm:
    return module


def transformer(module: sana_transformer.SanaTransformer2DModel) -> modules.SanaTransformer2DModel:
    return module


# A module of diffusers and the protocol that describes it have one name.
DESCRIBED: dict[type[nn.Module], type] = {
    real: getattr(modules, real.__name__)
    for real in (
        normalization.RMSNorm,
        sana_transformer.GLUMBConv,
        autoencoder_dc.ResBlock,
        attention_processor.SanaMultiscaleAttentionProjection,
        attention_processor.SanaMultiscaleLinearAttention,
        autoencoder_dc.EfficientViTBlock,
        autoencoder_dc.DCUpBlock2d,
        autoencoder_dc.DCDownBlock2d,
        autoencoder_dc.Decoder,
        autoencoder_dc.Encoder,
        embeddings.PatchEmbed,
        attention_processor.Attention,
        sana_transformer.SanaTransformerBlock,
        sana_transformer.SanaModulatedNorm,
        sana_transformer.SanaTransformer2DModel,
    )
}
# What exists only where another attribute is true.
ONLY_WITH = {"in_shortcut_repeats": "in_shortcut", "out_shortcut_average_group_size": "out_shortcut"}
BLOCK_KINDS: dict[type[nn.Module], Callable[[object], bool]] = {
    autoencoder_dc.ResBlock: modules.is_res_block,
    autoencoder_dc.EfficientViTBlock: modules.is_efficient_vit_block,
    autoencoder_dc.DCUpBlock2d: modules.is_up_block,
    autoencoder_dc.DCDownBlock2d: modules.is_down_block,
}

AUTOENCODERS: dict[str, dict[str, Any]] = {
    "interpolated, strided": {},
    "shuffled": {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
    "batch norm": {"decoder_norm_types": "batch_norm", "decoder_act_fns": "relu"},
    "without shortcuts": {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "no layers in the first stage": {
        "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
        "decoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    },
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{row: (row, {}) for row in miniatures.ROWS},
    "patches and positions": ("1.6b", {"patch_size": 2, "interpolation_scale": 0.5}),
    "biases of attentions, weights of norms": ("1.6b", {"attention_bias": True, "norm_elementwise_affine": True}),
}


def attributes(protocol: type) -> dict[str, Any]:
    """Names and types of a protocol's attributes."""
    properties = {name: value for name, value in vars(protocol).items() if isinstance(value, property)}
    return {name: get_type_hints(value.fget)["return"] for name, value in properties.items()}


def agrees(value: object, hint: Any) -> bool:
    """Whether a value has a type, or the attributes of a protocol."""
    if get_origin(hint) in (Union, UnionType):
        return any(agrees(value, each) for each in get_args(hint))
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return isinstance(value, int | float)
    if getattr(hint, "_is_protocol", False) and hint.__module__ == modules.__name__:
        return not disagreements(value, hint)
    return isinstance(value, get_origin(hint) or hint)


def disagreements(module: object, protocol: type) -> list[str]:
    """What a protocol says of a module that is not so."""
    wrong = []
    for name, hint in attributes(protocol).items():
        if name in ONLY_WITH and not getattr(module, ONLY_WITH[name]):
            continue
        if not hasattr(module, name):
            wrong.append(f"{type(module).__name__} has no {name}")
        elif not agrees(getattr(module, name), hint):
            wrong.append(f"{type(module).__name__}.{name} is a {type(getattr(module, name)).__name__}, not {hint}")
    return wrong


def check(network: nn.Module) -> set[type]:
    """Compares every module of a network that is described; gives the kinds that there were."""
    for module in network.modules():
        if type(module) in DESCRIBED:
            assert disagreements(module, DESCRIBED[type(module)]) == []
    return {type(module) for module in network.modules()} & DESCRIBED.keys()


def blocks_of(half: Any) -> Iterator[nn.Module]:
    for stage in half.up_blocks if hasattr(half, "up_blocks") else half.down_blocks:
        assert type(stage) is nn.Sequential
        yield from stage.children()


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_are_as_described(name: str) -> None:
    model: Any = miniatures.make_autoencoder(**AUTOENCODERS[name])
    assert check(model) == {
        normalization.RMSNorm,
        sana_transformer.GLUMBConv,
        attention_processor.SanaMultiscaleAttentionProjection,
        attention_processor.SanaMultiscaleLinearAttention,
        autoencoder_dc.Decoder,
        autoencoder_dc.Encoder,
        *BLOCK_KINDS,
    }
    for block in [*blocks_of(model.decoder), *blocks_of(model.encoder), model.decoder.conv_out, model.encoder.conv_in]:
        kinds = [kind for kind, is_one in BLOCK_KINDS.items() if is_one(block)]
        assert kinds == ([] if type(block) is nn.Conv2d else [type(block)])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_are_as_described(name: str) -> None:
    row, overrides = TRANSFORMERS[name]
    model: Any = miniatures.make_transformer(row, **overrides)
    assert check(model) == {
        normalization.RMSNorm,
        sana_transformer.GLUMBConv,
        embeddings.PatchEmbed,
        attention_processor.Attention,
        sana_transformer.SanaTransformerBlock,
        sana_transformer.SanaModulatedNorm,
        sana_transformer.SanaTransformer2DModel,
    }
    assert all(type(block) is sana_transformer.SanaTransformerBlock for block in model.transformer_blocks)


def test_every_protocol_is_compared() -> None:
    protocols = {value for value in vars(modules).values() if getattr(value, "_is_protocol", False)}
    ours = {protocol for protocol in protocols if protocol.__module__ == modules.__name__}
    assert ours - set(DESCRIBED.values()) == {modules.SanaTransformerConfig}  # an attribute of the transformer
    assert all(attributes(protocol) for protocol in ours)


def test_a_change_is_found() -> None:
    decoder: Any = miniatures.make_autoencoder().decoder
    block = decoder.up_blocks[0][-1]
    block.conv1 = nn.Linear(2, 2)
    del block.norm
    assert disagreements(block, modules.ResBlock) == [
        f"ResBlock.conv1 is a Linear, not {nn.Conv2d}",
        "ResBlock has no norm",
    ]
    assert agrees(torch.zeros(1), attributes(modules.RMSNorm)["weight"])
    assert not agrees(1, attributes(modules.RMSNorm)["weight"])
