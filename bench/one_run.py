"""What side_by_side.py starts: one way of one stage at one size, once. Seconds, peak memory, difference.

    python bench/one_run.py '{"mode": "rows", "size": [1024, 1024], "settings": {...}, "folder": "/scratch"}'

The last line is one JSON object. What is compiled runs once before, which tells how long compiling took; so does what
Triton interprets, and on a CUDA device everything but whole generations and huge pictures, so that kernels are chosen,
compiled and loaded: `first_seconds` is what a process takes that has loaded nothing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import stages
from machine import synchronize

TWICE_PIXELS = 2**26


def main(request: str) -> None:
    asked = json.loads(request)
    settings = stages.Settings(**asked["settings"])
    folder = Path(asked["folder"])
    width, height = asked["size"]
    found = measure(
        stages.open_stage(settings), asked["mode"], (width, height), folder, reference_of((width, height), folder)
    )
    print(json.dumps(found))


def reference_of(size: stages.Size, folder: Path) -> Path:
    """Where the first whole run, which is the first of all, leaves its result for the others."""
    return folder / f"whole-{size[0]}x{size[1]}.npy"


@torch.no_grad()
def measure(stage: stages.Stage, mode: str, size: stages.Size, folder: Path, reference: Path) -> dict[str, Any]:
    """One run, after what must come before it."""
    device = stage.settings.device
    begun = time.perf_counter()
    ready = stage.ready(mode, size, reference.exists(), folder)
    ready_seconds = time.perf_counter() - begun
    ready.warm_up()
    compiled = mode == "compiled"
    first_seconds = None
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if compiled or interprets or (device != "cpu" and not stage.of_process and size[0] * size[1] <= TWICE_PIXELS):
        first_seconds = timed(ready, device)[0]
    gc.collect()

    loaded_bytes = reset_peak(device)
    seconds, result = timed(ready, device)
    peak_bytes = None if loaded_bytes is None else peak(device, stage.of_process)
    if peak_bytes is not None and loaded_bytes is not None and not stage.of_process:
        peak_bytes -= loaded_bytes

    difference = None
    if reference.exists():
        difference = stage.difference(result, reference)
    elif mode == "whole":
        part = reference.with_suffix(".part.npy")
        stage.keep(result, part)
        part.replace(reference)
        difference = 0.0
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "max_difference": difference,
        "ready_seconds": ready_seconds,
        "first_seconds": first_seconds,
        "compile_seconds": max(0.0, first_seconds - seconds) if compiled and first_seconds is not None else None,
    }


def timed(ready: stages.Ready, device: str) -> tuple[float, Any]:
    synchronize(device)
    begun = time.perf_counter()
    result = ready.run()
    synchronize(device)
    return time.perf_counter() - begun, result


def reset_peak(device: str) -> int | None:
    """Makes the peak start again from now, where that can be done; returns the bytes that are held now."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return memory_status("VmRSS")
    return None


def peak(device: str, of_process: bool) -> int:
    """The most bytes held since then: resident memory, or on a CUDA device what tensors took or PyTorch reserved."""
    if device != "cpu":
        return torch.cuda.max_memory_reserved(device) if of_process else torch.cuda.max_memory_allocated(device)
    return memory_status("VmHWM")


def memory_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(sys.argv[1])
