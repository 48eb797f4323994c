"""AutoencoderDC, decoder and encoder, as sweeps over rows.

Everything in a DC-AE is local but for its ReLU linear attentions, each of which needs two sums over the whole map
before its first output row (EfficientViT, arXiv 2205.14756). So the network is cut at its attentions: the sweep that
produces an attention's input also accumulates that attention's sums, from keys and values alone; the next sweep applies
them, from queries alone. Nothing is computed twice, and between two sweeps only one map exists.

Once its sums are known an attention is local, so a sweep need not start from the map just before it: it may repeat the
sweeps in between from an earlier, smaller map, in one go, and the maps that no sweep starts from never exist.

    sweep 0   latent -> convolutions -> map 0, sums of attention 0
    sweep i   map i-1 -> attention i-1 applied -> Mix-FFN, convolutions, upsampling -> map i, sums of attention i
    sweep n   map n-1 -> attention n-1 applied -> ... -> rows of pixels

The modules are diffusers' own; this file reads their weights and never calls their `forward`, except for an attention
on a map of at most `head_dim` pixels, where diffusers switches to quadratic attention and the map is tiny anyway.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import product
from math import ceil
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from handscroll.banded import backend, triton
from handscroll.banded.backend import Conv, LinearAttentionSums
from handscroll.banded.rows import (
    Chain,
    Join,
    Pointwise,
    Residual,
    RowMap,
    RowOp,
    Stage,
    Strip,
    Tee,
    Whole,
    Windowed,
    Workspace,
    cut,
    sweep,
)

# Without a plan, a strip is as tall as makes its largest activation about this big. On a CPU nothing gets faster
# beyond; on a device every strip costs its launches.
DEFAULT_STRIP_BYTES, DEFAULT_DEVICE_STRIP_BYTES = 16 * 2**20, 256 * 2**20

# Makes the parameters and buffers of these modules real while it is entered; outside they may be on the meta device.
Lend = Callable[[Sequence[nn.Module]], AbstractContextManager[Any]]
# What an attention keeps of the whole map: the sums of each of its scales.
Sums = tuple[LinearAttentionSums, ...]


@dataclass(frozen=True)
class Pass:
    """What the row operators of one pass share."""

    plain: bool = False
    workspace: Workspace = field(default_factory=Workspace)
    copies: bool = False  # whether what is laid out must live on without the module's own parameters

    def windowed(self, function: Callable[[Tensor], Tensor], size: int, step: int = 1, pad: int | None = None) -> RowOp:
        return Windowed(function, size, step, pad, self.workspace)

    def conv(self, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Conv:
        return Conv(weight, bias, plain=self.plain, copies=self.copies, **options)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Conv:
        return self.conv(weight[:, :, None, None], bias)


class Unit(ABC):
    """One step of the network, made of a diffusers module.

    `in_scale` is the size of its input map over the size of the network's input, `factor` what it multiplies that by,
    `channels` the most channels it holds for a pixel of its output (the estimate behind default strip heights).
    """

    module: Any
    in_scale: float
    factor: float = 1.0
    channels: int

    @abstractmethod
    def build(self, this: Pass) -> RowOp:
        """The row operator for one pass; weights are laid out anew, so that they are freed with it."""


@dataclass(frozen=True)
class Local(Unit):
    """A step whose output rows depend on a few input rows."""

    module: Any
    make: Callable[[Pass], RowOp]
    in_scale: float
    channels: int
    factor: float = 1.0

    def build(self, this: Pass) -> RowOp:
        return self.make(this)


@dataclass(frozen=True)
class Attention(Unit):
    """A barrier: linear attention over the whole map."""

    module: Any
    in_scale: float
    channels: int
    factor: float = 1.0

    def is_linear(self, pixels: int) -> bool:
        """diffusers attends quadratically on maps of at most head_dim pixels; `pixels` are the network input's."""
        return round(pixels * self.in_scale**2) > self.module.attention_head_dim

    def build(self, this: Pass) -> RowOp:
        return whole_attention(copy.deepcopy(self.module) if this.copies else self.module)

    def sum(self, this: Pass) -> AttentionSums:
        return AttentionSums(self.module, this)

    def apply(self, sums: Sums, this: Pass) -> RowOp:
        return apply_attention(self.module, sums, this)


# ---------------------------------------------------------------------------------------------------------------------
# Local layers


def _check_dense(*layers: Any) -> None:
    for layer in layers:
        if type(layer) not in (nn.Conv2d, nn.Linear):
            raise TypeError(f"rows can only be streamed through plain Conv2d and Linear layers, not {type(layer)}")


def _conv(layer: nn.Conv2d, this: Pass, activation: Any | None = None) -> Conv:
    _check_dense(layer)
    return this.conv(layer.weight, layer.bias, stride=layer.stride[0], groups=layer.groups, activation=activation)


def _norm_(norm: Any, this: Pass) -> Callable[[Tensor], Tensor]:
    """A norm of [B, rows, W, C] that may write over its input."""
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = (norm.running_var.float() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.float()
        shift = -norm.running_mean.float() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.float()
        return lambda strip: torch.addcmul(shift, strip, scale).to(strip.dtype)
    if not isinstance(norm, RMSNorm):
        raise TypeError(f"rows can only be streamed through RMS and batch norms, not {type(norm)}")
    weight, bias = (value.clone() if this.copies and value is not None else value for value in (norm.weight, norm.bias))
    eps = norm.eps
    return lambda strip: backend.rms_norm_(strip, weight, bias, eps)


def res_block(block: Any, this: Pass) -> RowOp:
    """`ResBlock`: x + norm(conv(act(conv(x)))). Lags two rows."""
    conv1 = _conv(block.conv1, this, block.nonlinearity)
    conv2 = _conv(block.conv2, this)
    norm_ = _norm_(block.norm, this)
    return Residual(Chain([this.windowed(conv1, 3), this.windowed(conv2, 3), Pointwise(norm_)]))


def glu_mb_conv(block: Any, this: Pass) -> RowOp:
    """`GLUMBConv` (Mix-FFN): 1x1 expand, SiLU, 3x3 depthwise, gate, 1x1 project, norm, + x. Lags one row."""
    expand = _conv(block.conv_inverted, this, block.nonlinearity)
    project = _conv(block.conv_point, this)
    depthwise = block.conv_depth
    _check_dense(depthwise)
    if not this.plain and depthwise.kernel_size == (3, 3) and triton.in_use(depthwise.weight):
        gated: list[RowOp] = [this.windowed(_convolved_and_gated(depthwise, this), 3)]
    else:
        gated = [this.windowed(_conv(depthwise, this), 3), Pointwise(backend.gate_)]
    ops: list[RowOp] = [Pointwise(expand), *gated, Pointwise(project)]
    if block.norm is not None:
        ops.append(Pointwise(_norm_(block.norm, this)))
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


def _repeat_channels(strip: Tensor, repeats: int) -> Tensor:
    return strip if repeats == 1 else strip.repeat_interleave(repeats, dim=-1)


def _mean_of_groups(strip: Tensor, group_size: int) -> Tensor:
    return strip.unflatten(-1, (-1, group_size)).mean(dim=-1)


def conv_with_repeat(conv: nn.Conv2d, repeats: int, this: Pass) -> RowOp:
    """The decoder's first layer: conv(x) + x with every channel repeated (repeats = 0: no shortcut)."""
    run = _conv(conv, this)

    def rows(window: Tensor) -> Tensor:
        out = run(window)
        return out.add_(_repeat_channels(window[:, 1:-1], repeats)) if repeats else out

    return this.windowed(rows, 3)


def conv_with_mean(conv: nn.Conv2d, group_size: int, this: Pass) -> RowOp:
    """The encoder's last layer: conv(x) + the mean of each group of channels (group_size = 0: no shortcut)."""
    run = _conv(conv, this)

    def rows(window: Tensor) -> Tensor:
        out = run(window)
        return out.add_(_mean_of_groups(window[:, 1:-1], group_size)) if group_size else out

    return this.windowed(rows, 3)


def up_block(block: Any, this: Pass) -> RowOp:
    """`DCUpBlock2d`: doubles both sides. Lags one input row."""
    # In half precision the sums of taps are rounded once more, which nothing hides where there is no shortcut.
    folds = block.shortcut or block.conv.weight.dtype == torch.float32
    if block.interpolate and folds and not this.plain:
        return this.windowed(_upsample_by_phases(block), 3)
    run = _conv(block.conv, this)

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


def _upsample_by_phases(block: Any) -> Callable[[Tensor], Tensor]:
    """Nearest upsampling and its 3x3 convolution as four 2x2 convolutions of the small map, 4/9 of the work.

    Of the three taps along an axis, two fall on the same source pixel: output 2i reads sources i-1, i, i with weights
    w0, w1 + w2; output 2i+1 reads i, i, i+1 with w0 + w1, w2. The zero padding of the large map is that of the small.
    """
    conv = block.conv
    _check_dense(conv)
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


def _shuffled_source(strip: Tensor, repeats: int, phase: int) -> Tensor:
    """What pixel_shuffle of the repeated channels puts at one of the four phases: channel (4c + phase) // repeats."""
    if 4 % repeats == 0:
        return strip[..., phase // repeats :: 4 // repeats]
    shuffled = torch.arange(phase, strip.shape[-1] * repeats, 4, device=strip.device)
    return strip.index_select(-1, shuffled // repeats)


def down_block(block: Any, this: Pass) -> RowOp:
    """`DCDownBlock2d`: halves both sides, by a strided convolution or by pixel_unshuffle."""
    run = _conv(block.conv, this)
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


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _scales(attention: Any, thirds: Sequence[int], this: Pass) -> tuple[Conv, list[RowOp]]:
    """The channels of diffusers' multi-scale q, k, v that belong to the given thirds (0: q, 1: k, 2: v).

    diffusers concatenates [q|k|v], then takes groups of 3 * head_dim *consecutive* channels over all scales and calls a
    group's thirds q, k and v. So the thirds cut across the three projections; each is made here by its own rows of the
    concatenated weight. Gives the projection, and what makes each scale of it: `[B, rows, W, heads * len(thirds) *
    head_dim]` a scale, a head's thirds side by side. The first scale is the projection itself.
    """
    _check_dense(attention.to_q, attention.to_k, attention.to_v)
    head_dim = attention.attention_head_dim
    weight = _thirds_of_all([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight], thirds, head_dim)
    scales: list[RowOp] = [Pointwise(lambda strip: strip)]
    for scale in attention.to_qkv_multiscale:
        _check_dense(scale.proj_in, scale.proj_out)
        size = scale.proj_in.kernel_size[0]
        depthwise = this.conv(_thirds_of(scale.proj_in.weight.detach(), thirds, head_dim), groups=len(weight))
        mix = this.conv(_thirds_of(scale.proj_out.weight.detach(), thirds, head_dim), groups=len(weight) // head_dim)
        scales.append(Chain([this.windowed(depthwise, size), Pointwise(mix)]))
    return this.linear(weight), scales


def _thirds_of_all(weights: Sequence[Tensor], thirds: Sequence[int], head_dim: int) -> Tensor:
    """`_thirds_of` all weights one below another, which together are never in memory."""
    ends = torch.tensor([0] + [len(weight) for weight in weights], device=weights[0].device).cumsum(0)
    chosen = _thirds_of(torch.arange(int(ends[-1]), device=ends.device), thirds, head_dim)
    out = weights[0].new_empty(len(chosen), *weights[0].shape[1:])
    filled = 0
    for weight, first in zip(weights, ends, strict=False):
        rows = chosen[(chosen >= first) & (chosen < first + len(weight))] - first
        torch.index_select(weight.detach(), 0, rows, out=out[filled : filled + len(rows)])
        filled += len(rows)
    return out


def _thirds_of(weight: Tensor, thirds: Sequence[int], head_dim: int) -> Tensor:
    groups = weight.unflatten(0, (-1, 3, head_dim))
    return groups[:, list(thirds)].flatten(0, 2).contiguous()


class AttentionSums(RowOp):
    """Accumulates `sum_i v_i relu(k_i)^T` and `sum_i relu(k_i)` of one attention over all rows. Yields no rows.

    `sums` lives on without the op, whose line buffers and weights end with the pass.
    """

    def __init__(self, attention: Any, this: Pass) -> None:
        self.head_dim = attention.attention_head_dim
        self.project, self.scales = _scales(attention, (1, 2), this)
        self.sums: Sums = tuple(LinearAttentionSums() for _ in self.scales)

    def push(self, strip: Strip, last: bool) -> Strip:
        held = [None if strip is None else self.project(strip)]
        del strip
        for scale, sums in zip(self.scales, self.sums, strict=True):
            self._add(scale.push(held[0] if scale is not self.scales[-1] else held.pop(), last), sums)
        return None

    def _add(self, of_scale: Strip, sums: LinearAttentionSums) -> None:
        if of_scale is not None:
            heads = of_scale.unflatten(-1, (-1, 2, self.head_dim))
            sums.add(heads[..., 0, :], heads[..., 1, :])


def apply_attention(attention: Any, sums: Sums, this: Pass) -> RowOp:
    """`x + norm(to_out(sums applied to relu(q)))`: once its sums are known, an attention is a local layer."""
    _check_dense(attention.to_out)
    project, scales = _scales(attention, (0,), this)
    to_out = this.linear(attention.to_out.weight, attention.to_out.bias)
    head_dim, eps = attention.attention_head_dim, attention.eps

    def attend_(strip: Tensor) -> Tensor:
        # [B, rows, W, scales * heads * head_dim] of q, written over
        by_scale = strip.unflatten(-1, (len(sums), -1, head_dim))
        for index, of_scale in enumerate(sums):
            of_scale.apply_(by_scale[:, :, :, index], eps)
        return strip

    ops: list[RowOp] = [
        Pointwise(project),
        Join(scales),
        Pointwise(attend_),
        Pointwise(to_out),
        Pointwise(_norm_(attention.norm_out, this)),
    ]
    return Residual(Chain(ops)) if attention.residual_connection else Chain(ops)


def whole_attention(attention: Any) -> RowOp:
    """diffusers' own forward on a map of a few pixels, where it is quadratic."""
    return Whole(lambda map_: attention(map_.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous())


# ---------------------------------------------------------------------------------------------------------------------
# The network as a list of units


def _block_units(block: Any, scale: float) -> Iterator[Unit]:
    if hasattr(block, "attn"):
        inner_channels = 3 * block.attn.to_q.out_features * (1 + len(block.attn.to_qkv_multiscale))
        yield Attention(block.attn, scale, inner_channels)
        feed_forward = block.conv_out
        hidden_channels = feed_forward.conv_inverted.out_channels
        yield Local(feed_forward, lambda this: glu_mb_conv(feed_forward, this), scale, hidden_channels)
    else:
        yield Local(block, lambda this: res_block(block, this), scale, block.conv1.out_channels)


def decoder_units(decoder: Any) -> list[Unit]:
    """The decoder of an `AutoencoderDC` from latent to pixels, in the order it runs."""
    repeats = decoder.in_shortcut_repeats if decoder.in_shortcut else 0
    first, final = decoder.conv_in, decoder.conv_out
    units: list[Unit] = [Local(first, lambda this: conv_with_repeat(first, repeats, this), 1.0, first.out_channels)]
    scale = 1.0

    def up(block: Any) -> Unit:
        return Local(block, lambda this: up_block(block, this), scale, block.conv.out_channels, 2.0)

    for stage in reversed(decoder.up_blocks):
        for block in stage:
            if hasattr(block, "repeats"):
                units.append(up(block))
                scale *= 2
            else:
                units += _block_units(block, scale)
    norm_out, activation_ = decoder.norm_out, backend.in_place(decoder.conv_act)

    def norm_and_activation(this: Pass) -> RowOp:
        norm_ = _norm_(norm_out, this)
        return Pointwise(lambda strip: activation_(norm_(strip)))

    units.append(Local(norm_out, norm_and_activation, scale, norm_out.dim[0]))
    if hasattr(final, "repeats"):
        units.append(up(final))
    else:
        units.append(Local(final, lambda this: this.windowed(_conv(final, this), 3), scale, final.in_channels))
    return units


def encoder_units(encoder: Any) -> list[Unit]:
    """The encoder of an `AutoencoderDC` from pixels to latent, in the order it runs."""
    scale = 1.0
    units: list[Unit] = []
    first, final = encoder.conv_in, encoder.conv_out

    def down(block: Any) -> Unit:
        return Local(block, lambda this: down_block(block, this), scale, 4 * block.conv.in_channels, 0.5)

    if hasattr(first, "group_size"):
        units.append(down(first))
        scale /= 2
    else:
        units.append(Local(first, lambda this: this.windowed(_conv(first, this), 3), scale, first.out_channels))
    for stage in encoder.down_blocks:
        for block in stage:
            if hasattr(block, "group_size"):
                units.append(down(block))
                scale /= 2
            else:
                units += _block_units(block, scale)
    group_size = encoder.out_shortcut_average_group_size if encoder.out_shortcut else 0
    units.append(Local(final, lambda this: conv_with_mean(final, group_size, this), scale, final.in_channels))
    return units


# ---------------------------------------------------------------------------------------------------------------------
# Running it


@dataclass(frozen=True)
class Sweep:
    """One pass over the rows: the attention that it applies first (none in the first sweep), then local units."""

    attention: Attention | None
    local: tuple[Unit, ...]

    @property
    def in_scale(self) -> float:
        return self.attention.in_scale if self.attention is not None else self.local[0].in_scale

    def row_bytes(self, width: int, element_bytes: int) -> int:
        """What the largest activation of the sweep holds for one row of its input; `width` is the network input's."""
        units = [*self.local, self.attention] if self.attention is not None else self.local
        return max(
            round(unit.channels * width * (unit.in_scale * unit.factor) ** 2 / self.in_scale) * element_bytes
            for unit in units
        )

    def map_bytes(self, height: int, width: int, element_bytes: int) -> int:
        """The map that the sweep starts from; nothing for the first, whose input is the caller's."""
        if self.attention is None:
            return 0
        return round(height * width * self.in_scale**2) * self.attention.module.to_out.out_features * element_bytes

    @property
    def weight_bytes(self) -> int:
        """The weights that the sweep uses, which it holds once more in a layout of its own."""
        units = [*self.local, self.attention] if self.attention is not None else self.local
        return sum(p.numel() * p.element_size() for unit in units for p in unit.module.parameters())


def cut_at_barriers(units: Sequence[Unit], height: int, width: int) -> list[Sweep]:
    """The sweeps that a network needs on an input of this size."""
    sweeps: list[tuple[Attention | None, list[Unit]]] = [(None, [])]
    for unit in units:
        if isinstance(unit, Attention) and unit.is_linear(height * width):
            sweeps.append((unit, []))
        else:
            sweeps[-1][1].append(unit)
    return [Sweep(attention, tuple(local)) for attention, local in sweeps]


def strip_heights(sweeps: Sequence[Sweep], given: Tensor, strip_rows: int | None) -> list[int]:
    """Rows of its own input that each sweep takes at a time; the network is `given` [B, C, H, W].

    `strip_rows` is the height in the last sweep, that is in rows of the map at the last barrier; the others get strips
    of the same bytes. None stands for what makes the largest activation about as big as is best on the device.
    """
    if strip_rows is not None and strip_rows < 1:
        raise ValueError(f"strips of {strip_rows} rows end nowhere")
    row_bytes = [sweep.row_bytes(given.shape[-1], len(given) * given.element_size()) for sweep in sweeps]
    default_bytes = DEFAULT_STRIP_BYTES if given.device.type == "cpu" else DEFAULT_DEVICE_STRIP_BYTES
    strip_bytes = default_bytes if strip_rows is None else strip_rows * row_bytes[-1]
    heights = [max(1, strip_bytes // one_row) for one_row in row_bytes]
    return heights if strip_rows is None else [*heights[:-1], strip_rows]


def stream(
    sweeps: Sequence[Sweep],
    strips_of: Callable[[int], Iterable[Tensor]],
    height: int,
    heights: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    new_map: Callable[[int, int], RowMap] | None = None,
    lend: Lend | None = None,
    on_sweep: Callable[[int, int], None] | None = None,
    plain: bool = False,
) -> Generator[Tensor, None, None]:
    """Runs a network sweep by sweep and yields the rows of its output.

    `strips_of(rows)` gives the input as strips `[B, rows, W, C]`; `height` is its height; `heights` are
    the strip heights of the sweeps. The rest is as in `decode_rows`.
    """
    count = len(sweeps)
    starts = range(count) if starts is None else starts
    _check_route(count, heights, starts)
    last_reader = {start: index for index, start in enumerate(starts)}
    lent: Lend = (lambda modules: nullcontext()) if lend is None else lend
    maps: dict[int, RowMap] = {}
    sums: dict[int, Sums] = {}
    try:
        for index, start in enumerate(starts):
            this = Pass(plain, copies=lend is not None)
            # The height is in rows of this sweep's own map, wherever it starts: what it holds depends little on that.
            rows_at_1 = heights[index] / sweeps[index].in_scale
            stages = list(_stages(sweeps, range(start, index + 1), sums, rows_at_1, lent, this))
            source_rows = _rows_at(sweeps[start].in_scale, rows_at_1)
            if start == 0:
                source = strips_of(source_rows)
            else:
                source = maps[start].strips(source_rows, keep=last_reader[start] != index)
            following = sweeps[index + 1].attention if index + 1 < count else None
            if following is None:
                yield from sweep(source, stages)
            else:
                with lent([following.module]):
                    side = following.sum(this)
                stages.append(Stage(Tee(side), sys.maxsize))
                result = None
                if index + 1 in last_reader:
                    map_height = round(height * following.in_scale)
                    result = RowMap(map_height) if new_map is None else new_map(index + 1, map_height)
                    maps[index + 1] = result
                for strip in sweep(source, stages):
                    if result is not None:
                        result.write(strip)
                    del strip
                sums[index + 1] = side.sums
                del side
            # Before the listener, who may trim the heap: with its buffers and weights.
            del stages, this, source
            if start and last_reader[start] == index:
                maps.pop(start).close()
            if on_sweep is not None:
                on_sweep(index + 1, count)
    finally:
        for map_ in maps.values():
            map_.close()


def _stages(
    sweeps: Sequence[Sweep], indices: Iterable[int], sums: dict[int, Sums], rows_at_1: float, lent: Lend, this: Pass
) -> Iterator[Stage]:
    """The ops of consecutive sweeps; each unit's weights are lent while they are laid out, and no longer."""
    for index in indices:
        attention = sweeps[index].attention
        if attention is not None:
            with lent([attention.module]):
                op = attention.apply(sums[index], this)
            yield Stage(op, _rows_at(attention.in_scale, rows_at_1))
        for unit in sweeps[index].local:
            with lent([unit.module]):
                op = unit.build(this)
            yield Stage(op, _rows_at(unit.in_scale * unit.factor, rows_at_1))


def _rows_at(scale: float, rows_at_1: float) -> int:
    """A strip's rows where the map is `scale` times the size of the network's input, at least one."""
    return max(1, ceil(scale * rows_at_1))


def _check_route(count: int, heights: Sequence[int], starts: Sequence[int]) -> None:
    if len(heights) != count or min(heights) < 1:
        raise ValueError(f"heights must be one for each of {count} sweeps and at least 1 row, not {list(heights)}")
    if len(starts) != count:
        raise ValueError(f"starts must be one for each of {count} sweeps, not {list(starts)}")
    for index, start in enumerate(starts):
        if not 0 <= start <= index:
            raise ValueError(f"sweep {index} cannot start from map {start}: only from maps 0 to {index} (0: the input)")


def _check_input(first: Any, image: Tensor, lent: bool) -> None:
    conv = getattr(first, "conv", first)
    _check_dense(conv)
    weight = conv.weight
    device = image.device if lent and weight.is_meta else weight.device
    expected = (weight.shape[1], weight.dtype, device)
    given = (image.shape[1], image.dtype, image.device)
    if given != expected or not image.numel():
        raise ValueError(f"expected channels, type and device {expected}, not {given} of shape {tuple(image.shape)}")


@torch.no_grad()
def decode_rows(
    decoder: Any,
    latent: Tensor,
    strip_rows: int | None = None,
    *,
    heights: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    new_map: Callable[[int, int], RowMap] | None = None,
    lend: Lend | None = None,
    on_sweep: Callable[[int, int], None] | None = None,
    plain: bool = False,
) -> Generator[Tensor, None, None]:
    """The decoder of an `AutoencoderDC`, row by row, from top to bottom.

    decoder: diffusers' `AutoencoderDC.decoder`, in eval mode. latent: `[B, C, h, w]` in the decoder's dtype and on its
    device, not scaled. strip_rows: rows of the map at the last attention to take at a time; None lets the size decide.
    Yields `[B, 3, rows, W]`; together the same values as `decoder(latent)` up to the order of summation. On the CPU
    they are the same to the bit whatever the other arguments:

    heights: in place of strip_rows, for every sweep the rows that it takes of the map at its own attention (of the
    latent in sweep 0); elsewhere it takes as much of the picture, but at least one row.
    starts: for every sweep the number of the sweep whose map it starts from. `starts[i] == i` is the ordinary way; an
    earlier one repeats the sweeps from that one to i, 0 from the latent. A map is stored if a sweep starts from it,
    and freed with the last that does.
    new_map: makes the map that a sweep starts from, out of the sweep's number and the map's height in rows; its default
    is `RowMap`. It is closed at its end, and when the decoding is abandoned.
    lend: a context manager in which the parameters and buffers of the modules that it is given are real; outside they
    may be on the meta device. It is entered while a module's weights are laid out, before the sweep runs.

    Raises ValueError for a latent that does not fit, and for heights or starts that cannot be.
    """
    _check_input(decoder.conv_in, latent, lend is not None)
    height, width = latent.shape[2:]
    sweeps = cut_at_barriers(decoder_units(decoder), height, width)
    if heights is None:
        heights = strip_heights(sweeps, latent, strip_rows)
    map_ = latent.permute(0, 2, 3, 1).contiguous()
    strips = stream(
        sweeps,
        lambda rows: cut(map_, rows),
        height,
        heights,
        starts=starts,
        new_map=new_map,
        lend=lend,
        on_sweep=on_sweep,
        plain=plain,
    )
    with closing(strips):
        for strip in strips:
            yield strip.permute(0, 3, 1, 2)
            del strip


@torch.no_grad()
def encode(
    encoder: Any,
    image: Tensor,
    strip_rows: int | None = None,
    *,
    heights: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    new_map: Callable[[int, int], RowMap] | None = None,
    lend: Lend | None = None,
    on_sweep: Callable[[int, int], None] | None = None,
    plain: bool = False,
) -> Tensor:
    """The encoder of an `AutoencoderDC`, row by row: image `[B, 3, H, W]` -> latent `[B, C, h, w]`, not scaled.

    The other arguments are as in `decode_rows`.
    """
    _check_input(encoder.conv_in, image, lend is not None)
    height, width = image.shape[2:]
    if heights is None:
        heights = strip_heights(cut_at_barriers(encoder_units(encoder), height, width), image, strip_rows)
    map_ = image.permute(0, 2, 3, 1)
    return encode_strips(
        encoder,
        lambda rows: (strip.contiguous() for strip in cut(map_, rows)),
        height,
        width,
        heights,
        starts=starts,
        new_map=new_map,
        lend=lend,
        on_sweep=on_sweep,
        plain=plain,
    )


@torch.no_grad()
def encode_strips(
    encoder: Any,
    strips_of: Callable[[int], Iterable[Tensor]],
    height: int,
    width: int,
    heights: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    new_map: Callable[[int, int], RowMap] | None = None,
    lend: Lend | None = None,
    on_sweep: Callable[[int, int], None] | None = None,
    plain: bool = False,
) -> Tensor:
    """`encode` of an image that need not exist: `strips_of(rows)` gives it from top to bottom, `[B, rows, width, 3]`
    contiguous in the encoder's dtype, as often as a sweep starts from it. Raises ValueError as `encode`.
    """
    units = encoder_units(encoder)
    ratio = round(1 / units[-1].in_scale)
    if height % ratio or width % ratio:
        raise ValueError(f"an image of {width}x{height} cannot be encoded: its sides must be multiples of {ratio}")
    strips = stream(
        cut_at_barriers(units, height, width),
        strips_of,
        height,
        heights,
        starts=starts,
        new_map=new_map,
        lend=lend,
        on_sweep=on_sweep,
        plain=plain,
    )
    return torch.cat(list(strips), dim=1).permute(0, 3, 1, 2).contiguous()
