"""The few operators that row blocks are made of, each as a plain reference and, where one is faster, a second way.

All take and give row blocks `[B, rows, W, C]`, contiguous. `Conv` holds weights laid out for one sweep; the layout is
thrown away with the sweep, so that the model's own parameters are never changed or doubled for long.

The fast way on CPUs is oneDNN through the operators that PyTorch's own compiler emits for them: weights reordered once
instead of at every call, and the activation applied while the result is still in registers. `plain=True` takes
`torch.nn.functional` instead; a test holds the two together. On CUDA devices what lies between products is made by
Triton kernels (triton.in_use), and convolutions are given few different heights (limits.few_heights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handscroll.banded import kernels, triton
from handscroll.limits import few_heights

Function = Callable[[Tensor], Tensor]

_FUSED_NAMES = {nn.SiLU: "swish", nn.ReLU: "relu"}
_ACTIVATION_NAMES = {type(None): None, nn.SiLU: "silu", nn.ReLU: "relu"}
# Elementwise chains run over pieces of about this size, so that each pass finds the last one's result in cache.
_CACHED_BYTES = 2**20
# Of a 2x2 convolution with fewer, oneDNN sums in an order that depends on how many rows and threads there are.
FEWEST_CHANNELS = 64


def has_onednn(weight: Tensor) -> bool:
    return bool(
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


class Conv:
    """A convolution over the rows it is given: padded with zeros at the left and right, not above or below.

    `weight` is `[C', C/groups, kh, kw]`. Maps `[B, n, W, C]` to `[B, (n - kh)//stride + 1, (W - ...)//stride + 1, C']`,
    followed by `activation` if one is given. `pad_columns` defaults to kw // 2. copies: nothing of the weight and bias
    that were given is used after this; else, where a layout is the model's own, they are not doubled.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        groups: int = 1,
        pad_columns: int | None = None,
        activation: nn.Module | None = None,
        plain: bool = False,
        copies: bool = False,
    ) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.stride, self.groups, self.activation = stride, groups, activation
        self._operator = (weight.shape[1] * groups, weight.shape[0], groups, weight.shape[2])
        self.padding = [0, weight.shape[-1] // 2 if pad_columns is None else pad_columns]
        self.is_pointwise = stride == 1 and tuple(weight.shape[2:]) == (1, 1)
        self.plain, self.onednn = plain, not plain and has_onednn(weight)
        self.is_linear = self.onednn and self.is_pointwise and groups == 1
        self.needs_single_rows = weight.shape[-1] % 2 == 0 and min(weight.shape[:2]) < FEWEST_CHANNELS
        # Laid out here, before the first row block, so that what lives for the whole pass lies together in the heap. No
        # shape is promised: convolutions keep their speed without it, a 1x1 one only as a linear layer.
        if self.is_linear:
            self.weight = laid_out_matrix(self.weight.flatten(1))
        elif self.onednn:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, [stride] * 2, [1, 1], groups, None
            )
        elif copies:
            self.weight = self.weight.clone()
        if copies and self.bias is not None:
            self.bias = self.bias.clone()

    def __call__(self, row_block: Tensor) -> Tensor:
        # [B, n, W, C] -> [B, n', W', C']
        return (never_single(self._made) if self.is_pointwise and self.onednn else self._made)(row_block)

    def _made(self, row_block: Tensor) -> Tensor:
        if row_block.is_cuda and not self.plain:
            return self.of_few_heights(row_block)
        if not self.onednn:
            return row_by_row(self._plain, row_block, self.weight.shape[2], self.stride)
        fused = "none" if self.activation is None else _FUSED_NAMES.get(type(self.activation), "")

        def run(rows: Tensor) -> Tensor:
            return self._onednn(rows, fused or "none")

        if self.needs_single_rows:
            out = row_by_row(run, row_block, self.weight.shape[2], self.stride)
        else:
            out = run(row_block)
        return out if fused or self.activation is None else activated(self.activation)(out)

    def _plain(self, row_block: Tensor) -> Tensor:
        image = row_block.permute(0, 3, 1, 2)
        out = F.conv2d(image, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        out = out.permute(0, 2, 3, 1).contiguous()
        return out if self.activation is None else activated(self.activation)(out)

    def of_few_heights(self, row_block: Tensor) -> Tensor:
        """The same with few different shapes, for which cuDNN has to choose a way each: `few_heights`."""
        bias, activation, shape = self.bias, self.activation, self.weight.shape
        if self.is_pointwise and self.groups == 1:
            out, bias = F.linear(row_block, self.weight.flatten(1), bias), None
        else:
            rows = (row_block.shape[1] - shape[2]) // self.stride + 1
            missing = (few_heights(rows) - rows) * self.stride
            if missing:
                row_block = F.pad(row_block, (0, 0, 0, 0, 0, missing))
            bias_later = triton.in_use(row_block)
            image = row_block.permute(0, 3, 1, 2)
            out = F.conv2d(
                image, self.weight, None if bias_later else bias, self.stride, self.padding, groups=self.groups
            )
            out = out.permute(0, 2, 3, 1)[:, :rows].contiguous()
            bias = bias if bias_later else None
        if type(activation) in _ACTIVATION_NAMES and triton.in_use(out):
            name = _ACTIVATION_NAMES[type(activation)]
            return out if bias is None and name is None else triton.bias_activation_(out, bias, name)
        if bias is not None:
            out += bias
        return out if activation is None else activated(activation)(out)

    def _onednn(self, row_block: Tensor, fused: str) -> Tensor:
        if self.is_linear:
            self._meets(fused, row_block.shape[:-1].numel(), 1, row_block)
            return torch.ops.mkldnn._linear_pointwise(row_block, self.weight, self.bias, fused, [], "")
        out = torch.ops.mkldnn._convolution_pointwise(
            row_block.permute(0, 3, 1, 2),
            self.weight,
            self.bias,
            self.padding,
            [self.stride] * 2,
            [1, 1],
            self.groups,
            fused,
            [],
            "",
        )
        self._meets(fused, out.shape[2], out.shape[0] * out.shape[3], row_block)
        return out.permute(0, 2, 3, 1).contiguous()

    def _meets(self, fused: str, rows: int, columns: int, row_block: Tensor) -> None:
        kernels.MET.add((*self._operator, fused != "none", rows, columns, row_block.element_size()))


def row_by_row(function: Function, row_block: Tensor, size: int = 1, step: int = 1) -> Tensor:
    """A function of windows of `size` rows, `step` apart: [B, (n-1)*step + size, W, C] -> [B, n, W', C'].

    On a CPU each row is made by a call of its own, on the same shape and strides however many come together: where
    libraries choose their code by the shape, or make the last few elements by other code than the rest.
    """
    if row_block.device.type != "cpu":
        return function(row_block)
    ends = range(size, row_block.shape[1] + 1, step)
    made = (function(row_block[:, end - size : end].contiguous()) for end in ends)
    first = next(made)
    if len(ends) == 1:
        return first
    out = first.new_empty(first.shape[0], len(ends), *first.shape[2:])
    out[:, :1] = first
    for index, row in enumerate(made, 1):
        out[:, index : index + 1] = row
    return out


def never_single(function: Function) -> Function:
    """Gives a single position twice: of one, a product is made by other code, which rounds otherwise."""

    def run(row_block: Tensor) -> Tensor:
        if row_block.shape[:-1].numel() > 1:
            return function(row_block)
        return function(torch.cat([row_block, row_block], dim=-2)).narrow(-2, 0, 1)

    return run


def activated(activation: nn.Module) -> Function:
    """The activation of each element, over its input where PyTorch can; on a CPU row by row, unless it is exact.

    Of a stretch of memory, the last few elements are made by other code than the rest.
    """
    if type(activation) is nn.ReLU:
        return nn.ReLU(inplace=True)
    if type(activation) is not nn.SiLU:
        return lambda row_block: row_by_row(activation, row_block)

    def silu_(row_block: Tensor) -> Tensor:
        for row in _each_row(row_block):
            F.silu(row, inplace=True)
        return row_block

    return silu_


def laid_out_matrix(weight: Tensor) -> Tensor:
    """A matrix `[C', C]` reordered for oneDNN, in memory of its own; only where `has_onednn(weight)`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def matrix(weight: Tensor, bias: Tensor | None, *, silu: bool = False, plain: bool = False) -> Function:
    """The product of a matrix `[C', C]`, as it is laid out, with each pixel `[..., C]`; then SiLU if asked for."""
    if not plain and has_onednn(weight):
        fused = _FUSED_NAMES[nn.SiLU] if silu else "none"
        return lambda row_block: torch.ops.mkldnn._linear_pointwise(row_block, weight, bias, fused, [], "")

    @never_single
    def product(row_block: Tensor) -> Tensor:
        out = F.linear(row_block, weight, bias)
        return F.silu(out, inplace=True) if silu else out

    # Of a text, [B, T, C], the axis of rows is that of tokens, of which all come at once.
    return lambda row_block: row_by_row(product, row_block) if row_block.ndim == 4 else product(row_block)


def rms_norm_(row_block: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the channels of every pixel, the sum of squares in fp32 (arXiv 1910.07467).

    `row_block` [..., C] -> `x / sqrt(mean(x^2) + eps) * weight + bias`, in place where the row block is contiguous
    (part of the rows of a batch is not).
    """
    channels = row_block.shape[-1]
    row_block = row_block.contiguous()
    pixels = row_block.view(-1, channels)
    if triton.in_use(row_block):
        triton.rms_norm(pixels[None, None], weight, bias, eps, out=pixels[None, None])
        return row_block
    step = max(1, _CACHED_BYTES // (channels * pixels.element_size())) if pixels.device.type == "cpu" else len(pixels)
    for piece in pixels.split(step):
        scale = torch.linalg.vector_norm(
            piece, dim=-1, keepdim=True, dtype=torch.promote_types(piece.dtype, torch.float32)
        )
        scale = scale.square_().div_(channels).add_(eps).rsqrt_()
        if piece.dtype == scale.dtype:
            piece.mul_(scale)
            if weight is not None:
                piece.mul_(weight)
            if bias is not None:
                piece.add_(bias)
        else:
            normed = piece.float().mul_(scale)
            if weight is not None:
                normed.mul_(weight)
            if bias is not None:
                normed.add_(bias)
            piece.copy_(normed)
    return row_block


def layer_norm_modulate(row_block: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layer_norm(row_block) * scale + shift` of [B, rows, W, C], in memory of its own; shift, scale: [B, 1, 1, C]."""
    if triton.in_use(row_block):
        return triton.layer_norm_modulate(row_block, shift, scale, eps)
    return F.layer_norm(row_block, row_block.shape[-1:], eps=eps).mul_(scale).add_(shift)


def gate_add_(row_block: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """`row_block * gate + residual` of [B, rows, W, C], in place; gate: [B, 1, 1, C].

    In fp16 infinite values become the largest, as in diffusers' attentions.
    """
    limit = 65504.0 if row_block.dtype == torch.float16 else None
    if triton.in_use(row_block):
        return triton.gate_add_(row_block, gate, residual, limit)
    if limit is not None:
        row_block.clamp_(-limit, limit)
    return row_block.mul_(gate).add_(residual)


def gate_(values: Tensor) -> Tensor:
    """The gate of Sana's Mix-FFN: `[..., 2C] -> [..., C]`, first half times SiLU of the second."""
    values, gates = values.chunk(2, dim=-1)
    out = values.new_empty(values.shape)
    for value, gate, target in zip(_each_row(values), _each_row(gates), _each_row(out), strict=True):
        torch.mul(value, F.silu(gate), out=target)
    return out


def _each_row(row_block: Tensor) -> Iterator[Tensor]:
    """`[B, rows, W, C]` as rows `[W, C]` on a CPU, else as it is."""
    if row_block.device.type != "cpu":
        yield row_block
        return
    for image in row_block:
        yield from image


def pixel_unshuffle(row_block: Tensor) -> Tensor:
    """`[B, 2n, 2W, C] -> [B, n, W, 4C]` in the channel order of `torch.nn.functional.pixel_unshuffle`."""
    batch, rows, width, channels = row_block.shape
    blocks = row_block.reshape(batch, rows // 2, 2, width // 2, 2, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(batch, rows // 2, width // 2, channels * 4)


def pixel_shuffle(row_block: Tensor) -> Tensor:
    """`[B, n, W, 4C] -> [B, 2n, 2W, C]` in the channel order of `torch.nn.functional.pixel_shuffle`."""
    batch, rows, width, channels = row_block.shape
    blocks = row_block.reshape(batch, rows, width, channels // 4, 2, 2)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(batch, rows * 2, width * 2, channels // 4)
