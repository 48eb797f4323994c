"""The local layers of an AutoencoderDC as row operators: each output row depends on a few input rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from handscroll.banded import backend, triton
from handscroll.banded.backend import Conv
from handscroll.banded.layers import Pass, check_dense
from handscroll.banded.modules import DCDownBlock2d, DCUpBlock2d, GLUMBConv, ResBlock
from handscroll.banded.rows import Chain, Pointwise, Residual, RowOp


def res_block(block: ResBlock, this: Pass) -> RowOp:
    """`ResBlock`: x + norm(conv(act(conv(x)))). Lags two rows."""
    conv1 = this.conv(block.conv1, block.nonlinearity)
    conv2 = this.conv(block.conv2)
    norm_ = this.norm_(block.norm)
    return Residual(Chain([this.windowed(conv1, 3), this.windowed(conv2, 3), Pointwise(norm_)]))


def glu_mb_conv(block: GLUMBConv, this: Pass) -> RowOp:
    """`GLUMBConv` (Mix-FFN): 1x1 expand, SiLU, 3x3 depthwise, gate, 1x1 project, norm, + x. Lags one row."""
    expand = this.conv(block.conv_inverted, block.nonlinearity)
    project = this.conv(block.conv_point)
    depthwise = block.conv_depth
    check_dense(depthwise)
    if not this.plain and depthwise.kernel_size == (3, 3) and triton.in_use(depthwise.weight):
        gated: list[RowOp] = [this.windowed(_convolved_and_gated(depthwise, this), 3)]
    else:
        gated = [this.windowed(this.conv(depthwise), 3), Pointwise(backend.gate_)]
    ops: list[RowOp] = [Pointwise(expand), *gated, Pointwise(project)]
    if block.norm is not None:
        ops.append(Pointwise(this.norm_(block.norm)))
    return Residual(Chain(ops)) if block.residual_connection else Chain(ops)


def _convolved_and_gated(depthwise: nn.Conv2d, this: Pass) -> Callable[[Tensor], Tensor]:
    """The depthwise convolution and the gate of its output's halves in one pass: [B, n+2, W, 2C] -> [B, n, W, C]."""
    weight, bias = depthwise.weight.detach(), None if depthwise.bias is None else depthwise.bias.detach()
    if this.copies:
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    of_values, of_gates = weight.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)

    def rows(window: Tensor) -> Tensor:
        values, gates = window.chunk(2, dim=-1)
        return triton.depthwise_gate(values, gates, (of_values, of_gates), (biases[0], biases[1]))

    return rows


def _repeat_channels(row_block: Tensor, repeats: int) -> Tensor:
    return row_block if repeats == 1 else row_block.repeat_interleave(repeats, dim=-1)


def _mean_of_groups(row_block: Tensor, group_size: int) -> Tensor:
    def mean(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, group_size)).mean(dim=-1)

    # PyTorch converts all that it is given of half precision to fp32.
    return mean(row_block) if row_block.dtype == torch.float32 else backend.row_by_row(mean, row_block)


def conv_with_repeat(conv: nn.Conv2d, repeats: int, this: Pass) -> RowOp:
    """The decoder's first layer: conv(x) + x with every channel repeated (repeats = 0: no shortcut)."""
    run = this.conv(conv)

    def rows(window: Tensor) -> Tensor:
        out = run(window)
        return out.add_(_repeat_channels(window[:, 1:-1], repeats)) if repeats else out

    return this.windowed(rows, 3)


def conv_with_mean(conv: nn.Conv2d, group_size: int, this: Pass) -> RowOp:
    """The encoder's last layer: conv(x) + the mean of each group of channels (group_size = 0: no shortcut)."""
    run = this.conv(conv)

    def rows(window: Tensor) -> Tensor:
        out = run(window)
        return out.add_(_mean_of_groups(window[:, 1:-1], group_size)) if group_size else out

    return this.windowed(rows, 3)


def up_block(block: DCUpBlock2d, this: Pass) -> RowOp:
    """`DCUpBlock2d`: doubles both sides. Lags one input row."""
    # In half precision the sums of taps are rounded once more, which nothing hides where there is no shortcut.
    folds = block.shortcut or block.conv.weight.dtype == torch.float32
    if block.interpolate and folds and not this.plain:
        return this.windowed(_upsample_by_phases(block), 3)
    run = this.conv(block.conv)

    def rows(window: Tensor) -> Tensor:
        # [B, n+2, W, C] -> [B, 2n, 2W, C']
        inner = window[:, 1:-1]
        if block.interpolate:
            doubled = window.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            out = run(doubled[:, 1:-1])
        else:
            out = backend.pixel_shuffle(run(window))
        return out.add_(backend.pixel_shuffle(_repeat_channels(inner, block.repeats))) if block.shortcut else out

    return this.windowed(rows, 3)


def _upsample_by_phases(block: DCUpBlock2d) -> Callable[[Tensor], Tensor]:
    """Nearest upsampling and its 3x3 convolution as four 2x2 convolutions of the small map, 4/9 of the work.

    Of the three taps along an axis, two fall on the same source pixel: output 2i reads sources i-1, i, i with weights
    w0, w1 + w2; output 2i+1 reads i, i, i+1 with w0 + w1, w2. The zero padding of the large map is that of the small.
    """
    conv = block.conv
    check_dense(conv)
    weight = conv.weight.detach()  # [K, C, 3, 3]
    taps = (((0,), (1, 2)), ((0, 1), (2,)))  # by phase: which of the three fall on either source

    def folded(row_phase: int) -> Tensor:
        """Both column phases of a row phase, [2K, C, 2, 2]."""
        out = weight.new_empty(2, *weight.shape[:2], 2, 2)
        for phase, source_row, source_column in product((0, 1), repeat=3):
            cells = product(taps[row_phase][source_row], taps[phase][source_column])
            total = sum(weight[:, :, row, column].float() for row, column in cells)
            out[phase, :, :, source_row, source_column] = total
        return out.flatten(0, 1)

    # One convolution for each row phase; it makes both column phases at once, as 2K channels.
    convs = []
    for row_phase in (0, 1):
        bias = None if conv.bias is None else conv.bias.detach().repeat(2)
        convs.append(Conv(folded(row_phase), bias, pad_columns=1))

    repeats, channels = block.repeats, conv.out_channels

    def rows(window: Tensor) -> Tensor:
        # [B, n+2, W, C] -> [B, 2n, 2W, K]
        batch, padded_rows, width, _ = window.shape
        inner = window[:, 1:-1]
        out = window.new_empty(batch, padded_rows - 2, 2, width, 2, channels)
        for row_phase, run in enumerate(convs):
            pair = run(window[:, row_phase : padded_rows - 1 + row_phase])  # [B, n, W+1, 2K]
            if triton.in_use(pair):
                source = inner if block.shortcut else None
                doubled = out.view(batch, -1, 2 * width, channels)
                triton.upsample_row_phase(pair, source, repeats, row_phase, doubled)
                continue
            for column_phase in (0, 1):
                phase = pair[:, :, column_phase : column_phase + width, column_phase * channels :][..., :channels]
                target = out[:, :, row_phase, :, column_phase]
                if block.shortcut:
                    torch.add(phase, _shuffled_source(inner, repeats, 2 * row_phase + column_phase), out=target)
                else:
                    target.copy_(phase)
            del pair, phase
        return out.view(batch, -1, 2 * width, channels)

    return rows


def _shuffled_source(row_block: Tensor, repeats: int, phase: int) -> Tensor:
    """What pixel_shuffle of the repeated channels puts at one of the four phases: channel (4c + phase) // repeats."""
    if 4 % repeats == 0:
        return row_block[..., phase // repeats :: 4 // repeats]
    shuffled = torch.arange(phase, row_block.shape[-1] * repeats, 4, device=row_block.device)
    return row_block.index_select(-1, shuffled // repeats)


def down_block(block: DCDownBlock2d, this: Pass) -> RowOp:
    """`DCDownBlock2d`: halves both sides, by a strided convolution or by pixel_unshuffle."""
    run = this.conv(block.conv)
    unshuffles = block.downsample

    def rows(window: Tensor) -> Tensor:
        # Rows 2i-1 ... 2n of the input (2i-1 ... 2n+1 when it unshuffles) -> n rows
        out = run(window)
        if unshuffles:
            out = backend.pixel_unshuffle(out)
        if block.shortcut:
            inner = window[:, 1 : 1 + 2 * out.shape[1]]
            out = out + _mean_of_groups(backend.pixel_unshuffle(inner), block.group_size)
        return out

    return this.windowed(rows, size=4 if unshuffles else 3, step=2, pad=1)
