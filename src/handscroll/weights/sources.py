"""Where a parameter's numbers come from, and what they take: as they are stored, resident, and at work.

A `Source` fills a buffer of bytes. What is stored in a floating-point type is cast where another is wanted. A matrix in
8 or 4 bits has parts (quantised.py), which are read as they are, or made wide; one that is stored plainly can be
quantised while it is read, to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from handscroll.errors import CheckpointError
from handscroll.units import one_line
from handscroll.weights.dtypes import DTYPES, STORED_DTYPES, wanted_dtype
from handscroll.weights.forms import GROUPS, PACKED, SCALE, Form, matrix_shape, packed_bytes, parts_of
from handscroll.weights.header import MAX_NAME, TensorEntry
from handscroll.weights.quantised import PIECE_NUMBERS, quantise_rows, views, widen

# Reads one stored tensor, or a part of it, into a flat tensor of any dtype.
Read = Callable[[TensorEntry, Tensor], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One parameter: `entries` are what is stored of it, `shape` is its own. form: how it is kept; None: plainly.

    Without a form there is one entry. With one, entries are the parts in their order, or one plain entry that is
    quantised while it is read.
    """

    shape: tuple[int, ...]
    entries: tuple[TensorEntry, ...]
    form: Form | None = None

    @classmethod
    def plain(cls, entry: TensorEntry) -> Source:
        return cls(entry.shape, (entry,))

    @property
    def first(self) -> TensorEntry:
        return self.entries[0]

    @property
    def place(self) -> tuple[Path, int]:
        """Sorts sources as they lie in the files."""
        return self.first.file, self.first.start

    @property
    def is_stored_so(self) -> bool:
        """Whether the file holds it in its form."""
        return self.form is None or len(self.entries) > 1

    @property
    def stored_bytes(self) -> int:
        """What is read of the files."""
        return sum(entry.n_bytes for entry in self.entries)

    @property
    def packed_bytes(self) -> int:
        """What its parts take in memory; of a plain one, nothing."""
        return 0 if self.form is None else packed_bytes(self.form, self.shape)

    def wide_bytes(self, dtype: torch.dtype) -> int:
        """What it takes as one plain tensor."""
        return math.prod(self.shape) * self.wide_dtype(dtype).itemsize

    def wide_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.form is not None else wanted_dtype(self.first, dtype)

    def fill(self, read: Read, target: Tensor) -> None:
        """Reads it into one plain tensor of its shape, on the CPU where it has a form. Raises CheckpointError."""
        if self.form is None:
            read(self.first, target.view(-1))
            return
        rows, columns = matrix_shape(self.shape)
        flat = target.view(rows, columns)
        for here, parts in self._pieces(read):
            widen(self.form, parts, flat[here])

    def fill_packed(self, read: Read, packed: Tensor) -> None:
        """Reads it into the bytes of its parts, on the CPU. Raises CheckpointError."""
        assert self.form is not None
        whole = views(self.form, self.shape, packed)
        rows = matrix_shape(self.shape)[0]
        if self.is_stored_so:
            for entry, part in zip(self.entries, whole.values(), strict=True):
                read(entry, part.view(-1))
            self._check(whole)
            return
        for here, parts in self._pieces(read):
            for suffix, part in parts.items():
                whole[suffix].view(rows, -1)[here] = part.view(len(part), -1)

    def fill_packed_with_error(self, read: Read, packed: Tensor) -> float:
        """As `fill_packed`; gives by how much its numbers err, `|made wide - before| / |before|` over all of them."""
        assert self.form is not None
        self.fill_packed(read, packed)
        rows, columns = matrix_shape(self.shape)
        whole = {suffix: part.view(rows, -1) for suffix, part in views(self.form, self.shape, packed).items()}
        step = max(1, PIECE_NUMBERS // columns)
        off = size = 0.0
        for top in range(0, rows, step):
            count = min(step, rows - top)
            before = torch.empty(count, columns)
            read(_rows_of(self.first, rows, top, count), before.view(-1))
            made = torch.empty(count, columns)
            widen(self.form, {suffix: part[top : top + count] for suffix, part in whole.items()}, made)
            off += float((made - before).square().sum())
            size += float(before.square().sum())
        return math.sqrt(off / size) if size else 0.0

    def _pieces(self, read: Read) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Some rows at a time, and their parts."""
        assert self.form is not None
        rows, columns = matrix_shape(self.shape)
        step = max(1, PIECE_NUMBERS // columns)
        for top in range(0, rows, step):
            count = min(step, rows - top)
            shape = (count, columns)
            packed = torch.empty(packed_bytes(self.form, shape), dtype=torch.uint8)
            parts = views(self.form, shape, packed)
            if self.is_stored_so:
                for entry, part in zip(self.entries, parts.values(), strict=True):
                    read(_rows_of(entry, rows, top, count), part.view(-1))
                self._check(parts)
            else:
                piece = torch.empty(count, columns, dtype=DTYPES[self.first.dtype])
                read(_rows_of(self.first, rows, top, count), piece.view(-1))
                quantise_rows(self.form, piece.float(), parts)
                self._check(parts)
            yield slice(top, top + count), parts

    def _check(self, parts: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError where a scale is none: scales are few, and one of NaN blackens a picture."""
        scale = parts[SCALE]
        if bool((scale.isfinite() & (scale != 0)).all()):
            return
        entry = self.entries[-1]
        name = one_line(entry.name, MAX_NAME)
        if self.is_stored_so:
            raise CheckpointError(f"{entry.file}: the tensor {name} holds a scale of zero, NaN or infinity")
        raise CheckpointError(f"{entry.file}: the tensor {name} holds numbers that are not finite")


def sources_of(entries: Mapping[str, TensorEntry | Source]) -> dict[str, Source]:
    """The same, each stored tensor as a plain source."""
    return {name: Source.plain(each) if isinstance(each, TensorEntry) else each for name, each in entries.items()}


def stored_matrix(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> Source:
    """A matrix of this shape that is stored in parts, by their suffixes: `weight` or `weight_packed`, and their scales.

    Its form is what the parts are. Raises CheckpointError where they do not fit the shape or each other.
    """
    scale = parts[SCALE]
    numbers = parts.get(PACKED) or parts["weight"]
    form = Form(numbers.dtype)
    if numbers.name.endswith(PACKED):
        columns, groups = shape[1], scale.shape[-1] if scale.shape else 1
        form = Form("int4", columns // groups if groups and not columns % groups else 0)
        if form.group not in GROUPS:
            raise CheckpointError(
                f"{scale.file}: the tensor {one_line(scale.name, MAX_NAME)} has {groups} scales for rows of {columns}; "
                f"handscroll reads groups of {', '.join(map(str, GROUPS))}"
            )
    for part, entry in zip(parts_of(form, shape), (numbers, scale), strict=True):
        stored = STORED_DTYPES.get(entry.dtype)
        # A scale may be of another type than ours, and is cast.
        fits = entry.dtype == part.dtype or (part.suffix == SCALE and stored is not None and stored.is_floating_point)
        if math.prod(entry.shape) != math.prod(part.shape) or not fits:
            raise CheckpointError(
                f"{entry.file}: the tensor {one_line(entry.name, MAX_NAME)} has shape {_text(entry.shape)} in "
                f"{entry.dtype}, and of a matrix of {_text(shape)} in {form} it is {_text(part.shape)} in {part.dtype}"
            )
    return Source(shape, (numbers, scale), form)


def _rows_of(entry: TensorEntry, rows: int, top: int, count: int) -> TensorEntry:
    """Some of the rows of a stored matrix, as an entry of its own."""
    row_bytes = entry.n_bytes // rows
    shape = (count, math.prod(entry.shape) // rows)
    return TensorEntry(entry.name, entry.file, entry.dtype, shape, entry.start + top * row_bytes, count * row_bytes)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
