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
    own_resident_bytes,
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


def group_v2(
    folder: str, limit: str, used: int, inactive_file: int = 0, active_file: int = 0, slab_reclaimable: int = 0
) -> dict[str, str]:
    statistics = (
        f"anon 1000\nfile 9000\nshmem 5000\nactive_file {active_file}\ninactive_file {inactive_file}\nslab 7\n"
        f"unevictable 800\nslab_reclaimable {slab_reclaimable}\nslab_unreclaimable 900\nworkingset_refault_file 3\n"
    )
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": statistics,
    }


def group_v1(folder: str, limit: str, used: int, inactive_file: int = 0, active_file: int = 0) -> dict[str, str]:
    statistics = (
        "cache 9000\ninactive_file 5\nactive_file 6\ntotal_cache 9000\ntotal_shmem 70\n"
        f"total_inactive_file {inactive_file}\ntotal_active_file {active_file}\ntotal_unevictable 8\n"
    )
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


def test_file_pages_count_as_free_however_lately_they_were_read(tmp_path: Path) -> None:
    """A checkpoint that was read twice is active: outside a container it counts as available just the same."""
    write_tree(tmp_path, {"proc/self/cgroup": "0::/job\n"})
    full = group_v2("sys/fs/cgroup/job", str(8 * GIB), 8 * GIB, inactive_file=2 * GIB, active_file=4 * GIB)
    write_tree(tmp_path, full)
    assert container_memory(tmp_path) == Memory(8 * GIB, 6 * GIB)
    write_tree(tmp_path, group_v2("sys/fs/cgroup/job", str(8 * GIB), 8 * GIB, GIB, 4 * GIB, slab_reclaimable=GIB))
    assert container_memory(tmp_path) == Memory(8 * GIB, 6 * GIB)
    write_tree(tmp_path, {"proc/self/cgroup": "4:memory:/job\n"})
    full = group_v1("sys/fs/cgroup/memory/job", str(8 * GIB), 8 * GIB, inactive_file=2 * GIB, active_file=4 * GIB)
    write_tree(tmp_path, full)
    assert container_memory(tmp_path) == Memory(8 * GIB, 6 * GIB)


def test_each_group_around_gives_up_its_own_pages(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/self/cgroup": "0::/pod/job\n"})
    write_tree(tmp_path, group_v2("sys/fs/cgroup/pod/job", "max", used=5 * GIB, active_file=4 * GIB))
    write_tree(tmp_path, group_v2("sys/fs/cgroup/pod", str(16 * GIB), used=16 * GIB, active_file=9 * GIB))
    write_tree(tmp_path, group_v2("sys/fs/cgroup", str(64 * GIB), used=60 * GIB, inactive_file=GIB))
    assert container_memory(tmp_path) == Memory(16 * GIB, 5 * GIB)


def test_statistics_never_promise_more_than_the_group_uses(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/self/cgroup": "0::/\n"})
    write_tree(tmp_path, group_v2("sys/fs/cgroup", str(8 * GIB), used=GIB, active_file=3 * GIB))
    assert container_memory(tmp_path) == Memory(8 * GIB, 8 * GIB)


def test_a_limit_that_slows_down_counts_as_one_that_refuses(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.high": f"{4 * GIB}\n"})
    write_tree(tmp_path, group_v2("sys/fs/cgroup", "max", used=3 * GIB, active_file=GIB))
    assert container_memory(tmp_path) == Memory(4 * GIB, 2 * GIB)
    write_tree(tmp_path, {"sys/fs/cgroup/memory.high": "max\n"})
    assert container_memory(tmp_path) == Memory(None, None)


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
    before, own_before = resident_bytes(), own_resident_bytes()
    assert before is not None
    assert own_before is not None
    assert own_before <= before
    held = np.ones(64 * 2**20, np.uint8)
    after, own_after, peak = resident_bytes(), own_resident_bytes(), peak_resident_bytes()
    assert after is not None
    assert own_after is not None
    assert peak is not None
    assert 60 * 2**20 < after - before < 80 * 2**20
    assert 60 * 2**20 < own_after - own_before < 80 * 2**20
    assert peak >= before + 60 * 2**20
    del held


def test_pages_of_a_mapped_file_are_the_systems_already(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(64 * 2**20))
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    before, own_before = resident_bytes(), own_resident_bytes()
    assert int(mapped[::4096].sum()) == 0
    after, own_after = resident_bytes(), own_resident_bytes()
    assert before is not None
    assert after is not None
    assert own_before is not None
    assert own_after is not None
    assert after - before > 60 * 2**20
    assert own_after - own_before < 4 * 2**20


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(system, "_process", refuse)
    assert resident_bytes() is own_resident_bytes() is None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "psutil", None)
    system._process.cache_clear()
    monkeypatch.setattr(system, "container_memory", lambda: Memory())
    assert resident_bytes() is None
    assert memory() == Memory(None, None)
    monkeypatch.undo()
    system._process.cache_clear()
    assert resident_bytes() is not None


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
    assert (free_disk_bytes(tmp_path) or 0) > 0


def test_asking_for_help_imports_no_measuring_library() -> None:
    code = (
        "import sys; from handscroll.cli.main import run\n"
        "run(['--help'])\n"
        "print([name for name in ('torch', 'psutil', 'platformdirs') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
