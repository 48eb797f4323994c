"""A finished latent on disk: safetensors, with what is needed to decode and label it in the file's metadata.

Other tools' latents are read too, as they save them: `latents` of diffusers' pipelines (`output_type="latent"`) are
scaled as ours are; ComfyUI's `latent_tensor` is in the autoencoder's own scale, which its file says.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handscroll.errors import CheckpointError, FormatError, OutputError, SizeError, UsageError
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.request import Request
from handscroll.units import MAX_SIDE_PX, listed, one_line, shown
from handscroll.weights.header import TensorEntry, read_header, read_metadata
from handscroll.weights.tensor_file import CHECKSUM, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

TENSOR_NAME = "latent"
COMFY_NAME, COMFY_MARK = "latent_tensor", "latent_format_version_0"
# As other tools call a latent. Where none of these is there, it is the only tensor that can be one.
NAMES = (TENSOR_NAME, "latents", "samples", COMFY_NAME, "image_latents", "z")
# A latent decodes without its prompt, which a request cannot be without.
_NO_PROMPT = "a latent"
_FLOATS = ("fp64", "fp32", "fp16", "bf16")
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
    """Raises OutputError where a file is in the way that `save_latent` has not written. For names that a file gives."""
    try:
        is_ours = not os.path.lexists(path) or (not path.is_symlink() and _is_ours(path))
    except CheckpointError:
        is_ours = False
    if not is_ours:
        raise OutputError(
            f"{path}: is in the way and is no latent of handscroll; move it, or name a file with --save-latent"
        )


def _is_ours(path: Path) -> bool:
    entries, facts = read_header(path), read_metadata(path)
    return [entry.name for entry in entries] == [TENSOR_NAME] and {CHECKSUM, "model"} <= facts.keys()


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
    named = [entry for entry in read_header(path) if entry.name in NAMES and _is_one(entry)]
    return (named[0].shape, facts_of_latent(path)) if len(named) == 1 else None


def facts_of_latent(path: Path) -> dict[str, str]:
    """What a latent's file says of how it was made, from its header alone. Raises CheckpointError naming the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; --save-latent of generate makes one")
    if any(entry.name == COMFY_MARK for entry in read_header(path)):
        return {}  # ComfyUI's `prompt` is a graph of nodes
    return {name: value for name, value in read_metadata(path).items() if name != CHECKSUM}


def load_latent(path: Path, autoencoder: AutoencoderSpec | None = None) -> tuple[Tensor, dict[str, str]]:
    """The latent [1, C, h, w] fp32 of a file, scaled as a sampler leaves it, and the file's facts.

    autoencoder: what decodes it, which tells a latent among several tensors and undoes another scale. Left out, only
    what `save_latent` writes is read. Raises CheckpointError naming the file, and the tensors where it is not clear.
    """
    facts = facts_of_latent(path)
    entry = _chosen(path, read_header(path), autoencoder)
    if not _is_one(entry):
        raise CheckpointError(
            f"{path}: the tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; a latent is [1, channels, h, w] "
            "or [channels, h, w], of floats"
        )
    if len(entry.shape) == 4 and entry.shape[0] > 1:
        raise CheckpointError(f"{path}: {entry.name!r} holds {entry.shape[0]} latents; save each in a file of its own")
    _check_size(path, entry, autoencoder)
    stored = read_tensors(path, entry.name)[0][entry.name]
    latent = stored.float()
    if entry.dtype == "fp64" and stored.isfinite().all() and not latent.isfinite().all():
        raise CheckpointError(f"{path}: {entry.name!r} holds numbers too large for fp32, which no model makes")
    latent = latent if latent.ndim == 4 else latent[None]
    if entry.name == COMFY_NAME and autoencoder is not None:
        latent *= autoencoder.scaling_factor
    return latent, facts


def _check_size(path: Path, entry: TensorEntry, autoencoder: AutoencoderSpec | None) -> None:
    """Raises CheckpointError for what no picture is made of, before a file that claims it is read."""
    height, width = entry.shape[-2:]
    ratio = 1 if autoencoder is None else autoencoder.spatial_compression_ratio
    if max(height, width) * ratio > MAX_SIDE_PX:
        raise CheckpointError(f"{path}: a latent of {width}x{height} is of a picture above {MAX_SIDE_PX} a side")


def how_read(path: Path, autoencoder: AutoencoderSpec) -> tuple[str, ...]:
    """A line for the user on how another tool's latent was understood; nothing for one of ours."""
    name = _chosen(path, read_header(path), autoencoder).name
    if name == TENSOR_NAME:
        return ()
    if name == COMFY_NAME:
        return (f"{path}: {name!r} is taken as ComfyUI saves it, in the autoencoder's own scale",)
    return (f"{path}: {one_line(repr(name))} is taken as diffusers' pipelines give it for output_type='latent'",)


def _chosen(path: Path, entries: Sequence[TensorEntry], autoencoder: AutoencoderSpec | None) -> TensorEntry:
    """The tensor that is the latent. Raises CheckpointError where none is, or several may be."""
    names = NAMES if autoencoder is not None else (TENSOR_NAME,)
    named = [entry for entry in entries if entry.name in names]
    found = [entry for entry in named if _is_one(entry)] or named
    if autoencoder is not None and (not found or not _is_one(found[0])):
        others = [entry for entry in entries if _is_one(entry)]
        fitting = [entry for entry in others if entry.shape[-3] == autoencoder.latent_channels]
        found = fitting or [entry for entry in others if len(entry.shape) == 4] or found
    if not found:
        there = listed(one_line(repr(entry.name), 40) for entry in entries) or "no tensor"
        raise CheckpointError(f"{path}: holds no latent; it holds {there}, and a latent is called {TENSOR_NAME!r}")
    if len(found) > 1:
        there = listed(one_line(repr(entry.name), 40) for entry in found)
        raise CheckpointError(f"{path}: which of {there} is the latent? save it alone in a file, as {TENSOR_NAME!r}")
    if found[0].name == COMFY_NAME and not any(entry.name == COMFY_MARK for entry in entries):
        raise CheckpointError(
            f"{path}: {COMFY_NAME!r} without {COMFY_MARK!r} does not say how it is scaled; save it anew with ComfyUI"
        )
    return found[0]


def _is_one(entry: TensorEntry) -> bool:
    return len(entry.shape) in (3, 4) and min(entry.shape) > 0 and entry.dtype in _FLOATS


def request_of_latent(file: Path, facts: Mapping[str, str], wanted: Mapping[str, Any]) -> Request:
    """The request that decodes a saved latent: its model and size, with the fields in `wanted` as they are asked for.

    Raises CheckpointError where the file does not say which model made it, or its metadata is broken; UsageError.
    """
    named = wanted.get("model") or facts.get("model")
    if named is None:
        raise CheckpointError(f"{file}: does not say which model made it; name it with --model")
    made: dict[str, Any] = {"model": named}
    try:
        made |= {side: _side(side, facts[side]) for side in ("width", "height") if facts.get(side, "").strip()}
        if "model" not in wanted:
            made["revision"] = facts.get("revision") or None
        Request(_NO_PROMPT, **made)
    except (ValueError, OverflowError, UsageError) as error:
        raise CheckpointError(f"{file}: its metadata is broken: {one_line(error, MAX_REASON)}") from error
    return Request(_NO_PROMPT, **{**made, **wanted})


def _side(name: str, told: str) -> int:
    """A side as a file tells it, also as 64.0. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,12})(\.0*)?", told.strip())
    if found is None:
        raise ValueError(f"{name} is {shown(told)}; take it out there, and the whole of the latent is decoded")
    return int(found[1])


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
