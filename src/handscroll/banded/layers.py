"""What both networks make of a module's parameters for one pass over the rows: convolutions, matrices, norms.

A `Pass` lays everything out anew, so that nothing of it is left when the pass has ended. A `LayerPass` is that of a
layer of the transformer, through which several branches go one after another: what they share is laid out once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from handscroll.banded import backend, quantised
from handscroll.banded.backend import Conv, Function
from handscroll.banded.rows import RowOp, Windowed, Workspace

Channels = tuple[int, int]  # from the first up to the second


@dataclass(frozen=True)
class Pass:
    """What the row operators of one pass share, and how they are made.

    plain: by `torch.nn.functional` alone. copies: what is made must live on without the module's own parameters.
    """

    plain: bool = False
    workspace: Workspace = field(default_factory=Workspace)
    copies: bool = False

    def windowed(
        self,
        function: Function,
        size: int,
        step: int = 1,
        pad: int | None = None,
        *,
        above: bool = False,
        below: bool = False,
    ) -> RowOp:
        """`function` of windows of rows, as in `Windowed`; windows are joined in the memory that the pass shares."""
        return Windowed(function, size, step, pad, self.workspace, above, below)

    def conv(self, layer: nn.Conv2d, activation: nn.Module | None = None) -> Conv:
        """A convolution `[B, n, W, C] -> [B, n', W', C']` over the rows that it is given, then `activation`.

        Raises TypeError for a layer of another make.
        """
        check_dense(layer)
        stride, groups = layer.stride[0], layer.groups
        return self.conv_by(layer.weight, layer.bias, stride=stride, groups=groups, activation=activation)

    def conv_by(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: nn.Module | None = None,
    ) -> Conv:
        """A convolution by a weight `[C', C / groups, kh, kw]`."""
        return Conv(
            weight, bias, stride=stride, groups=groups, activation=activation, plain=self.plain, copies=self.copies
        )

    def linear_by(self, weight: Tensor, bias: Tensor | None = None) -> Conv:
        """A linear layer on every pixel by a weight `[C', C]`."""
        return self.conv_by(weight[:, :, None, None], bias)

    def norm_(self, norm: object | None) -> Function:
        """A norm of `[..., C]` over the channels, which may write over its input; None is none.

        A batch norm is one in eval mode: a scale and a shift of each channel. Raises TypeError for any but an RMS or a
        batch norm.
        """
        if norm is None:
            return lambda row_block: row_block
        if type(norm) is RMSNorm:
            weight, bias, eps = self._kept(norm.weight), self._kept(norm.bias), norm.eps
            return lambda row_block: backend.rms_norm_(row_block, weight, bias, eps)
        if isinstance(norm, nn.BatchNorm2d):
            return _batch_norm(norm)
        raise TypeError(f"rows can only be streamed through RMS and batch norms, not {type(norm)}")

    def _kept(self, value: Tensor | None) -> Tensor | None:
        return value.clone() if self.copies and value is not None else value


def _batch_norm(norm: nn.BatchNorm2d) -> Function:
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    shift = -norm.running_mean.float() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.float()
    return lambda row_block: torch.addcmul(shift, row_block, scale).to(row_block.dtype)


@dataclass(frozen=True)
class LayerPass(Pass):
    """What the branches of a layer share.

    lay_out: matrices are reordered for oneDNN when they are first asked for, and stay so for as long as this lives.
    Else they are used as they are. workspace_of_gates: where windows of values and of gates are needed at a time.
    """

    lay_out: bool = False
    workspace_of_gates: Workspace = field(default_factory=Workspace)
    quantiser: quantised.Quantiser = field(default_factory=quantised.Quantiser, init=False)
    _laid_out: dict[tuple[nn.Module, Channels | None], Tensor] = field(default_factory=dict, init=False)

    def linear(
        self, layer: nn.Module, activation: nn.Module | None = None, channels: Channels | None = None
    ) -> Function:
        """A linear layer or 1x1 convolution on the last axis, then SiLU if that is asked for.

        channels: of its result only these. Layers of other makes are called as the modules that they are. Raises
        TypeError for a larger convolution, and for single channels of another make.
        """
        if type(layer) is not nn.Linear and type(layer) is not nn.Conv2d:
            if channels is not None:
                raise TypeError(f"single channels of {type(layer)} are not known")
            return backend.never_single(_called(layer, activation))
        if any(size != 1 for size in layer.weight.shape[2:]):
            raise TypeError(f"a convolution of {tuple(layer.weight.shape)} is not a linear layer")
        weight, bias = layer.weight.flatten(1), layer.bias
        if channels is not None:
            chosen = slice(*channels)
            weight, bias = weight[chosen], None if bias is None else bias[chosen]
        if weight.dtype in quantised.DTYPES:
            scale = cast(Tensor, layer.weight_scale)[slice(None) if channels is None else slice(*channels)]
            silu = activation is not None
            return quantised.matrix(weight, scale, bias, silu=silu, plain=self.plain, quantiser=self.quantiser)
        if self.lay_out and not self.plain and backend.has_onednn(weight):
            key = (layer, channels)
            if key not in self._laid_out:
                self._laid_out[key] = backend.laid_out_matrix(weight)
            weight = self._laid_out[key]
        return self.matrix(weight, bias, activation)

    def norm_(self, norm: object | None) -> Function:
        """As that of any pass, but a norm of another make is called as the module that it is."""
        if norm is None or type(norm) is RMSNorm or not callable(norm):
            return super().norm_(norm)
        return norm

    def once(self, layer: nn.Module) -> Function:
        """As `linear`, for so few rows that no matrix is worth reordering."""
        return LayerPass(self.plain).linear(layer)

    def matrix(self, weight: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Function:
        """A matrix `[C', C]` on the last axis, as it is laid out, then SiLU if an activation is given."""
        return backend.never_single(backend.matrix(weight, bias, silu=activation is not None, plain=self.plain))


def check_dense(*layers: nn.Module) -> None:
    """Raises TypeError for a layer whose weights are not all that there is to it: quantised, with LoRA..."""
    for layer in layers:
        if type(layer) not in (nn.Conv2d, nn.Linear):
            raise TypeError(f"rows can only be streamed through plain Conv2d and Linear layers, not {type(layer)}")


def row_by_row(row_block: Tensor) -> Iterator[Tensor]:
    """`[B, rows, w, ...]` as `[B, 1, w, ...]` on a CPU, where the same call on the same shape gives the same bits."""
    return iter(row_block.split(1, dim=1) if row_block.device.type == "cpu" else (row_block,))


def _called(layer: nn.Module, activation: nn.Module | None) -> Function:
    """The module itself on the last axis, whether it takes that or an image."""
    takes_images = getattr(layer, "kernel_size", None) is not None

    def run(row_block: Tensor) -> Tensor:
        if takes_images:
            out = layer(row_block.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        else:
            out = layer(row_block)
        return out if activation is None else activation(out)

    return run
