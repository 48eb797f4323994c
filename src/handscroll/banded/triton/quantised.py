"""Positions in 8 bits: each row of a matrix divided by its own scale, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from handscroll.banded.triton.launch import WARP_ELEMENTS, Kernel
from handscroll.banded.triton.operands import power_of_2

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by launch.py when Triton is first used: kernels find it among their own module's names


@Kernel
def quantise_rows_kernel(
    rows: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    of_row: tl.tensor,
    inverse: tl.tensor,
    least: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < CHANNELS
    values = tl.load(rows + row * of_row + column, mask=mask, other=0).to(tl.float32)
    # A maximum drops NaN, which a sum of nothing but zeros and NaN brings back.
    scale = tl.max(tl.abs(values), axis=0) * inverse
    scale = tl.where(scale < least, least, scale) + tl.sum(values * 0, axis=0)
    values = tl.div_rn(values, scale)
    if WHOLE:
        # To the nearest, and of two to the even one: what is added pushes all that is not whole out of the number.
        values = (values + 12582912.0) - 12582912.0
    tl.store(numbers + row * CHANNELS + column, values.to(numbers.dtype.element_ty), mask=mask)
    tl.store(scales + row, scale)


def quantise_rows(rows: Tensor, dtype: torch.dtype, inverse: float, least: float) -> tuple[Tensor, Tensor]:
    """[M, C] of fp32, bf16 or fp16 -> numbers [M, C] in int8 or fp8 and scales [M, 1] fp32, as `quantised.quantised`.

    A scale is the row's largest number times `inverse`, and no less than `least`. rows: channels must be contiguous.
    """
    assert rows.stride(1) == 1, "channels must be contiguous"
    count, channels = rows.shape
    numbers = torch.empty(count, channels, dtype=dtype, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    block = power_of_2(channels)
    quantise_rows_kernel.launch(
        (count,),
        rows,
        numbers,
        scales,
        rows.stride(0),
        inverse,
        least,
        CHANNELS=channels,
        BLOCK=block,
        WHOLE=dtype == torch.int8,
        num_warps=min(16, max(1, block // WARP_ELEMENTS * 2)),
    )
    return numbers, scales
