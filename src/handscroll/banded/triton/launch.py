"""Where Triton kernels can run, how they are compiled and launched, and the functions that several of them call.

Triton is imported when a kernel is first used, or `available` asked about a CUDA tensor: this module is imported on
machines without it. With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run on CPUs,
slowly: that is how they are tested where there is no device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by `_triton` when Triton is first used: what it compiles finds it among its own module's names

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the first with bf16 in hardware, and the least that Triton supports

# 64 elements for each thread of a warp: in registers without spilling, and half a dozen 16-byte loads in flight.
WARP_ELEMENTS = 2048
# Programs that keep a device busy where more of them would only read more halo rows.
BUSY_PROGRAMS = 2048

# What may change with every row block: a kernel is not compiled anew because a count is 1 or a multiple of 16.
COUNTS = {"pixels", "rows", "width", "program_pixels", "program_rows", "parts"}
KERNELS: list[Kernel] = []  # all that there are
_INLINED: list[Callable[..., Any]] = []


def in_use(tensor: Tensor) -> bool:
    """Whether the operators of `backend` and the networks call these kernels for such a tensor.

    On CUDA devices wherever they work, unless HANDSCROLL_TRITON=0 forbids them; in Triton's interpreter only where
    HANDSCROLL_TRITON=1 asks for them.
    """
    asked = os.environ.get("HANDSCROLL_TRITON")
    if asked == "0" or not available(tensor):
        return False
    return _works(tensor.device) if tensor.is_cuda else asked == "1"


def available(tensor: Tensor) -> bool:
    """Whether the kernels can run on such a tensor: of fp32, bf16 or fp16, on a CUDA device that Triton supports.

    True for tensors on the CPU where Triton's interpreter was asked for.
    """
    if tensor.dtype not in DTYPES:
        return False
    if tensor.device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()
    return tensor.is_cuda and torch.version.hip is None and _is_supported(tensor.device) and _has_triton()


@cache
def _is_supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


@cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


@cache
def _works(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run: Triton needs a C compiler, which many machines lack."""
    try:
        probe_kernel.launch((1,), torch.zeros(1, device=device), num_warps=1)
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"Triton cannot compile kernels here, so PyTorch's own are taken, about half as fast ({reason}). What "
            "is mostly missing is a C compiler (Debian: apt install gcc); HANDSCROLL_TRITON=0 ends this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    _INLINED.append(function)
    return function


@cache
def _triton() -> Any:
    """Triton, with all that kernels refer to by name in place: each finds it among its own module's names."""
    triton, language = import_module("triton"), import_module("triton.language")
    jitted = {id(function): triton.jit(function) for function in _INLINED}
    functions = [*_INLINED, *(kernel.function for kernel in KERNELS)]
    for names in {id(function.__globals__): function.__globals__ for function in functions}.values():
        names["tl"] = language
        names.update({name: jitted[id(value)] for name, value in names.items() if id(value) in jitted})
    return triton


class Kernel:
    """A function in Triton's language."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        KERNELS.append(self)

    @cached_property
    def jitted(self) -> Any:
        code = self.function.__code__
        counts = [name for name in code.co_varnames[: code.co_argcount] if name in COUNTS]
        return _triton().jit(self.function, do_not_specialize=counts)

    def launch(self, grid: tuple[int, ...], *arguments: Any, num_warps: int, fuses: bool = False, **sizes: Any) -> None:
        """Runs it on the device of the first argument.

        fuses: whether a product may be added to a sum in one instruction, without being rounded in between.
        """
        device = arguments[0].device
        is_elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if is_elsewhere else nullcontext():
            self.jitted[grid](*arguments, **sizes, num_warps=num_warps, enable_fp_fusion=fuses)


@Kernel
def probe_kernel(out: tl.tensor) -> None:
    tl.store(out, 1.0)


@inlined
def rounded(values: tl.tensor, like: tl.tensor) -> tl.tensor:
    # As if they had been written to this tensor and read again.
    return values.to(like.dtype.element_ty).to(tl.float32)


@inlined
def silu(values: tl.tensor) -> tl.tensor:
    return values / (1 + tl.exp(-values))


@inlined
def relu(values: tl.tensor) -> tl.tensor:
    return tl.where(values < 0, 0.0, values)  # a maximum would make a NaN 0
