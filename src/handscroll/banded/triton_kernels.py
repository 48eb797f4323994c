"""Triton kernels for what lies between the matrix products of the two networks, for CUDA devices.

Between two products a strip `[B, rows, W, C]` is read, changed a little and written; on a device only the bytes count.
Each function here makes in one pass what PyTorch makes in two to six, with the same roundings: everything is computed
in fp32, and rounded to the strip's type wherever the operators that it stands for would have written a tensor. Results
differ from theirs by the order of sums and the last bits of exponentials and square roots, before they are rounded.

Triton is imported when a kernel is first used, or `available` asked about a CUDA tensor: this module is imported on
machines without it. With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run on CPUs,
slowly: that is how they are tested where there is no device.

Sizes of blocks are functions of the channels wherever a block decides the order of a sum over channels, so that a
pixel has the same bits in strips of any height. Offsets within a program fit 32 bits; where a program starts is counted
in 64, so that a strip may have more than 2^31 elements.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # Triton's language from the first use on; kernels find it among this module's names

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the first with bf16 in hardware, and the least that Triton supports

# 64 elements for each thread of a warp: in registers without spilling, and half a dozen 16-byte loads in flight.
WARP_ELEMENTS = 2048
# Programs among which a sum over pixels is divided: eight for each multiprocessor of an H100. A constant, so that
# the order of summation is the same on every device.
SUM_PROGRAMS = 1024
# Programs that keep a device busy where more of them would only read more halo rows.
BUSY_PROGRAMS = 2048


def in_use(tensor: Tensor) -> bool:
    """Whether the operators of `backend` and the networks call these kernels for such a tensor.

    Only where HANDSCROLL_TRITON=1 asks for them, until they have been measured on a device.
    """
    return os.environ.get("HANDSCROLL_TRITON") == "1" and available(tensor)


def available(tensor: Tensor) -> bool:
    """Whether the kernels can run on such a tensor: of fp32, bf16 or fp16, on a CUDA device that Triton supports.

    True for tensors on the CPU where Triton's interpreter was asked for.
    """
    if tensor.dtype not in DTYPES:
        return False
    if tensor.device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()
    return tensor.is_cuda and torch.version.hip is None and _is_supported(tensor.device) and _has_triton()


@cache
def _is_supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


@cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Kernels that are compiled when they are first launched

_INLINED: list[Callable[..., Any]] = []
# What may change with every strip: a kernel is not compiled anew because a count is 1 or a multiple of 16.
_COUNTS = {"pixels", "rows", "width", "program_pixels", "program_rows", "parts"}


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    _INLINED.append(function)
    return function


@cache
def _triton() -> Any:
    """Triton, with all that kernels refer to by name in place."""
    triton = import_module("triton")
    names = globals()
    names["tl"] = import_module("triton.language")
    names.update({function.__name__: triton.jit(function) for function in _INLINED})
    return triton


class _Kernel:
    """A function in Triton's language."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @cached_property
    def jitted(self) -> Any:
        code = self.function.__code__
        counts = [name for name in code.co_varnames[: code.co_argcount] if name in _COUNTS]
        return _triton().jit(self.function, do_not_specialize=counts)

    def launch(self, grid: tuple[int, ...], *arguments: Any, num_warps: int, fuses: bool = False, **sizes: Any) -> None:
        """Runs it on the device of the first argument.

        fuses: whether a product may be added to a sum in one instruction, without being rounded in between.
        """
        device = arguments[0].device
        is_elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if is_elsewhere else nullcontext():
            self.jitted[grid](*arguments, **sizes, num_warps=num_warps, enable_fp_fusion=fuses)


def _power_of_2(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _body_and_tail(channels: int) -> tuple[int, int]:
    """Two blocks that cover the channels, the first of them fully; the second may be empty.

    Blocks are powers of 2, and one block for Sana's 2240 channels would be nearly half empty: 2048 + 256 is not.
    """
    body = 1 << (channels.bit_length() - 1)
    return body, _power_of_2(channels - body) if channels > body else 0


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
        "PIXELS": max(1, WARP_ELEMENTS // _power_of_2(body + tail)),
        "num_warps": min(max(1, body // WARP_ELEMENTS), 16),
    }


def _pixel_strides(strip: Tensor) -> tuple[int, int]:
    """Elements from one of the batch to the next, and from one pixel to the next, row after row.

    `[B, rows, W, C]` of which the channels are contiguous and the rows follow each other: a strip, some of its rows, or
    some of its channels.
    """
    _, rows, width, channels = strip.shape
    of_batch, of_row, of_pixel, of_channel = strip.stride()
    assert of_channel == 1 or channels == 1, "channels must be contiguous"
    assert rows == 1 or width == 1 or of_row == width * of_pixel, "rows must follow each other"
    return of_batch, of_pixel if width > 1 else of_row if rows > 1 else channels


def _check_like(strip: Tensor, *others: Tensor | None) -> None:
    for other in others:
        assert other is None or (other.shape, other.dtype) == (strip.shape, strip.dtype), "not the strip's shape"


def _batch_stride(modulation: Tensor, strip: Tensor) -> int:
    """From one of the batch to the next, of [B, 1, 1, C] or, for all of them, [1, 1, 1, C]."""
    assert modulation.shape in ((len(strip), 1, 1, strip.shape[-1]), (1, 1, 1, strip.shape[-1])), (
        "not a value a channel"
    )
    assert modulation.stride(-1) == 1 or modulation.shape[-1] == 1, "channels must be contiguous"
    return modulation.stride(0) if len(modulation) > 1 else 0


def _check_vectors(count: int, *vectors: Tensor | None) -> None:
    for vector in vectors:
        assert vector is None or (vector.is_contiguous() and vector.numel() == count), f"not {count} contiguous values"


@_inlined
def _rounded(values: tl.tensor, like: tl.tensor) -> tl.tensor:
    # As if they had been written to this tensor and read again.
    return values.to(like.dtype.element_ty).to(tl.float32)


@_inlined
def _silu(values: tl.tensor) -> tl.tensor:
    return values / (1 + tl.exp(-values))


@_inlined
def _positive(values: tl.tensor) -> tl.tensor:
    return tl.where(values < 0, 0.0, values)  # a maximum would make a NaN 0


# ---------------------------------------------------------------------------------------------------------------------
# Norms


@_inlined
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
        values = _silu(_rounded(values, out))
    if ACTIVATION == "relu":
        values = _positive(values)
    if residual is not None:
        values = _rounded(values, out) + tl.load(residual + residual_offsets, mask=mask, other=0).to(tl.float32)
    tl.store(out + out_offsets, values.to(out.dtype.element_ty), mask=mask)


@_Kernel
def _rms_norm(
    strip: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    strip_batch: tl.tensor,
    strip_pixel: tl.tensor,
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
    strip += batch * strip_batch + first * strip_pixel
    out += batch * out_batch + first * out_pixel
    if residual is not None:
        residual += batch * residual_batch + first * residual_pixel
    pixel = tl.arange(0, PIXELS)[:, None]
    inside = first + pixel < pixels

    column = tl.arange(0, BODY)[None, :]
    body = tl.load(strip + pixel * strip_pixel + column, mask=inside, other=0).to(tl.float32)
    squares = tl.sum(body * body, axis=1)
    if TAIL > 0:
        tail_column = BODY + tl.arange(0, TAIL)[None, :]
        of_tail = inside & (tail_column < CHANNELS)
        tail = tl.load(strip + pixel * strip_pixel + tail_column, mask=of_tail, other=0).to(tl.float32)
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
    strip: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`activation(rms_norm(strip) * weight + bias) + residual`, each pixel normed over its channels (arXiv 1910.07467).

    strip, residual and out: [B, rows, W, C] of one dtype, or some of the rows or channels of such. weight, bias: [C].
    activation: "silu", "relu" or None. out: where to write it, new memory by default; it may be the strip.

    Rounded as `backend.rms_norm_`, then the activation, then `+=` would be.
    """
    out = torch.empty_like(strip, memory_format=torch.contiguous_format) if out is None else out
    _check_like(strip, residual, out)
    _check_vectors(strip.shape[-1], weight, bias)
    assert activation in (None, "silu", "relu"), activation
    batch, rows, width, channels = strip.shape
    blocks = _row_blocks(channels)
    _rms_norm.launch(
        (-(-rows * width // blocks["PIXELS"]), batch),
        strip,
        weight,
        bias,
        residual,
        out,
        rows * width,
        eps,
        *_pixel_strides(strip),
        *((0, 0) if residual is None else _pixel_strides(residual)),
        *_pixel_strides(out),
        ACTIVATION=activation or "none",
        **blocks,
    )
    return out


@_inlined
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
    values = _rounded(values * scale, out)
    values = values * tl.load(modulation_scale + column, mask=column < CHANNELS, other=0).to(tl.float32)
    values = _rounded(values, out)
    values = values + tl.load(modulation_shift + column, mask=column < CHANNELS, other=0).to(tl.float32)
    tl.store(out + out_offsets, values.to(out.dtype.element_ty), mask=mask)


@_Kernel
def _layer_norm_modulate(
    strip: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    strip_batch: tl.tensor,
    strip_pixel: tl.tensor,
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
    strip += batch * strip_batch + first * strip_pixel
    out += batch * out_batch + first * out_pixel
    shift += batch * shift_batch
    scale += batch * scale_batch
    pixel = tl.arange(0, PIXELS)[:, None]
    inside = first + pixel < pixels

    column = tl.arange(0, BODY)[None, :]
    body = tl.load(strip + pixel * strip_pixel + column, mask=inside, other=0).to(tl.float32)
    total = tl.sum(body, axis=1)
    if TAIL > 0:
        tail_column = BODY + tl.arange(0, TAIL)[None, :]
        of_tail = inside & (tail_column < CHANNELS)
        tail = tl.load(strip + pixel * strip_pixel + tail_column, mask=of_tail, other=0).to(tl.float32)
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


def layer_norm_modulate(strip: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`layer_norm(strip) * scale + shift`, each pixel normed over its channels, without weights of the norm's own.

    strip and out: [B, rows, W, C] of one dtype, or some of the rows or channels of such. shift, scale: [B, 1, 1, C].
    out: where to write it, new memory by default; it may be the strip. Rounded after the norm, the product and the sum.
    """
    out = torch.empty_like(strip, memory_format=torch.contiguous_format) if out is None else out
    _check_like(strip, out)
    batch, rows, width, channels = strip.shape
    blocks = _row_blocks(channels)
    _layer_norm_modulate.launch(
        (-(-rows * width // blocks["PIXELS"]), batch),
        strip,
        shift,
        scale,
        out,
        rows * width,
        eps,
        *_pixel_strides(strip),
        _batch_stride(shift, strip),
        _batch_stride(scale, strip),
        *_pixel_strides(out),
        **blocks,
    )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Gates


@_Kernel
def _gate_add(
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
    values = _rounded(values, out)
    values += tl.load(residual + pixel * residual_pixel + column, mask=mask, other=0).to(tl.float32)
    tl.store(out + pixel * out_pixel + column, values.to(out.dtype.element_ty), mask=mask)


def gate_add_(out: Tensor, gate: Tensor, residual: Tensor, limit: float | None = None) -> Tensor:
    """`clamp(out, -limit, limit) * gate + residual`, in place; without a limit nothing is clamped.

    out and residual: [B, rows, W, C] of one dtype, or some of the rows or channels of such. gate: [B, 1, 1, C]. Rounded
    after the product and the sum.
    """
    _check_like(out, residual)
    batch, rows, width, channels = out.shape
    block = min(256, _power_of_2(channels))  # 16 bytes of half precision for each thread of a warp
    pixels = WARP_ELEMENTS // block
    _gate_add.launch(
        (-(-rows * width // pixels) * -(-channels // block), batch),
        out,
        gate,
        residual,
        rows * width,
        0.0 if limit is None else limit,
        _batch_stride(gate, out),
        *_pixel_strides(out),
        *_pixel_strides(residual),
        LIMITED=limit is not None,
        CHANNELS=channels,
        PIXELS=pixels,
        BLOCK=block,
        num_warps=1,
    )
    return out


@_inlined
def _taps(row: tl.tensor, pixel: tl.tensor, of_left: tl.tensor, of_centre: tl.tensor, of_right: tl.tensor) -> tl.tensor:
    return (
        tl.load(row - pixel, mask=of_left, other=0).to(tl.float32),
        tl.load(row, mask=of_centre, other=0).to(tl.float32),
        tl.load(row + pixel, mask=of_right, other=0).to(tl.float32),
    )


@_inlined
def _weights(weight: tl.tensor, channel: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return (
        tl.load(weight + channel * 9, mask=mask, other=0).to(tl.float32),
        tl.load(weight + channel * 9 + 1, mask=mask, other=0).to(tl.float32),
        tl.load(weight + channel * 9 + 2, mask=mask, other=0).to(tl.float32),
    )


@_inlined
def _plus_row(total: tl.tensor, weights: tl.tensor, taps: tl.tensor) -> tl.tensor:
    of_left, of_centre, of_right = weights
    left, centre, right = taps
    return total + of_left * left + of_centre * centre + of_right * right


@_Kernel
def _depthwise_gate(
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
            gated = _rounded(value, out) * _rounded(_silu(_rounded(gate, out)), out)
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
    _check_vectors(channels * 9, *weights)
    _check_vectors(channels, *biases)
    out = values.new_empty(batch, rows, width, channels) if out is None else out
    assert (out.shape, out.dtype) == ((batch, rows, width, channels), values.dtype), "not the result's shape"
    assert values.stride(-1) == out.stride(-1) == 1, "channels must be contiguous"
    # Four channels of one pixel for each thread: more than their 18 weights each would not leave registers for three
    # programs on a multiprocessor. Two pixels of 64 channels, 128 bytes each, are what a warp reads at once.
    block, columns = min(64, _power_of_2(channels)), min(8, _power_of_2(width))
    tiles = -(-channels // block) * -(-width // columns)
    # Rows at the seams between programs are read twice or three times: no more of them than keep a device busy.
    program_rows = max(min(rows, 8), -(-rows * tiles * batch // BUSY_PROGRAMS))
    _depthwise_gate.launch(
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


# ---------------------------------------------------------------------------------------------------------------------
# Linear attention


def _check_sums(products: Tensor, normaliser: Tensor, shape: tuple[int, int, int, int]) -> None:
    """What is kept of an attention: products [B, heads, d, d'] and normaliser [B, heads, d]."""
    assert products.shape == shape, "not a product for each head"
    assert products.dtype == normaliser.dtype == torch.float32, "sums are kept in fp32"
    _check_vectors(products.numel(), products)
    _check_vectors(shape[0] * shape[1] * shape[2], normaliser)


@_Kernel
def _attention_sums(
    keys: tl.tensor,
    values: tl.tensor,
    partial: tl.tensor,
    pixels: tl.tensor,
    program_pixels: tl.tensor,
    heads: tl.tensor,
    keys_batch: tl.tensor,
    keys_pixel: tl.tensor,
    keys_head: tl.tensor,
    keys_channel: tl.tensor,
    values_batch: tl.tensor,
    values_pixel: tl.tensor,
    values_head: tl.tensor,
    values_channel: tl.tensor,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    # Heads first: programs that run at the same time read what lies side by side.
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * program_pixels
    batch = tl.program_id(2).to(tl.int64)
    last = tl.minimum(first + program_pixels, pixels)
    pixel = tl.arange(0, PIXELS)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    value = tl.arange(0, VALUES)[None, :]
    keys += batch * keys_batch + first.to(tl.int64) * keys_pixel + head * keys_head
    values += batch * values_batch + first.to(tl.int64) * values_pixel + head * values_head

    products = tl.zeros([KEYS, VALUES], dtype=tl.float32)
    sums = tl.zeros([PIXELS, KEYS], dtype=tl.float32)
    for start in range(first, last, PIXELS):
        inside = start + pixel < last
        some_keys = tl.load(keys + pixel * keys_pixel + key * keys_channel, mask=inside & (key < KEY_DIM), other=0)
        some_values = tl.load(
            values + pixel * values_pixel + value * values_channel, mask=inside & (value < VALUE_DIM), other=0
        )
        positive = _positive(some_keys.to(tl.float32))
        sums += positive
        # Products of halves are exact in fp32; "ieee" keeps fp32 itself from being cut to tf32.
        columns = tl.trans(positive.to(some_keys.dtype))
        products = tl.dot(columns, some_values, products, input_precision="ieee")
        keys += PIXELS * keys_pixel
        values += PIXELS * values_pixel

    count: tl.constexpr = KEY_DIM * VALUE_DIM + KEY_DIM
    part = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * heads + head
    partial += part * count
    key = tl.arange(0, KEYS)
    cells = key[:, None] * VALUE_DIM + value
    tl.store(partial + cells, products, mask=(key[:, None] < KEY_DIM) & (value < VALUE_DIM))
    tl.store(partial + KEY_DIM * VALUE_DIM + key, tl.sum(sums, axis=0), mask=key < KEY_DIM)


@_Kernel
def _add_parts(
    partial: tl.tensor,
    products: tl.tensor,
    normaliser: tl.tensor,
    parts: tl.tensor,
    PRODUCTS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Of one head. Several parts at a time, since nothing but waiting for memory happens here.
    head = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < PRODUCTS + KEYS
    is_product = cell < PRODUCTS
    products += head * PRODUCTS
    normaliser += head * KEYS
    of_part = tl.num_programs(0).to(tl.int64) * (PRODUCTS + KEYS)
    part = tl.arange(0, PARTS)[:, None]
    partial += head * (PRODUCTS + KEYS) + part * of_part + cell[None, :]
    total = tl.load(products + cell, mask=is_product, other=0)
    total += tl.load(normaliser + cell - PRODUCTS, mask=inside & (cell >= PRODUCTS), other=0)
    for start in range(0, parts, PARTS):
        total += tl.sum(tl.load(partial, mask=(start + part < parts) & inside[None, :], other=0), axis=0)
        partial += PARTS * of_part
    tl.store(products + cell, total, mask=is_product)
    tl.store(normaliser + cell - PRODUCTS, total, mask=inside & (cell >= PRODUCTS))


def attention_sums(keys: Tensor, values: Tensor, products: Tensor, normaliser: Tensor) -> None:
    """Adds `sum_i relu(k_i) v_i^T` to products and `sum_i relu(k_i)` to normaliser, over all pixels of a strip.

    keys (before their ReLU) and values: [B, rows, W, heads, d] and [B, rows, W, heads, d'] of one dtype and any strides
    (copied if rows do not follow each other). products: [B, heads, d, d'], normaliser: [B, heads, d], contiguous, fp32.

    Parts of the strip are summed beside each other and then added in an order that depends on their number alone,
    without atomics: the same strips give the same bits. (Strips cut otherwise do not.)
    """
    batch, _, _, heads, key_dim = keys.shape
    value_dim = values.shape[-1]
    assert keys.shape[:-1] == values.shape[:-1], "not as many keys as values"
    assert keys.dtype == values.dtype, "keys and values of different types"
    _check_sums(products, normaliser, (batch, heads, key_dim, value_dim))
    keys, values = keys.flatten(1, 2), values.flatten(1, 2)
    pixels = keys.shape[1]
    # Tensor cores take 16 at least. A tile of 8 KiB of keys and one of values is what four warps have in flight.
    key_block, value_block = max(16, _power_of_2(key_dim)), max(16, _power_of_2(value_dim))
    tile = max(16, min(128, 4096 // max(key_block, value_block)))
    tiles = -(-pixels // tile)
    program_tiles = -(-tiles // max(1, SUM_PROGRAMS // (batch * heads)))
    parts = -(-tiles // program_tiles)
    partial = products.new_empty(parts, batch * heads, key_dim * value_dim + key_dim)
    _attention_sums.launch(
        (heads, parts, batch),
        keys,
        values,
        partial,
        pixels,
        program_tiles * tile,
        heads,
        *keys.stride(),
        *values.stride(),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEYS=key_block,
        VALUES=value_block,
        PIXELS=tile,
        num_warps=4,
        fuses=True,
    )
    block = min(128, _power_of_2(partial.shape[-1]))
    _add_parts.launch(
        (batch * heads, -(-partial.shape[-1] // block)),
        partial,
        products,
        normaliser,
        parts,
        PRODUCTS=key_dim * value_dim,
        KEYS=key_dim,
        PARTS=8,
        BLOCK=block,
        num_warps=max(1, block // 32),
    )


@_Kernel
def _attention_apply(
    queries: tl.tensor,
    products: tl.tensor,
    normaliser: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    program_pixels: tl.tensor,
    heads: tl.tensor,
    eps: tl.tensor,
    queries_batch: tl.tensor,
    queries_pixel: tl.tensor,
    queries_head: tl.tensor,
    queries_channel: tl.tensor,
    out_batch: tl.tensor,
    out_pixel: tl.tensor,
    out_head: tl.tensor,
    out_channel: tl.tensor,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * program_pixels
    batch = tl.program_id(2).to(tl.int64)
    last = tl.minimum(first + program_pixels, pixels)
    pixel = tl.arange(0, PIXELS)[:, None]
    key = tl.arange(0, KEYS)
    value = tl.arange(0, VALUES)[None, :]
    queries += batch * queries_batch + first.to(tl.int64) * queries_pixel + head * queries_head
    out += batch * out_batch + first.to(tl.int64) * out_pixel + head * out_head
    products += (batch * heads + head) * (KEY_DIM * VALUE_DIM)
    normaliser += (batch * heads + head) * KEY_DIM

    mixture = tl.load(
        products + key[:, None] * VALUE_DIM + value, mask=(key[:, None] < KEY_DIM) & (value < VALUE_DIM), other=0
    )
    total = tl.load(normaliser + key, mask=key < KEY_DIM, other=0)[None, :]
    key = key[None, :]
    for start in range(first, last, PIXELS):
        inside = start + pixel < last
        asked = tl.load(queries + pixel * queries_pixel + key * queries_channel, mask=inside & (key < KEY_DIM), other=0)
        asked = _positive(asked.to(tl.float32))
        weight = tl.sum(asked * total, axis=1) + eps
        mixed = tl.dot(asked, mixture, input_precision=PRECISION) / weight[:, None]
        tl.store(
            out + pixel * out_pixel + value * out_channel,
            mixed.to(out.dtype.element_ty),
            mask=inside & (value < VALUE_DIM),
        )
        queries += PIXELS * queries_pixel
        out += PIXELS * out_pixel


def attention_apply(
    queries: Tensor, products: Tensor, normaliser: Tensor, eps: float = 1e-15, out: Tensor | None = None
) -> Tensor:
    """`relu(q) @ products / (relu(q) . normaliser + eps)` for every pixel and head, in fp32, rounded once.

    queries (before their ReLU): [B, rows, W, heads, d] of any strides (copied if rows do not follow each other).
    products: [B, heads, d, d'], normaliser: [B, heads, d], contiguous, fp32. Gives [B, rows, W, heads, d'] in the
    queries' dtype, in new memory or in `out`, of any strides as long as its rows follow each other; it may be the
    queries where d' = d.
    """
    batch, rows, width, heads, key_dim = queries.shape
    value_dim = products.shape[-1]
    _check_sums(products, normaliser, (batch, heads, key_dim, value_dim))
    out = queries.new_empty(batch, rows, width, heads, value_dim) if out is None else out
    assert (out.shape, out.dtype) == ((batch, rows, width, heads, value_dim), queries.dtype), "not the result's shape"
    queries, target = queries.flatten(1, 2), out.view(batch, rows * width, heads, value_dim)
    pixels = rows * width
    key_block, value_block = max(16, _power_of_2(key_dim)), max(16, _power_of_2(value_dim))
    # The three products need many registers: tiles of half the size let twice as many programs run beside each other.
    tile = max(16, min(64, 2048 // max(key_block, value_block)))
    # A head's products are read once for eight tiles; fewer where that would leave a device idle.
    program_tiles = min(8, -(-pixels * heads * batch // (tile * BUSY_PROGRAMS)))
    _attention_apply.launch(
        (heads, -(-pixels // (program_tiles * tile)), batch),
        queries,
        products,
        normaliser,
        target,
        pixels,
        program_tiles * tile,
        heads,
        eps,
        *queries.stride(),
        *target.stride(),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEYS=key_block,
        VALUES=value_block,
        PIXELS=tile,
        # Queries in half precision are exact in tf32, and three products of tf32 hold fp32's sums to more bits than
        # the result has. Of queries in fp32 nothing may be lost.
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32x3",
        num_warps=4,
        fuses=True,
    )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Upsampling


@_Kernel
def _upsample_row_phase(
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
    block = min(128, _power_of_2(channels))
    columns = min(WARP_ELEMENTS // block, _power_of_2(width))
    _upsample_row_phase.launch(
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
