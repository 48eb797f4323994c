"""This machine without torch: memory, of containers too, the processor, and disk."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


@dataclass(frozen=True)
class Memory:
    """In bytes: what there is in all, and what this process could still get. None where the system does not tell."""

    total_bytes: int | None = None
    available_bytes: int | None = None


# Memory


def memory() -> Memory:
    """The machine's memory, or the container's where that is less."""
    import psutil

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of fields that small containers do not have
            found = psutil.virtual_memory()
        machine = Memory(found.total, found.available)
    except (OSError, psutil.Error):
        machine = Memory()
    container = container_memory()
    return Memory(
        _least(machine.total_bytes, container.total_bytes),
        _least(machine.available_bytes, container.available_bytes),
    )


def available_bytes() -> int | None:
    """What the system could still give to this process, or None where it does not tell."""
    return memory().available_bytes


def container_memory(root: Path = Path("/")) -> Memory:
    """What Linux's control groups leave to this process: the least of its group and those around it.

    Both versions are read, below `root`. What a group has read from files counts as used there, though most of it would
    be given up at once; so the part that was not touched lately is not taken for used.
    """
    total = available = None
    for group, version in _memory_groups(root):
        names = _GROUP_FILES[version]
        try:
            limit = int((group / names.limit).read_text())  # "max" where there is none
            used = int((group / names.used).read_text())
        except (OSError, ValueError):
            continue
        if limit >= _NO_LIMIT_BYTES:
            continue
        total = _least(total, limit)
        available = _least(available, max(0, limit - used + _unused_cache_bytes(group / "memory.stat", names.cache)))
    return Memory(total, available)


@dataclass(frozen=True)
class _GroupFiles:
    limit: str
    used: str
    cache: str  # the name in memory.stat, of the group with those inside it


_NO_LIMIT_BYTES = 2**62  # version 1 has a number near 2**63 where there is none
_GROUP_FILES = {
    1: _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _GroupFiles("memory.max", "memory.current", "inactive_file"),
}


def _memory_groups(root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of this process's group and of those around it, and the version that they are written in.

    A container may see its own group as the outermost one, while its name is told as the machine sees it.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # 0::/name, or in version 1 4:memory:/name
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        outermost, version = (mounted / "memory", 1) if controllers else (mounted, 2)
        group = outermost / name.strip("/")
        yield from ((folder, version) for folder in (group, *group.parents) if folder.is_relative_to(outermost))


def _unused_cache_bytes(statistics: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in statistics.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _least(*amounts: int | None) -> int | None:
    return min((amount for amount in amounts if amount is not None), default=None)


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not tell."""
    import psutil

    try:
        return int(_process(os.getpid()).memory_info().rss)
    except (OSError, psutil.Error):
        return 0


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    """Made once, for it is asked a hundred times a second; a process that was forked has its own, not its parent's."""
    import psutil

    return psutil.Process(pid)


def peak_resident_bytes() -> int:
    """The most this process has held so far, as `/usr/bin/time -v` prints it."""
    # Linux lets a new program inherit the usage of the process that started it, which may have held gigabytes.
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Processor and disk


def processor_name() -> str:
    """What the processor calls itself, or its kind where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def usable_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_disk_bytes(folder: Path) -> int:
    """What this user may still write into a folder. Raises OSError."""
    return shutil.disk_usage(folder).free
