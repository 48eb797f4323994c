"""Every tensor of a module against the headers of its files, before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from handscroll.errors import CheckpointError
from handscroll.events import OnEvent, notice
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.units import one_line
from handscroll.weights import bitsandbytes
from handscroll.weights.dtypes import DTYPES
from handscroll.weights.folder import WeightFiles
from handscroll.weights.foreign import FUSE_FIRST, USE_THE_ORIGINAL, has_both_factors, is_adapter, quantised_by_tensors
from handscroll.weights.forms import LOW_RANK, PACKED, SCALE, SHAPE
from handscroll.weights.header import MAX_NAME, TensorEntry, shape_text
from handscroll.weights.sources import Source, stored_matrix

SMALL = 2**20  # parameters, which take no time to be looked for one by one
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_amount(spec: CheckpointSpec, component: str, part: str | None) -> None:
    """Raises CheckpointError where a config describes far more than is stored, before that is made.

    A module without its weights takes memory too, for every layer: a config must not be able to ask for any amount.
    """
    weights = spec.weights_of(component)
    match component, part:
        case "transformer", _:
            described = spec.transformer.parameter_count
        case "text_encoder", _:
            described = spec.text_encoder.parameter_count
        case _, "decoder":
            described = spec.autoencoder.decoder_parameter_count
        case _:
            described = spec.autoencoder.encoder_parameter_count if part else spec.autoencoder.parameter_count
    # Of 4 bits, eight numbers in an int32, two in a byte.
    stored = sum(math.prod(entry.shape) * _numbers_in(entry) for _, entry in weights.named())
    if described > 2 * stored + SMALL:
        if said := _strange([entry.name for entry in weights.tensors]):
            raise CheckpointError(f"{spec.folder / component}: {said}")
        raise CheckpointError(
            f"{spec.folder / component / 'config.json'}: describes {described:,} parameters, and the files beside it "
            f"hold {stored:,}; they do not belong together"
        )


def _numbers_in(entry: TensorEntry) -> int:
    """The most numbers of a matrix that stand in one that is stored."""
    return 8 if entry.name.endswith(PACKED) else 2 if entry.dtype == "uint8" else 1


def match_tensors(
    spec: CheckpointSpec, component: str, module: nn.Module, part: str | None, on_event: OnEvent
) -> dict[str, Source]:
    """Where each tensor of the module's state dict comes from, in file order.

    A tensor that is stored under another name, as the file says, is found there. What the module has no place for is
    left out, and told once. Raises CheckpointError, naming file and tensor, for one that is missing or of another shape
    or kind, and for weights that are quantised, or an adapter that is not fused.
    """
    weights = spec.weights_of(component)
    wanted = module.state_dict()
    computed = {name for name, _ in module.named_buffers()} - wanted.keys()
    other_half = {"decoder": "encoder.", "encoder": "decoder."}.get(part or "")

    quantisation = spec.quantisation_of(component)
    part_of, matrix = part_in_form, matrix_in_form
    if quantisation is not None and quantisation.is_bitsandbytes:
        part_of, matrix = bitsandbytes.part_of, bitsandbytes.matrix
    found: dict[str, TensorEntry] = {}
    parts: dict[str, dict[str, TensorEntry]] = {}
    extra: list[TensorEntry] = []
    for name, entry in named(component, weights):
        a_part = part_of(name, entry.dtype) if quantisation is not None else None
        if a_part is not None and a_part[0] in wanted:
            parts.setdefault(a_part[0], {})[a_part[1]] = entry
            continue
        if name in computed or (other_half and name.startswith(other_half)):
            continue
        if name not in wanted:
            extra.append(entry)
            continue
        if name in found:
            raise CheckpointError(f"{entry.file}: the tensor {name} is there twice, once as {found[name].name}")
        _check(weights, entry, tuple(wanted[name].shape), wanted[name].is_floating_point())
        found[name] = entry
    sources = {name: Source.plain(entry) for name, entry in found.items()}
    for name, its in parts.items():
        if name in found:
            raise CheckpointError(f"{found[name].file}: the tensor {name} is there twice, once quantised")
        shape, first = tuple(wanted[name].shape), next(iter(its.values()))
        if len(shape) < 2 or any(size != 1 for size in shape[2:]):
            told = one_line(first.name, MAX_NAME)
            raise CheckpointError(f"{first.file}: the tensor {told} is quantised and no matrix")
        sources[name] = matrix(shape, its)
    if missing := [name for name in wanted if name not in sources]:
        raise CheckpointError(_missing(spec.folder / component, weights, missing))
    if extra:
        # A scale changes the layer that it is beside, and an adapter has two factors; others change nothing.
        modules = [name for name, _ in module.named_modules() if name]
        names = [entry.name for entry in extra]
        beside = [name for name in names if any(f".{each}." in f".{name}" for each in modules)]
        if said := _strange(names if has_both_factors(names) else beside):
            raise CheckpointError(f"{spec.folder / component}: {said}")
        on_event(notice(_left_out(extra)))
    return sources


def part_in_form(name: str, dtype: str) -> tuple[str, str] | None:
    """The parameter that a tensor is a part of, and which part (weights/forms.py); None for others."""
    owner, _, suffix = name.rpartition(".")
    is_part = suffix in (PACKED, SCALE, SHAPE, *LOW_RANK) or (suffix == "weight" and dtype in ("int8", "fp8"))
    return (f"{owner}.weight", suffix) if is_part else None


def matrix_in_form(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> Source:
    """A quantised matrix. Raises CheckpointError where a part is missing, or does not fit."""
    needed = [PACKED if PACKED in parts else "weight", SCALE]
    needed += LOW_RANK if parts.keys() & set(LOW_RANK) else ()
    if lacking := [suffix for suffix in needed if suffix not in parts]:
        there = next(iter(parts.values()))
        missing = f"{there.name.rpartition('.')[0]}.{lacking[0]}"
        raise CheckpointError(
            f"{there.file}: the tensor {one_line(missing, MAX_NAME)} is missing, to which {there.name} belongs"
        )
    return stored_matrix(shape, parts)


def named(component: str, weights: WeightFiles) -> Iterator[tuple[str, TensorEntry]]:
    """Every tensor with the module's name for it: stored under it, or under the other name of numbers that are shared.

    A text encoder that was saved as Gemma2ForCausalLM lies under `model.`, and its head is the table of embeddings, of
    which a file may hold either.
    """
    stored = dict(weights.named())
    if component == "text_encoder":
        head = stored.pop(HEAD, None)
        if head is not None and not {EMBEDDING, EMBEDDING.removeprefix("model.")} & stored.keys():
            stored[EMBEDDING] = head
    for name, entry in stored.items():
        yield name.removeprefix("model.") if component == "text_encoder" else name, entry


def _check(weights: WeightFiles, entry: TensorEntry, shape: tuple[int, ...], is_floating_point: bool) -> None:
    """Raises CheckpointError for a stored tensor that is not what the module wants."""
    fits = entry.dtype in DTYPES and DTYPES[entry.dtype].is_floating_point == is_floating_point
    if fits and entry.shape == shape:
        return
    name = one_line(entry.name, MAX_NAME)
    if not fits:
        how = quantised_by_tensors([each.name for each in weights.tensors]) or "quantised"
        raise CheckpointError(
            f"{entry.file}: the tensor {name} is stored as {entry.dtype}: {how} files are not supported; "
            f"{USE_THE_ORIGINAL}"
        )
    raise CheckpointError(
        f"{entry.file}: the tensor {name} has shape {_told(entry.shape)}, the config asks for {_told(shape)}"
    )


def _missing(folder: Path, weights: WeightFiles, missing: list[str]) -> str:
    where = weights.files[0] if len(weights.files) == 1 else folder
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    line = f"{where}: the tensor {missing[0]}{more} is missing"
    said = _strange([entry.name for entry in weights.tensors])
    return f"{line}: the folder {said}" if said else line


def _strange(names: list[str]) -> str:
    """What tensors of these names are, where they are not a model as it was trained; nothing for ordinary ones."""
    if how := quantised_by_tensors(names):
        return f"holds weights that are {how}, which handscroll does not read; {USE_THE_ORIGINAL}"
    return f"holds a LoRA adapter that is not fused; {FUSE_FIRST}" if is_adapter(names) else ""


def _left_out(extra: list[TensorEntry]) -> str:
    first = extra[0]
    others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
    return (
        f"{first.file}: the tensor {one_line(first.name, MAX_NAME)}{others} is not used: "
        "a network of this kind has no place for it"
    )


def _told(shape: tuple[int, ...]) -> str:
    return one_line(shape_text(shape), MAX_NAME)
