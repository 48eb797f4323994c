"""This machine without torch: memory, containers too, and the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def available_bytes() -> int | None:
    """What the system could still give to this process, or None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    of_system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:  # a container may have less
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        of_container = int(limit) - int(used)
    except (OSError, ValueError):
        return of_system
    return of_container if of_system is None else min(of_system, of_container)


def processor_name() -> str:
    """What the processor calls itself, or its kind where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
