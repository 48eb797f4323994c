"""What a run makes, and what tells one job's latents from another's."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from handscroll.errors import HandscrollError, RunFolderError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.folder import files_of
from handscroll.models.registry import resolve, split_revision
from handscroll.plan.plan import Plan
from handscroll.request import Request
from handscroll.units import QUOTED_CHARACTERS, one_line
from handscroll.version import __version__
from handscroll.weights.json_text import parse_json

FORMAT, FORMAT_VERSION = "handscroll run", 1
MAX_NAME_BYTES = 255  # what common file systems hold
MAX_JOB_BYTES = 4 << 20  # of a job.json: two prompts of 20,000 characters, escaped, and 10,000 pictures that are done


@dataclass(frozen=True)
class Job:
    """What a run makes. Two jobs whose `latents` are equal, and their seeds, may share latents and states.

    `request` is as given, but for `model`, which is found again from any folder, and its `revision`, which is the
    commit that it was; `seed` None in it stands for a drawn one. `steps` are those of all sizes that a picture grows
    through. `latents` holds everything else that latents depend on, `pictures` what pictures depend on beyond their
    latents; both are JSON values under names that a user understands. `latent_shapes` are those of the sizes that a
    picture grows through, each under the steps before it; it is not written, and empty in a job that was read.
    """

    request: Request
    first_seed: int
    steps: int
    latents: Mapping[str, Any]
    pictures: Mapping[str, Any]
    output: Path
    save_latent: Path | None = None
    quality: int | None = None
    latent_shapes: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        request: Request,
        spec: CheckpointSpec,
        plan: Plan,
        output: Path,
        save_latent: Path | None,
        quality: int | None,
    ) -> Self:
        """The job of a request as it was planned."""
        import torch

        latents = {
            "model": str(spec.folder.resolve()),
            "model files": _fingerprint(spec.folder),
            "prompt": request.prompt,
            "negative prompt": request.negative,
            "size": f"{plan.width}x{plan.height}",
            "steps": plan.steps,
            "composition": " ".join(f"{size.width}x{size.height}" for size in plan.sizes),
            "guidance": plan.guidance,
            "count": request.count,
            "text encoder's precision": plan.precision.told("text_encoder"),
            "transformer's precision": plan.precision.told("transformer"),
            "device": plan.device.partition(":")[0],
            "handscroll version": __version__,
            "torch version": str(torch.__version__),
            "diffusers version": importlib.metadata.version("diffusers"),
        }
        if spec.commit is not None:
            latents["model revision"] = spec.commit
        if plan.smaller is not None:  # smaller pictures are decoded and encoded on the way to the latent
            latents["growth's precision"] = plan.precision.autoencoder
        return cls(
            dataclasses.replace(request, model=resolved_name(request.model), revision=spec.commit, devices=None),
            plan.seeds[0],
            plan.total_steps,
            latents,
            {"decode": plan.decode, "autoencoder's precision": plan.precision.autoencoder, "quality": quality},
            output,
            save_latent,
            quality,
            {size.steps_before: _latent_shape(spec, size) for size in plan.sizes},
        )

    def difference(self, older: Job) -> str:
        """What tells this job's latents from an older one's, in words; empty where nothing does."""
        for name in dict.fromkeys([*self.latents, *older.latents]):
            ours, theirs = self.latents.get(name), older.latents.get(name)
            if ours != theirs:
                told = len(f"{ours}{theirs}") < 80 and name != "model files"
                return f"its {name} was {theirs!r}, now it is {ours!r}" if told else f"it was begun with another {name}"
        if self.request.seed == older.first_seed or self.request.seed is older.request.seed is None:
            return ""
        now = "to be drawn" if self.request.seed is None else self.request.seed
        return f"its seed was {older.first_seed}, now it is {now}"

    def resumed(
        self,
        device: str | None,
        memory_bytes: int | None = None,
        model: str | None = None,
        devices: str | None = None,
    ) -> Request:
        """The request that goes on with this job: with the seed that was drawn, and in what it computed in.

        A `model` is the job's own, named anew.
        """
        precisions = {value for name, value in {**self.latents, **self.pictures}.items() if name.endswith("precision")}
        return dataclasses.replace(
            self.request,
            model=self.request.model if model is None else model,
            seed=self.first_seed,
            device=self._device(device, devices),
            devices=devices,
            precision=precisions.pop() if len(precisions) == 1 else self.request.precision,
            memory_bytes=self.request.memory_bytes if memory_bytes is None else memory_bytes,
        )

    def _device(self, device: str | None, devices: str | None) -> str:
        if device is not None or devices is not None:
            return device or "auto"
        return self.latents.get("device", "auto") if self.request.device == "auto" else self.request.device


def run_folder_of(output: Path) -> Path:
    """Where the run of an output file keeps its work: `dusk.png` -> `dusk.png.run`, beside the file itself."""
    place = place_of(output)
    name = place.name
    if len(os.fsencode(f"{name}.run")) > MAX_NAME_BYTES:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    return place.with_name(f"{name}.run")


def resolved_name(model: str) -> str:
    """A model's name as it is found again from any folder: a checkpoint's folder absolute, and without a revision."""
    found = resolve(model)
    return str(found.resolve()) if isinstance(found, Path) else str(split_revision(model)[0])


def place_of(output: Path) -> Path:
    """Behind a symbolic link, the file it points to."""
    return Path(os.path.realpath(output)) if output.is_symlink() else output


def find_run(path: Path) -> Path:
    """The run folder that a user means by it or by its output file. Raises RunFolderError."""
    folders = [path, run_folder_of(path)] if path.name else [path]
    for folder in folders:
        if (folder / "job.json").is_file():
            return folder
    if path.is_dir():
        raise RunFolderError(f"{path}: not a run folder: it holds no job.json")
    raise RunFolderError(f"{path}: no unfinished run is there; name the folder, such as dusk.png.run, or its picture")


def read_job(folder: Path) -> Job:
    """The job of a run folder. Raises RunFolderError where it is broken, foreign or of another version."""
    job = job_of(folder, read_facts(folder))
    expected = run_folder_of(job.output)
    if folder.name != expected.name:
        raise RunFolderError(f"{folder}: was renamed; call it {expected.name} again")
    if folder.resolve() != expected.resolve():
        raise RunFolderError(f"{folder}: {job.output} is a link to another folder; put the run beside {expected}")
    return job


def load_facts(folder: Path) -> Any:
    """What a job.json holds, whatever that is. Raises OSError, ValueError or RecursionError where it is none."""
    file = folder / "job.json"
    if not file.is_file() or file.stat().st_size > MAX_JOB_BYTES:
        raise ValueError(f"{file}: no file, or too large")
    return parse_json(file.read_bytes(), MAX_JOB_BYTES)


def read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = load_facts(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{folder}: its job.json is broken") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise RunFolderError(f"{folder}: not a run folder of handscroll")
    if facts.get("format_version") != FORMAT_VERSION:
        other = one_line(str(facts.get("handscroll")), QUOTED_CHARACTERS)
        raise RunFolderError(f"{folder}: written by handscroll {other}, this is {__version__}")
    return facts


def job_of(folder: Path, facts: dict[str, Any]) -> Job:
    """The job that a folder's facts tell of. A file that lay beside the picture lies beside the folder now.

    Raises RunFolderError for facts that cannot be.
    """
    try:
        recorded, latent = Path(facts["output"]), facts["save_latent"]
        output = folder.with_name(recorded.name)
        if latent is not None:
            latent = Path(latent)
            latent = output.with_name(latent.name) if latent.parent == recorded.parent else latent
        return Job(
            request=Request(**facts["request"]),
            first_seed=_whole(facts["first_seed"], 0, 2**64 - 1),
            steps=_whole(facts["steps"], 1, 2**31),
            latents=_plain(facts["latents"]),
            pictures=_plain(facts["pictures"]),
            output=output,
            save_latent=latent,
            quality=None if facts["quality"] is None else _whole(facts["quality"], 1, 100),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, HandscrollError) as error:
        raise RunFolderError(f"{folder}: its job.json is broken") from error


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError
    return value


def _plain(values: Any) -> dict[str, Any]:
    """A table of texts and numbers, as every job's are."""
    if not all(value is None or isinstance(value, str | int | float) for value in values.values()):
        raise ValueError
    return dict(values)


def _latent_shape(spec: CheckpointSpec, plan: Plan) -> tuple[int, ...]:
    return 1, spec.transformer.in_channels, plan.latent_height, plan.latent_width


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's files: names, sizes and times, not contents."""
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files_of(folder)]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]
