"""A few tensors on disk as safetensors, with a checksum: whole or not at all, also after a power cut.

They are written from their own memory: a latent of 32768x32768 takes 128 MiB, which need not be there twice.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from handscroll.errors import CheckpointError
from handscroll.units import first_line, one_line
from handscroll.weights.header import DTYPES, MAX_NAME, TensorEntry, read_all

if TYPE_CHECKING:
    from torch import Tensor
from handscroll.files import write_whole

# Safetensors, whole or not at all
CHECKSUM = "crc32"  # in the metadata: a power cut can leave a file of the right length that holds zeros
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "uint8": "U8"}
_TORCH_DTYPES = {DTYPES[stored][0]: name for name, stored in _DTYPE_NAMES.items()}  # by what `read_header` calls them


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, part: Path | None = None
) -> None:
    """Writes a safetensors file atomically, with a checksum in its metadata, without copying tensors of the CPU.

    Raises OSError.
    """
    entries: dict[str, object] = {}
    data = []
    end = checksum = 0
    # The format wants wide numbers first, so that all of them lie aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        data.append(_bytes_of(tensor))
        start, end = end, end + len(data[-1])
        checksum = zlib.crc32(data[-1], checksum)
        dtype = _DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    entries["__metadata__"] = dict(sorted({**metadata, CHECKSUM: f"{checksum:08x}"}.items()))
    write_whole(path, [header_bytes(entries), *data], part=part)


def header_bytes(header: Mapping[str, object]) -> bytes:
    """What a safetensors file begins with: the header's length, and the header, so long that tensors lie aligned."""
    packed = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed


def read_tensors(path: Path, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, only `names` if given and there, and its metadata without the checksum.

    Raises CheckpointError for a file that cannot be read, is not whole, or does not match its checksum.
    """
    stored, metadata = read_all(path)
    try:
        wanted = [entry for entry in stored if not names or entry.name in names]
        tensors = {entry.name: _read_tensor(entry) for entry in wanted}
    except OSError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {first_line(error)}") from error
    expected, checksum = metadata.pop(CHECKSUM, None), 0
    for _, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        checksum = zlib.crc32(_bytes_of(tensor), checksum)
    if expected is not None and len(wanted) == len(stored) and expected != f"{checksum:08x}":
        raise CheckpointError(f"{path}: damaged: its numbers do not match their checksum")
    return tensors, metadata


def _read_tensor(entry: TensorEntry) -> Tensor:
    """In memory of its own. (safetensors' own reader hides that memory ran out behind a ValueError.)"""
    import torch

    if entry.dtype not in _TORCH_DTYPES:
        name = one_line(entry.name, MAX_NAME)
        raise CheckpointError(f"{entry.file}: the tensor {name} is {entry.dtype}, which no latent is")
    dtype = getattr(torch, _TORCH_DTYPES[entry.dtype])
    data = bytearray(entry.n_bytes)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(data) != entry.n_bytes:
            raise OSError(0, f"the tensor {entry.name} is cut short")
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(entry.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
