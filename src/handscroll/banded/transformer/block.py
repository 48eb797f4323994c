"""A layer of the transformer, `SanaTransformerBlock`, in row blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn

from handscroll.banded import backend
from handscroll.banded.backend import Function
from handscroll.banded.exchange import Exchange, Wait
from handscroll.banded.layers import LayerPass, row_by_row
from handscroll.banded.modules import Attention, SanaTransformerBlock
from handscroll.banded.rows import Pointwise, Residual, Stage, sweep
from handscroll.banded.sums import LinearAttentionSums
from handscroll.banded.transformer.branch import BranchState
from handscroll.banded.transformer.mix_ffn import MixFFN


class BlockPass:
    """`SanaTransformerBlock` on a branch's map: the sums of its attention at first, then the rows of the next map."""

    def __init__(self, block: SanaTransformerBlock, state: BranchState, this: LayerPass) -> None:
        if not isinstance(block.attn1.processor, SanaLinearAttnProcessor2_0):
            raise TypeError(f"a self-attention by {type(block.attn1.processor)} cannot be run in row blocks")
        if not isinstance(block.attn2.processor, SanaAttnProcessor2_0):
            raise TypeError(f"a cross-attention by {type(block.attn2.processor)} cannot be run in row blocks")
        batch = len(state.modulation)
        table = block.scale_shift_table[None] + state.modulation.reshape(batch, 6, -1)
        shift_attn, scale_attn, gate_attn, self.shift, self.scale, self.gate = table[:, :, None, None].unbind(1)
        self.block, self.state, self.this = block, state, this
        normed = _modulated(block.norm1, shift_attn, scale_attn)
        exchange = state.exchange
        row_blocks = state.map.row_blocks(state.band_rows, keep=True)
        self.ends = None if exchange is None else _Ends(row_blocks)
        sums = _attention_sums(block.attn1, normed, self.ends or row_blocks, this, state.first_row)
        self._wait: Wait | None = None
        if exchange is not None:
            heads = block.attn1.heads
            channels = state.text.shape[-1] // heads
            sums.expect(batch, heads, channels, channels, state.text.device)
            self._wait = exchange.merge([sums])
        self._attend = _self_attention(block.attn1, normed, sums, gate_attn, this)

    def row_blocks(self) -> Iterator[Tensor]:
        """The row blocks of the next map; the branch's own is freed on the way."""
        read = _cross_attention(self.block.attn2, self.state, self.this)
        if self._wait is not None:
            self._wait()

        def attended(row_block: Tensor) -> Tensor:
            return read(self._attend(row_block))

        state = self.state
        if state.exchange is None or self.ends is None:
            stages = [Stage(Pointwise(attended), state.band_rows), Stage(Residual(self._feed()), state.band_rows)]
            return sweep(state.map.row_blocks(state.band_rows), stages)
        edges = _Edges(state.exchange, attended(self.ends.rows) if state.rows else None)
        if not state.rows:
            return iter(())
        feed = Residual(self._feed(edges.above, edges.below), skip_rows=int(edges.above))
        inner = without_ends(state.map.row_blocks(state.band_rows), state.rows)
        return sweep(edges.around(attended(row_block) for row_block in inner), [Stage(feed, state.band_rows)])

    def _feed(self, above: bool = False, below: bool = False) -> MixFFN:
        block = self.block
        normed = _modulated(block.norm2, self.shift, self.scale)
        return MixFFN(block.ff, normed, self.gate, self.this, above=above, below=below)


class _Ends:
    """Passes row blocks on, and keeps the first row and the last: `rows` [B, 2, w, width], or [B, 1, ...] of one."""

    def __init__(self, row_blocks: Iterable[Tensor]) -> None:
        self._row_blocks = row_blocks
        self._first: Tensor | None = None
        self._last: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        for row_block in self._row_blocks:
            if self._first is None:
                self._first = row_block[:, :1].clone()
            self._last = row_block[:, -1:].clone()
            count += row_block.shape[1]
            yield row_block
        if count == 1:
            self._last = None

    @property
    def rows(self) -> Tensor:
        assert self._first is not None
        return self._first if self._last is None else torch.cat([self._first, self._last], dim=1)


class _Edges:
    """A band's first and last row, as its feed-forward takes them, and those next to them that other ranks make.

    They are sent as soon as they are there, and waited for when the rows that need them come.
    """

    def __init__(self, exchange: Exchange, rows: Tensor | None) -> None:
        """rows: [B, 2, w, width], the first and the last, or [B, 1, w, width] of a band of one row; None of none."""
        before, after = exchange.bands.neighbours(exchange.ranks.rank)
        near = [(other, end) for end, other in enumerate((before, after)) if other is not None]
        self.above, self.below, self._single = before is not None, after is not None, len(exchange.rows) == 1
        self._own = [] if rows is None else [rows[:, :1].contiguous(), rows[:, -1:].contiguous()]
        self._others = [torch.empty_like(each) for each in self._own]
        self._wait = exchange.ranks.trade(
            [(other, self._own[end]) for other, end in near], [(other, self._others[end]) for other, end in near]
        )

    def around(self, inner: Iterable[Tensor]) -> Iterator[Tensor]:
        """All rows of the band and those next to it, given the row blocks between its first and its last row."""
        row_blocks = iter(inner)
        ready = next(row_blocks, None)  # which needs no other rank: made while rows are on their way
        self._wait()
        yield torch.cat([self._others[0], self._own[0]], dim=1) if self.above else self._own[0]
        while ready is not None:
            yield ready
            ready = next(row_blocks, None)
        end = [] if self._single else [self._own[1]]
        end += [self._others[1]] if self.below else []
        if end:
            yield torch.cat(end, dim=1)


def without_ends(row_blocks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The row blocks of a map of `rows` rows without its first and its last row."""
    row = 0
    for row_block in row_blocks:
        first, end = max(1 - row, 0), min(rows - 1 - row, row_block.shape[1])
        row += row_block.shape[1]
        if first < end:
            yield row_block[:, first:end]


def _modulated(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Function:
    """Norm, scale and shift of [B, rows, w, width], in memory of its own."""
    if type(norm) is not nn.LayerNorm:
        raise TypeError(f"a layer with the norm {type(norm)} cannot be run in row blocks")
    scale = 1 + scale
    if norm.elementwise_affine:
        return lambda row_block: norm(row_block).mul_(scale).add_(shift)
    return lambda row_block: backend.layer_norm_modulate(row_block, shift, scale, norm.eps)


def _attention_sums(
    attention: Attention, normed: Function, row_blocks: Iterable[Tensor], this: LayerPass, first_row: int
) -> LinearAttentionSums:
    to_k, to_v = this.linear(attention.to_k), this.linear(attention.to_v)
    norm_k_, heads = this.norm_(attention.norm_k), attention.heads
    sums = LinearAttentionSums(first_row)
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
