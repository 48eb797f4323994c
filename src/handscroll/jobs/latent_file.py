"""A finished latent on disk: safetensors, with what is needed to decode and label it in the file's metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from handscroll.errors import CheckpointError, FormatError, OutputError

if TYPE_CHECKING:
    from torch import Tensor
from handscroll.weights.header import read_header, read_metadata
from handscroll.weights.tensor_file import CHECKSUM, read_tensors, write_tensors

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


def describe_latent(path: Path) -> tuple[tuple[int, ...], dict[str, str]] | None:
    """The shape and the facts of a latent's file, from its header alone; None for a file that holds no latent.

    Raises CheckpointError for a file that is no whole safetensors file.
    """
    for entry in read_header(path):
        if entry.name == TENSOR_NAME and len(entry.shape) == 4:
            return entry.shape, {name: value for name, value in read_metadata(path).items() if name != CHECKSUM}
    return None


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
