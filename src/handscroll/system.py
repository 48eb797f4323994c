"""This machine without torch: memory, of containers too, the processor, and disk."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


# In the environment of a rank: the process that started it.
LAUNCHER = "HANDSCROLL_LAUNCHER"
# And the file that ranks of one host find each other by.
STORE = "HANDSCROLL_STORE"
# In the environment of a process that starts ranks: the one that started it, with which it ends.
PARENT = "HANDSCROLL_PARENT"


@dataclass(frozen=True)
class Memory:
    """In bytes: what there is in all, and what this process could still get. None where the system does not tell."""

    total_bytes: int | None = None
    available_bytes: int | None = None


# psutil is an ordinary library, which may be broken or find its system without what it asks for: its own errors too.
_NOT_TOLD = (Exception,)


# Memory


def memory() -> Memory:
    """The machine's memory, or the container's where that is less."""
    machine = _machine_memory()
    container = container_memory()
    return Memory(
        _least(machine.total_bytes, container.total_bytes),
        _least(machine.available_bytes, container.available_bytes),
    )


def _machine_memory() -> Memory:
    try:
        import psutil

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of fields that small containers do not have
            found = psutil.virtual_memory()
    except _NOT_TOLD:
        return Memory()
    return Memory(found.total, found.available)


def available_bytes() -> int | None:
    """What the system could still give to this process, or None where it does not tell."""
    return memory().available_bytes


def container_memory(root: Path = Path("/")) -> Memory:
    """What Linux's control groups leave to this process: the least of its group and those around it.

    Both versions are read, below `root`. What a group has read from files counts as used there, though the kernel gives
    it up when memory is asked for, before anything else: file pages, whether touched lately (active) or not, and what
    it remembers of files (reclaimable slab). The same is counted outside a container (`MemAvailable`). Pages that
    cannot be given up are in none of these: of memory that programs share (tmpfs), and what is locked.
    """
    total = available = None
    for group, version in _memory_groups(root):
        names = _GROUP_FILES[version]
        limit = _least(*(_number_in(group / name) for name in names.limits))
        used = _number_in(group / names.used)
        if limit is None or limit >= _NO_LIMIT_BYTES or used is None:
            continue
        total = _least(total, limit)
        given_up = min(used, _given_up_bytes(group / "memory.stat", names.given_up))
        available = _least(available, max(0, limit - used + given_up))
    return Memory(total, available)


@dataclass(frozen=True)
class _GroupFiles:
    limits: tuple[str, ...]  # from which on memory is refused, or everything is slowed down
    used: str
    given_up: tuple[str, ...]  # in memory.stat, of the group with those inside it


_NO_LIMIT_BYTES = 2**62  # version 1 has a number near 2**63 where there is none
_GROUP_FILES = {
    1: _GroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: _GroupFiles(
        ("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file", "slab_reclaimable")
    ),
}


def _memory_groups(root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of this process's group and of those around it, and the version that they are written in.

    A container may see its own group as the outermost one, while its name is told as the machine sees it.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:  # 0::/name, or in version 1 4:memory:/name
        if line.count(":") < 2:
            continue
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        outermost, version = (mounted / "memory", 1) if controllers else (mounted, 2)
        group = outermost / name.strip("/")
        yield from ((folder, version) for folder in (group, *group.parents) if folder.is_relative_to(outermost))


def _number_in(file: Path) -> int | None:
    """None where there is no such file, and for "max", which is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _given_up_bytes(statistics: Path, names: Collection[str]) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in statistics.read_text().splitlines():
            name, _, amount = line.partition(" ")
            total += int(amount) if name in names else 0
    return total


def _least(*amounts: int | None) -> int | None:
    return min((amount for amount in amounts if amount is not None), default=None)


def resident_bytes() -> int | None:
    """What this process holds in memory now, or None where that cannot be known."""
    try:
        return int(_process(os.getpid()).memory_info().rss)
    except _NOT_TOLD:
        return None


def own_resident_bytes() -> int | None:
    """Of `resident_bytes` what would be free without this process: its file pages are the system's to give up already.

    Those are code and mapped weights, which `available_bytes` counts. Where a system does not tell them apart, all.
    """
    try:
        held = _process(os.getpid()).memory_info()
    except _NOT_TOLD:
        return None
    return max(0, int(held.rss) - int(getattr(held, "shared", 0)))


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    """Made once, for it is asked a hundred times a second; a process that was forked has its own, not its parent's."""
    import psutil

    return psutil.Process(pid)


def peak_resident_bytes() -> int | None:
    """The most this process has held so far, as `/usr/bin/time -v` prints it, or None where that cannot be known."""
    # Linux lets a new program inherit the usage of the process that started it, which may have held gigabytes.
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    with contextlib.suppress(*_NOT_TOLD):
        return int(_process(os.getpid()).memory_info().peak_wset)  # Windows
    return None


# Processor and disk


def processor_name() -> str:
    """What the processor calls itself, or its kind where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def boot_id() -> str:
    """What tells this machine from others that call themselves the same; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def usable_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(processes: int) -> int:
    """How many threads each of so many busy processes should have: teams that share cores wait for each other."""
    return max(1, usable_cores() // processes)


def how_it_ended(exit_code: int) -> str:
    """`was ended by SIGKILL`, or `has ended`: of a process, by the code that Python's subprocess gives."""
    if exit_code >= 0:
        return "has ended"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


def free_disk_bytes(folder: Path) -> int | None:
    """What this user may still write into a folder, or None where the system does not tell. Raises OSError."""
    try:
        return shutil.disk_usage(folder).free
    except AttributeError:
        return None
