"""Which safetensors files hold a component's weights. No torch, no weight is read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from handscroll.errors import CheckpointError
from handscroll.weights.file_state import FileState
from handscroll.weights.header import TensorEntry, read_header

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FILE_NAME = re.compile(
    r"(?P<base>diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>(?!safetensors)[\w-]+?))??"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """All tensors of one component, over one file or several shards."""

    files: tuple[Path, ...]
    tensors: tuple[TensorEntry, ...]
    states: tuple[FileState, ...] = ()  # of the files, as their headers were read

    @classmethod
    def from_folder(cls, folder: Path) -> WeightFiles:
        """Read the headers of a component folder such as `transformer/`.

        Raises CheckpointError for no weights, a missing shard, a truncated file or a name that occurs twice.
        """
        files = find_weight_files(folder)
        states = _states(files)
        tensors = tuple(entry for file in files for entry in read_header(file))
        for name, times in Counter(entry.name for entry in tensors).items():
            if times > 1:
                raise CheckpointError(f"{folder}: the tensor {name} occurs in {times} shards")
        return cls(files, tensors, states)

    @property
    def state_of(self) -> dict[Path, FileState]:
        """How each file was found; nothing where that was not noted."""
        return dict(zip(self.files, self.states, strict=False))

    @property
    def n_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self.tensors)

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.tensors)

    @property
    def dtype_bytes(self) -> dict[str, int]:
        """The bytes in each dtype, most first."""
        held: Counter[str] = Counter()
        for entry in self.tensors:
            held[entry.dtype] += entry.n_bytes
        return dict(held.most_common())

    @property
    def dtype(self) -> str:
        """The dtype that most bytes are in: `fp32`, `bf16` or `fp16` for everything published so far."""
        return next(iter(self.dtype_bytes), "fp32")


NO_WEIGHTS = WeightFiles((), ())


def _states(files: Iterable[Path]) -> tuple[FileState, ...]:
    try:
        return tuple(map(FileState.of, files))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way in which a component is stored: plain or a variant, a single file or an index and its shards."""

    variant: str | None
    names: tuple[str, ...]
    index: str | None


def candidates(names: Iterable[str]) -> list[Candidate]:
    """The ways in which a component folder with these file names holds its weights, in diffusers' order.

    The plain files come first, then variants by name; where a single file and shards hold the same, the single file
    counts.
    """
    singles: dict[str | None, str] = {}
    indices: dict[str | None, str] = {}
    shards: dict[str | None, list[str]] = {}
    for name in sorted(names):
        match = _FILE_NAME.fullmatch(name)
        if match is None:
            continue
        if match["index"]:
            indices.setdefault(match["index_variant"] or match["variant"], name)
        elif match["shard"]:
            shards.setdefault(match["variant"], []).append(name)
        else:
            singles.setdefault(match["variant"], name)
    found = []
    for variant in sorted({*singles, *indices}, key=lambda variant: (variant is not None, variant or "")):
        if variant in singles:
            found.append(Candidate(variant, (singles[variant],), None))
        elif variant in indices:
            found.append(Candidate(variant, tuple(shards.get(variant, ())), indices[variant]))
    return found


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files to read in a component folder: the plain ones if whole, else the first whole variant."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
    found = candidates(names)
    if not found:
        raise CheckpointError(_nothing_found(folder, names))
    first_error: CheckpointError | None = None
    for candidate in found:
        try:
            return _whole(folder, candidate)
        except CheckpointError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _whole(folder: Path, candidate: Candidate) -> tuple[Path, ...]:
    if candidate.index is None:
        return tuple(folder / name for name in candidate.names)
    index = folder / candidate.index
    try:
        promised = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards") from error
    for name in promised:
        # A shard's name is joined to the folder, so it must not lead out of it.
        if not isinstance(name, str) or _FILE_NAME.fullmatch(name) is None:
            raise CheckpointError(f"{index}: names {name!r}, which is no safetensors shard")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: this shard is missing, though {index.name} names it")
    return tuple(folder / name for name in promised)


def _nothing_found(folder: Path, names: list[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return (
            f"{folder / pickles[0]}: a pickle, which can run code when it is opened, so it is not read; "
            "convert the model with diffusers' save_pretrained(FOLDER, safe_serialization=True) and use that folder"
        )
    return f"{folder}: holds no weights; expected diffusion_pytorch_model.safetensors or model.safetensors"
