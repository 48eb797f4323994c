"""fp32 that is fp32: what a host program or a default has set for all of PyTorch, put aside while a job computes."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What PyTorch calls them; each computes in fp32 as its own setting says, else its library's, else that of all.
_OPERATORS = ("matmul", "conv", "rnn")


class _Held:
    """What is set aside now: for each setting how many jobs ask for it, and what undoes it when the last has ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: dict[str, int] = {}
        self.undo: dict[str, contextlib.ExitStack] = {}


_HELD = _Held()


@contextmanager
def full_fp32(device: str) -> Iterator[None]:
    """Inside, fp32 on this kind of device is computed in fp32: in no TF32 (CUDA's convolutions' default) and no bf16.

    When the last of the jobs that are inside at the same time has left, what was set before is put back, through
    whichever of PyTorch's two ways to set it, of which the older refuses to be asked when the newer one has said what
    it cannot say. Settings are the whole process's: other threads that compute meanwhile compute in fp32 as well.
    """
    libraries = ("mkldnn", "cuda") if device.startswith("cuda") else ("mkldnn",)
    with contextlib.ExitStack() as leave:
        for library in libraries:
            _enter(library)
            leave.callback(_leave, library)
        yield


def _enter(library: str) -> None:
    with _HELD.lock:
        _HELD.jobs[library] = _HELD.jobs.get(library, 0) + 1
        if _HELD.jobs[library] > 1:
            return
        undo = _HELD.undo[library] = contextlib.ExitStack()
        places = [(library, operator) for operator in _OPERATORS]
        undo.callback(_set, {place: _own_setting(*place) for place in places})
        if library == "cuda":
            # First, for it changes the newer settings as well: so the two ways go on telling the same.
            undo.enter_context(_older_flags_off())
        _set(dict.fromkeys(places, "ieee"))


def _leave(library: str) -> None:
    with _HELD.lock:
        _HELD.jobs[library] -= 1
        if not _HELD.jobs[library]:
            _HELD.undo.pop(library).close()
            for other in _HELD.undo:  # CUDA's older flags set oneDNN's precision too
                _set({(other, operator): "ieee" for operator in _OPERATORS})


def _set(settings: dict[tuple[str, str], str]) -> None:
    for (library, operator), precision in settings.items():
        torch._C._set_fp32_precision_setter(library, operator, precision)


def _own_setting(library: str, operator: str) -> str:
    """An operator's own setting; `none` where it follows its library's or that of all.

    PyTorch tells only what comes of all three. So those above are changed for a moment: who follows them shows it.
    """

    def told(library: str, operator: str) -> str:
        return torch._C._get_fp32_precision_getter(library, operator)

    def follows(library: str, operator: str, above: tuple[str, str], restored: str) -> bool:
        seen = set()
        for precision in ("ieee", "tf32"):
            torch._C._set_fp32_precision_setter(*above, precision)
            seen.add(told(library, operator))
        torch._C._set_fp32_precision_setter(*above, restored)
        return len(seen) > 1

    of_all = told("generic", "all")
    of_library = "none" if follows(library, "all", ("generic", "all"), of_all) else told(library, "all")
    own = told(library, operator)
    return "none" if follows(library, operator, (library, "all"), of_library) else own


@contextmanager
def _older_flags_off() -> Iterator[None]:
    """`allow_tf32` of both CUDA libraries, off inside; one that refuses to be asked is left as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are the older ones
        flags: tuple[tuple[Callable[[], Any], Callable[[Any], Any], Any], ...] = (
            (torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision, "highest"),
            (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, False),
        )
        undo: list[tuple[Callable[[Any], Any], Any]] = []
        for get, set_, off in flags:
            with contextlib.suppress(RuntimeError):
                undo.append((set_, get()))
                set_(off)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for set_, before in undo:
                set_(before)
