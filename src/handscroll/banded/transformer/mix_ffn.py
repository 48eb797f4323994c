"""The Mix-FFN of a transformer's layer, its hidden channels a slab at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handscroll.banded import triton
from handscroll.banded.backend import Function
from handscroll.banded.layers import LayerPass, row_by_row
from handscroll.banded.modules import GLUMBConv
from handscroll.banded.rows import RowBlock, RowOp, Windowed
from handscroll.limits import CUDA_SLAB_CHANNELS, SLAB_CHANNELS, SLAB_MULTIPLE


class MixFFN(RowOp):
    """`gate * GLUMBConv(norm(x))`: 1x1 expand, SiLU, 3x3 depthwise, gate, 1x1 project. Lags one row.

    Of the hidden channels a slab exists at a time: values and the gates that belong to them. above and below: whether
    the first and the last row that it is given are not its own but those next to them (`Windowed`).
    """

    def __init__(
        self,
        feed_forward: GLUMBConv,
        normed: Function,
        gate: Tensor,
        this: LayerPass,
        *,
        above: bool = False,
        below: bool = False,
    ) -> None:
        expand, depthwise = feed_forward.conv_inverted, feed_forward.conv_depth
        activation = feed_forward.nonlinearity
        if feed_forward.norm is not None or feed_forward.residual_connection or type(activation) is not nn.SiLU:
            raise TypeError(
                "a Mix-FFN with a norm, a shortcut or another activation than SiLU cannot be run in row blocks"
            )
        if type(depthwise) is not nn.Conv2d or depthwise.kernel_size != (3, 3) or depthwise.groups == 1:
            raise TypeError(
                f"a Mix-FFN with {type(depthwise)} for its depthwise convolution cannot be run in row blocks"
            )
        self.normed, self.gate = normed, gate
        self.project = this.linear(feed_forward.conv_point)
        self.hidden = depthwise.out_channels // 2
        sliceable = type(expand) is nn.Conv2d
        in_one = not this.plain and triton.in_use(depthwise.weight)
        self.slabs: list[_Slab] = []
        ops: list[RowOp]
        most = CUDA_SLAB_CHANNELS if depthwise.weight.is_cuda else SLAB_CHANNELS
        for first, end in slabs(self.hidden, most) if sliceable else [(0, self.hidden)]:
            makes, weights, biases = [], [], []
            for start, stop in ((first, end), (self.hidden + first, self.hidden + end)):
                makes.append(this.linear(expand, activation, (start, stop)) if sliceable else None)
                weights.append(depthwise.weight[start:stop])
                biases.append(None if depthwise.bias is None else depthwise.bias[start:stop])
            if in_one:
                workspaces = (this.workspace, this.workspace_of_gates)
                ops = [Windowed(_itself, 3, workspace=each, above=above, below=below) for each in workspaces]
                combine, halo_rows = _convolve_and_gate(weights, biases), 2
            else:
                convs = [this.conv_by(w, b, groups=len(w)) for w, b in zip(weights, biases, strict=True)]
                ops = [this.windowed(convolve, 3, above=above, below=below) for convolve in convs]
                combine, halo_rows = _gate, 0
            self.slabs.append(_Slab(first, end, makes[0], ops[0], makes[1], ops[1], combine, halo_rows))
        self.expand_whole = None if sliceable else this.linear(expand, activation)

    def push(self, row_block: RowBlock, last: bool) -> RowBlock:
        source = None if row_block is None else self.normed(row_block)
        del row_block
        if self.expand_whole is not None and source is not None:
            source = self.expand_whole(source)
        gated: Tensor | None = None
        for slab in self.slabs:
            gates = slab.gates.push(self._made(slab.make_gates, source, self.hidden, slab), last)
            values = slab.values.push(self._made(slab.make_values, source, 0, slab), last)
            if gates is None or values is None:
                continue
            if gated is None:
                rows = values.shape[1] - slab.halo_rows
                gated = values.new_empty(values.shape[0], rows, values.shape[2], self.hidden)
            slab.combine(values, gates, gated[..., slab.first : slab.end])
            del gates, values
        del source
        return None if gated is None else self.project(gated).mul_(self.gate)

    @staticmethod
    def _made(make: Function | None, row_block: RowBlock, offset: int, slab: _Slab) -> RowBlock:
        if row_block is None or make is not None:
            return None if row_block is None or make is None else make(row_block)
        return row_block[..., offset + slab.first : offset + slab.end]


@dataclass(frozen=True)
class _Slab:
    """Hidden channels `first ... end - 1` of the Mix-FFN, and as many gates: how each is made and convolved.

    combine: writes what values and gates are together. It may be given `halo_rows` more than it writes, still to be
    convolved.
    """

    first: int
    end: int
    make_values: Function | None
    values: RowOp
    make_gates: Function | None
    gates: RowOp
    combine: Callable[[Tensor, Tensor, Tensor], None]
    halo_rows: int


def _itself(window: Tensor) -> Tensor:
    """A window as it is, in its workspace: gone when the next slab's is made."""
    return window


def _convolve_and_gate(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The depthwise convolution of values and gates, and the gate, in one pass over windows of both."""

    def combine(values: Tensor, gates: Tensor, out: Tensor) -> None:
        triton.depthwise_gate(values, gates, (weights[0], weights[1]), (biases[0], biases[1]), out)

    return combine


def _gate(values: Tensor, gates: Tensor, out: Tensor) -> None:
    """`values * silu(gates)`, into `out`; a row at a time is still in cache when it is multiplied."""
    for value, gate, target in zip(row_by_row(values), row_by_row(gates), row_by_row(out), strict=True):
        torch.mul(value, F.silu(gate), out=target)


def slabs(hidden: int, most: int) -> list[tuple[int, int]]:
    """Cuts so many channels into slabs of nearly equal size, of `most` channels each."""
    count = -(-hidden // most)
    size = -(-hidden // (count * SLAB_MULTIPLE)) * SLAB_MULTIPLE
    return [(first, min(first + size, hidden)) for first in range(0, hidden, size)]
