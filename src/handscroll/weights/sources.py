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
from handscroll.weights.forms import (
    LOW_RANK,
    LOW_RANK_SCALE,
    PACKED,
    SCALE,
    Form,
    form_in,
    matrix_shape,
    packed_bytes,
    parts_of,
)
from handscroll.weights.header import MAX_NAME, TensorEntry, shape_text
from handscroll.weights.low_rank import quantise_corrected
from handscroll.weights.quantised import pieces_of, quantise_rows, rows_in, views, widen

# Reads one stored tensor, or a part of it, into a flat tensor of any dtype.
Read = Callable[[TensorEntry, Tensor], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One parameter: `entries` are what is stored of it, `shape` is its own.

    stored: the form in which the files hold it, its parts being the entries; None: plainly, as one entry. form: how it
    is kept in memory; None: plainly. What is stored plainly and kept in a form is quantised while it is read; what is
    stored in a form is kept in the same, or plainly. What others store otherwise is a class of its own.
    """

    shape: tuple[int, ...]
    entries: tuple[TensorEntry, ...]
    form: Form | None = None
    stored: Form | None = None

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
    def is_plain(self) -> bool:
        """Whether it is stored plainly and kept plainly."""
        return self.form is None and self.stored is None

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
        return wanted_dtype(self.first, dtype) if self.is_plain else dtype

    def fill(self, read: Read, target: Tensor) -> None:
        """Reads it into one plain tensor of its shape, on the CPU where it has a form. Raises CheckpointError."""
        form = self.stored or self.form
        if form is None:
            read(self.first, target.view(-1))
            return
        flat = target.view(matrix_shape(self.shape))
        if form.rank:  # of which the correction is for all rows
            packed = torch.empty(packed_bytes(form, self.shape), dtype=torch.uint8)
            self._fill_parts(form, read, packed)
            widen(form, views(form, self.shape, packed), flat)
            return
        for here, parts in self._pieces(form, read):
            widen(form, parts, flat[here])

    def fill_packed(self, read: Read, packed: Tensor) -> None:
        """Reads it into the bytes of its parts, on the CPU. Raises CheckpointError."""
        assert self.form is not None
        self._fill_parts(self.form, read, packed)

    def fill_packed_with_error(self, read: Read, packed: Tensor) -> float:
        """As `fill_packed`; gives by how much its numbers err, `|made wide - before| / |before|` over all of them."""
        assert self.form is not None
        self.fill_packed(read, packed)
        whole = {suffix: part.view(len(part), -1) for suffix, part in views(self.form, self.shape, packed).items()}
        off = size = 0.0
        for here in pieces_of(*matrix_shape(self.shape)):
            before = self._rows(read, here)
            made = torch.empty_like(before)
            widen(self.form, rows_in(whole, here), made)
            off += float((made - before).square().sum())
            size += float(before.square().sum())
        return math.sqrt(off / size) if size else 0.0

    def _fill_parts(self, form: Form, read: Read, packed: Tensor) -> None:
        whole = views(form, self.shape, packed)
        by_rows = {suffix: part.view(len(part), -1) for suffix, part in whole.items()}
        if self.stored is not None:
            for entry, part in zip(self.entries, whole.values(), strict=True):
                read(entry, part.view(-1))
            self._adapt(whole)
            self._check(whole)
        elif form.rank:
            try:
                quantise_corrected(form, matrix_shape(self.shape)[1], lambda here: self._rows(read, here), by_rows)
            except ArithmeticError as error:
                raise not_finite(self.first) from error
            self._check(whole)
        else:
            for here, parts in self._pieces(form, read):
                for suffix, part in parts.items():
                    by_rows[suffix][here] = part.view(len(part), -1)

    def _pieces(self, form: Form, read: Read) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Some rows at a time, and their parts, of a form in which rows have nothing in common."""
        rows, columns = matrix_shape(self.shape)
        for here in pieces_of(rows, columns):
            shape = (here.stop - here.start, columns)
            packed = torch.empty(packed_bytes(form, shape), dtype=torch.uint8)
            parts = views(form, shape, packed)
            if self.stored is not None:
                for entry, part in zip(self.entries, parts.values(), strict=True):
                    read(_rows_of(entry, rows, here), part.view(-1))
                self._adapt(parts)
            else:
                quantise_rows(form, self._rows(read, here), parts)
            self._check(parts)
            yield here, parts

    def _rows(self, read: Read, here: slice) -> Tensor:
        """Some rows of what is stored plainly, [n, K] fp32."""
        entry = _rows_of(self.first, self.shape[0], here)
        piece = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        read(entry, piece.view(-1))
        return piece.float()

    def _adapt(self, parts: Mapping[str, Tensor]) -> None:
        """Makes what was read ours, where others store the same numbers otherwise."""

    def _check(self, parts: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError where a scale is none: scales are few, and one of NaN blackens a picture."""
        wrong = [
            index
            for index, (suffix, part) in enumerate(parts.items())
            if suffix in (SCALE, LOW_RANK_SCALE) and not bool((part.isfinite() & (part != 0)).all())
        ]
        if not wrong:
            return
        if self.stored is None:
            raise not_finite(self.first)
        entry = self.entries[wrong[0]]
        name = one_line(entry.name, MAX_NAME)
        raise CheckpointError(f"{entry.file}: the tensor {name} holds a scale of zero, NaN or infinity")


def sources_of(entries: Mapping[str, TensorEntry | Source]) -> dict[str, Source]:
    """The same, each stored tensor as a plain source."""
    return {name: Source.plain(each) if isinstance(each, TensorEntry) else each for name, each in entries.items()}


def stored_matrix(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> Source:
    """A matrix of this shape that is stored in parts, by their suffixes: `weight` or `weight_packed`, its scales, and
    all three parts of a correction or none.

    Its form is what the parts are. Raises CheckpointError where they do not fit the shape or each other.
    """
    scale = parts[SCALE]
    numbers = parts.get(PACKED) or parts["weight"]
    try:
        form = form_in(shape, {suffix: (entry.dtype, entry.shape) for suffix, entry in parts.items()})
    except ValueError as error:
        raise CheckpointError(f"{scale.file}: the tensor {one_line(numbers.name, MAX_NAME)} {error}") from error
    assert form is not None
    entries = (numbers, scale, *(parts[suffix] for suffix in LOW_RANK if suffix in parts))
    for part, entry in zip(parts_of(form, shape), entries, strict=True):
        stored = STORED_DTYPES.get(entry.dtype)
        # A scale may be of another type than ours, and is cast.
        fits = entry.dtype == part.dtype or (part.suffix == SCALE and stored is not None and stored.is_floating_point)
        if math.prod(entry.shape) != math.prod(part.shape) or not fits:
            there, wanted = (f"{shape_text(each.shape)} in {each.dtype}" for each in (entry, part))
            raise CheckpointError(
                f"{entry.file}: the tensor {one_line(entry.name, MAX_NAME)} has shape {there}, and of a matrix of "
                f"{shape_text(shape)} in {form} it is {wanted}"
            )
    return Source(shape, entries, form, stored=form)


def not_finite(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: the tensor {one_line(entry.name, MAX_NAME)} holds numbers that are not finite"
    )


def _rows_of(entry: TensorEntry, rows: int, here: slice) -> TensorEntry:
    """Some of the rows of a stored matrix, as an entry of its own."""
    row_bytes, count = entry.n_bytes // rows, here.stop - here.start
    return entry.part(here.start * row_bytes, count * row_bytes, (count, math.prod(entry.shape) // rows))
