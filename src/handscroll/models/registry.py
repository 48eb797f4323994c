"""Short names for the official Sana checkpoints and for the model that ships inside the package.

The checkpoints live under https://huggingface.co/Efficient-Large-Model; nothing here reaches for them.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from handscroll.errors import UnknownModelError, UsageError
from handscroll.models.links import split_link
from handscroll.models.single_file import describe_file
from handscroll.units import shown
from handscroll.weights.foreign import PICKLE_SUFFIXES

# How files of weights are called; no hub id ends so.
MODEL_FILES = (".safetensors", ".gguf", ".onnx", ".msgpack", *PICKLE_SUFFIXES)
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"
# As the model cards state it: https://huggingface.co/Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers
SANA_LICENCE = (
    "NVIDIA License (NSCL v2-custom): non-commercial, read the checkpoint's LICENSE.txt; "
    "text encoder: Gemma Terms of Use (ai.google.dev/gemma/terms)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint with a short name. `hub_id` is None for the built-in one, which has a `builtin_folder` instead.

    `native_px` is the side of the pictures it was trained on, `precision` what its transformer should run in.
    """

    name: str
    hub_id: str | None
    native_px: int
    precision: str
    licence: str
    note: str

    @property
    def builtin_folder(self) -> Path | None:
        return None if self.hub_id else BUILTIN_FOLDER / self.name


def _official(name: str, repository: str, native_px: int, precision: str, note: str) -> Entry:
    return Entry(name, f"Efficient-Large-Model/{repository}", native_px, precision, SANA_LICENCE, note)


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "tiny-landscape",
        None,
        1024,
        "fp32",
        "Apache-2.0",
        "ships with handscroll: small painted landscapes, made to try everything without a download",
    ),
    _official("sana-0.6b-512", "Sana_600M_512px_diffusers", 512, "fp16", "the lightest; multilingual"),
    _official("sana-0.6b", "Sana_600M_1024px_diffusers", 1024, "fp16", "light; multilingual"),
    _official("sana-1.6b-512", "Sana_1600M_512px_diffusers", 512, "fp16", "English"),
    _official("sana-1.6b-512-multiling", "Sana_1600M_512px_MultiLing_diffusers", 512, "fp16", "multilingual"),
    _official("sana-1.6b", "Sana_1600M_1024px_BF16_diffusers", 1024, "bf16", "the usual choice; multilingual"),
    _official("sana-1.6b-fp16", "Sana_1600M_1024px_diffusers", 1024, "fp16", "English; prefer sana-1.6b"),
    _official("sana-1.6b-multiling", "Sana_1600M_1024px_MultiLing_diffusers", 1024, "fp16", "prefer sana-1.6b"),
    _official("sana-1.6b-2k", "Sana_1600M_2Kpx_BF16_diffusers", 2048, "bf16", "2048x2048; multilingual"),
    _official("sana-1.6b-4k", "Sana_1600M_4Kpx_BF16_diffusers", 4096, "bf16", "4096x4096; multilingual"),
    _official("sana-1.5-1.6b", "SANA1.5_1.6B_1024px_diffusers", 1024, "bf16", "trained further; multilingual"),
    _official("sana-1.5-4.8b", "SANA1.5_4.8B_1024px_diffusers", 1024, "bf16", "the largest; multilingual"),
    _official("sana-sprint-0.6b", "Sana_Sprint_0.6B_1024px_diffusers", 1024, "bf16", "1 to 4 steps"),
    _official("sana-sprint-1.6b", "Sana_Sprint_1.6B_1024px_diffusers", 1024, "bf16", "1 to 4 steps"),
)
BY_NAME: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
BY_HUB_ID: dict[str, Entry] = {entry.hub_id: entry for entry in ENTRIES if entry.hub_id}
_OFFICIAL = {hub_id.lower(): entry for hub_id, entry in BY_HUB_ID.items()}  # the hub takes its ids in any case
# The hub's own rule: letters, digits, `-`, `_` and `.`, not at either end, and none of the pairs `--` and `..`.
_HUB_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(f"{_HUB_PART}/{_HUB_PART}", re.ASCII)


def split_revision(model: str | Path, revision: str | None = None) -> tuple[str | Path, str | None]:
    """`owner/name@REV`, `short-name@REV` or a link of the hub -> the model and its revision, which may be given apart.

    A folder whose name holds an @ is a folder. Raises UsageError for two revisions, or none after the @.
    """
    model = model_name(model)
    text = str(model)
    if isinstance(model, Path) or _local(text) is not None:
        return model, revision
    if link := split_link(text):
        return link[0], _one_revision(text, link[1], revision)
    if "@" not in text:
        return model, revision
    name, _, named = text.partition("@")
    if not named:
        raise UsageError(f"{text!r} names no revision after the @; write owner/name@REVISION")
    return name, _one_revision(text, named, revision)


def _one_revision(text: str, named: str | None, revision: str | None) -> str | None:
    """Of the revision in a text and the one beside it. Raises UsageError for two."""
    if None not in (named, revision) and revision != named:
        raise UsageError(f"{text!r} and --revision {revision} name two revisions; give one of them")
    return revision if named is None else named


def resolve(model: str | Path) -> Entry | Path | str:
    """What a user means by a model: a registry entry, a folder on this machine, or a hub id as `owner/name` or a link.

    A short name comes before a folder of the same name (write `./name` for the folder), and the hub id of an official
    checkpoint is its entry. A revision after an @ is not looked at. Raises UnknownModelError, with the closest short
    names, for anything else.
    """
    model = model_name(model)
    if isinstance(model, Path):
        if folder := _local(model):
            return _as_folder(folder)
        raise UnknownModelError(f"no such model folder: {model}")
    model = str(split_revision(model)[0])
    entry = BY_NAME.get(model.lower()) or _OFFICIAL.get(model.lower())
    if entry is not None:
        return entry
    if model and (folder := _local(model)):
        return _as_folder(folder)
    if model.startswith((".", "/", "~")) or "\\" in model:
        raise UnknownModelError(f"no such model folder: {model}")
    if model.lower().endswith(MODEL_FILES):
        raise UnknownModelError(f"no such file: {model}; and a model is a folder, a short name or a hub id owner/name")
    if _HUB_ID.fullmatch(model):
        return model
    if "://" in model:
        raise UnknownModelError(f"{model}: no link of huggingface.co; give a folder, a short name or owner/name")
    raise UnknownModelError(
        f"no model {shown(model, 100)}; {_closest(model[:100])}; a checkpoint folder or a hub id owner/name also does"
    )


def model_name(model: object) -> str | Path:
    """A model as somebody gave it, a name or a path. Raises UnknownModelError for what is neither."""
    if isinstance(model, os.PathLike) and not isinstance(model, Path):
        model = os.fspath(model)
    if not isinstance(model, str | Path):
        raise UnknownModelError(f"model {shown(model)} is no name; give a text or a pathlib.Path")
    return model


def _local(model: str | Path) -> Path | None:
    """What a text names on this machine, if there is something."""
    try:
        path = Path(model).expanduser()
        return path if os.path.lexists(path) else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, no such user, a zero byte
        return None


def _as_folder(path: Path) -> Path:
    """Raises UnknownModelError for what is no folder, saying what it is."""
    if path.is_dir():
        return path
    if path.is_symlink() and not path.exists():
        raise UnknownModelError(f"{path}: a link to {shown(os.readlink(path))}, which is not there")
    said = describe_file(path) if path.is_file() else "neither a folder nor a file"
    raise UnknownModelError(f"{path}: {said}")


def _closest(model: str) -> str:
    near = difflib.get_close_matches(model.lower(), BY_NAME, n=3, cutoff=0.5)
    return f"the closest names are {', '.join(near)}" if near else "`handscroll models` lists the short names"
