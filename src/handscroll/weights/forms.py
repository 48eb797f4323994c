"""Matrices in 8 and 4 bits: what they are stored as, and what that takes. No torch.

A matrix `[N, K]` (or a 1x1 convolution `[N, K, 1, 1]`) is stored as parts, by the names and in the forms that
compressed-tensors reads (https://github.com/vllm-project/compressed-tensors):

int8    `weight` int8 [N, K], `weight_scale` fp32 [N, 1]: `scale * weight`, |weight| <= 127
fp8     `weight` fp8 (e4m3) [N, K], `weight_scale` fp32 [N, 1]
int4    `weight_packed` int32 [N, K / 8], `weight_scale` bf16 [N, K / group], `weight_shape` int64 [2]: eight numbers
        of 4 bits in each int32, the first lowest, each with 8 added; `scale * (number - 8)` with one scale for
        `group` neighbours of a row

In memory the parts of one matrix lie one after the other, as one stretch of bytes (`weight_shape` is left out).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STORED = ("int8", "int4", "fp8")
GROUPS = (128, 64, 32)
SCALE, PACKED, SHAPE = "weight_scale", "weight_packed", "weight_shape"
ITEM_BYTES = {"int8": 1, "fp8": 1, "int32": 4, "fp32": 4, "bf16": 2}
PARTS_ALIGNMENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is stored. storage: int8, int4 or fp8. group: neighbours that share a scale, of int4 alone."""

    storage: str
    group: int = 0

    def __str__(self) -> str:
        return f"{self.storage} in groups of {self.group}" if self.group else self.storage


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


def parts_of(form: Form, shape: tuple[int, ...]) -> tuple[Part, Part]:
    """The parts of a matrix of this shape, one after the other: its numbers and their scales.

    Raises ValueError for a matrix that cannot be stored so.
    """
    rows, columns = matrix_shape(shape)
    if form.storage == "int4":
        if form.group not in GROUPS or columns % form.group:
            raise ValueError(f"rows of {columns} numbers cannot be cut into groups of {form.group}")
        numbers = Part(PACKED, "int32", (rows, columns // 8), 0)
        return numbers, Part(SCALE, "bf16", (rows, columns // form.group), numbers.n_bytes)
    numbers = Part("weight", form.storage, shape, 0)
    aligned = -(-numbers.n_bytes // PARTS_ALIGNMENT_BYTES) * PARTS_ALIGNMENT_BYTES
    return numbers, Part(SCALE, "fp32", (rows, 1), aligned)


def packed_bytes(form: Form, shape: tuple[int, ...]) -> int:
    """What the parts of a matrix take together, up to where the next one may begin."""
    last = parts_of(form, shape)[-1]
    return -(-(last.start + last.n_bytes) // PARTS_ALIGNMENT_BYTES) * PARTS_ALIGNMENT_BYTES


def stored_bytes(form: Form, shapes: Iterable[tuple[int, ...]]) -> int:
    """What matrices of these shapes take in files, without their headers."""
    shape_bytes = 16 if form.storage == "int4" else 0
    return sum(sum(part.n_bytes for part in parts_of(form, shape)) + shape_bytes for shape in shapes)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[N, K] of a matrix or a 1x1 convolution. Raises ValueError for others."""
    if len(shape) < 2 or any(size != 1 for size in shape[2:]):
        raise ValueError(f"a tensor of shape {tuple(shape)} is no matrix")
    return shape[0], shape[1]
