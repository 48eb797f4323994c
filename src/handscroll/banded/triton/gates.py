"""The gates after an attention and within a Mix-FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from handscroll.banded.triton.launch import BUSY_PROGRAMS, WARP_ELEMENTS, Kernel, inlined, rounded, silu
from handscroll.banded.triton.operands import batch_stride, check_like, check_vectors, pixel_strides, power_of_2

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by launch.py when Triton is first used: kernels find it among their own module's names


@Kernel
def gate_add_kernel(
    out: tl.tensor,
    gate: tl.tensor,
    residual: tl.tensor,
    pixels: tl.tensor,
    limit: tl.tensor,
    gate_batch: tl.tensor,
    out_batch: tl.tensor,
    out_pixel: tl.tensor,
    residual_batch: tl.tensor,
    residual_pixel: tl.tensor,
    LIMITED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    first = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    pixel = tl.arange(0, PIXELS)[:, None]
    mask = (first + pixel < pixels) & (column < CHANNELS)
    out += batch * out_batch + first * out_pixel
    residual += batch * residual_batch + first * residual_pixel
    values = tl.load(out + pixel * out_pixel + column, mask=mask, other=0).to(tl.float32)
    if LIMITED:
        values = tl.where(values > limit, limit, tl.where(values < -limit, -limit, values))
    values *= tl.load(gate + batch * gate_batch + column, mask=column < CHANNELS, other=0).to(tl.float32)
    values = rounded(values, out)
    values += tl.load(residual + pixel * residual_pixel + column, mask=mask, other=0).to(tl.float32)
    tl.store(out + pixel * out_pixel + column, values.to(out.dtype.element_ty), mask=mask)


def gate_add_(out: Tensor, gate: Tensor, residual: Tensor, limit: float | None = None) -> Tensor:
    """`clamp(out, -limit, limit) * gate + residual`, in place; without a limit nothing is clamped.

    out and residual: [B, rows, W, C] of one dtype, or some of the rows or channels of such. gate: [B, 1, 1, C]. Rounded
    after the product and the sum.
    """
    check_like(out, residual)
    batch, rows, width, channels = out.shape
    block = min(256, power_of_2(channels))  # 16 bytes of half precision for each thread of a warp
    pixels = WARP_ELEMENTS // block
    gate_add_kernel.launch(
        (-(-rows * width // pixels) * -(-channels // block), batch),
        out,
        gate,
        residual,
        rows * width,
        0.0 if limit is None else limit,
        batch_stride(gate, out),
        *pixel_strides(out),
        *pixel_strides(residual),
        LIMITED=limit is not None,
        CHANNELS=channels,
        PIXELS=pixels,
        BLOCK=block,
        num_warps=1,
    )
    return out


@inlined
def _taps(row: tl.tensor, pixel: tl.tensor, of_left: tl.tensor, of_centre: tl.tensor, of_right: tl.tensor) -> tl.tensor:
    return (
        tl.load(row - pixel, mask=of_left, other=0).to(tl.float32),
        tl.load(row, mask=of_centre, other=0).to(tl.float32),
        tl.load(row + pixel, mask=of_right, other=0).to(tl.float32),
    )


@inlined
def _weights(weight: tl.tensor, channel: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return (
        tl.load(weight + channel * 9, mask=mask, other=0).to(tl.float32),
        tl.load(weight + channel * 9 + 1, mask=mask, other=0).to(tl.float32),
        tl.load(weight + channel * 9 + 2, mask=mask, other=0).to(tl.float32),
    )


@inlined
def _plus_row(total: tl.tensor, weights: tl.tensor, taps: tl.tensor) -> tl.tensor:
    of_left, of_centre, of_right = weights
    left, centre, right = taps
    return total + of_left * left + of_centre * centre + of_right * right


@Kernel
def depthwise_gate_kernel(
    values: tl.tensor,
    gates: tl.tensor,
    value_weight: tl.tensor,
    gate_weight: tl.tensor,
    value_bias: tl.tensor,
    gate_bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    program_rows: tl.tensor,
    in_batch: tl.tensor,
    in_row: tl.tensor,
    in_pixel: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    out_pixel: tl.tensor,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # A program goes down its rows. Each is read once, and added to the three rows of results that it belongs to, of
    # which two are not complete yet.
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    first_channel = tl.program_id(0) % blocks * BLOCK
    first_column = tl.program_id(0) // blocks * COLUMNS
    first_row = tl.program_id(1) * program_rows
    batch = tl.program_id(2).to(tl.int64)
    channel = first_channel + tl.arange(0, BLOCK)[None, :]
    of_channel = channel < CHANNELS
    column = tl.arange(0, COLUMNS)[:, None]
    room = width - first_column
    of_left = (first_column + column > 0) & (column <= room) & of_channel
    of_centre = (column < room) & of_channel
    of_right = (column + 1 < room) & of_channel

    start = batch * in_batch + first_row.to(tl.int64) * in_row + first_column.to(tl.int64) * in_pixel
    values += start
    gates += start
    out += batch * out_batch + first_row.to(tl.int64) * out_row + first_column.to(tl.int64) * out_pixel
    of_in = column * in_pixel + channel
    of_out = column * out_pixel + channel

    value_above = _weights(value_weight, channel, of_channel)
    value_level = _weights(value_weight + 3, channel, of_channel)
    value_below = _weights(value_weight + 6, channel, of_channel)
    gate_above = _weights(gate_weight, channel, of_channel)
    gate_level = _weights(gate_weight + 3, channel, of_channel)
    gate_below = _weights(gate_weight + 6, channel, of_channel)
    value_start = tl.zeros([COLUMNS, BLOCK], dtype=tl.float32)
    gate_start = tl.zeros([COLUMNS, BLOCK], dtype=tl.float32)
    if value_bias is not None:
        value_start += tl.load(value_bias + channel, mask=of_channel, other=0).to(tl.float32)
        gate_start += tl.load(gate_bias + channel, mask=of_channel, other=0).to(tl.float32)

    value_begun = value_start  # of the row above the one that is read: its upper and middle taps are in
    value_upper = value_start  # of the row that is read: only its upper taps
    gate_begun = gate_start
    gate_upper = gate_start
    for row in range(tl.minimum(program_rows, rows - first_row) + 2):
        value_taps = _taps(values + of_in, in_pixel, of_left, of_centre, of_right)
        gate_taps = _taps(gates + of_in, in_pixel, of_left, of_centre, of_right)
        value = _plus_row(value_begun, value_below, value_taps)
        gate = _plus_row(gate_begun, gate_below, gate_taps)
        value_begun = _plus_row(value_upper, value_level, value_taps)
        gate_begun = _plus_row(gate_upper, gate_level, gate_taps)
        value_upper = _plus_row(value_start, value_above, value_taps)
        gate_upper = _plus_row(gate_start, gate_above, gate_taps)
        if row >= 2:
            gated = rounded(value, out) * rounded(silu(rounded(gate, out)), out)
            tl.store(out + of_out, gated.to(out.dtype.element_ty), mask=of_centre)
            out += out_row
        values += in_row
        gates += in_row


def depthwise_gate(
    values: Tensor,
    gates: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    out: Tensor | None = None,
) -> Tensor:
    """3x3 depthwise convolutions of values and gates, then values times SiLU of the gates: Sana's Mix-FFN.

    values, gates: [B, n+2, W, C] of the same strides, with the row above and the row below; zeros stand at the left and
    right. weights: [C, 1, 3, 3] of the values and of the gates; biases: [C] of both, or two None. Gives [B, n, W, C],
    written to `out` if that is given. Summed in fp32, from the upper row to the lower, and rounded after the
    convolution, SiLU and the product.
    """
    batch, padded_rows, width, channels = values.shape
    rows = padded_rows - 2
    assert rows > 0, "rows above and below are missing"
    assert (gates.shape, gates.dtype, gates.stride()) == (values.shape, values.dtype, values.stride()), "unlike values"
    assert (biases[0] is None) == (biases[1] is None), "a bias of one half"
    check_vectors(channels * 9, *weights)
    check_vectors(channels, *biases)
    out = values.new_empty(batch, rows, width, channels) if out is None else out
    assert (out.shape, out.dtype) == ((batch, rows, width, channels), values.dtype), "not the result's shape"
    assert values.stride(-1) == out.stride(-1) == 1, "channels must be contiguous"
    # Four channels of one pixel for each thread: more than their 18 weights each would not leave registers for three
    # programs on a multiprocessor. Two pixels of 64 channels, 128 bytes each, are what a warp reads at once.
    block, columns = min(64, power_of_2(channels)), min(8, power_of_2(width))
    tiles = -(-channels // block) * -(-width // columns)
    # Rows at the seams between programs are read twice or three times: no more of them than keep a device busy.
    program_rows = max(min(rows, 8), -(-rows * tiles * batch // BUSY_PROGRAMS))
    depthwise_gate_kernel.launch(
        (tiles, -(-rows // program_rows), batch),
        values,
        gates,
        *weights,
        *biases,
        out,
        rows,
        width,
        program_rows,
        *values.stride()[:3],
        *out.stride()[:3],
        CHANNELS=channels,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=max(1, block * columns // 128),
        fuses=True,
    )
    return out
