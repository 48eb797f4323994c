"""The autoencoders that the tests stream: every configuration as its difference from one."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from handscroll.banded.autoencoder import decode_rows
from handscroll.banded.rows import RowOp

EXACT = 2e-5
STRIP_ROWS = (1, 2, 3, 7, None)
DTYPES = (torch.float32, torch.bfloat16)
# height x width of the latent. With head_dim 4, 1x1 and 2x2 attend quadratically at the deepest stage, 1x9 does not.
SIZES = ((1, 1), (1, 9), (9, 1), (2, 2), (5, 7))
R, E = "ResBlock", "EfficientViTBlock"

F32 = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": (R, R, R, E, E, E),
    "decoder_block_types": (R, R, R, E, E, E),
    "encoder_block_out_channels": (8, 8, 8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 8, 8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 2, 1, 1),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}


def stages(
    count: int,
    channels: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    scales: tuple[int, ...] = (5,),
) -> dict[str, Any]:
    """Three stages of ResBlocks, then attention, as the deeper published models have them."""
    types, multiscales = (R,) * 3 + (E,) * (count - 3), ((),) * 3 + (scales,) * (count - 3)
    return {
        "encoder_block_types": types,
        "decoder_block_types": types,
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "encoder_layers_per_block": encoder_layers,
        "decoder_layers_per_block": decoder_layers,
        "encoder_qkv_multiscales": multiscales,
        "decoder_qkv_multiscales": multiscales,
    }


SHUFFLE = {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}
BATCH_NORM = {
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
}


@dataclass(frozen=True)
class Case:
    """A configuration as its difference from `F32`."""

    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = SIZES


CASES = {
    "f32": Case(),
    "f32 by shuffling": Case(SHUFFLE),
    "f32 with batch norm and relu": Case(BATCH_NORM | SHUFFLE),
    "batch norm in attention": Case({"decoder_norm_types": "batch_norm", "decoder_conv_act_fn": "silu"}),
    "f64": Case(
        stages(7, (8, 8, 8, 8, 16, 16, 16), (0, 1, 1, 1, 1, 1, 1), (0, 2, 1, 1, 1, 1, 1)) | SHUFFLE,
        ((1, 1), (1, 3), (2, 2), (3, 2)),
    ),
    "f128": Case(
        stages(8, (8, 8, 8, 8, 8, 16, 16, 16), (0, 1, 1, 1, 1, 1, 1, 1), (0, 1, 2, 1, 1, 1, 1, 1)),
        ((1, 1), (1, 3), (3, 1)),
    ),
    "no layers in the first stage": Case(
        {"encoder_layers_per_block": (0, 1, 1, 1, 1, 1), "decoder_layers_per_block": (0, 1, 1, 1, 1, 1)}
    ),
    "no layers in a middle stage": Case(
        stages(6, (8, 8, 8, 8, 8, 16), (1, 1, 0, 1, 1, 1), (1, 1, 0, 1, 1, 1)) | SHUFFLE, ((1, 1), (2, 2), (5, 7))
    ),
    "no layers in the last stage": Case(stages(4, (8, 8, 8, 8), (1, 1, 1, 0), (1, 1, 1, 0)), ((1, 1), (4, 9), (9, 4))),
    "without shortcuts": Case({"encoder_out_shortcut": False, "decoder_in_shortcut": False}),
    "one scale": Case(stages(6, (8, 8, 8, 8, 16, 16), (1,) * 6, (1,) * 6, scales=())),
    "three scales": Case(stages(6, (8, 8, 8, 8, 16, 16), (1,) * 6, (1,) * 6, scales=(3, 5))),
    "ResBlocks only": Case({"encoder_block_types": R, "decoder_block_types": R}),
    "mixed stages": Case(
        {
            "encoder_block_types": (E, R, E, R, E, R),
            "decoder_block_types": (R, E, R, E, R, E),
            "encoder_qkv_multiscales": ((3,), (), (), (), (5,), ()),
            "decoder_qkv_multiscales": ((), (5,), (), (), (), (3,)),
        },
        ((1, 1), (1, 3), (2, 2)),
    ),
    "heads of eight": Case({"attention_head_dim": 8}),
    "heads of sixteen, in a stage of 24 channels": Case(
        stages(5, (6, 12, 24, 24, 24), (1,) * 5, (1,) * 5) | {"attention_head_dim": 16}, ((1, 1), (4, 4), (3, 6))
    ),
    "channels that grow by odd ratios": Case(
        {"decoder_block_out_channels": (12, 16, 16, 16, 8, 16), "encoder_block_out_channels": (8, 32, 16, 8, 8, 16)}
    ),
}


def alike(one: Tensor, other: Tensor, most: float = EXACT) -> bool:
    """Of the same shape and type, and equal up to `most` of the other's largest, or of 1 where that is smaller."""
    error = (one.float() - other.float()).abs().max().item() if one.shape == other.shape else math.inf
    return one.dtype == other.dtype and error <= most * max(1, other.float().abs().max().item())


@functools.cache
def autoencoder(name: str, seed: int = 0) -> AutoencoderDC:
    torch.manual_seed(seed)
    model = AutoencoderDC(**{**F32, **CASES[name].config})
    return as_if_trained(model)


@functools.cache
def steady_autoencoder(name: str, height: int, width: int) -> AutoencoderDC:
    """The first of a case's random networks whose whole decode of `latent_of` this size is itself near the truth.

    Some divide by what is almost zero in an attention, and so amplify rounding: the whole decode of one latent is then
    several times as far from fp64 as that of the same latent with its last bits changed, by chance alone. Whether a
    network is such a one is decided by the whole decode of several such latents; rows have no say in it.
    """
    for seed in range(200):
        model = autoencoder(name, seed)
        if _whole_error(model, latent_of(model, height, width)) <= EXACT / 4:
            return model
    raise AssertionError(f"every random network of {name} amplifies rounding")


def _whole_error(model: AutoencoderDC, latent: Tensor) -> float:
    """How far the whole decode in fp32 is from fp64, or from those of two latents that differ by their last bits."""
    latents = [latent]
    for number in range(2):
        up = torch.rand(latent.shape, generator=torch.Generator().manual_seed(number)) < 0.5
        latents.append(torch.nextafter(latents[-1], torch.where(up, torch.inf, -torch.inf)))
    decoded, *others = model.decoder(torch.cat(latents)).split(len(latent))
    spread = max((other - decoded).abs().max().item() for other in others)
    if spread > EXACT / 4:  # fp64 is slow, and so is asked for one latent alone
        return math.inf
    error = (decoded - copy.deepcopy(model.decoder).double()(latent.double())).abs().max().item()
    return max(spread, error)


def as_if_trained(module: nn.Module) -> Any:
    """Norms, biases and statistics as a training might leave them rather than as they start."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def latent_of(model: AutoencoderDC, height: int, width: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.latent_channels, height, width, generator=generator)


def through(op: RowOp, row_blocks: list[Tensor]) -> list[Tensor]:
    ready = [op.push(row_block, last=row_block is row_blocks[-1]) for row_block in row_blocks]
    return [row_block for row_block in ready if row_block is not None]


def streamed(decoder: Any, latent: Tensor, strip_rows: int | None = None, **options: Any) -> Tensor:
    return torch.cat(list(decode_rows(decoder, latent, strip_rows, **options)), dim=2)


def decode(model: AutoencoderDC, latent: Tensor, strip_rows: int | None = None, **options: Any) -> Tensor:
    return streamed(model.decoder, latent, strip_rows, **options)


@functools.cache
def in_dtype(name: str, dtype: torch.dtype) -> Any:
    return copy.deepcopy(autoencoder(name).decoder).to(dtype)
