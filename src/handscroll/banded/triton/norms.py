"""The networks' norms, each with what comes after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from handscroll.banded.triton.launch import WARP_ELEMENTS, Kernel, inlined, relu, rounded, silu
from handscroll.banded.triton.operands import batch_stride, check_like, check_vectors, pixel_strides, power_of_2

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by launch.py when Triton is first used: kernels find it among their own module's names


def _body_and_tail(channels: int) -> tuple[int, int]:
    """Two blocks that cover the channels, the first of them fully; the second may be empty.

    Blocks are powers of 2, and one block for Sana's 2240 channels would be nearly half empty: 2048 + 256 is not.
    """
    body = 1 << (channels.bit_length() - 1)
    return body, power_of_2(channels - body) if channels > body else 0


def _row_blocks(channels: int) -> dict[str, Any]:
    """How a program holds whole pixels in registers.

    One warp: then sums over channels are exchanged between its threads, without shared memory and barriers. Only of
    rows that no warp can hold is one spread over several.
    """
    body, tail = _body_and_tail(channels)
    return {
        "CHANNELS": channels,
        "BODY": body,
        "TAIL": tail,
        "PIXELS": max(1, WARP_ELEMENTS // power_of_2(body + tail)),
        "num_warps": min(max(1, body // WARP_ELEMENTS), 16),
    }


@inlined
def _finish_rms(
    values: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    residual_offsets: tl.tensor,
    out: tl.tensor,
    out_offsets: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    values = values * scale
    if weight is not None:
        values = values * tl.load(weight + column, mask=column < CHANNELS, other=0).to(tl.float32)
    if bias is not None:
        values = values + tl.load(bias + column, mask=column < CHANNELS, other=0).to(tl.float32)
    if ACTIVATION == "silu":
        values = silu(rounded(values, out))
    if ACTIVATION == "relu":
        values = relu(values)
    if residual is not None:
        values = rounded(values, out) + tl.load(residual + residual_offsets, mask=mask, other=0).to(tl.float32)
    tl.store(out + out_offsets, values.to(out.dtype.element_ty), mask=mask)


@Kernel
def rms_norm_kernel(
    row_block: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    row_block_batch: tl.tensor,
    row_block_pixel: tl.tensor,
    residual_batch: tl.tensor,
    residual_pixel: tl.tensor,
    out_batch: tl.tensor,
    out_pixel: tl.tensor,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    BODY: tl.constexpr,
    TAIL: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * PIXELS
    batch = tl.program_id(1).to(tl.int64)
    row_block += batch * row_block_batch + first * row_block_pixel
    out += batch * out_batch + first * out_pixel
    if residual is not None:
        residual += batch * residual_batch + first * residual_pixel
    pixel = tl.arange(0, PIXELS)[:, None]
    inside = first + pixel < pixels

    column = tl.arange(0, BODY)[None, :]
    body = tl.load(row_block + pixel * row_block_pixel + column, mask=inside, other=0).to(tl.float32)
    squares = tl.sum(body * body, axis=1)
    if TAIL > 0:
        tail_column = BODY + tl.arange(0, TAIL)[None, :]
        of_tail = inside & (tail_column < CHANNELS)
        tail = tl.load(row_block + pixel * row_block_pixel + tail_column, mask=of_tail, other=0).to(tl.float32)
        squares += tl.sum(tail * tail, axis=1)
    scale = tl.rsqrt(squares / CHANNELS + eps)[:, None]

    of_residual = pixel * residual_pixel + column
    of_out = pixel * out_pixel + column
    _finish_rms(body, scale, weight, bias, residual, of_residual, out, of_out, column, inside, ACTIVATION, CHANNELS)
    if TAIL > 0:
        of_residual = pixel * residual_pixel + tail_column
        of_out = pixel * out_pixel + tail_column
        _finish_rms(
            tail, scale, weight, bias, residual, of_residual, out, of_out, tail_column, of_tail, ACTIVATION, CHANNELS
        )


def rms_norm(
    row_block: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`activation(rms_norm(row_block) * weight + bias) + residual`, each pixel normed over its channels (arXiv
    1910.07467).

    row_block, residual and out: [B, rows, W, C] of one dtype, or some of the rows or channels of such. weight, bias:
    [C]. activation: "silu", "relu" or None. out: where to write it, new memory by default; it may be the row block.

    Rounded as `backend.rms_norm_`, then the activation, then `+=` would be.
    """
    out = torch.empty_like(row_block, memory_format=torch.contiguous_format) if out is None else out
    check_like(row_block, residual, out)
    check_vectors(row_block.shape[-1], weight, bias)
    assert activation in (None, "silu", "relu"), activation
    batch, rows, width, channels = row_block.shape
    blocks = _row_blocks(channels)
    rms_norm_kernel.launch(
        (-(-rows * width // blocks["PIXELS"]), batch),
        row_block,
        weight,
        bias,
        residual,
        out,
        rows * width,
        eps,
        *pixel_strides(row_block),
        *((0, 0) if residual is None else pixel_strides(residual)),
        *pixel_strides(out),
        ACTIVATION=activation or "none",
        **blocks,
    )
    return out


@inlined
def _finish_layer(
    values: tl.tensor,
    scale: tl.tensor,
    modulation_scale: tl.tensor,
    modulation_shift: tl.tensor,
    out: tl.tensor,
    out_offsets: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    CHANNELS: tl.constexpr,
) -> None:
    values = rounded(values * scale, out)
    values = values * tl.load(modulation_scale + column, mask=column < CHANNELS, other=0).to(tl.float32)
    values = rounded(values, out)
    values = values + tl.load(modulation_shift + column, mask=column < CHANNELS, other=0).to(tl.float32)
    tl.store(out + out_offsets, values.to(out.dtype.element_ty), mask=mask)


@Kernel
def layer_norm_modulate_kernel(
    row_block: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    row_block_batch: tl.tensor,
    row_block_pixel: tl.tensor,
    shift_batch: tl.tensor,
    scale_batch: tl.tensor,
    out_batch: tl.tensor,
    out_pixel: tl.tensor,
    CHANNELS: tl.constexpr,
    BODY: tl.constexpr,
    TAIL: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * PIXELS
    batch = tl.program_id(1).to(tl.int64)
    row_block += batch * row_block_batch + first * row_block_pixel
    out += batch * out_batch + first * out_pixel
    shift += batch * shift_batch
    scale += batch * scale_batch
    pixel = tl.arange(0, PIXELS)[:, None]
    inside = first + pixel < pixels

    column = tl.arange(0, BODY)[None, :]
    body = tl.load(row_block + pixel * row_block_pixel + column, mask=inside, other=0).to(tl.float32)
    total = tl.sum(body, axis=1)
    if TAIL > 0:
        tail_column = BODY + tl.arange(0, TAIL)[None, :]
        of_tail = inside & (tail_column < CHANNELS)
        tail = tl.load(row_block + pixel * row_block_pixel + tail_column, mask=of_tail, other=0).to(tl.float32)
        total += tl.sum(tail, axis=1)
    mean = (total / CHANNELS)[:, None]

    body = body - mean
    squares = tl.sum(body * body, axis=1)
    if TAIL > 0:
        tail = tl.where(of_tail, tail - mean, 0.0)
        squares += tl.sum(tail * tail, axis=1)
    rescale = tl.rsqrt(squares / CHANNELS + eps)[:, None]

    _finish_layer(body, rescale, scale, shift, out, pixel * out_pixel + column, column, inside, CHANNELS)
    if TAIL > 0:
        of_out = pixel * out_pixel + tail_column
        _finish_layer(tail, rescale, scale, shift, out, of_out, tail_column, of_tail, CHANNELS)


def layer_norm_modulate(
    row_block: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """`layer_norm(row_block) * scale + shift`, each pixel normed over its channels, without weights of the norm's own.

    row_block and out: [B, rows, W, C] of one dtype, or some of the rows or channels of such. shift, scale: [B, 1, 1,
    C]. out: where to write it, new memory by default; it may be the row block. Rounded after the norm, the product and
    the sum.
    """
    out = torch.empty_like(row_block, memory_format=torch.contiguous_format) if out is None else out
    check_like(row_block, out)
    batch, rows, width, channels = row_block.shape
    blocks = _row_blocks(channels)
    layer_norm_modulate_kernel.launch(
        (-(-rows * width // blocks["PIXELS"]), batch),
        row_block,
        shift,
        scale,
        out,
        rows * width,
        eps,
        *pixel_strides(row_block),
        batch_stride(shift, row_block),
        batch_stride(scale, row_block),
        *pixel_strides(out),
        **blocks,
    )
    return out
