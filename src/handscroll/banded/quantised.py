"""Products of matrices in 8 bits: the weights by output channel, the activations by position.

Of int8 the sums are whole numbers, so that every library gives the same, and a position the same in row blocks of any
height. What comes before and after is single operations on single numbers, each rounded as IEEE 754 says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from handscroll.banded import triton
from handscroll.limits import LARGEST

Function = Callable[[Tensor], Tensor]
# Memory of a type and shape.
Piece = Callable[..., Tensor]

# Positions are multiplied in pieces whose results in 32 bits are about this big.
PIECE_BYTES = 2**23
# On a CUDA device torch's product wants more rows than these.
FEWEST_ROWS = 32
MOST_EXACT = 2**24 // 127**2
_TINY = torch.finfo(torch.float32).tiny
DTYPES = (torch.int8, torch.float8_e4m3fn)
_LARGEST = {torch.int8: LARGEST["int8"], torch.float8_e4m3fn: LARGEST["fp8"]}


def _new(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class Quantiser:
    """Positions in 8 bits, made once for all products with the same row block, one after the other.

    A row block that was given must not be written to until another is. On a CPU it also has the memory that products
    are made in, which would else be new to the process for each of them.
    """

    def __init__(self) -> None:
        self._pieces: dict[torch.dtype, Tensor] = {}
        self._of: weakref.ref[Tensor] | None = None
        self._made: tuple[torch.dtype, Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[..., C] -> numbers [M, C] in int8 or fp8, and what each position's are to be multiplied by, [M, 1] fp32."""
        if self._of is None or self._of() is not positions or self._made is None or self._made[0] != dtype:
            self._made = None
            self._made = dtype, *quantised(positions.reshape(-1, positions.shape[-1]), dtype, self.piece)
            self._of = weakref.ref(positions)
        return self._made[1:]

    def piece(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory that is valid until the same type is asked for again."""
        count = torch.Size(shape).numel()
        memory = self._pieces.get(dtype)
        if memory is None or memory.numel() < count:
            self._pieces.pop(dtype, None)
            memory = self._pieces[dtype] = torch.empty(count, dtype=dtype)
        return memory[:count].view(shape)


def matrix(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    silu: bool = False,
    plain: bool = False,
    quantiser: Quantiser | None = None,
) -> Function:
    """The product with a matrix `[C', C]` in int8 or fp8 times `scale` [C', 1] fp32, then bias, then SiLU if asked for.

    Takes [..., C] in fp32, bf16 or fp16 and gives [..., C'] in the same. plain: by fp64, which is the reference.
    """
    multiply = _in_fp64 if plain else {torch.int8: _int8, torch.float8_e4m3fn: _fp8}[weight.dtype]
    in_8_bits = quantiser or Quantiser()

    def product(positions: Tensor) -> Tensor:
        numbers, scales = in_8_bits(positions, weight.dtype)
        shape = (*positions.shape[:-1], len(weight))
        if positions.is_cuda:
            out = multiply(numbers, weight, scales, scale, bias, positions.dtype)
            return (F.silu(out, inplace=True) if silu else out).view(shape)
        out = positions.new_empty(len(numbers), len(weight))
        step = max(1, PIECE_BYTES // (4 * len(weight)))
        for top in range(0, len(numbers), step):
            here = slice(top, top + step)
            if multiply is _int8:
                sums = whole_sums(numbers[here], weight, in_8_bits.piece)
                _scaled(sums, scales[here], scale, bias, out.dtype, out[here], in_8_bits.piece)
            else:
                out[here] = multiply(numbers[here], weight, scales[here], scale, bias, positions.dtype)
        if silu:
            # Exponentials of the last few elements of a stretch of memory may be made by other code.
            for row in out.view(-1, shape[-2] if positions.ndim > 2 else len(out), shape[-1]):
                F.silu(row, inplace=True)
        return out.view(shape)

    return product


def quantised(positions: Tensor, dtype: torch.dtype, piece: Piece = _new) -> tuple[Tensor, Tensor]:
    """[M, C] -> numbers [M, C] in int8 or fp8, and scales [M, 1] fp32, the largest of each being the type's."""
    largest = _LARGEST[dtype]
    if triton.in_use(positions):
        return triton.quantise_rows(positions, dtype, 1 / largest, _TINY)
    numbers = torch.empty_like(positions, dtype=dtype)
    scales = positions.new_empty(len(positions), 1, dtype=torch.float32)
    step = len(positions) if positions.is_cuda else max(1, PIECE_BYTES // (4 * positions.shape[1]))
    for top in range(0, len(positions), max(1, step)):
        some = positions[top : top + step]
        here = slice(top, top + step)
        # By a product: what divides by a number may do so by its reciprocal on a device and not on another.
        scales[here] = some.abs().amax(dim=1, keepdim=True)
        scales[here].mul_(1 / largest).clamp_(min=_TINY)
        wide = torch.empty_like(some, dtype=torch.float32) if some.is_cuda else piece(torch.float32, *some.shape)
        wide.copy_(some).div_(scales[here])
        numbers[here] = wide.round_() if dtype == torch.int8 else wide
    return numbers, scales


def _int8(
    numbers: Tensor, weight: Tensor, scales: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _scaled(whole_sums(numbers, weight), scales, scale, bias, dtype)


def whole_sums(numbers: Tensor, weight: Tensor, piece: Piece = _new) -> Tensor:
    """int8 [M, C] and [C', C] -> int32 [M, C'], exact. piece: gives the memory of it on a CPU."""
    count = len(numbers)
    if numbers.is_cuda:
        padded = F.pad(numbers, (0, 0, 0, FEWEST_ROWS - count)) if count < FEWEST_ROWS else numbers
        return torch._int_mm(padded, weight.t())[:count]
    if _multiplies_int8():
        return torch._int_mm(numbers, weight.t(), out=piece(torch.int32, count, len(weight)))
    return sums_by_fp32(numbers, weight)


def sums_by_fp32(numbers: Tensor, weight: Tensor) -> Tensor:
    """The same by products in fp32, for processors without instructions for int8.

    Of so few channels at a time that no sum passes 2^24, up to which fp32 holds every whole number: in any order.
    """
    channels = weight.shape[1]
    pieces = -(-channels // MOST_EXACT)
    sums = numbers.new_zeros(len(numbers), len(weight), dtype=torch.int32)
    for some in (slice(each * channels // pieces, (each + 1) * channels // pieces) for each in range(pieces)):
        wide = numbers[:, some].float()
        step = max(1, PIECE_BYTES // (4 * wide.shape[1]))
        for first in range(0, len(weight), step):
            part = torch.mm(wide, weight[first : first + step, some].float().t())
            sums[:, first : first + step] += part.to(torch.int32)
    return sums


@cache
def _multiplies_int8() -> bool:
    """Whether this processor has instructions for it. Without, torch's own product of int8 is 25 times slower."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def _fp8(
    numbers: Tensor, weight: Tensor, scales: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if dtype == torch.bfloat16:  # the only type that torch scales row by row
        return torch._scaled_mm(numbers, weight.t(), scales, scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True)
    one = torch.ones((), device=numbers.device)
    sums = torch._scaled_mm(numbers, weight.t(), one, one, out_dtype=torch.float32)
    return _scaled(sums, scales, scale, bias, dtype)


def _in_fp64(
    numbers: Tensor, weight: Tensor, scales: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The sums of int8 are whole in fp64, up to 2^53."""
    return _scaled(numbers.double() @ weight.t().double(), scales, scale, bias, dtype)


def _scaled(
    sums: Tensor,
    scales: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    piece: Piece = _new,
) -> Tensor:
    """`sums * scales * scale + bias`, each in fp32; into `out`, and then by way of a piece, if that is given."""
    if out is None:
        wide = sums.float()
    else:
        wide = (out if dtype == torch.float32 else piece(torch.float32, *sums.shape)).copy_(sums)
    wide.mul_(scales).mul_(scale.view(1, -1))
    if bias is not None:
        wide.add_(bias.float())
    if out is None:
        return wide.to(dtype)
    return out if wide is out else out.copy_(wide)
