"""A finished latent on disk: safetensors, with what is needed to decode and label it in the file's metadata."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handscroll.errors import CheckpointError, FormatError, OutputError, SizeError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.request import Request
from handscroll.units import one_line
from handscroll.weights.header import read_header, read_metadata
from handscroll.weights.tensor_file import CHECKSUM, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

TENSOR_NAME = "latent"
MAX_REASON = 120  # characters, of why a file is broken


def check_latent_target(path: Path) -> None:
    """Raises before any work is done if a latent cannot be written there."""
    if path.suffix.lower() != ".safetensors":
        raise FormatError(f"{path}: a latent is saved as .safetensors; give it that ending")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} does not exist or cannot be written to")


def check_is_latent(path: Path) -> None:
    """Raises OutputError where a file is in the way of a latent and is not one itself. For names that a file gives."""
    try:
        is_latent = not os.path.lexists(path) or (not path.is_symlink() and describe_latent(path) is not None)
    except CheckpointError:
        is_latent = False
    if not is_latent:
        raise OutputError(f"{path}: is in the way and is no latent; move it, or name a file with --save-latent")


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


def request_of_latent(file: Path, facts: Mapping[str, str], wanted: Mapping[str, Any]) -> Request:
    """The request that a saved latent came from, with the fields in `wanted` as they are now asked for.

    Raises CheckpointError where the file does not say which model made it, or its metadata is broken; UsageError.
    """
    named = wanted.get("model") or facts.get("model")
    if named is None:
        raise CheckpointError(f"{file}: does not say which model made it; name it with --model")
    try:
        made: dict[str, Any] = {
            "prompt": facts.get("prompt") or "unknown",
            "negative": facts.get("negative", ""),
            "model": named,
            "width": int(facts["width"]) if "width" in facts else None,
            "height": int(facts["height"]) if "height" in facts else None,
            "steps": int(facts["steps"]) if "steps" in facts else None,
            "guidance": float(facts["guidance"]) if "guidance" in facts else None,
            "seed": int(facts.get("seed", 0)),
        }
        if "model" not in wanted:
            made["revision"] = facts.get("revision") or None
        Request(**made)
    except (ValueError, OverflowError, UsageError) as error:
        raise CheckpointError(f"{file}: its metadata is broken: {one_line(error, MAX_REASON)}") from error
    return Request(**{**made, **wanted})


def with_size_of(file: Path, latent: Tensor, request: Request, spec: CheckpointSpec) -> Request:
    """The request with the picture's size, which is at most what the latent [1, C, h, w] holds.

    Raises CheckpointError for a latent that the model's autoencoder does not decode, SizeError for another size.
    """
    factor = spec.autoencoder.spatial_compression_ratio
    _, channels, rows, columns = latent.shape
    if channels != spec.autoencoder.latent_channels:
        raise CheckpointError(
            f"{file}: the latent has {channels} channels and {spec.name} decodes {spec.autoencoder.latent_channels}; "
            "name the model that made it with --model"
        )
    width, height = request.width or columns * factor, request.height or rows * factor
    patch = spec.transformer.patch_size
    if -(-width // (factor * patch)) * patch != columns or -(-height // (factor * patch)) * patch != rows:
        raise SizeError(f"{file}: the latent of {columns}x{rows} does not hold a picture of {width}x{height}")
    return dataclasses.replace(request, width=width, height=height)
