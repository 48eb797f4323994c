"""The stages of a picture, and the ways to run each: one file a stage, behind one interface.

A `Stage` is made in two processes: in the one that compares, which asks what a way would take, and in the one that
measures, which makes it `ready` and runs it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

NAMES = ("decode", "encode", "denoise", "text", "generate")
# Every way that any stage knows, in the order in which they take turns; the others are held to the first.
MODES = ("whole", "compiled", "tiled", "tiled-1024", "patch", "rows", "untuned", "int8", "int8-weights", "int4", "fp8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# diffusers' tiles: their side and how far apart they begin, in pixels.
TILES_PX = {"tiled": (512, 448), "tiled-1024": (1024, 896)}
ROWS_COMPARED = 64

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common; goes to the measuring processes as JSON.

    folder: where `write_files` put its files. model: a row of make_checkpoint.py, or for `generate` a folder or name.
    """

    stage: str
    model: str = "sana-1.6b"
    precision: str = "fp32"
    device: str = "cpu"
    miniature: bool = False
    strip_rows: int | None = None
    layers: int | None = None
    steps: int | None = None
    folder: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


@dataclass(frozen=True)
class Ready:
    """A way that is ready to run. `run` gives its result; `warm_up` a small one, so that libraries are loaded."""

    run: Callable[[], Any]
    warm_up: Callable[[], object]


class Stage(ABC):
    """One stage under some settings.

    limit: the rate of the device that the stage's work is held to. of_process: whether the memory of a run is that of
    the whole process, or else what it takes above the loaded model. has_size: whether the picture's size matters.
    multiple_px: what its sides must be multiples of.
    """

    modes: ClassVar[tuple[str, ...]]
    limit: ClassVar[Literal["convolution", "matrix"] | None]
    of_process: ClassVar[bool] = False
    has_size: ClassVar[bool] = True
    multiple_px: ClassVar[int] = 32

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def model_name(self) -> str:
        """What the report calls the model."""
        return f"{self.settings.model}{', miniature' if self.settings.miniature else ''}"

    def write_files(self, folder: Path) -> None:
        """Once, before the first run: whatever the runs read, to `Settings.folder`."""
        return

    @abstractmethod
    def ready(self, mode: str, size: Size, compared: bool, scratch: Path) -> Ready:
        """Loads what a way needs. compared: whether its result will be held to the whole one's. scratch: for files."""

    def flop(self, size: Size) -> int | None:
        """The work of the whole way; None where it is not counted."""
        return None

    def needed_bytes(self, mode: str, size: Size) -> int | None:
        """About what a way needs, model included; None where it cannot be said, or is little."""
        return None

    def pointless(self, mode: str, size: Size) -> str | None:
        """Why a way is not worth running at a size."""
        if mode in TILES_PX and max(size) <= TILES_PX[mode][0]:
            return "a single tile: the same as whole"
        return None

    def keep(self, result: Any, reference: Path) -> None:
        """Stores the whole result for the others to be held to."""
        np.save(reference, result.float().cpu().numpy())

    def difference(self, result: Any, reference: Path) -> float:
        """The largest difference from the whole result. Part by part, so that comparing needs no memory to speak of."""
        whole = np.load(reference, mmap_mode="r")
        if whole.shape != tuple(result.shape):
            raise ValueError(f"a result of {tuple(result.shape)} beside a whole one of {whole.shape}")
        axis = whole.ndim - 2
        parts = (slice(top, top + ROWS_COMPARED) for top in range(0, whole.shape[axis], ROWS_COMPARED))
        return max(
            float(np.abs(result[..., rows, :].float().cpu().numpy() - whole[..., rows, :]).max()) for rows in parts
        )


def open_stage(settings: Settings) -> Stage:
    """The stage that the settings name."""
    stage: Stage = importlib.import_module(f"stages.{settings.stage}").STAGE(settings)
    return stage


def in_dtype(module: Any, dtype: torch.dtype) -> Any:
    """A module for inference in another dtype."""
    return torch.nn.Module.to(
        module, dtype=dtype
    ).eval()  # diffusers' own `to` warns about modules that Sana has none of


def random_tensor(*shape: int, settings: Settings, seed: int = 1) -> Tensor:
    """Normal deviates, the same on every device."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(settings.device, settings.dtype)
