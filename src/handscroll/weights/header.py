"""What a safetensors file's header promises. No torch, no weight is read.

A safetensors file is eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape and
offsets), then the tensors' bytes end to end. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError

# Safetensors' own dtype names -> (the name used throughout handscroll, bytes an element).
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("fp64", 8),
    "F32": ("fp32", 4),
    "F16": ("fp16", 2),
    "BF16": ("bf16", 2),
    "F8_E4M3": ("fp8", 1),
    "F8_E5M2": ("fp8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as its file's header describes it. `start` is absolute: the tensor's first byte in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """Every tensor that a safetensors file holds, in file order; only the header is read.

    Raises CheckpointError naming the file when it is shorter than its header promises or is no safetensors file.
    """
    header, first_byte, size = _read_json(file)
    entries = [_entry(file, name, value, first_byte) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry.start)
    end = max((entry.start + entry.n_bytes for entry in entries), default=first_byte)
    if end > size:
        raise CheckpointError(
            f"{file}: truncated: the header promises {end} bytes and the file has {size}; fetch it again"
        )
    return tuple(entries)


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself, beside its tensors. Raises CheckpointError as `read_header`."""
    found = _read_json(file)[0].get("__metadata__", {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: the header's metadata is not a table")
    return {name: str(value) for name, value in found.items()}


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the position of the first tensor's first byte, and the size of the file in bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes are no safetensors file; fetch it again")
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: not a safetensors file: its header would be {header_bytes} bytes")
            if 8 + header_bytes > size:
                raise CheckpointError(
                    f"{file}: truncated: the header takes {header_bytes} bytes and the file has {size}; fetch it again"
                )
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: its header is not JSON") from error

    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not a table of tensors")
    return header, 8 + header_bytes, size


def _entry(file: Path, name: str, value: Any, first_byte: int) -> TensorEntry:
    try:
        dtype, element_bytes = DTYPES[value["dtype"]]
        shape = tuple(value["shape"])
        start, end = value["data_offsets"]
        plain = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        if not plain or end - start != math.prod(shape) * element_bytes:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry for the tensor {name} makes no sense: {value}") from error
    return TensorEntry(name, file, dtype, shape, first_byte + start, end - start)
