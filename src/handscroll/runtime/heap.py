"""The C heap: when freed memory goes back to the system. Only glibc's is known here.

glibc takes blocks from a certain size on from the system one by one, and gives them back when they are freed. It raises
that size by itself as blocks are freed, up to 32 MiB; smaller blocks then come from a heap that keeps what was freed.
Lowering the size helps only a process that is young: whatever the size, a block is first looked for among what the heap
holds free, and is kept there again when it is freed. So `large_blocks_returned`, which is for a process that has
already worked, also sets the heap's large free blocks aside for a while. They are not touched, and so take no memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

# glibc's names for what mallopt sets (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# A process that is ours alone, and one that is somebody else's, where a budget is a call's and smaller.
FOR_GOOD = {M_MMAP_THRESHOLD: 2**20, M_TRIM_THRESHOLD: 2**20}
FOR_A_WHILE = {M_MMAP_THRESHOLD: 2**16, M_TRIM_THRESHOLD: 2**20, M_MMAP_MAX: 2**20}
# What glibc arrives at by itself in a process that frees large blocks (malloc.c). Once anything was set, it adapts no
# more; so this is what is put back where the environment sets nothing.
ADAPTED = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_MMAP_MAX: 2**16}
# The names under which the environment sets them.
VARIABLES = {
    M_MMAP_THRESHOLD: ("MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold"),
    M_TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold"),
    M_MMAP_MAX: ("MALLOC_MMAP_MAX_", "glibc.malloc.mmap_max"),
}
# The size of a block lies before it, and in that its second bit is set where the system gave it by itself (malloc.c).
_SIZE_BYTES, _OF_ITS_OWN = ctypes.sizeof(ctypes.c_size_t), 2
_LARGEST_BYTES = 2**30
_PROBED_BYTES = 2**26  # more than other threads are likely to take at the same moment; it is never touched


def is_known() -> bool:
    """Whether this process's memory comes from glibc, and not from another library or an allocator put before it."""
    if sys.platform != "linux":
        return False
    try:
        glibc, library = _library("libc.so.6"), _library()
        if not hasattr(glibc, "mallopt"):
            return False
        return _address(glibc.malloc) == _address(library.malloc) or _counts(glibc, library)
    except (OSError, AttributeError):
        return False


def return_large_blocks() -> None:
    """Every block of a row block's size goes back to the system when it is freed, for the rest of the process.

    Where the environment has set a threshold lower, it stays.
    """
    with _STATE.lock:
        _STATE.for_good = True
        _set(_for_good())


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Every block of a row block's size goes back to the system when it is freed, while this is entered.

    It holds for all threads, and ends when the last that entered has left: then glibc's sizes are those that the
    environment sets, else the ones at which it arrives by itself in a process that frees large blocks. What this
    thread's heap holds free is set aside meanwhile.
    """
    with _STATE.lock:
        _STATE.entered += 1
        _set(FOR_A_WHILE)
    aside: list[int] = []
    try:
        _set_aside(aside)
        yield
    finally:
        _give_back(aside)
        with _STATE.lock:
            _STATE.entered -= 1
            if not _STATE.entered:
                _set(_usual() | (_for_good() if _STATE.for_good else {}))


def _usual() -> dict[int, int]:
    return usual_settings(os.environ.get("GLIBC_TUNABLES", ""), dict(os.environ))


def _for_good() -> dict[int, int]:
    usual = _usual()
    return {parameter: min(value, usual[parameter]) for parameter, value in FOR_GOOD.items()}


def usual_settings(tunables: str, environment: dict[str, str]) -> dict[int, int]:
    """What mallopt's settings are without us: as the user's environment sets them, else as glibc adapts them.

    tunables: `name=value` separated by colons, as in GLIBC_TUNABLES, which come before the older variables.
    """
    tuned = dict(each.split("=", 1) for each in tunables.split(":") if "=" in each)
    settings = {}
    for parameter, (variable, tunable) in VARIABLES.items():
        asked = tuned.get(tunable, environment.get(variable, ""))
        try:
            settings[parameter] = int(asked, 0)
        except ValueError:
            settings[parameter] = ADAPTED[parameter]
    return settings


class _State:
    """Who has asked for large blocks to be returned: how many for a while, and whether anybody for good."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entered = 0
        self.for_good = False


_STATE = _State()


_OF_HEAP = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`.

    `arena` is what the heap has of the system, `uordblks` and `fordblks` what of it is in use and free, and `hblkhd`
    what the system gave by itself.
    """

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _OF_HEAP]


class _OlderHeap(ctypes.Structure):
    """glibc's `struct mallinfo`, before 2.33."""

    _fields_: ClassVar = [(name, ctypes.c_int) for name in _OF_HEAP]


def _set_aside(aside: list[int]) -> None:
    """Adds the addresses of all blocks that the heap can still give without the system, the largest first."""
    if not is_known():
        return
    library = _library()
    if not hasattr(library, "mallinfo2"):
        return  # a glibc before 2.33
    free_bytes = library.mallinfo2().fordblks
    size_bytes = _LARGEST_BYTES
    while size_bytes >= FOR_A_WHILE[M_MMAP_THRESHOLD]:
        if size_bytes <= free_bytes:
            heap_bytes, address = library.mallinfo2().arena, library.malloc(size_bytes)
            own = address and ctypes.c_size_t.from_address(address - _SIZE_BYTES).value & _OF_ITS_OWN
            # Where no block comes from the system by itself, as when there are too many of them, the heap grows.
            if address and not own and library.mallinfo2().arena <= heap_bytes:
                aside.append(address)
                free_bytes -= size_bytes
                continue
            library.free(address)
        size_bytes //= 2


def _counts(glibc: Any, library: Any) -> bool:
    """Whether glibc counts a block as its own that this process is given.

    Under its name alone it is not known: the address of `malloc` may be a place in the program that leads to glibc's,
    as in the Python of Debian and Ubuntu.
    """
    describe = glibc.mallinfo2 if hasattr(glibc, "mallinfo2") else glibc.mallinfo

    def in_use_bytes() -> int:
        now = describe()
        return int(now.uordblks + now.hblkhd)

    for _ in range(3):  # other threads take and free blocks meanwhile
        before_bytes = in_use_bytes()
        address = library.malloc(_PROBED_BYTES)
        taken_bytes = in_use_bytes() - before_bytes
        library.free(address)
        if address and abs(taken_bytes - _PROBED_BYTES) < _PROBED_BYTES // 2:
            return True
    return False


def _give_back(aside: list[int]) -> None:
    if aside:
        library = _library()
        while aside:
            library.free(aside.pop())


def _library(name: str | None = None) -> Any:
    """A library by its name; left out, whichever this process finds first."""
    library = ctypes.CDLL(name)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype, library.mallinfo2.argtypes = _Heap, []
    if hasattr(library, "mallinfo"):
        library.mallinfo.restype, library.mallinfo.argtypes = _OlderHeap, []
    return library


def _set(settings: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return  # a C library other than glibc
    for parameter, value in settings.items():
        mallopt(parameter, value)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
