"""What this machine computes on."""

from __future__ import annotations

import time

import torch

from handscroll.errors import UsageError
from handscroll.plan.plan import Hardware

# A CPU's bf16 must win clearly: a choice that flips from run to run would change the picture.
BF16_MUST_BE_FASTER = 1.3


def find_hardware(device: str, precision: str) -> Hardware:
    """Resolves `auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError for a device that is not here.

    bf16 is timed against fp32 only where the answer matters: `precision` auto, on a CPU with bf16 instructions.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.partition(":")[2] or 0)
        if index >= count:
            raise UsageError(f"device {device} is not here: this machine has {count} CUDA devices; use --device cpu")
        return Hardware(f"cuda:{index}")
    return Hardware("cpu", bf16_is_faster=precision == "auto" and _cpu_bf16_is_faster())


def _cpu_bf16_is_faster() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    seconds = {dtype: _convolution_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.float32] > BF16_MUST_BE_FASTER * seconds[torch.bfloat16]


def _convolution_seconds(dtype: torch.dtype) -> float:
    """The best of a few runs of a convolution like the decoder's, 0.6 GFLOP."""
    image = torch.ones(1, 128, 32, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.conv2d(image, weight, padding=1)
        best = min(best, time.perf_counter() - start)
    return best
