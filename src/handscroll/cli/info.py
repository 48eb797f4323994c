"""`handscroll info`: what a picture, latent, checkpoint, weight file or run folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handscroll.cli.options import Json
from handscroll.cli.output import columns, print_text, to_json
from handscroll.errors import FormatError, UsageError
from handscroll.units import gibibytes, one_line

if TYPE_CHECKING:
    from handscroll.models.checkpoint import CheckpointSpec

Found = dict[str, Any]

TENSORS_SHOWN, MOST_NAME = 20, 100  # characters of a name


def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A picture, latent, weight file, checkpoint folder or run folder.")
    ],
    *,
    as_json: Json = False,
) -> None:
    """Say what a file or folder holds: how a picture was made, what a checkpoint is, where a run stands.

    \b
      handscroll info dusk.png
      handscroll info dusk.png.run --json

    Reads no weights and no pixels.
    """
    found = look_at(file)
    if as_json:
        print(to_json(found))
    else:
        print_text("\n".join(_SHOWN[found["kind"]](found)))


def look_at(path: Path) -> Found:
    """JSON values that say what is there, `kind` first: picture, latent, weights, checkpoint or run.

    Raises UsageError for what is none of them, and what reading each of them raises.
    """
    from handscroll.jobs.job import find_run, run_folder_of
    from handscroll.pictures.formats import FORMATS

    try:
        if path.is_dir():
            if (path / "job.json").is_file():
                return _run(path)
            if (path / "model_index.json").is_file():
                return _checkpoint(path)
            raise UsageError(f"{path}: neither a checkpoint folder (model_index.json) nor a run folder (job.json)")
        if not path.exists():
            if path.name and (run_folder_of(path) / "job.json").is_file():
                return _run(find_run(path))
            raise UsageError(f"{path}: no such file or folder")
        if path.suffix.lower() in (".safetensors", ".latent"):
            return _safetensors(path)
        if path.suffix.lower() in FORMATS:
            return _picture(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    raise FormatError(
        f"{path}: not known; info takes {' '.join(FORMATS)} .safetensors .latent, a checkpoint or a run folder"
    )


# What is there


def _picture(path: Path) -> Found:
    from handscroll.pictures.formats import FORMATS
    from handscroll.pictures.metadata import read_parameters, read_size

    width, height = read_size(path)
    return {
        "kind": "picture",
        "path": str(path),
        "format": FORMATS[path.suffix.lower()].title,
        "width": width,
        "height": height,
        "bytes": path.stat().st_size,
        "parameters": read_parameters(path),
    }


def _safetensors(path: Path) -> Found:
    from handscroll.jobs.latent_file import describe_latent
    from handscroll.weights.folder import WeightFiles
    from handscroll.weights.header import read_header, read_metadata

    if latent := describe_latent(path):
        shape, facts = latent
        found = {"kind": "latent", "path": str(path), "shape": list(shape), "facts": facts}
        return {**found, "bytes": path.stat().st_size}
    weights = WeightFiles((path,), read_header(path))
    return {
        "kind": "weights",
        "path": str(path),
        "bytes": path.stat().st_size,
        "parameters": weights.n_parameters,
        "dtypes": weights.dtype_bytes,
        "metadata": read_metadata(path),
        "tensors": {
            entry.name: {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.n_bytes}
            for entry in weights.tensors
        },
    }


def _checkpoint(path: Path) -> Found:
    from handscroll.models.checkpoint import CheckpointSpec
    from handscroll.models.folder import COMPONENTS
    from handscroll.plan.unused import uses_guidance

    spec = CheckpointSpec.from_folder(path)
    configs: dict[str, Any] = {
        "text_encoder": spec.text_encoder,
        "transformer": spec.transformer,
        "vae": spec.autoencoder,
    }
    components = {
        name: {
            "parameters": spec.weights_of(name).n_parameters,
            "precision": _precision(spec, name),
            "bytes": spec.weights_of(name).n_bytes,
            "files": [file.name for file in spec.weights_of(name).files],
            "config": dataclasses.asdict(configs[name]),
        }
        for name in COMPONENTS
    }
    return {
        "kind": "checkpoint",
        "path": str(path),
        "name": spec.name,
        "native_px": spec.native_px,
        "compose_px": spec.compose_px,
        "steps": spec.default_steps,
        "guidance": spec.default_guidance if uses_guidance(spec) else None,
        "scheduler": spec.scheduler.class_name,
        "licence": spec.licence,
        "parameters": sum(each["parameters"] for each in components.values()),
        "bytes": spec.n_bytes,
        "components": components,
    }


def _precision(spec: CheckpointSpec, component: str) -> str:
    """What a component is stored in, as `int8+bf16` where its matrices are in 8 or 4 bits."""
    quantised = spec.quantisation_of(component)
    return f"{quantised.storage}+{spec.dtype_of(component)}" if quantised else spec.dtype_of(component)


def _run(folder: Path) -> Found:
    from handscroll.jobs.status import read_status

    status = read_status(folder)
    job = status.job
    return {
        "kind": "run",
        "path": str(folder),
        "output": str(job.output),
        "save_latent": None if job.save_latent is None else str(job.save_latent),
        "size": job.latents.get("size"),
        "steps": job.steps,
        "goes_on": status.goes_on,
        "request": dataclasses.asdict(job.request),
        "pictures": [
            {
                "path": str(each.path),
                "seed": each.seed,
                "written": each.is_written,
                "latent": each.has_latent,
                "steps_done": each.steps_done,
            }
            for each in status.pictures
        ],
    }


# For people to read


def _picture_lines(found: Found) -> Iterator[str]:
    size = f"{found['width']}x{found['height']}"
    yield f"{found['path']}: {found['format']} picture, {size}, {gibibytes(found['bytes'])}"
    yield ""
    yield found["parameters"] or "it does not say how it was made"


def _latent_lines(found: Found) -> Iterator[str]:
    yield f"{found['path']}: latent of {_shape(found['shape'])}, {gibibytes(found['bytes'])}"
    yield from _table(found["facts"])


def _weights_lines(found: Found) -> Iterator[str]:
    tensors = found["tensors"]
    amount = f"{_count(found['parameters'])} parameters in {len(tensors)} tensors"
    yield f"{found['path']}: {amount}, {gibibytes(found['bytes'])}"
    yield from _table({dtype: gibibytes(n_bytes) for dtype, n_bytes in found["dtypes"].items()})
    yield from _table(found["metadata"])
    yield ""
    first = list(tensors.items())[:TENSORS_SHOWN]
    rows = [(one_line(name, MOST_NAME), each["dtype"], _shape(each["shape"])) for name, each in first]
    yield from columns([("TENSOR", "DTYPE", "SHAPE"), *rows])
    if len(tensors) > TENSORS_SHOWN:
        yield f"and {len(tensors) - TENSORS_SHOWN} more, which --json lists"


def _checkpoint_lines(found: Found) -> Iterator[str]:
    amount = f"{_count(found['parameters'])} parameters, {gibibytes(found['bytes'])}"
    yield f"{found['path']}: checkpoint {found['name']}, {amount}"
    composed = f", larger ones composed at {found['compose_px']}" if found["compose_px"] else ""
    yield from _table(
        {
            "pictures": f"{found['native_px']}x{found['native_px']}{composed}",
            "steps": f"{found['steps']} of {found['scheduler']}",
            "guidance": "none" if found["guidance"] is None else f"{found['guidance']:g}",
            "licence": found["licence"] or "the folder does not say",
        }
    )
    yield ""
    rows = [("COMPONENT", "PARAMETERS", "PRECISION", "SIZE", "SHAPE")]
    for name, each in found["components"].items():
        amounts = _count(each["parameters"]), each["precision"], gibibytes(each["bytes"])
        rows.append((name, *amounts, _form(name, each["config"])))
    yield from columns(rows)


def _run_lines(found: Found) -> Iterator[str]:
    request = found["request"]
    yield f"{found['path']}: unfinished run of {found['output']}"
    yield from _table(
        {
            "prompt": request["prompt"],
            **({"negative": request["negative"]} if request["negative"] else {}),
            "model": request["model"],
            "size": found["size"],
            "steps": found["steps"],
        }
    )
    yield ""
    rows = [("PICTURE", "SEED", "DONE")]
    for each in found["pictures"]:
        steps = f"step {each['steps_done']} of {found['steps']}"
        rows.append(
            (
                Path(each["path"]).name,
                str(each["seed"]),
                "written" if each["written"] else "latent finished" if each["latent"] else steps,
            )
        )
    yield from columns(rows)
    yield ""
    yield f"`handscroll resume {found['path']}` goes on {found['goes_on']}"


_SHOWN: dict[str, Callable[[Found], Iterator[str]]] = {
    "picture": _picture_lines,
    "latent": _latent_lines,
    "weights": _weights_lines,
    "checkpoint": _checkpoint_lines,
    "run": _run_lines,
}


def _table(facts: Mapping[str, object]) -> list[str]:
    shown = [(one_line(name, MOST_NAME), one_line(str(value))) for name, value in facts.items()]
    return columns(shown) if shown else []


def _form(component: str, config: Mapping[str, Any]) -> str:
    match component:
        case "text_encoder":
            return f"{config['num_hidden_layers']} layers of {config['hidden_size']} channels"
        case "transformer":
            heads, head_channels = config["num_attention_heads"], config["attention_head_dim"]
            return f"{config['num_layers']} layers of {heads * head_channels} channels, {heads} heads"
    factor = 2 ** (len(config["decoder_block_out_channels"]) - 1)
    return f"{config['latent_channels']} channels for {factor}x{factor} pixels"


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _count(number: int) -> str:
    """`1.6 B`, `591.7 M`, `12.3 k` or `512`."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)
