"""Matrices in 8 and 4 bits: how their numbers are chosen, and made wide again. What they are stored as: forms.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from handscroll.limits import LARGEST
from handscroll.weights.dtypes import STORED_DTYPES
from handscroll.weights.forms import (
    LOW_RANK_IN,
    LOW_RANK_OUT,
    LOW_RANK_SCALE,
    PACKED,
    SCALE,
    Form,
    matrix_shape,
    parts_of,
)

# Rows of a matrix that are read or quantised, and made wide, at a time: about this many numbers.
PIECE_NUMBERS, WIDENED_NUMBERS = 2**19, 2**20
# Of an int4 group's scale, as shares of the one that its largest number would need: which errs least is taken.
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)


def views(form: Form, shape: tuple[int, ...], packed: Tensor) -> dict[str, Tensor]:
    """The parts within a matrix's bytes, by their suffixes."""
    return {
        part.suffix: packed[part.start : part.start + part.n_bytes].view(STORED_DTYPES[part.dtype]).view(part.shape)
        for part in parts_of(form, shape)
    }


def pieces_of(rows: int, columns: int, numbers: int | None = None) -> Iterator[slice]:
    """The rows of a matrix in pieces of about so many numbers, `PIECE_NUMBERS` if None."""
    step = max(1, (numbers or PIECE_NUMBERS) // columns)
    for top in range(0, rows, step):
        yield slice(top, min(top + step, rows))


def rows_in(parts: Mapping[str, Tensor], here: slice) -> dict[str, Tensor]:
    """The parts of some of a matrix's rows; what belongs to all rows is whole in it."""
    return {suffix: part if suffix in (LOW_RANK_IN, LOW_RANK_SCALE) else part[here] for suffix, part in parts.items()}


def quantise_rows(form: Form, rows: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Writes rows [n, K] fp32 into their numbers and scales. A row's depend on that row alone."""
    if form.storage == "int4":
        numbers, scale = _in_4_bits(rows, form.group)
        parts[PACKED].copy_(pack(numbers))
        parts[SCALE].copy_(scale)
        return
    scale = row_scale(rows, LARGEST[form.storage])
    numbers = rows / scale
    if form.storage == "int8":
        numbers.round_().clamp_(-127, 127)
    parts["weight"].copy_(numbers.view(parts["weight"].shape))
    parts[SCALE].copy_(scale)


def widen(form: Form, parts: Mapping[str, Tensor], out: Tensor) -> None:
    """Writes `scale * number` of a matrix, and its correction, into `out`, `[N, K]` or of the matrix's shape, in fp32,
    bf16 or fp16.

    Multiplied in fp32 and rounded once. A piece of rows at a time.
    """
    rows, columns = matrix_shape(tuple(out.shape))
    out = out.view(rows, columns)
    scale = parts[SCALE].view(rows, -1, 1)
    for here in pieces_of(rows, columns, WIDENED_NUMBERS) if out.device.type == "cpu" else [slice(0, rows)]:
        is_packed = form.storage == "int4"
        wide = unpack(parts[PACKED][here]) if is_packed else parts["weight"].view(rows, columns)[here].float()
        wide.view(len(wide), -1, columns // scale.shape[1]).mul_(scale[here].float())
        if form.rank:
            wide.addmm_(*_factors(rows_in(parts, here)))
        out[here] = wide


def correction(parts: Mapping[str, Tensor]) -> Tensor:
    """[n, K] fp32: what is added to these rows."""
    return torch.mm(*_factors(parts))


def _factors(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return parts[LOW_RANK_OUT] * parts[LOW_RANK_SCALE].view(1, -1), parts[LOW_RANK_IN].float()


def row_scale(rows: Tensor, largest: float = LARGEST["int8"]) -> Tensor:
    """[N, K] fp32 -> [N, 1]: what a row is divided by, so that its largest number becomes `largest`; 1 for zeros."""
    # By a product: what divides by a number may do so by its reciprocal on a device and not on another.
    scale = rows.abs().amax(dim=1, keepdim=True).mul_(1 / largest)
    # The smallest normal number: below it a quotient could be infinite.
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _in_4_bits(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[N, K] fp32 -> numbers int8 [N, K] from 0 to 15, and scales bf16 [N, K / group].

    The number farthest from zero becomes -8, so that a scale may be negative and all sixteen numbers are used; then the
    scale is made smaller where that makes the group's squared error smaller.
    """
    grouped = rows.view(len(rows), -1, group)
    farthest = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))
    best_error = torch.full_like(farthest, torch.inf)
    best_scale = torch.ones_like(farthest)
    for share in _SHARES:
        scale = (farthest * (share / -8)).bfloat16().float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        numbers = (grouped / scale).round_().clamp_(-8, 7)
        error = (numbers.mul_(scale).sub_(grouped)).square_().sum(dim=2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    numbers = (grouped / best_scale).round_().clamp_(-8, 7).add_(8)
    return numbers.to(torch.int8).view(rows.shape), best_scale.squeeze(2).bfloat16()


def pack(numbers: Tensor) -> Tensor:
    """int8 [N, K] from 0 to 15 -> int32 [N, K / 8], the first of eight lowest."""
    pairs = numbers[:, ::2] | (numbers[:, 1::2] << 4)
    return pairs.contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [N, K / 8] -> fp32 [N, K], whole numbers from -8 to 7."""
    pairs = packed.contiguous().view(torch.uint8)
    numbers = torch.empty(*pairs.shape, 2, device=packed.device)
    numbers[..., 0] = pairs & 15
    numbers[..., 1] = pairs >> 4
    return numbers.sub_(8).view(len(packed), -1)
