"""A correction of low rank beside a matrix in 4 bits: what 4 bits lose most of, in two thin factors.

The correction takes the matrix's largest singular directions, 4 bits what is left, and then in turns: the correction
those of what 4 bits leave, and 4 bits the rest of it (as LoftQ does, https://arxiv.org/abs/2310.08659). Directions are
found by subspace iteration (Halko et al., https://arxiv.org/abs/0909.4061), a piece of rows at a time, so that no
matrix is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from handscroll.weights.forms import BEYOND, LOW_RANK_IN, LOW_RANK_OUT, LOW_RANK_SCALE, Form
from handscroll.weights.quantised import correction, pieces_of, quantise_rows, row_scale, rows_in, views, widen

ROUNDS = 5
# Readings of all rows for directions: from random ones, and from those of the round before.
_FIRST_PASSES, _LATER_PASSES = 3, 1
_SEED = 0


def quantise(form: Form, weight: Tensor, packed: Tensor) -> None:
    """Writes a matrix of any floating-point type, which is on the CPU, into its bytes."""
    parts, flat = views(form, tuple(weight.shape), packed), weight.flatten(1)
    if form.rank:
        quantise_corrected(form, flat.shape[1], lambda here: flat[here].float(), parts)
        return
    for here in pieces_of(*flat.shape):
        quantise_rows(form, flat[here].float(), rows_in(parts, here))


def quantise_corrected(form: Form, columns: int, read: Callable[[slice], Tensor], parts: Mapping[str, Tensor]) -> None:
    """Writes a matrix into its parts, numbers [N, K / 8], scales and correction.

    read: gives some rows of it, [n, K] fp32; each is read about twenty times. Directions are found in fp64, so that the
    bytes do not depend on how many threads multiply, but where a factor lies all but halfway between two numbers.
    Raises ArithmeticError where the matrix holds numbers that are not finite.
    """
    rows = len(parts[LOW_RANK_OUT])
    plain = Form(form.storage, form.group)

    def left_over() -> Iterator[Tensor]:
        """The matrix without what its numbers hold, which is all of it before there are any; in pieces, fp64."""
        for here in pieces_of(rows, columns):
            piece = read(here)
            if numbered:
                held = torch.empty_like(piece)
                widen(plain, rows_in(parts, here), held)
                piece = piece - held
            yield piece.double()

    numbered = False
    count = min(form.rank + BEYOND, rows, columns)
    start = torch.randn(columns, count, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    basis = start
    for turn in range(ROUNDS):
        for _ in range(_LATER_PASSES if turn else _FIRST_PASSES):
            total = torch.zeros_like(basis)
            for piece in left_over():
                total.addmm_(piece.t(), piece @ basis)
            if not total.isfinite().all():
                raise ArithmeticError("numbers that are not finite")
            # A matrix of lower rank gives fewer directions; the others may be any.
            basis = torch.linalg.qr(total).Q if total.any() else torch.linalg.qr(start).Q
        outs = torch.cat([piece @ basis for piece in left_over()])
        _write_factors(outs, basis, form.rank, parts)
        for here in pieces_of(rows, columns):
            some = rows_in(parts, here)
            quantise_rows(plain, read(here) - correction(some), some)
        numbered = True


def _write_factors(outs: Tensor, basis: Tensor, rank: int, parts: Mapping[str, Tensor]) -> None:
    """The `rank` largest directions of `outs @ basis.t()`, [N, c] and [K, c] with orthonormal columns, in 8 bits."""
    directions = torch.linalg.eigh(outs.t() @ outs).eigenvectors.flip(1)[:, :rank]
    ins, outs = (basis @ directions).t(), (outs @ directions).t()
    # Of a direction and its opposite, the one whose farthest number is positive.
    farthest = ins.gather(1, ins.abs().argmax(dim=1, keepdim=True))
    ins, outs = (each * farthest.sign() for each in (ins, outs))
    in_scale, out_scale = row_scale(ins), row_scale(outs)
    scale = (in_scale * out_scale).float()
    is_none = scale < torch.finfo(torch.float32).tiny  # a direction of nothing
    parts[LOW_RANK_IN].copy_((ins / in_scale).round_().masked_fill_(is_none, 0))
    parts[LOW_RANK_OUT].copy_((outs / out_scale).round_().masked_fill_(is_none, 0).t())
    parts[LOW_RANK_SCALE].copy_(scale.masked_fill(is_none, 1))
