"""Look at this machine: does everything that handscroll needs work here, and what would mend what does not?

Every part is really imported, since a package that is installed may still be broken.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from handscroll.files import can_lock
from handscroll.models.registry import BY_NAME
from handscroll.request import DEFAULT_MODEL
from handscroll.system import Memory, free_disk_bytes, memory, processor_name, resident_bytes, usable_cores
from handscroll.units import first_line, gibibytes
from handscroll.version import __version__

# The package to import, and what is used of it. Which versions of it will do stands in pyproject.toml alone.
NEEDED: dict[str, tuple[str, ...]] = {
    "torch": ("nn",),
    "diffusers": ("AutoencoderDC", "SanaTransformer2DModel", "DPMSolverMultistepScheduler"),
    "transformers": ("Gemma2Model", "AutoTokenizer"),
    "tokenizers": ("Tokenizer",),
    "safetensors": ("safe_open",),
    "huggingface_hub": ("snapshot_download",),
    "fsspec": ("filesystem",),
    "numpy": ("ndarray",),
    "pyvips": ("Image",),
    "psutil": ("Process", "virtual_memory"),
    "platformdirs": ("user_cache_path",),
    "typer": ("Typer",),
    "rich": ("print",),
}
LITTLE_DISK_BYTES = 2**30


@dataclass(frozen=True)
class Problem:
    """What is broken or missing, and the one command that mends it. Nothing runs without a `needed` part."""

    part: str
    needed: bool
    message: str
    mend: str


@dataclass(frozen=True)
class Health:
    """What was found. Sizes are bytes; None stands for what is missing or what the system does not tell."""

    versions: dict[str, str | None]
    platform: str
    devices: list[dict[str, Any]]
    memory: dict[str, int | None]
    disk: dict[str, dict[str, Any]]
    hub: dict[str, Any]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        return not any(problem.needed for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """The object of `handscroll doctor --json`."""
        problems = [vars(problem) for problem in self.problems]
        return {"ok": self.ok, **vars(self), "problems": problems}


def examine() -> Health:
    """Look at everything once. Takes a few seconds, most of them to import torch and diffusers."""
    problems = [problem for package in NEEDED if (problem := _try(package))]
    broken = {problem.part for problem in problems}
    cache, offline = _hub() if "huggingface_hub" not in broken else (None, None)
    disk = {"cache": _disk(cache), "here": _disk(Path.cwd())} if cache else {"here": _disk(Path.cwd())}
    return Health(
        versions=_versions(broken),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        devices=_devices() if "torch" not in broken else [],
        memory=vars(memory() if "psutil" not in broken else Memory()),
        disk=disk,
        hub={"cache": str(cache) if cache else None, "offline": offline},
        problems=[*problems, *_optional(broken, disk), *_of_this_system()],
    )


def _try(package: str) -> Problem | None:
    try:
        module = importlib.import_module(package)
        for name in NEEDED[package]:
            getattr(module, name)
    except Exception as error:  # a broken package may raise anything
        return Problem(package, True, first_line(error), f'pip install --force-reinstall "{requirement_of(package)}"')
    return None


def requirement_of(package: str) -> str:
    """What pip installs for a package to import, as handscroll's own installation asks for it: `torch<2.14,>=2.9`."""
    try:
        requirements = metadata.requires("handscroll") or []
    except metadata.PackageNotFoundError:  # run from its source
        requirements = []
    for requirement in requirements:
        wanted, _, only_where = requirement.partition(";")
        name = re.match(r"[\w.-]*", wanted)
        if name and re.sub(r"[-.]", "_", name[0]).lower() == package and "extra" not in only_where:
            return wanted.strip()
    return package


def _optional(broken: set[str], disk: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    folder = BY_NAME[DEFAULT_MODEL].builtin_folder
    if folder is None or not (folder / "model_index.json").is_file():
        message = "the built-in model is not in this installation; --model takes any other"
        yield Problem(DEFAULT_MODEL, False, message, "pip install --force-reinstall --no-deps handscroll")
    if _installed("hf_xet") is None:
        yield Problem("hf_xet", False, "large checkpoints are fetched more slowly without it", "pip install hf_xet")
    if "torch" not in broken and Path("/proc/driver/nvidia/version").exists() and not _cuda_is_built():
        message = "there is an NVIDIA driver here, but this torch cannot use it"
        yield Problem("torch with CUDA", False, message, f'pip install --force-reinstall "{requirement_of("torch")}"')
    for place in disk.values():
        if (place["free_bytes"] or LITTLE_DISK_BYTES) < LITTLE_DISK_BYTES:
            message = f"only {gibibytes(place['free_bytes'])} free at {place['path']}"
            yield Problem("disk", False, message, f"du -xh --max-depth=1 {place['path']} | sort -h")


def _of_this_system() -> Iterator[Problem]:
    """What this system does not offer, though everything is installed."""
    if platform.system() != "Linux":
        message = "handscroll is tested on Linux alone; on this system nobody has tried it"
        yield Problem(platform.system() or "system", False, message, "pip install -e '.[dev]' && pytest")
    if resident_bytes() is None:
        message = "nothing tells how much memory a process holds, so --memory is refused on a CPU"
        yield Problem("resident memory", False, message, f'pip install --force-reinstall "{requirement_of("psutil")}"')
    if not can_lock():
        message = "there are no file locks, so two processes may work on one picture and neither notices"
        yield Problem("file locks", False, message, "start one handscroll after the other")


def _cuda_is_built() -> bool:
    import torch

    return torch.backends.cuda.is_built()


# Versions


def _versions(broken: set[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"handscroll": __version__, "python": platform.python_version()}
    found |= {package: _installed(package) for package in NEEDED}
    found["libvips"] = None if "pyvips" in broken else _libvips_version()
    return found


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libvips_version() -> str:
    import pyvips

    return ".".join(str(pyvips.version(part)) for part in range(3))


# Devices


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = {
        "device": "cpu",
        "name": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "bf16": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    return [cpu, *(_cuda_device(index) for index in range(torch.cuda.device_count()))]


def _cuda_device(index: int) -> dict[str, Any]:
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "device": f"cuda:{index}",
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "total_bytes": total_bytes,
        "free_bytes": free_bytes,
        "bf16": major >= 8,
    }


# Disk


def _disk(place: Path) -> dict[str, Any]:
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    return {"path": str(place), "free_bytes": free_disk_bytes(existing)}


def _hub() -> tuple[Path, bool]:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute(), bool(constants.HF_HUB_OFFLINE)
