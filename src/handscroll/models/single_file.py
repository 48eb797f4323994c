"""A file that is given where a checkpoint folder is expected: what it is, and what to do."""

from __future__ import annotations

from pathlib import Path

from handscroll.errors import CheckpointError
from handscroll.models.index import LAYOUT
from handscroll.weights.foreign import (
    FUSE_FIRST,
    LORA_FILES,
    PICKLE_SUFFIXES,
    SAVE_AS_FOLDER,
    USE_THE_ORIGINAL,
    by_suffix,
    first_bytes,
    is_adapter,
    quantised_by_tensors,
    stands_in,
    what_it_is,
)
from handscroll.weights.header import read_header

CONVERT = (
    "use the checkpoint that diffusers reads, such as --model sana-1.6b or a hub id ending in _diffusers, "
    "or convert it with diffusers' scripts/convert_sana_to_diffusers.py"
)


def describe_file(file: Path) -> str:
    """One line without the file's name. At most a header is read."""
    folder = file.resolve().parent
    if (folder / "model_index.json").is_file() or (folder.parent / "model_index.json").is_file():
        whole = folder if (folder / "model_index.json").is_file() else folder.parent
        return f"only one file of a checkpoint; give the folder that it lies in, {whole}"
    suffix = file.suffix.lower()
    first = first_bytes(file)
    if said := stands_in(first):
        return said
    if suffix in PICKLE_SUFFIXES:
        return f"a pickle, which can run code when it is opened, so it is not read; {CONVERT}"
    if said := by_suffix(file.name):
        return said
    if suffix == ".safetensors" or first[8:9] == b"{":
        return _describe_safetensors(file)
    if said := what_it_is(first):
        return said
    return f"a file, and a model is a folder with {LAYOUT}, a short name or a hub id owner/name"


def _describe_safetensors(file: Path) -> str:
    try:
        names = [entry.name for entry in read_header(file)]
    except CheckpointError as error:
        return str(error).removeprefix(f"{file}: ")
    if file.name in LORA_FILES or is_adapter(names):
        return f"a LoRA adapter and not a model; {FUSE_FIRST}"
    if how := quantised_by_tensors(names):
        return f"a single file of weights that are {how}, which handscroll does not read; {USE_THE_ORIGINAL}"
    if any(name.startswith(("transformer_blocks.", "decoder.", "encoder.")) for name in names):
        return f"a single file of weights, and a model is a folder with {LAYOUT}; {SAVE_AS_FOLDER}"
    return f"a single file of weights, and a model is a folder with {LAYOUT}; {CONVERT}"
