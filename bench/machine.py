"""What a measurement was made on: the processor, its cores, its memory and the versions that matter. No names."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch

from handscroll.system import memory, processor_name, usable_cores

RATE_SECONDS = 2.0


def describe() -> dict[str, Any]:
    total_bytes = memory().total_bytes
    description: dict[str, Any] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if total_bytes is None else round(total_bytes / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def slug(description: dict[str, Any]) -> str:
    """A description as part of a file name: `intel-xeon-platinum-8488c-2-cores`, or `nvidia-h100-80gb-hbm3`."""
    if description.get("gpu"):
        return re.sub(r"[^a-z0-9]+", "-", description["gpu"].lower()).strip("-")
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", "", description["processor"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {description['cores']} cores").strip("-")


@torch.no_grad()
def convolution_gflops(
    side: int = 256, seconds: float = RATE_SECONDS, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> float:
    """The best rate of a 3x3 convolution of 128 channels, channels last: what a decode can hope for here."""
    image = torch.randn(1, 128, side, side).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(device, dtype).contiguous(memory_format=torch.channels_last)
    flop = 2 * 128 * 128 * 9 * side * side
    return best_gflops(flop, [lambda: torch.nn.functional.conv2d(image, weight, padding=1)], seconds, device)


@torch.no_grad()
def matmul_gflops(
    side: int = 2048, seconds: float = RATE_SECONDS, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> float:
    """The best rate of a product of [side, side] matrices, by whichever library is faster on a CPU."""
    left, right = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    ways = [lambda: torch.mm(left, right)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    return best_gflops(2 * side**3, ways, seconds, device)


def best_gflops(flop: int, ways: Sequence[Callable[[], object]], seconds: float, device: str) -> float:
    """The rate of the fastest run of several ways to do `flop` operations, run for so many seconds in all."""
    best = float("inf")
    for way in ways:
        way()
        synchronize(device)
        until = time.perf_counter() + seconds / len(ways)
        while time.perf_counter() < until:
            begun = time.perf_counter()
            way()
            synchronize(device)
            best = min(best, time.perf_counter() - begun)
    return flop / best / 1e9


def synchronize(device: str) -> None:
    """Waits until what was asked of a device is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)
