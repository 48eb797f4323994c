"""Matrices in 8 and 4 bits: what they are stored as, and what that takes. No torch.

A matrix `[N, K]` (or a 1x1 convolution `[N, K, 1, 1]`) is stored as parts, by the names and in the forms that
compressed-tensors reads (https://github.com/vllm-project/compressed-tensors):

int8    `weight` int8 [N, K], `weight_scale` fp32 [N, 1]: `scale * weight`, |weight| <= 127
fp8     `weight` fp8 (e4m3) [N, K], `weight_scale` fp32 [N, 1]
int4    `weight_packed` int32 [N, K / 8], `weight_scale` bf16 [N, K / group], `weight_shape` int64 [2]: eight numbers
        of 4 bits in each int32, the first lowest, each with 8 added; `scale * (number - 8)` with one scale for
        `group` neighbours of a row

A matrix in int4 may have a correction of low rank r, which is added to it and is ours alone: `weight_low_rank_out` int8
[N, r], `weight_low_rank_in` int8 [r, K] and `weight_low_rank_scale` fp32 [r, 1]: `(out * scale) @ in`.

In memory the parts of one matrix lie one after the other, as one stretch of bytes (`weight_shape` is left out).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

STORED = ("int8", "int4", "fp8")
GROUPS = (128, 64, 32)
SCALE, PACKED, SHAPE = "weight_scale", "weight_packed", "weight_shape"
LOW_RANK_OUT, LOW_RANK_IN, LOW_RANK_SCALE = "weight_low_rank_out", "weight_low_rank_in", "weight_low_rank_scale"
LOW_RANK = (LOW_RANK_OUT, LOW_RANK_IN, LOW_RANK_SCALE)
BEYOND = 8  # directions that are looked for beyond the rank, so that its last ones are found as well as its first
PARTS = ("weight", SCALE, PACKED, *LOW_RANK)  # what follows a module's name, of all forms
ITEM_BYTES = {"int8": 1, "fp8": 1, "int32": 4, "fp32": 4, "bf16": 2}
PARTS_ALIGNMENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is stored. storage: int8, int4 or fp8. Of int4 alone, group: neighbours that share a scale; rank: of
    the correction that is added, 0 for none.
    """

    storage: str
    group: int = 0
    rank: int = 0

    def __str__(self) -> str:
        grouped = f"{self.storage} in groups of {self.group}" if self.group else self.storage
        return f"{grouped} + rank {self.rank}" if self.rank else grouped


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a matrix: what follows the module's name, its dtype and shape, and where it begins."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """Where the next part, or the next matrix, may begin."""
        return -(-(self.start + self.n_bytes) // PARTS_ALIGNMENT_BYTES) * PARTS_ALIGNMENT_BYTES


def parts_of(form: Form, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The parts of a matrix of this shape, one after the other: its numbers, their scales, its correction.

    Raises ValueError for a matrix that cannot be stored so.
    """
    rows, columns = matrix_shape(shape)
    if form.storage == "int4":
        if form.group not in GROUPS or columns % form.group:
            raise ValueError(f"rows of {columns} numbers cannot be cut into groups of {form.group}")
        parts: list[tuple[str, str, tuple[int, ...]]]
        parts = [(PACKED, "int32", (rows, columns // 8)), (SCALE, "bf16", (rows, columns // form.group))]
    else:
        parts = [("weight", form.storage, shape), (SCALE, "fp32", (rows, 1))]
    if form.rank:
        parts.append((LOW_RANK_OUT, "int8", (rows, form.rank)))
        parts.append((LOW_RANK_IN, "int8", (form.rank, columns)))
        parts.append((LOW_RANK_SCALE, "fp32", (form.rank, 1)))
    made: list[Part] = []
    for suffix, dtype, part_shape in parts:
        made.append(Part(suffix, dtype, part_shape, made[-1].end if made else 0))
    return tuple(made)


def packed_bytes(form: Form, shape: tuple[int, ...]) -> int:
    """What the parts of a matrix take together, up to where the next one may begin."""
    return parts_of(form, shape)[-1].end


def stored_bytes(form: Form, shapes: Iterable[tuple[int, ...]]) -> int:
    """What matrices of these shapes take in files, without their headers."""
    shape_bytes = 16 if form.storage == "int4" else 0
    return sum(sum(part.n_bytes for part in parts_of(form, shape)) + shape_bytes for shape in shapes)


def form_in(shape: tuple[int, ...], parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> Form | None:
    """The form of a stored matrix of this shape, by its parts' dtypes and shapes; None for one that is stored plainly.

    Raises ValueError for parts that are of no form.
    """
    if PACKED in parts:
        columns, scale_shape = matrix_shape(shape)[1], parts[SCALE][1]
        groups = scale_shape[-1] if scale_shape else 1
        group = columns // groups if groups and not columns % groups else 0
        if group not in GROUPS:
            raise ValueError(
                f"has {groups} scales for rows of {columns}; handscroll reads groups of {', '.join(map(str, GROUPS))}"
            )
        rank = 0
        if LOW_RANK_OUT in parts:
            out_shape = parts[LOW_RANK_OUT][1]
            rank = out_shape[1] if len(out_shape) == 2 else 0
            if not 0 < rank <= most_rank(shape):
                raise ValueError(f"has a correction of no rank that is read, which is {most_rank(shape)} at most")
        elif set(LOW_RANK) & parts.keys():
            raise ValueError("has parts of a correction without the others")
        return Form("int4", group, rank)
    dtype = parts["weight"][0] if "weight" in parts else ""
    if dtype in STORED and set(LOW_RANK) & parts.keys():
        raise ValueError("has parts of a correction, which is for matrices in 4 bits")
    return Form(dtype) if dtype in STORED else None


def most_rank(shape: tuple[int, ...]) -> int:
    """The largest rank of a correction that is made, or read: beyond it, it would save nothing."""
    return min(matrix_shape(shape)) // 4


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[N, K] of a matrix or a 1x1 convolution. Raises ValueError for others."""
    if len(shape) < 2 or any(size != 1 for size in shape[2:]):
        raise ValueError(f"a tensor of shape {tuple(shape)} is no matrix")
    return shape[0], shape[1]
