"""Each layer of the autoencoder, streamed, against its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d, EfficientViTBlock, ResBlock
from torch import nn

from autoencoder_cases import (
    EXACT,
    as_if_trained,
    through,
)
from handscroll.banded.autoencoder.attention import AttentionSums, apply_attention
from handscroll.banded.autoencoder.blocks import down_block, glu_mb_conv, res_block, up_block
from handscroll.banded.layers import Pass
from handscroll.banded.rows import RowOp, cut


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("interpolate", [True, False])
def test_an_up_block_of_any_ratio(repeats: int, plain: bool, interpolate: bool) -> None:
    torch.manual_seed(0)
    block = DCUpBlock2d(16, 4 * repeats, interpolate=interpolate).requires_grad_(False)
    assert block.repeats == repeats
    map_ = torch.randn(2, 16, 5, 3)
    op = up_block(block, Pass(plain))
    rows = through(op, list(cut(map_.permute(0, 2, 3, 1), 2)))
    torch.testing.assert_close(torch.cat(rows, dim=1).permute(0, 3, 1, 2), block(map_), atol=EXACT, rtol=0)


def efficient_vit(norm_type: str) -> EfficientViTBlock:
    return EfficientViTBlock(64, attention_head_dim=16, norm_type=norm_type, qkv_multiscales=(5,))


# A layer, how it is streamed, and its bound on the error in bf16 over that of the layer's own forward.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Pass], RowOp] | None, float]] = {
    "ResBlock": (lambda: ResBlock(64, 64, "rms_norm", "silu"), res_block, 1.05),
    "ResBlock, batch norm": (lambda: ResBlock(64, 64, "batch_norm", "relu"), res_block, 1.05),
    "Mix-FFN": (lambda: efficient_vit("rms_norm").conv_out, glu_mb_conv, 1.05),
    "attention": (lambda: efficient_vit("rms_norm").attn, None, 1.05),
    "attention, batch norm": (lambda: efficient_vit("batch_norm").attn, None, 1.05),
    # The sums of two taps are rounded to bf16 once more.
    "upsampling": (lambda: DCUpBlock2d(64, 64, interpolate=True), up_block, 1.4),
    "upsampling by shuffling": (lambda: DCUpBlock2d(64, 64), up_block, 1.05),
    "downsampling": (lambda: DCDownBlock2d(64, 64), down_block, 1.05),
    "downsampling by shuffling": (lambda: DCDownBlock2d(64, 64, downsample=True), down_block, 1.05),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_bf16_layer_by_layer(layer: str) -> None:
    make, stream, bound = LAYERS[layer]
    torch.manual_seed(0)
    half = as_if_trained(make()).to(torch.bfloat16)
    reference = copy.deepcopy(half).float()
    map_ = torch.randn(2, 64, 16, 16).to(torch.bfloat16)
    row_blocks = list(cut(map_.permute(0, 2, 3, 1).contiguous(), 4))
    expected = reference(map_.float())
    whole_error = (half(map_).float() - expected).abs().mean()
    for plain in (False, True):
        this = Pass(plain)
        if stream is None:
            sums = AttentionSums(half, this)
            through(sums, row_blocks)
            op = apply_attention(half, sums.sums, this)
        else:
            op = stream(half, this)
        result = torch.cat(through(op, row_blocks), dim=1).permute(0, 3, 1, 2)
        assert result.dtype == torch.bfloat16
        assert (result.float() - expected).abs().mean() <= bound * whole_error
