"""A finished latent on disk: safetensors, with what is needed to decode and label it in the file's metadata.

Whatever is written here appears whole or not at all, also after a power cut, and is written from the tensors' own
memory: a latent of 32768x32768 takes 128 MiB, which need not be there twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from handscroll.errors import CheckpointError, FormatError, OutputError
from handscroll.weight_files import DTYPES, TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

TENSOR_NAME = "latent"


def check_latent_target(path: Path) -> None:
    """Raises before any work is done if a latent cannot be written there."""
    if path.suffix.lower() != ".safetensors":
        raise FormatError(f"{path}: a latent is saved as .safetensors; give it that ending")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} does not exist or cannot be written to")


def save_latent(path: Path, latent: Tensor, facts: Mapping[str, str], *, part: Path | None = None) -> None:
    """Writes a latent [1, C, h, w] as fp32 and its facts, atomically, by way of `part`. Raises OutputError."""
    try:
        write_tensors(path, {TENSOR_NAME: latent.float()}, facts, part=part)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def load_latent(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The latent [1, C, h, w] fp32 of a file, and its facts. Raises CheckpointError naming the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; --save-latent of generate makes one")
    tensors, facts = read_tensors(path, TENSOR_NAME)
    if TENSOR_NAME not in tensors:
        raise CheckpointError(f"{path}: holds no tensor named {TENSOR_NAME!r}; --save-latent makes such files")
    latent = tensors[TENSOR_NAME]
    if latent.ndim != 4 or latent.shape[0] != 1 or not latent.is_floating_point():
        raise CheckpointError(f"{path}: the latent has shape {list(latent.shape)}; expected [1, channels, h, w] floats")
    return latent.float(), facts


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
    header = json.dumps(entries, ensure_ascii=False).encode("utf-8", "replace")
    header += b" " * (-len(header) % 8)
    write_whole(path, [len(header).to_bytes(8, "little"), header, *data], part=part)


def read_tensors(path: Path, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, only `names` if given and there, and its metadata without the checksum.

    Raises CheckpointError for a file that cannot be read, is not whole, or does not match its checksum.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
        stored = read_header(path)
        wanted = [entry for entry in stored if not names or entry.name in names]
        tensors = {entry.name: _read_tensor(entry) for entry in wanted}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {str(error).splitlines()[0]}") from error
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
        raise CheckpointError(f"{entry.file}: the tensor {entry.name} is {entry.dtype}, which no latent is")
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


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], *, part: Path | None = None) -> None:
    """Writes a file so that even a power cut leaves the older one or the new one. Raises OSError.

    It is written as `part` first, on the same file system; left out, under a hidden name beside `path`.
    """
    part = part or path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
