"""A checkpoint folder with its matrices in 8 or 4 bits: written tensor by tensor, and whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from handscroll.errors import OutputError, UsageError
from handscroll.events import OnEvent, Progress, ignore
from handscroll.files import sync_folder, write_whole
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.folder import COMPONENTS
from handscroll.models.quantisation import Quantisation, form_of
from handscroll.units import first_line, gibibytes
from handscroll.version import __version__
from handscroll.weights.file_state import FileState, promises_of
from handscroll.weights.files import OpenFiles
from handscroll.weights.forms import PACKED, SHAPE, Form, matrix_shape, parts_of
from handscroll.weights.header import DTYPES, TensorEntry, read_metadata
from handscroll.weights.sources import Source
from handscroll.weights.tensor_file import header_bytes

PIECE_BYTES = 2**24
SOURCE = "handscroll_source"  # in a file's metadata: what it was made from, and how
REPORT = "quantisation.json"
_STORED_NAMES = {name: stored for stored, (name, _) in DTYPES.items()}
# Beside the components.
_FILES = ("model_index.json", "handscroll.json", "LICENSE", "LICENCE", "NOTICE", "README.md")
_FOLDERS = ("scheduler", "tokenizer")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One quantised matrix. error: of its numbers, `|made wide - before| / |before|` over all of them (Frobenius)."""

    name: str
    form: Form
    shape: tuple[int, ...]
    error: float
    bytes_before: int
    bytes_after: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "form": str(self.form),
            "shape": list(self.shape),
            "error": self.error,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: the folder, each component's storage, its matrices, what was left as it is, and all bytes."""

    folder: Path
    model: str
    storages: Mapping[str, str]
    matrices: tuple[Matrix, ...]
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "model": self.model,
            "precisions": dict(self.storages),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "matrices": [matrix.as_dict() for matrix in self.matrices],
            "kept": list(self.kept),
        }


def quantise_folder(
    spec: CheckpointSpec, storages: Mapping[str, str], output: Path, on_event: OnEvent = ignore
) -> Report:
    """Writes `output`, a checkpoint folder like the spec's with these components' matrices in these storages.

    It is `OUTPUT.part` until it is whole. A second run goes on with the files of it that are whole. Memory: one matrix,
    and some pieces. Raises UsageError for a component that is quantised already, OutputError where the folder cannot be
    written, CheckpointError for weights that cannot be read.
    """
    for component, storage in storages.items():
        if (stored := spec.quantisation_of(component)) is not None:
            raise UsageError(stored.refusal(spec.name, component, storage))
        if not spec.weights_of(component).files:
            raise UsageError(f"{spec.name}: its weights are not on this machine")
    if os.path.lexists(output):
        raise OutputError(f"{output}: is there already; give another folder, or move it away")
    part = output.with_name(f"{output.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        _check_room(spec, storages, part)
        report = _Writer(spec, storages, part, on_event).write(output)
        os.replace(part, output)
        sync_folder(output.parent)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written: {error.strerror or first_line(error)}; {part} keeps what is whole, and the "
            "same command goes on from there"
        ) from error
    return report


def _check_room(spec: CheckpointSpec, storages: Mapping[str, str], part: Path) -> None:
    there = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    needed = sum(_bytes_after(spec, component, storages.get(component, "")) for component in COMPONENTS)
    free = shutil.disk_usage(part).free
    if needed - there > free:
        raise OutputError(f"{part}: needs {gibibytes(needed - there)}, and {gibibytes(free)} are free")


def _bytes_after(spec: CheckpointSpec, component: str, storage: str) -> int:
    return sum(
        stored.n_bytes for entry in spec.weights_of(component).tensors for stored in _stored(component, storage, entry)
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the new file: its name, dtype as handscroll names it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


def _form(component: str, storage: str, entry: TensorEntry) -> Form | None:
    return form_of(component, storage, entry.name, entry.shape) if entry.dtype in ("fp32", "bf16", "fp16") else None


def _stored(component: str, storage: str, entry: TensorEntry) -> list[_Stored]:
    """What stands for one stored tensor: itself, or the parts of a matrix."""
    form = _form(component, storage, entry)
    if form is None:
        return [_Stored(entry.name, entry.dtype, entry.shape, entry.n_bytes)]
    owner = entry.name.removesuffix("weight")
    parts = [
        _Stored(f"{owner}{part.suffix}", part.dtype, part.shape, part.n_bytes) for part in parts_of(form, entry.shape)
    ]
    return [*parts, _Stored(f"{owner}{SHAPE}", "int64", (2,), 16)] if parts[0].name.endswith(PACKED) else parts


class _Writer:
    def __init__(self, spec: CheckpointSpec, storages: Mapping[str, str], part: Path, on_event: OnEvent) -> None:
        self.spec, self.storages, self.part, self.on_event = spec, storages, part, on_event
        self.matrices: list[Matrix] = []
        self.kept: list[str] = []
        self.tensors_done = 0
        self.tensors = sum(len(spec.weights_of(component).tensors) for component in storages)

    def write(self, output: Path) -> Report:
        for component in COMPONENTS:
            storage = self.storages.get(component)
            self._copy_small(component, quantised=storage is not None)
            if storage is not None:
                for file in self.spec.weights_of(component).files:
                    self._write_file(component, storage, file)
                self._write_index(component, storage)
                self._write_config(component, storage)
        self._copy_rest()
        report = Report(
            output,
            self.spec.name,
            dict(self.storages),
            tuple(self.matrices),
            tuple(self.kept),
            self.spec.n_bytes,
            sum(_bytes_after(self.spec, each, self.storages.get(each, "")) for each in COMPONENTS),
        )
        write_whole(self.part / REPORT, [json.dumps(report.as_dict(), indent=1).encode() + b"\n"])
        return report

    # What is copied as it is

    def _copy_small(self, component: str, quantised: bool) -> None:
        """A component's folder; without its weights and what names them, where these are made anew."""
        folder, weights = self.spec.folder / component, self.spec.weights_of(component)
        (self.part / component).mkdir(exist_ok=True)
        others = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"} - {
            file.name for file in weights.files
        }
        for file in sorted(folder.iterdir()):
            is_made = quantised and (file in weights.files or file.name == "config.json" or ".index." in file.name)
            if file.is_file() and not is_made and file.name not in others and file.suffix in (".json", ".safetensors"):
                self._copy(file, self.part / component / file.name)

    def _copy_rest(self) -> None:
        files = [self.spec.folder / name for name in _FILES]
        for name in _FOLDERS:
            (self.part / name).mkdir(exist_ok=True)
            files += sorted((self.spec.folder / name).iterdir())
        for file in files:
            if file.is_file():
                self._copy(file, self.part / file.relative_to(self.spec.folder))

    def _copy(self, source: Path, target: Path) -> None:
        if target.exists() and target.stat().st_size == source.stat().st_size:
            return

        def pieces() -> Iterator[bytes]:
            with source.open("rb") as stream:
                while piece := stream.read(PIECE_BYTES):
                    yield piece

        write_whole(target, pieces())

    # What is made

    def _write_file(self, component: str, storage: str, file: Path) -> None:
        weights = self.spec.weights_of(component)
        entries = [entry for entry in weights.tensors if entry.file == file]
        layout = [each for entry in entries for each in _stored(component, storage, entry)]
        made_from = _made_from(file, weights.state_of.get(file), storage, layout)
        target = self.part / component / file.name
        report = target.with_suffix(".report.json")
        if target.exists() and report.exists() and read_metadata(target).get(SOURCE) == made_from:
            self._take_report(json.loads(report.read_text()))
            self._tell(component, len(entries))
            return
        header: dict[str, Any] = {}
        end = 0
        for each in layout:
            start, end = end, end + each.n_bytes
            header[each.name] = {
                "dtype": _STORED_NAMES[each.dtype],
                "shape": list(each.shape),
                "data_offsets": [start, end],
            }
        header["__metadata__"] = {**read_metadata(file), "handscroll": __version__, SOURCE: made_from}
        files = OpenFiles(promises_of(entries, weights.state_of))
        found: dict[str, Any] = {"matrices": [], "kept": []}
        try:
            data = self._data(component, storage, entries, files, found)
            write_whole(target, itertools.chain([header_bytes(header)], data))
        finally:
            files.close()
        write_whole(report, [json.dumps(found).encode()])
        self._take_report(found)

    def _data(
        self, component: str, storage: str, entries: list[TensorEntry], files: OpenFiles, found: dict[str, Any]
    ) -> Iterator[bytes | memoryview]:
        for entry in entries:
            self._tell(component, 1)
            form = _form(component, storage, entry)
            if form is None:
                if entry.name.endswith(".weight") and len(entry.shape) > 1:
                    found["kept"].append(f"{component}: {entry.name}")
                yield from _copied(files, entry)
                continue
            source = replace(Source.plain(entry), form=form)
            packed = torch.empty(source.packed_bytes, dtype=torch.uint8)
            error = source.fill_packed_with_error(files.read, packed)
            parts = parts_of(form, entry.shape)
            for part in parts:
                yield packed[part.start : part.start + part.n_bytes].numpy().data
            after = sum(part.n_bytes for part in parts)
            if form.storage == "int4":
                rows, columns = matrix_shape(entry.shape)
                yield rows.to_bytes(8, "little") + columns.to_bytes(8, "little")
                after += 16
            matrix = Matrix(f"{component}: {entry.name}", form, entry.shape, error, entry.n_bytes, after)
            found["matrices"].append(matrix.as_dict() | asdict(form))

    def _tell(self, component: str, tensors: int) -> None:
        self.tensors_done += tensors
        self.on_event(Progress("quantize", self.tensors_done, self.tensors, 0, component.replace("_", " ")))

    def _take_report(self, found: Mapping[str, Any]) -> None:
        for each in found["matrices"]:
            form = Form(each["storage"], each["group"], each["rank"])
            sizes = each["bytes_before"], each["bytes_after"]
            self.matrices.append(Matrix(each["name"], form, tuple(each["shape"]), each["error"], *sizes))
        self.kept += found["kept"]

    def _write_index(self, component: str, storage: str) -> None:
        weights = self.spec.weights_of(component)
        for file in weights.files:
            (self.part / component / file.name).with_suffix(".report.json").unlink(missing_ok=True)
        if len(weights.files) < 2:
            return
        weight_map, total = {}, 0
        for entry in weights.tensors:
            for each in _stored(component, storage, entry):
                weight_map[each.name] = entry.file.name
                total += each.n_bytes
        base = weights.files[0].name.partition("-0")[0]
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_whole(self.part / component / f"{base}.safetensors.index.json", [json.dumps(index, indent=1).encode()])

    def _write_config(self, component: str, storage: str) -> None:
        config = json.loads((self.spec.folder / component / "config.json").read_text())
        forms = [matrix.form for matrix in self.matrices if matrix.name.startswith(component)]
        group = max((form.group for form in forms), default=0)
        quantisation = Quantisation(storage, self.spec.dtype_of(component), any(form.rank for form in forms))
        config["quantization_config"] = quantisation.as_config(group)
        write_whole(self.part / component / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])


def _made_from(file: Path, state: FileState | None, storage: str, layout: list[_Stored]) -> str:
    """What a file is made from, and into what: the next run takes one that is whole only where both are the same."""
    facts: list[object] = [file.name, state and (state.n_bytes, state.modified_ns), storage, __version__]
    facts += [(each.name, each.dtype, each.shape) for each in layout]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _copied(files: OpenFiles, entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of a tensor as they are stored."""
    count = entry.n_bytes
    for first in range(0, count, PIECE_BYTES):
        size = min(PIECE_BYTES, count - first)
        piece = torch.empty(size, dtype=torch.uint8)
        files.read(entry.part(first, size, (size,), "uint8"), piece)
        yield piece.numpy().data
