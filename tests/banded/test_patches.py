"""Patch convolution gives the whole decode too, and leaves the module as it found it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderDC
from torch import nn

from handscroll.banded.patches import conv2d_by_patches, convolutions_by_patches, decode_by_patches


def tiny_autoencoder() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    ).eval()


@pytest.mark.parametrize("patches", [1, 2, 3, 32, 1000])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 2), (7, 5)])
def test_it_is_the_whole_decode(patches: int, size: tuple[int, int]) -> None:
    model = tiny_autoencoder()
    latent = torch.randn(2, 4, *size)
    result = decode_by_patches(model.decoder, latent, patches)
    assert not result.requires_grad
    assert (result - model.decoder(latent)).abs().max() <= 2e-5


def test_strided_convolutions_too() -> None:
    model = tiny_autoencoder()
    image = torch.randn(1, 3, 18, 14)
    with torch.no_grad():
        whole = model.encoder(image)
        with convolutions_by_patches(model.encoder, 4):
            patched = model.encoder(image)
    assert (patched - whole).abs().max() <= 2e-5


@pytest.mark.parametrize("kernel_size", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_every_kind_of_convolution(kernel_size: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 4, 11, 9)
    for dilation, groups in ((1, 1), (2, 1), (1, 4)):
        layer = nn.Conv2d(4, 8, kernel_size, stride, padding, dilation, groups).requires_grad_(False)
        for patches in (1, 2, 5, 40):
            torch.testing.assert_close(conv2d_by_patches(layer, image, patches), layer(image), atol=1e-5, rtol=0)


def test_the_module_is_restored_even_after_a_failure() -> None:
    decoder = tiny_autoencoder().decoder

    def mine(image: torch.Tensor) -> torch.Tensor:
        return image

    decoder.conv_out.forward = mine
    with pytest.raises(RuntimeError):
        decode_by_patches(decoder, torch.randn(1, 5, 3, 3))
    assert decoder.conv_out.forward is mine
    changed = [name for name, layer in decoder.named_modules() if "forward" in layer.__dict__]
    assert changed == ["conv_out"]


def test_no_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="0 patches"):
        decode_by_patches(tiny_autoencoder().decoder, torch.randn(1, 4, 2, 2), 0)
