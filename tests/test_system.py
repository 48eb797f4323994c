"""This machine as it is told: its memory, a container's in both versions, its processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from handscroll import system
from handscroll.system import (
    Memory,
    available_bytes,
    container_memory,
    free_disk_bytes,
    memory,
    peak_resident_bytes,
    processor_name,
    resident_bytes,
    usable_cores,
)

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712\n"


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def group_v2(folder: str, limit: str, used: int, inactive_file: int = 0) -> dict[str, str]:
    statistics = f"anon 1000\nfile 9000\nactive_file 4000\ninactive_file {inactive_file}\nslab 7\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": statistics,
    }


def group_v1(folder: str, limit: str, used: int, inactive_file: int = 0) -> dict[str, str]:
    statistics = f"cache 9000\ninactive_file 5\ntotal_cache 9000\ntotal_inactive_file {inactive_file}\n"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": statistics,
    }


def test_a_container_of_version_2_gives_back_its_page_cache(tmp_path: Path) -> None:
    """A checkpoint that was just read fills the cache, which counts as used and is there for the asking."""
    write_tree(tmp_path, {"proc/self/cgroup": "0::/\n"})
    write_tree(tmp_path, group_v2("sys/fs/cgroup", str(8 * GIB), used=7 * GIB, inactive_file=5 * GIB))
    assert container_memory(tmp_path) == Memory(8 * GIB, 6 * GIB)


def test_a_container_of_version_1(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/\n4:memory,hugetlb:/docker/0123\n1:name=systemd:/docker/0123\n0::/docker/0123\n"
    write_tree(tmp_path, {"proc/self/cgroup": lines})
    write_tree(tmp_path, group_v1("sys/fs/cgroup/memory", str(4 * GIB), used=3 * GIB, inactive_file=GIB))
    assert container_memory(tmp_path) == Memory(4 * GIB, 2 * GIB)


def test_the_groups_around_count_too(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/self/cgroup": "0::/user.slice/session.scope\n"})
    write_tree(tmp_path, group_v2("sys/fs/cgroup/user.slice/session.scope", str(6 * GIB), used=GIB))
    write_tree(tmp_path, group_v2("sys/fs/cgroup/user.slice", str(16 * GIB), used=13 * GIB))
    assert container_memory(tmp_path) == Memory(6 * GIB, 3 * GIB)
    write_tree(tmp_path, group_v2("sys/fs/cgroup/user.slice", "max", used=13 * GIB))
    assert container_memory(tmp_path) == Memory(6 * GIB, 5 * GIB)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/\n"},
        {"proc/self/cgroup": "0::/\n", **group_v2("sys/fs/cgroup", "max", used=GIB)},
        {"proc/self/cgroup": "4:memory:/a\n", **group_v1("sys/fs/cgroup/memory/a", NO_LIMIT_V1, used=GIB)},
        {"proc/self/cgroup": "4:cpu:/a\n", **group_v1("sys/fs/cgroup/memory/a", str(GIB), used=0)},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "nonsense", "sys/fs/cgroup/memory.current": "1"},
    ],
    ids=["no Linux", "no files", "no limit", "no limit in version 1", "no group for memory", "no number"],
)
def test_without_a_limit_nothing_is_told(tmp_path: Path, files: dict[str, str]) -> None:
    write_tree(tmp_path, files)
    assert container_memory(tmp_path) == Memory(None, None)


def test_a_container_that_is_too_full_has_nothing_left_and_needs_no_statistics(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/self/cgroup": "0::/\n"} | group_v2("sys/fs/cgroup", str(GIB), used=2 * GIB))
    (tmp_path / "sys/fs/cgroup/memory.stat").unlink()
    assert container_memory(tmp_path) == Memory(GIB, 0)


def test_the_container_counts_where_it_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory()
    assert machine.total_bytes is not None
    assert machine.available_bytes is not None
    assert 0 < machine.available_bytes <= machine.total_bytes
    monkeypatch.setattr(system, "container_memory", lambda: Memory(1000, 10))
    assert memory() == Memory(1000, 10)
    assert available_bytes() == 10
    monkeypatch.setattr(system, "container_memory", lambda: Memory(2**60, 2**60))
    assert memory().total_bytes == machine.total_bytes


def test_what_the_process_holds() -> None:
    before = resident_bytes()
    held = np.ones(64 * 2**20, np.uint8)
    assert 60 * 2**20 < resident_bytes() - before < 80 * 2**20
    assert peak_resident_bytes() >= before + 60 * 2**20
    del held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_measures_itself() -> None:
    code = (
        "import os; from handscroll.system import resident_bytes; resident_bytes()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    before = resident_bytes(); held = bytearray(b'1' * (64 << 20))\n"
        "    os._exit(0 if resident_bytes() - before > 50 << 20 else 7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n"


def test_the_processor_and_the_disk(tmp_path: Path) -> None:
    assert processor_name().strip()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert free_disk_bytes(tmp_path) > 0


def test_asking_for_help_imports_no_measuring_library() -> None:
    code = (
        "import sys; from handscroll.cli.main import run\n"
        "run(['--help'])\n"
        "print([name for name in ('torch', 'psutil', 'platformdirs') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
