"""The memory that `attach` is allowed: what a process that already works takes beside weights, input and result."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import handscroll
import miniatures
from handscroll.errors import UsageError
from handscroll.runtime import heap
from handscroll.runtime.memory import trim

BENCH = Path(__file__).parents[1] / "bench"

needs_peaks = pytest.mark.skipif(
    not (heap.is_known() and os.access("/proc/self/clear_refs", os.W_OK)),
    reason="this system does not let a process's peak be measured anew, or has another allocator than glibc's",
)


def draws(*options: str) -> list[dict[str, Any]]:
    """In a process of its own, whose heap holds what earlier calls have freed."""
    command = [sys.executable, str(BENCH / "attach_memory.py"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["draws"]
    return found


@needs_peaks
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_what_was_allowed_is_kept(dtype: str) -> None:
    found = draws("--small", "--draws", "3", "--only", dtype)
    assert len(found) == 3
    for draw in found:
        assert draw["taken_bytes"] <= draw["allowed_bytes"], draw


@needs_peaks
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_allowed_is_kept_and_used(dtype: str) -> None:
    """On the published shape, beside which what a process takes anyway is little."""
    for draw in draws("--draws", "8", "--only", dtype):
        assert draw["taken_bytes"] <= draw["allowed_bytes"], draw
        if draw["more_is_faster"]:
            assert draw["allowed_bytes"] <= 1.3 * draw["taken_bytes"], draw


def heap_bytes() -> int:
    """What is resident of the memory that this process has asked for."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


@needs_peaks
def test_what_the_heap_holds_free_is_not_filled_meanwhile() -> None:
    """The kind of block that a call frees: too large for it to stay, and small enough for holes in a heap."""
    with heap.large_blocks_returned():
        pass

    def grown_bytes() -> int:
        kept = []
        for _ in range(8):  # holes of 8 MiB between blocks that stay
            kept += [torch.ones(2**21), torch.ones(2**10)]
        del kept[::2]
        trim()
        before_bytes = heap_bytes()
        with heap.large_blocks_returned():
            for _ in range(8):
                torch.ones(2**19)
            within_bytes = heap_bytes()
        return max(within_bytes, heap_bytes()) - before_bytes

    # Other threads of the process may take memory meanwhile; blocks that stay would be there each time.
    assert min(grown_bytes() for _ in range(3)) < 2**20


@pytest.mark.skipif(not heap.is_known(), reason="another allocator than glibc's")
def test_no_more_is_set_aside_than_the_heap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks do not come from the system one by one, so that the heap would grow and grow."""
    monkeypatch.setattr(heap, "_set", lambda settings: None)
    del (held := [torch.ones(2**18) for _ in range(64)])[::2]
    before_pages = int(Path("/proc/self/statm").read_text().split()[0])
    with heap.large_blocks_returned():
        grown_pages = int(Path("/proc/self/statm").read_text().split()[0]) - before_pages
    assert grown_pages * os.sysconf("SC_PAGE_SIZE") < 2**27
    assert len(held) == 32


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, int]]:
    """What the heap was set to, in order; nothing is really set."""
    asked: list[dict[int, int]] = []
    monkeypatch.setattr(heap, "_set", lambda each: asked.append(dict(each)))
    monkeypatch.setattr(heap, "_STATE", heap._State())
    for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_the_heap_is_put_back_when_the_last_call_has_ended(settings: list[dict[int, int]]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other_thread() -> None:
        with heap.large_blocks_returned():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other_thread)
    with heap.large_blocks_returned():
        thread.start()
        entered.wait(10)
    assert heap.ADAPTED not in settings
    leave.set()
    thread.join()
    assert settings[-1] == heap.ADAPTED
    assert settings.count(heap.ADAPTED) == 1


def test_the_heap_stays_as_it_is_for_a_process_that_has_a_budget(settings: list[dict[int, int]]) -> None:
    heap.return_large_blocks()
    with heap.large_blocks_returned():
        pass
    assert heap.ADAPTED not in settings


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {heap.M_MMAP_THRESHOLD: 65536}),
        ({"MALLOC_MMAP_MAX_": "many"}, {}),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0x1000:glibc.x=1"}, {heap.M_TRIM_THRESHOLD: 4096}),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=7", "MALLOC_MMAP_MAX_": "9"},
            {heap.M_MMAP_MAX: 7},
        ),
    ],
)
def test_settings_of_the_environment_are_what_is_put_back(
    environment: dict[str, str], expected: dict[int, int]
) -> None:
    assert heap.usual_settings(environment.get("GLIBC_TUNABLES", ""), environment) == heap.ADAPTED | expected


OTHER_ALLOCATOR = """
#include <string.h>
#include <sys/mman.h>
static char *next, *end;
void *malloc(size_t n) {
    n = (n + 31) & ~15UL;
    if (!next || next + n > end) {
        size_t block = n > 1UL << 28 ? n : 1UL << 28;
        next = mmap(0, block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        end = next + block;
    }
    char *given = next + 16;
    next += n;
    ((size_t *)given)[-1] = n - 16;
    return given;
}
void free(void *p) {}
void *calloc(size_t a, size_t b) { return malloc(a * b); }
void *realloc(void *p, size_t n) {
    void *q = malloc(n);
    if (p) memcpy(q, p, ((size_t *)p)[-1] < n ? ((size_t *)p)[-1] : n);
    return q;
}
"""


COMPILER = shutil.which("cc")
PYTHONS = [each for each in ("/usr/bin/python3", sys.executable) if os.access(each, os.X_OK)]


def known_to(python: str, **environment: str) -> str:
    """What a Python that has nothing but its standard library says of its allocator."""
    program = f"import runpy; print(runpy.run_path({heap.__file__!r})['is_known']())"
    run = [python, "-c", program]
    return subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not heap.is_known(), reason="another C library or allocator")
def test_any_python_on_glibc_is_known() -> None:
    """Debian's Python has a `malloc` of its own address that leads to glibc's; most others have none."""
    assert [known_to(python) for python in PYTHONS] == ["True"] * len(PYTHONS)


@pytest.mark.skipif(
    not heap.is_known() or COMPILER is None, reason="another C library, or no C compiler to make an allocator with"
)
def test_another_allocator_is_told_from_glibcs(tmp_path: Path) -> None:
    assert COMPILER is not None
    (tmp_path / "other.c").write_text(OTHER_ALLOCATOR)
    library = tmp_path / "other.so"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, tmp_path / "other.c"], check=True
    )
    assert [known_to(python, LD_PRELOAD=str(library)) for python in PYTHONS] == ["False"] * len(PYTHONS)


def test_a_process_with_another_allocator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "is_known", lambda: False)
    vae = miniatures.make_autoencoder().eval().requires_grad_(False)
    with pytest.raises(UsageError, match="glibc"):
        handscroll.attach(vae, memory="300MiB")
    handscroll.attach(vae, strip_rows=1)
    vae.decode(torch.randn(1, 32, 2, 2))
