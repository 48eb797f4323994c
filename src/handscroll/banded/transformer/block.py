"""A layer of the transformer, `SanaTransformerBlock`, in row blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn

from handscroll.banded import backend
from handscroll.banded.backend import Function
from handscroll.banded.layers import LayerPass, row_by_row
from handscroll.banded.modules import Attention, SanaTransformerBlock
from handscroll.banded.rows import Pointwise, Residual, Stage, sweep
from handscroll.banded.sums import LinearAttentionSums
from handscroll.banded.transformer.branch import BranchState
from handscroll.banded.transformer.mix_ffn import MixFFN


def through_block(block: SanaTransformerBlock, state: BranchState, this: LayerPass) -> Iterator[Tensor]:
    """`SanaTransformerBlock` on a branch's map, which is freed on the way: the row blocks of the next map."""
    if not isinstance(block.attn1.processor, SanaLinearAttnProcessor2_0):
        raise TypeError(f"a self-attention by {type(block.attn1.processor)} cannot be run in row blocks")
    if not isinstance(block.attn2.processor, SanaAttnProcessor2_0):
        raise TypeError(f"a cross-attention by {type(block.attn2.processor)} cannot be run in row blocks")
    batch = len(state.modulation)
    table = block.scale_shift_table[None] + state.modulation.reshape(batch, 6, -1)
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table[:, :, None, None].unbind(1)
    normed = _modulated(block.norm1, shift_attn, scale_attn)
    sums = _attention_sums(block.attn1, normed, state.map.row_blocks(state.band_rows, keep=True), this)
    attend = _self_attention(block.attn1, normed, sums, gate_attn, this)
    read = _cross_attention(block.attn2, state, this)
    feed = MixFFN(block.ff, _modulated(block.norm2, shift_ff, scale_ff), gate_ff, this)
    stages = [
        Stage(Pointwise(lambda row_block: read(attend(row_block))), state.band_rows),
        Stage(Residual(feed), state.band_rows),
    ]
    return sweep(state.map.row_blocks(state.band_rows), stages)


def _modulated(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Function:
    """Norm, scale and shift of [B, rows, w, width], in memory of its own."""
    if type(norm) is not nn.LayerNorm:
        raise TypeError(f"a layer with the norm {type(norm)} cannot be run in row blocks")
    scale = 1 + scale
    if norm.elementwise_affine:
        return lambda row_block: norm(row_block).mul_(scale).add_(shift)
    return lambda row_block: backend.layer_norm_modulate(row_block, shift, scale, norm.eps)


def _attention_sums(
    attention: Attention, normed: Function, row_blocks: Iterable[Tensor], this: LayerPass
) -> LinearAttentionSums:
    to_k, to_v = this.linear(attention.to_k), this.linear(attention.to_v)
    norm_k_, heads = this.norm_(attention.norm_k), attention.heads
    sums = LinearAttentionSums()
    for row_block in row_blocks:
        row_block = normed(row_block)
        keys = norm_k_(to_k(row_block)).unflatten(-1, (heads, -1))
        sums.add(keys, to_v(row_block).unflatten(-1, (heads, -1)))
        del keys
    return sums


def _self_attention(
    attention: Attention, normed: Function, sums: LinearAttentionSums, gate: Tensor, this: LayerPass
) -> Function:
    """Once its sums are known: `x + gate * attention(norm(x))` of [B, rows, w, width]."""
    to_q, to_out = this.linear(attention.to_q), this.linear(attention.to_out[0])
    norm_q_, heads = this.norm_(attention.norm_q), attention.heads

    def attend(row_block: Tensor) -> Tensor:
        mixed = norm_q_(to_q(normed(row_block)))
        mixed = sums.apply_(mixed.unflatten(-1, (heads, -1))).flatten(-2)
        return backend.gate_add_(to_out(mixed), gate, row_block)

    return attend


def _cross_attention(attention: Attention, state: BranchState, this: LayerPass) -> Function:
    """`x + attention(x, text)` of [B, rows, w, width]."""
    heads, bias, rescale = attention.heads, state.bias, attention.rescale_output_factor
    keys = this.norm_(attention.norm_k)(this.once(attention.to_k)(state.text))
    values = this.once(attention.to_v)(state.text)
    # A fused attention may give finite answers to keys that are not: let their infinity or NaN through.
    values += keys.abs().amax() * 0

    if state.text.shape[1] == 1 and bias is None:
        # The softmax of a single score is 1: every position reads the same, whatever it asks. So does the branch of an
        # empty negative prompt, a seventh of whose work this saves.
        answer = this.once(attention.to_out[0])(values[:, None])  # [B, 1, 1, width]
        if rescale != 1:
            answer.div_(rescale)
        return lambda row_block: answer + row_block

    to_q, to_out, norm_q_ = this.linear(attention.to_q), this.linear(attention.to_out[0]), this.norm_(attention.norm_q)
    # [B, heads, T, head_dim]
    keys, values = (each.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for each in (keys, values))

    def read(row_block: Tensor) -> Tensor:
        queries = norm_q_(to_q(row_block)).unflatten(-1, (heads, -1))  # [B, rows, w, heads, head_dim]
        for rows in row_by_row(queries):
            asked = rows.flatten(1, 2).transpose(1, 2)
            answer = F.scaled_dot_product_attention(asked, keys, values, bias)
            rows.copy_(answer.transpose(1, 2).view_as(rows))
        out = to_out(queries.flatten(-2))
        if rescale != 1:
            out.div_(rescale)
        return out.add_(row_block)

    return read
