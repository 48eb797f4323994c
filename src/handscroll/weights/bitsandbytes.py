"""Matrices as bitsandbytes stores them (https://github.com/bitsandbytes-foundation/bitsandbytes).

8 bits  `weight` int8 [N, K] and beside it `SCB` fp32 [N]: `SCB / 127 * weight`, which is our own int8. `weight_format`
        is 0; older versions wrote the numbers in orders of their own, which it says
4 bits  `weight` uint8 [N * K / 2, 1]: two numbers in each, the first one high, in the order of the rows; each names an
        entry of `weight.quant_map` [16], which `weight.absmax` multiplies, one for a block of neighbours. These are
        fp32, or again uint8: entries of `weight.nested_quant_map` [256] times `weight.nested_absmax`, one for a block
        of them, plus an offset. `weight.quant_state.bitsandbytes__nf4` (or fp4) is JSON with the sizes of the blocks
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from handscroll.errors import CheckpointError
from handscroll.limits import LARGEST
from handscroll.units import one_line
from handscroll.weights.forms import SCALE, Form, matrix_shape
from handscroll.weights.header import MAX_NAME, TensorEntry, shape_text
from handscroll.weights.json_text import parse_json
from handscroll.weights.quantised import pieces_of
from handscroll.weights.sources import Read, Source, not_finite

SCB, ORDER = "SCB", "weight_format"
STATE = "quant_state"
_FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PART = re.compile(rf"(?P<owner>.*)\.weight\.(?P<suffix>{'|'.join(_FOUR_BITS)}|{STATE}\.bitsandbytes__(nf4|fp4))")
_STATE_BYTES = 4096  # at most; 167 as it is written


def part_of(name: str, dtype: str) -> tuple[str, str] | None:
    """The parameter that a tensor is a part of, and which part; None for others."""
    if found := _PART.fullmatch(name):
        return f"{found['owner']}.weight", found["suffix"].partition(".")[0]
    owner, _, leaf = name.rpartition(".")
    if leaf in (SCB, ORDER):
        return f"{owner}.weight", leaf
    return (name, "weight") if dtype in ("int8", "uint8") else None


def matrix(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> Source:
    """A matrix by its parts' names. Raises CheckpointError where they do not fit each other."""
    return in_8_bits(shape, parts) if SCB in parts else in_4_bits(shape, parts)


def in_8_bits(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> Source:
    """A matrix of 8 bits, by its parts' names. Raises CheckpointError where they do not fit."""
    numbers, scale = _need(parts, "weight"), _need(parts, SCB)
    rows = matrix_shape(shape)[0]
    if numbers.dtype != "int8" or math.prod(numbers.shape) != math.prod(shape):
        raise _misfit(numbers, f"a matrix of {shape_text(shape)} in int8")
    if math.prod(scale.shape) != rows or scale.dtype != "fp32":
        raise _misfit(scale, f"{rows} scales in fp32")
    form = Form("int8")
    return EightBits(shape, (numbers, scale), form, stored=form, order=parts.get(ORDER))


def in_4_bits(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> Source:
    """A matrix of 4 bits, by its parts' names. Raises CheckpointError where they are missing or have other sizes."""
    numbers = _need(parts, "weight")
    names = ["absmax", "quant_map"]
    if "nested_absmax" in parts or "nested_quant_map" in parts:
        names += ["nested_absmax", "nested_quant_map"]
    others = [_need(parts, name) for name in names]
    count = math.prod(shape)
    if numbers.dtype != "uint8" or math.prod(numbers.shape) != count // 2 or matrix_shape(shape)[1] % 2:
        raise _misfit(numbers, f"a matrix of {shape_text(shape)} in 4 bits")
    return FourBits(shape, (numbers, *others), state=_need(parts, STATE))


@dataclass(frozen=True, slots=True)
class EightBits(Source):
    """order: where it is stored in which order the numbers lie; None for that of the rows."""

    order: TensorEntry | None = field(default=None, kw_only=True)

    def fill(self, read: Read, target: Tensor) -> None:
        self._check_order(read)
        Source.fill(self, read, target)

    def fill_packed(self, read: Read, packed: Tensor) -> None:
        self._check_order(read)
        Source.fill_packed(self, read, packed)

    def _adapt(self, parts: Mapping[str, Tensor]) -> None:
        scale = parts[SCALE]
        scale.mul_(1 / LARGEST["int8"])
        scale[scale == 0] = 1  # of a row of zeros

    def _check_order(self, read: Read) -> None:
        if self.order is None:
            return
        order = torch.empty(1, dtype=torch.uint8)
        if self.order.dtype == "uint8" and math.prod(self.order.shape) == 1:
            read(self.order, order)
            if not order:
                return
        raise CheckpointError(
            f"{self.order.file}: the tensor {one_line(self.order.name, MAX_NAME)} says that numbers lie in an order of "
            "older versions of bitsandbytes, which is not read; store it anew with version 0.45 or later"
        )


@dataclass(frozen=True, slots=True)
class FourBits(Source):
    """Is made wide while it is read. state: where the sizes of its blocks are stored."""

    state: TensorEntry | None = field(default=None, kw_only=True)

    @property
    def is_plain(self) -> bool:
        return False

    def fill(self, read: Read, target: Tensor) -> None:
        rows, columns = matrix_shape(self.shape)
        flat = target.view(rows, columns)
        table = self._read(read, self.entries[2], 16)
        block, scales = self._scales(read, rows * columns)
        for here in pieces_of(rows, columns):
            first, last = here.start * columns, here.stop * columns
            packed = torch.empty((last - first) // 2, dtype=torch.uint8)
            read(self.first.part(first // 2, packed.numel(), (packed.numel(),)), packed)
            indices = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).int()
            blocks = torch.arange(first, last).div_(block, rounding_mode="floor")
            wide = table[indices].mul_(scales[blocks])
            flat[here] = wide.view(-1, columns)

    def _scales(self, read: Read, count: int) -> tuple[int, Tensor]:
        """How many numbers share a scale, and the scales in fp32."""
        state = self._state(read)
        block = _size(state.get("blocksize"))
        if not block or state.get("shape") != list(self.shape):
            raise self._wrong("does not say the matrix's shape and its blocks")
        needed = -(-count // block)
        if len(self.entries) == 3:
            scales = self._read(read, self.entries[1], needed)
        else:
            offset, nested_block = state.get("nested_offset"), _size(state.get("nested_blocksize"))
            if not isinstance(offset, float) or not math.isfinite(offset) or not nested_block:
                raise self._wrong("does not say how its scales are stored")
            entry = self.entries[1]
            if entry.dtype != "uint8" or math.prod(entry.shape) != needed:
                raise _misfit(entry, f"{needed} scales in uint8")
            indices = torch.empty(needed, dtype=torch.uint8)
            read(entry, indices)
            of_blocks = self._read(read, self.entries[3], -(-needed // nested_block))
            table = self._read(read, self.entries[4], 256)
            scales = table[indices.int()] * of_blocks.repeat_interleave(nested_block)[:needed] + offset
        if not bool(scales.isfinite().all()):
            raise not_finite(self.entries[1])
        return block, scales

    def _state(self, read: Read) -> dict[str, Any]:
        entry = self.state
        assert entry is not None
        if entry.dtype != "uint8" or not 0 < entry.n_bytes <= _STATE_BYTES:
            raise self._wrong("is no JSON of a few hundred bytes")
        text = torch.empty(entry.n_bytes, dtype=torch.uint8)
        read(entry, text)
        try:
            found = parse_json(text.numpy().tobytes())
        except (ValueError, CheckpointError) as error:
            raise self._wrong(f"is no JSON: {one_line(error, MAX_NAME)}") from error
        if not isinstance(found, dict):
            raise self._wrong("is no JSON object")
        return found

    def _wrong(self, what: str) -> CheckpointError:
        assert self.state is not None
        return CheckpointError(f"{self.state.file}: the tensor {one_line(self.state.name, MAX_NAME)} {what}")

    def _read(self, read: Read, entry: TensorEntry, count: int) -> Tensor:
        """So many numbers of fp32."""
        if entry.dtype != "fp32" or math.prod(entry.shape) != count:
            raise _misfit(entry, f"{count} numbers in fp32")
        found = torch.empty(count)
        read(entry, found)
        return found


def _size(given: object) -> int:
    """A power of two that blocks may have; 0 for other values."""
    return given if isinstance(given, int) and not isinstance(given, bool) and given in _BLOCKS else 0


_BLOCKS = tuple(2**power for power in range(5, 13))


def _need(parts: Mapping[str, TensorEntry], suffix: str) -> TensorEntry:
    if suffix in parts:
        return parts[suffix]
    there = next(iter(parts.values()))
    name = one_line(there.name, MAX_NAME)
    raise CheckpointError(f"{there.file}: the tensor {suffix} is missing, to which {name} belongs")


def _misfit(entry: TensorEntry, wanted: str) -> CheckpointError:
    name = one_line(entry.name, MAX_NAME)
    return CheckpointError(
        f"{entry.file}: the tensor {name} is {shape_text(entry.shape)} in {entry.dtype}, not {wanted}"
    )
