"""What this machine computes on."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from handscroll.errors import UsageError
from handscroll.plan.plan import Hardware

BF16_MUST_BE_FASTER = 1.3
TIMINGS = 5


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
    return bool(remembered("cpu_bf16_is_faster", _time_bf16))


def _time_bf16() -> bool:
    """On one thread and by its own processor time, so that a busy machine gives the same answer as an idle one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _bf16_wins()
    finally:
        torch.set_num_threads(threads)


def _bf16_wins() -> bool:
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(TIMINGS):
        for dtype in seconds:
            seconds[dtype] = min(seconds[dtype], _convolution_seconds(dtype))
    return seconds[torch.float32] > BF16_MUST_BE_FASTER * seconds[torch.bfloat16]


def _convolution_seconds(dtype: torch.dtype) -> float:
    """One run of a convolution like the decoder's, 0.6 GFLOP, after one that does not count."""
    image = torch.ones(1, 128, 32, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    torch.nn.functional.conv2d(image, weight, padding=1)
    start = time.thread_time()
    torch.nn.functional.conv2d(image, weight, padding=1)
    return time.thread_time() - start


# What was measured is remembered: a choice that flipped from run to run would change the picture.


def cache_folder() -> Path:
    """Where measurements of this machine are kept: HANDSCROLL_CACHE, or `handscroll` in the user's cache folder."""
    if own := os.environ.get("HANDSCROLL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handscroll"


def remembered(name: str, measure: Callable[[], bool]) -> bool:
    """A measurement of this machine under this torch: from the cache file, or taken now and written there."""
    file = cache_folder() / "devices.json"
    key = f"{name}, {_processor()}, torch {torch.__version__}"
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    if key not in known:
        known[key] = measure()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.{os.getpid()}.part")
            part.write_text(json.dumps(known, indent=1))
            part.replace(file)
        except OSError:
            return known[key]  # a machine without a writable cache measures again
    return known[key]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
