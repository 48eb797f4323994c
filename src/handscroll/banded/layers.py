"""What both networks make of a module's parameters for one pass over the rows: convolutions, matrices, norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from handscroll.banded import backend
from handscroll.banded.backend import Conv
from handscroll.banded.rows import RowOp, Windowed, Workspace

Function = Callable[[Tensor], Tensor]


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


def check_dense(*layers: Any) -> None:
    for layer in layers:
        if type(layer) not in (nn.Conv2d, nn.Linear):
            raise TypeError(f"rows can only be streamed through plain Conv2d and Linear layers, not {type(layer)}")


def conv_of(layer: nn.Conv2d, this: Pass, activation: Any | None = None) -> Conv:
    check_dense(layer)
    return this.conv(layer.weight, layer.bias, stride=layer.stride[0], groups=layer.groups, activation=activation)


def in_place_norm(norm: Any, this: Pass) -> Callable[[Tensor], Tensor]:
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


class LayerPass:
    """Makes what a layer computes with out of its parameters, for all branches that pass through it.

    With `lay_out`, matrices are reordered for oneDNN when they are first asked for, and stay so for as long as this
    lives. Without, they are used as they are.
    """

    def __init__(self, plain: bool, lay_out: bool = False, workspace: Workspace | None = None) -> None:
        self.plain = plain
        self.workspace = Workspace() if workspace is None else workspace
        self.workspace_of_gates = Workspace()  # where windows of values and of gates are needed at a time
        self.laid_out: dict[tuple[Any, ...], Tensor] | None = {} if lay_out and not plain else None

    def linear(
        self, layer: Any, activation: nn.Module | None = None, channels: tuple[int, int] | None = None
    ) -> Function:
        """A linear layer or 1x1 convolution on the last axis, then SiLU if that is asked for.

        channels: only those from the first up to the second.
        """
        if type(layer) in (nn.Linear, nn.Conv2d):
            if any(size != 1 for size in layer.weight.shape[2:]):
                raise TypeError(f"a convolution of {tuple(layer.weight.shape)} is not a linear layer")
            weight, bias = layer.weight.flatten(1), layer.bias
            if channels is not None:
                chosen = slice(*channels)
                weight, bias = weight[chosen], None if bias is None else bias[chosen]
            return self.dense(weight, bias, activation, key=(layer, channels))
        if channels is not None:
            raise TypeError(f"single channels of {type(layer)} are not known")
        has_image = getattr(layer, "kernel_size", None) is not None

        def run(strip: Tensor) -> Tensor:
            out = layer(strip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous() if has_image else layer(strip)
            return out if activation is None else activation(out)

        return never_single(run)

    def once(self, layer: Any) -> Function:
        """As `linear`, for so few rows that no matrix is worth reordering."""
        return LayerPass(self.plain).linear(layer)

    def dense(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: nn.Module | None = None,
        key: tuple[Any, ...] | None = None,
    ) -> Function:
        """A matrix [C', C] on the last axis; `key` says which it is, where it is to be laid out."""
        if self.plain or not backend.has_onednn(weight):
            if activation is None:
                return never_single(lambda strip: F.linear(strip, weight, bias))
            return never_single(lambda strip: F.silu(F.linear(strip, weight, bias), inplace=True))
        fused = "none" if activation is None else "swish"
        if self.laid_out is not None and key is not None:
            if key not in self.laid_out:
                self.laid_out[key] = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            weight = self.laid_out[key]
        return never_single(lambda strip: torch.ops.mkldnn._linear_pointwise(strip, weight, bias, fused, [], ""))


def never_single(function: Function) -> Function:
    """Gives a single position twice: of one, a product is made by other code, which rounds otherwise."""

    def run(strip: Tensor) -> Tensor:
        if strip.shape[:-1].numel() > 1:
            return function(strip)
        return function(torch.cat([strip, strip], dim=-2)).narrow(-2, 0, 1)

    return run


def row_by_row(strip: Tensor) -> Iterator[Tensor]:
    """`[B, rows, w, ...]` as `[B, 1, w, ...]` on a CPU, where the same call on the same shape gives the same bits."""
    return iter(strip.split(1, dim=1) if strip.device.type == "cpu" else (strip,))
