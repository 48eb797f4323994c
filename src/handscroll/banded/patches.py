"""Patch convolution, for comparison: every single convolution is split into patches of rows (arXiv 2402.19481).

Whole activations exist at every layer; only what a convolution needs beside its input and output shrinks. The result
is that of the whole decode: each patch is convolved together with the few rows above and below that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def decode_by_patches(decoder: nn.Module, latent: Tensor, patches: int = 32) -> Tensor:
    """The decoder of an `AutoencoderDC`, its convolutions made in `patches` row blocks: [B, C, h, w] -> [B, 3, H, W].

    While it runs, the decoder's convolutions are replaced; no other thread may run the same module meanwhile.
    """
    with convolutions_by_patches(decoder, patches):
        return decoder(latent)


@contextmanager
def convolutions_by_patches(module: nn.Module, patches: int) -> Iterator[None]:
    """Within it, every Conv2d of `module` whose kernel is larger than one pixel works patch by patch."""
    if patches < 1:
        raise ValueError(f"a convolution cannot be split into {patches} patches")
    replaced: list[tuple[nn.Conv2d, Callable[[Tensor], Tensor] | None]] = []
    try:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 and layer.padding_mode == "zeros":
                # What hangs on the instance, if anything does: its class's own forward is found again by itself.
                replaced.append((layer, layer.__dict__.get("forward")))
                layer.forward = _forward_by_patches(layer, patches)  # type: ignore[method-assign,assignment]
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign,assignment]


def _forward_by_patches(layer: nn.Conv2d, patches: int) -> Callable[[Tensor], Tensor]:
    return lambda image: conv2d_by_patches(layer, image, patches)


def conv2d_by_patches(layer: nn.Conv2d, image: Tensor, patches: int) -> Tensor:
    """The convolution of `image` [B, C, H, W], made in at most `patches` row blocks of its output."""
    height = image.shape[2]
    stride, dilation = layer.stride[0], layer.dilation[0]
    pad_rows, pad_columns = _padding(layer)
    reach = dilation * (layer.kernel_size[0] - 1) + 1  # input rows that one output row sees
    out_height = (height + 2 * pad_rows - reach) // stride + 1
    band_rows = max(1, -(-out_height // patches))

    out: Tensor | None = None
    for top in range(0, out_height, band_rows):
        rows = min(band_rows, out_height - top)
        first = top * stride - pad_rows
        end = first + (rows - 1) * stride + reach
        above, below = min(max(0, -first), end - first), min(max(0, end - height), end - first)
        window = image[:, :, first + above : end - below]
        if above or below:
            window = F.pad(window, (0, 0, above, below))
        row_block = F.conv2d(
            window, layer.weight, layer.bias, layer.stride, (0, pad_columns), layer.dilation, layer.groups
        )
        if out is None:
            out = row_block.new_empty(*row_block.shape[:2], out_height, row_block.shape[3])
        out[:, :, top : top + rows] = row_block
    assert out is not None
    return out


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer.padding, str):
        raise TypeError(f"a convolution padded {layer.padding!r} is not split")
    rows, columns = layer.padding
    return rows, columns
