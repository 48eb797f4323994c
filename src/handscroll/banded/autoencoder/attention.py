"""The ReLU linear attention of an AutoencoderDC: its sums over the whole map, and what they give each row.

EfficientViT, arXiv 2205.14756. The modules are diffusers' `SanaMultiscaleLinearAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from handscroll.banded.backend import Conv
from handscroll.banded.layers import Pass, check_dense
from handscroll.banded.modules import SanaMultiscaleAttentionProjection, SanaMultiscaleLinearAttention
from handscroll.banded.rows import Chain, Cropped, Join, Pointwise, Residual, RowBlock, RowOp, Whole
from handscroll.banded.sums import LinearAttentionSums

# What an attention keeps of the whole map: the sums of each of its scales.
Sums = tuple[LinearAttentionSums, ...]


def _scales(attention: SanaMultiscaleLinearAttention, thirds: Sequence[int], this: Pass) -> tuple[Conv, list[RowOp]]:
    """The channels of diffusers' multi-scale q, k, v that belong to the given thirds (0: q, 1: k, 2: v).

    diffusers concatenates [q|k|v], then takes groups of 3 * head_dim *consecutive* channels over all scales and calls a
    group's thirds q, k and v. So the thirds cut across the three projections; each is made here by its own rows of the
    concatenated weight. Gives the projection, and what makes each scale of it: `[B, rows, W, heads * len(thirds) *
    head_dim]` a scale, a head's thirds side by side. The first scale is the projection itself.
    """
    check_dense(attention.to_q, attention.to_k, attention.to_v)
    head_dim = attention.attention_head_dim
    weight = _thirds_of_all([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight], thirds, head_dim)
    scales: list[RowOp] = [Pointwise(lambda row_block: row_block)]
    for module in attention.to_qkv_multiscale:
        scale = cast(SanaMultiscaleAttentionProjection, module)
        check_dense(scale.proj_in, scale.proj_out)
        size = scale.proj_in.kernel_size[0]
        depthwise = this.conv_by(_thirds_of(scale.proj_in.weight.detach(), thirds, head_dim), groups=len(weight))
        mix = this.conv_by(_thirds_of(scale.proj_out.weight.detach(), thirds, head_dim), groups=len(weight) // head_dim)
        scales.append(Chain([this.windowed(depthwise, size), Pointwise(mix)]))
    return this.linear_by(weight), scales


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


def reach_of(attention: SanaMultiscaleLinearAttention) -> int:
    """The rows above and below one that its keys, values and queries depend on: those of the largest scale."""
    scales = [cast(SanaMultiscaleAttentionProjection, module) for module in attention.to_qkv_multiscale]
    return max((int(scale.proj_in.kernel_size[0]) // 2 for scale in scales), default=0)


class AttentionSums(RowOp):
    """Accumulates `sum_i v_i relu(k_i)^T` and `sum_i relu(k_i)` of one attention over all rows. Yields no rows.

    given, own: the rows that it is given, and of these the ones that it sums, where other ranks sum the others. `sums`
    lives on without the op, whose line buffers and weights end with the pass.
    """

    def __init__(
        self,
        attention: SanaMultiscaleLinearAttention,
        this: Pass,
        given: range | None = None,
        own: range | None = None,
    ) -> None:
        self.head_dim = attention.attention_head_dim
        self.project, scales = _scales(attention, (1, 2), this)
        first_row = 0
        if given is not None and own is not None:
            first_row = own.start
            scales = [Cropped(scale, own.start - given.start, len(own)) for scale in scales]
        self.scales: list[RowOp] = scales
        self.sums: Sums = tuple(LinearAttentionSums(first_row) for _ in scales)

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        held = [None if row_block is None else self.project(row_block)]
        del row_block
        for scale, sums in zip(self.scales, self.sums, strict=True):
            self._add(scale.push(held[0] if scale is not self.scales[-1] else held.pop(), last), sums)
        return None

    def _add(self, of_scale: RowBlock, sums: LinearAttentionSums) -> None:
        if of_scale is not None:
            heads = of_scale.unflatten(-1, (-1, 2, self.head_dim))
            sums.add(heads[..., 0, :], heads[..., 1, :])


def apply_attention(attention: SanaMultiscaleLinearAttention, sums: Sums, this: Pass) -> RowOp:
    """`x + norm(to_out(sums applied to relu(q)))`: once its sums are known, an attention is a local layer."""
    check_dense(attention.to_out)
    project, scales = _scales(attention, (0,), this)
    to_out = this.linear_by(attention.to_out.weight, attention.to_out.bias)
    head_dim, eps = attention.attention_head_dim, attention.eps

    def attend_(row_block: Tensor) -> Tensor:
        # [B, rows, W, scales * heads * head_dim] of q, written over
        by_scale = row_block.unflatten(-1, (len(sums), -1, head_dim))
        for index, of_scale in enumerate(sums):
            of_scale.apply_(by_scale[:, :, :, index], eps)
        return row_block

    ops: list[RowOp] = [
        Pointwise(project),
        Join(scales),
        Pointwise(attend_),
        Pointwise(to_out),
        Pointwise(this.norm_(attention.norm_out)),
    ]
    return Residual(Chain(ops)) if attention.residual_connection else Chain(ops)


def whole_attention(attention: SanaMultiscaleLinearAttention) -> RowOp:
    """diffusers' own forward on a map of a few pixels, where it is quadratic."""
    return Whole(lambda map_: attention(map_.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous())
