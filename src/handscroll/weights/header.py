"""What a safetensors file's header promises. No torch, no weight is read.

A safetensors file is eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape and
offsets), then the tensors' bytes end to end. Format: https://github.com/huggingface/safetensors#format

Only files are taken that the safetensors library takes too. Some that it takes are refused: a header that would fill
the memory, and names that occur twice.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError
from handscroll.units import gibibytes, one_line
from handscroll.weights.foreign import FIRST_BYTES, text_in_place, unreadable, what_it_is
from handscroll.weights.json_text import MAX_FILE_BYTES, parse_json

# Safetensors' own dtype names -> (the name used throughout handscroll, bits an element).
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("fp64", 64),
    "F32": ("fp32", 32),
    "F16": ("fp16", 16),
    "BF16": ("bf16", 16),
    "F8_E4M3": ("fp8", 8),
    "F8_E5M2": ("fp8_e5m2", 8),
    "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 8),
    "F8_E8M0": ("fp8_e8m0", 8),
    "F6_E3M2": ("fp6_e3m2", 6),
    "F6_E2M3": ("fp6_e2m3", 6),
    "F4": ("fp4", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}
MOST = 2**64 - 1  # that a size or an offset can be
MAX_DIMENSIONS = 64  # of one tensor: more are known to no library
MAX_NAME = 100  # characters of a name that a message shows
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as its file's header describes it. `start` is absolute: the tensor's first byte in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    def part(self, first_byte: int, n_bytes: int, shape: tuple[int, ...], dtype: str | None = None) -> TensorEntry:
        """Some of its bytes, as an entry of their own; in its dtype, if no other is given."""
        return TensorEntry(self.name, self.file, dtype or self.dtype, shape, self.start + first_byte, n_bytes)


def shape_text(shape: tuple[int, ...]) -> str:
    """`2240x5600`, as messages say it."""
    return "x".join(map(str, shape)) or "scalar"


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """Every tensor that a safetensors file holds, in file order. Raises CheckpointError as `read_all`."""
    return read_all(file)[0]


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself, beside its tensors. Raises CheckpointError as `read_all`."""
    return read_all(file)[1]


def read_all(file: Path) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
    """Every tensor that a safetensors file holds, in file order, and its metadata; only the header is read.

    Raises CheckpointError naming the file when it is shorter or longer than its header promises, when tensors overlap
    or leave a gap, or when it is no safetensors file.
    """
    header, first_byte, size = _read_json(file)
    entries = [_entry(file, name, value, first_byte) for name, value in header.items() if name != METADATA]
    entries.sort(key=lambda entry: (entry.start, entry.n_bytes))
    end = first_byte
    for entry in entries:
        if entry.start != end:
            what = "begins before the one before it ends" if entry.start < end else "leaves a gap before it"
            raise _broken(file, f"the tensor {one_line(entry.name, MAX_NAME)} {what}")
        end = entry.start + entry.n_bytes
    if end > size:
        raise CheckpointError(
            f"{file}: truncated: the header promises {end} bytes and the file has {size}; fetch it again"
        )
    if end < size:
        raise _broken(file, f"{size - end} bytes follow the last tensor")
    return tuple(entries), header.get(METADATA) or {}


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the position of the first tensor's first byte, and the size of the file in bytes."""
    try:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: not a file")
        with file.open("rb") as stream:
            first = stream.read(FIRST_BYTES)
            if said := _something_else(first):
                raise CheckpointError(f"{file}: {said}")
            if size < 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes are no safetensors file; fetch it again")
            header_bytes = _header_bytes(file, int.from_bytes(first[:8], "little"), size)
            stream.seek(8)
            data = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(unreadable(file, error)) from error
    if len(data) < header_bytes:
        raise CheckpointError(f"{file}: truncated: it became shorter while it was read; fetch it again")
    try:
        header = parse_json(data, strict=True)
    except ValueError as error:
        raise _broken(file, one_line(error, 2 * MAX_NAME)) from error
    _check_metadata(file, header.get(METADATA))
    return header, 8 + header_bytes, size


def _something_else(first: bytes) -> str | None:
    """What a file is that begins so, if it is no safetensors file; None where it may be one."""
    if first[8:9] == b"{":
        return None
    if (said := what_it_is(first)) or len(first) <= 8:
        return said
    return text_in_place(first) or "not a safetensors file: its header does not begin with {; fetch it again"


def _header_bytes(file: Path, header_bytes: int, size: int) -> int:
    """The header's length as the file gives it. Raises CheckpointError where that cannot be, or is too much."""
    if header_bytes > MOST // 2 or (header_bytes > 100_000_000 and 8 + header_bytes > size):
        raise CheckpointError(
            f"{file}: not a safetensors file, or a damaged one: its header would be {header_bytes} bytes; fetch it "
            "again"
        )
    if 8 + header_bytes > size:
        raise CheckpointError(
            f"{file}: truncated: the header takes {header_bytes} bytes and the file has {size}; fetch it again"
        )
    if header_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{file}: its header takes {gibibytes(header_bytes)}; headers of at most {gibibytes(MAX_FILE_BYTES)} are "
            "read; save the model in several files"
        )
    return header_bytes


def _check_metadata(file: Path, metadata: object) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _broken(file, f"{METADATA} should give a text for each name")


def _entry(file: Path, name: str, value: Any, first_byte: int) -> TensorEntry:
    try:
        dtype, element_bits = DTYPES[value["dtype"]]
        shape = tuple(value["shape"])
        start, end = value["data_offsets"]
        plain = all(type(number) is int and 0 <= number <= MOST for number in (*shape, start, end))
        if not plain or not isinstance(value["shape"], list) or 8 * (end - start) != _bits(shape, element_bits):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        said = f"{one_line(name, MAX_NAME)}: {one_line(repr(value), MAX_NAME)}"
        raise _broken(file, f"this cannot be the tensor {said}") from error
    if len(shape) > MAX_DIMENSIONS:
        said = f"{one_line(name, MAX_NAME)} has {len(shape)} dimensions"
        raise CheckpointError(f"{file}: the tensor {said}; at most {MAX_DIMENSIONS} are read")
    return TensorEntry(name, file, dtype, shape, first_byte + start, end - start)


def _bits(shape: tuple[int, ...], element_bits: int) -> int:
    """Of all elements together. Raises ValueError for more than 64 bits can count, as the library does."""
    total = 1
    for size in (*shape, element_bits):
        total *= size
        if total > MOST:
            raise ValueError
    return total


def _broken(file: Path, said: str) -> CheckpointError:
    return CheckpointError(f"{file}: its header is broken: {said}; fetch the file again, or save it again")
