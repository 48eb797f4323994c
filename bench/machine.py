"""What a measurement was made on: the processor, its cores, its memory and the versions that matter. No names."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

RATE_SECONDS = 2.0


def describe() -> dict[str, Any]:
    description: dict[str, Any] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def slug(description: dict[str, Any]) -> str:
    """A description as part of a file name: `intel-xeon-platinum-8488c-2-cores`."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", "", description["processor"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {description['cores']} cores").strip("-")


@torch.no_grad()
def convolution_gflops(side: int = 256, seconds: float = RATE_SECONDS) -> float:
    """The best rate of a 3x3 convolution of 128 channels, fp32, channels last: what a decode can hope for here."""
    image = torch.randn(1, 128, side, side).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    conv(image)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        conv(image)
        best = min(best, time.perf_counter() - begun)
    return 2 * 128 * 128 * 9 * side * side / best / 1e9
