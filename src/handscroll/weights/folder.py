"""Which safetensors files hold a component's weights. No torch, no weight is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from handscroll.errors import CheckpointError
from handscroll.units import one_line
from handscroll.weights.file_state import FileState
from handscroll.weights.foreign import strange_folder, unreadable
from handscroll.weights.header import MAX_NAME, TensorEntry, read_all
from handscroll.weights.json_text import read_json

MAX_TENSORS = 50_000
_FILE_NAME = re.compile(
    r"(?P<base>diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>(?!safetensors)[\w-]+?))??"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5})(?:\.(?P<old_variant>(?!safetensors)[\w-]+))?)?\.safetensors"
    r"(?P<index>(?:\.(?P<old_index_variant>(?!index)[\w-]+))?\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """All tensors of one component, over one file or several shards.

    `tied`: names of tensors that are not stored, and the stored name of each one's numbers. safetensors' `save_model`
    keeps one of several names that share memory, and writes the others into the metadata.
    """

    files: tuple[Path, ...]
    tensors: tuple[TensorEntry, ...]
    tied: tuple[tuple[str, str], ...] = ()
    states: tuple[FileState, ...] = ()  # of the files, as their headers were read

    @classmethod
    def from_folder(cls, folder: Path) -> WeightFiles:
        """Read the headers of a component folder such as `transformer/`.

        Raises CheckpointError for no weights, a missing shard, a truncated file or a name that occurs twice.
        """
        files = find_weight_files(folder)
        states = _states(files)
        held = []
        for file in files:
            held.append(read_all(file))
            if sum(len(entries) for entries, _ in held) > MAX_TENSORS:
                raise CheckpointError(f"{folder}: holds more than {MAX_TENSORS:,} tensors, which no known model does")
        tensors = tuple(entry for entries, _ in held for entry in entries)
        for name, times in Counter(entry.name for entry in tensors).items():
            if times > 1:
                raise CheckpointError(f"{folder}: the tensor {one_line(name, MAX_NAME)} occurs in {times} shards")
        names = {entry.name for entry in tensors}
        said = {each for _, metadata in held for each in metadata.items()}
        tied = sorted((other, name) for other, name in said if name in names and other not in names)
        return cls(files, tensors, tuple(tied), states)

    @property
    def state_of(self) -> dict[Path, FileState]:
        """How each file was found; nothing where that was not noted."""
        return dict(zip(self.files, self.states, strict=False))

    def named(self) -> Iterator[tuple[str, TensorEntry]]:
        """Every name that stands for a tensor, and the tensor; those that are stored first, in file order."""
        stored = {entry.name: entry for entry in self.tensors}
        yield from stored.items()
        for name, other in self.tied:
            yield name, stored[other]

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
        """Of `fp32`, `bf16` and `fp16` the one that most bytes are in; empty where there are no tensors.

        Where nothing is in one of these, as in weights that are quantised, it is what most bytes are in.
        """
        held = list(self.dtype_bytes)
        return next((dtype for dtype in held if dtype in ("fp32", "bf16", "fp16")), held[0] if held else "")


NO_WEIGHTS = WeightFiles((), ())


def _states(files: Iterable[Path]) -> tuple[FileState, ...]:
    try:
        return tuple(map(FileState.of, files))
    except OSError as error:
        raise CheckpointError(unreadable(Path(error.filename), error)) from error


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
            indices.setdefault(_variant_of(match), name)
        elif match["shard"]:
            shards.setdefault(_variant_of(match), []).append(name)
        else:
            singles.setdefault(_variant_of(match), name)
    found = []
    for variant in sorted({*singles, *indices}, key=lambda variant: (variant is not None, variant or "")):
        if variant in singles:
            found.append(Candidate(variant, (singles[variant],), None))
        elif variant in indices:
            found.append(Candidate(variant, tuple(shards.get(variant, ())), indices[variant]))
    return found


def _variant_of(match: re.Match[str]) -> str | None:
    """`bf16`, wherever it stands in a name; diffusers once put it after the number of a shard, before `index`."""
    kinds = ("variant", "old_variant", "index_variant", "old_index_variant")
    return next((match[kind] for kind in kinds if match[kind]), None)


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
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{index}: not an index of safetensors shards; fetch it again")
    promised = sorted(set(shard_of.values()))
    if not promised:
        raise CheckpointError(f"{index}: names no safetensors shards; fetch it again")
    for name in promised:
        # A shard's name is joined to the folder, so it must not lead out of it.
        match = _FILE_NAME.fullmatch(name)
        if match is None or match["index"]:
            raise CheckpointError(f"{index}: names {one_line(repr(name), MAX_NAME)}, which is no safetensors shard")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: this shard is missing, though {index.name} names it")
    return tuple(folder / name for name in promised)


def _nothing_found(folder: Path, names: list[str]) -> str:
    if said := strange_folder(names):
        return f"{folder}: {said}"
    matches = [match for name in sorted(names) if (match := _FILE_NAME.fullmatch(name))]
    if matches:
        index = f"{matches[0]['base']}.safetensors.index.json"
        return f"{folder}: holds {matches[0][0]} and not the index of its shards, {index}; fetch that too"
    return f"{folder}: holds no weights; expected diffusion_pytorch_model.safetensors or model.safetensors"
