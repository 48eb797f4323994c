"""What follows a convolution: its bias and its activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from handscroll.banded.triton.launch import WARP_ELEMENTS, Kernel, relu, rounded, silu
from handscroll.banded.triton.operands import check_vectors, pixel_strides, power_of_2

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by launch.py when Triton is first used: kernels find it among their own module's names


@Kernel
def bias_activation_kernel(
    out: tl.tensor,
    bias: tl.tensor,
    pixels: tl.tensor,
    out_batch: tl.tensor,
    out_pixel: tl.tensor,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    first = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    pixel = tl.arange(0, PIXELS)[:, None]
    mask = (first + pixel < pixels) & (column < CHANNELS)
    out += tl.program_id(1).to(tl.int64) * out_batch + first * out_pixel
    values = tl.load(out + pixel * out_pixel + column, mask=mask, other=0).to(tl.float32)
    if bias is not None:
        values = rounded(values + tl.load(bias + column, mask=column < CHANNELS, other=0).to(tl.float32), out)
    if ACTIVATION == "silu":
        values = silu(values)
    elif ACTIVATION == "relu":
        values = relu(values)
    tl.store(out + pixel * out_pixel + column, values.to(out.dtype.element_ty), mask=mask)


def bias_activation_(out: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """`activation(out + bias)`, in place, rounded after the sum and after the activation.

    out: [B, rows, W, C], or some of the rows or channels of such. bias: [C]. activation: "silu", "relu" or None.
    """
    check_vectors(out.shape[-1], bias)
    assert activation in (None, "silu", "relu"), activation
    batch, rows, width, channels = out.shape
    block = min(256, power_of_2(channels))  # 16 bytes of half precision for each thread of a warp
    pixels = WARP_ELEMENTS // block
    bias_activation_kernel.launch(
        (-(-rows * width // pixels) * -(-channels // block), batch),
        out,
        bias,
        rows * width,
        *pixel_strides(out),
        ACTIVATION=activation or "none",
        CHANNELS=channels,
        PIXELS=pixels,
        BLOCK=block,
        num_warps=1,
    )
    return out
