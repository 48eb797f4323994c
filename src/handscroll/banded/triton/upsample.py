"""Nearest upsampling: from the column phases that convolutions give to the doubled map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from handscroll.banded.triton.launch import WARP_ELEMENTS, Kernel
from handscroll.banded.triton.operands import power_of_2

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by launch.py when Triton is first used: kernels find it among their own module's names


@Kernel
def upsample_row_phase_kernel(
    pair: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    pair_batch: tl.tensor,
    pair_row: tl.tensor,
    pair_pixel: tl.tensor,
    source_batch: tl.tensor,
    source_row: tl.tensor,
    source_pixel: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    out_pixel: tl.tensor,
    REPEATS: tl.constexpr,
    ROW_PHASE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = (tl.program_id(0) // blocks).to(tl.int64) * COLUMNS
    row = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, COLUMNS)[:, None]
    mask = (first + column < width) & (channel < CHANNELS)
    pair += batch * pair_batch + row * pair_row + first * pair_pixel
    out += batch * out_batch + (2 * row + ROW_PHASE) * out_row + 2 * first * out_pixel
    if source is not None:
        source += batch * source_batch + row * source_row + first * source_pixel
    for phase in tl.static_range(0, 2):
        values = tl.load(pair + (column + phase) * pair_pixel + phase * CHANNELS + channel, mask=mask, other=0)
        if source is not None:
            repeated = (4 * channel + 2 * ROW_PHASE + phase) // REPEATS
            shortcut = tl.load(source + column * source_pixel + repeated, mask=mask, other=0)
            values = (values.to(tl.float32) + shortcut.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + (2 * column + phase) * out_pixel + channel, values, mask=mask)


def upsample_row_phase(pair: Tensor, source: Tensor | None, repeats: int, row_phase: int, out: Tensor) -> None:
    """Every other row of a doubled map, from both of its column phases: the first, third... or second, fourth... row.

    pair: [B, n, W+1, 2K]; pixel j of phase p is channels pK ... pK+K-1 of its pixel j+p. source: [B, n, W, 4K/repeats],
    of which pixel_shuffle of the channels, each `repeats` times, is added; or None. out: [B, 2n, 2W, K], of which rows
    2i + row_phase are written.
    """
    batch, rows, width, channels = out.shape
    rows, width = rows // 2, width // 2
    assert out.shape == (batch, 2 * rows, 2 * width, channels), "not a doubled map"
    assert pair.shape == (batch, rows, width + 1, 2 * channels), "not two phases of the result"
    assert source is None or source.shape == (batch, rows, width, 4 * channels // repeats), "not the source"
    assert row_phase in (0, 1), row_phase
    assert pair.stride(-1) == out.stride(-1) == 1, "channels must be contiguous"
    assert source is None or source.stride(-1) == 1, "channels must be contiguous"
    assert pair.dtype == out.dtype, "not the result's type"
    block = min(128, power_of_2(channels))
    columns = min(WARP_ELEMENTS // block, power_of_2(width))
    upsample_row_phase_kernel.launch(
        (-(-channels // block) * -(-width // columns), rows, batch),
        pair,
        source,
        out,
        width,
        *pair.stride()[:3],
        *((0, 0, 0) if source is None else source.stride()[:3]),
        *out.stride()[:3],
        REPEATS=repeats,
        ROW_PHASE=row_phase,
        CHANNELS=channels,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=4,
    )
