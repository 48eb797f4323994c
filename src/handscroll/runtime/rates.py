"""How fast a device is: for the seconds of a plan and the choices between its candidates, never for the picture."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from handscroll.files import cache_folder, lock_folder, write_whole
from handscroll.plan.inputs import Rates
from handscroll.runtime.arithmetic import full_fp32
from handscroll.runtime.memory import empty_pinned_cache
from handscroll.system import processor_name

BF16_MUST_BE_FASTER = 1.3
TIMINGS = 5
CONVOLUTION_FLOP = 2 * 128 * 128 * 9 * 32 * 64


# How fast the device is: for the seconds of a plan and the choices between its ways, never for the picture.
def rates_of(device: str) -> Rates:
    threads = torch.get_num_threads() if device == "cpu" else 0
    of = f"{threads} threads" if threads else f"{torch.cuda.get_device_name(device)}, fp32 in full"
    name = f"rates of {of}"
    found = remembered(name, lambda: dataclasses.asdict(measure_rates(device)))
    try:
        return Rates(**found)
    except TypeError:  # written by another version
        return Rates()


def measure_rates(device: str) -> Rates:
    flops = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if device == "cpu" and dtype == torch.float16:
            continue  # the transformer alone may be fp16, and nobody asks for it on a CPU
        with full_fp32(device):
            seconds = min(_convolution_seconds(dtype, device, time.perf_counter) for _ in range(TIMINGS))
        flops[f"{precision}_flops"] = CONVOLUTION_FLOP / seconds
    if device == "cpu":
        return Rates(**flops)
    return Rates(**flops, host_bytes=_copied_bytes_a_second(device))


def _copied_bytes_a_second(device: str) -> float:
    """From pinned memory to a CUDA device."""
    with torch.cuda.device(device):
        block = torch.ones(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    start = time.perf_counter()
    block.to(device)
    torch.cuda.synchronize(device)
    rate = block.nbytes / (time.perf_counter() - start)
    del block
    empty_pinned_cache()
    return rate


def cpu_bf16_is_faster() -> bool:
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
            seconds[dtype] = min(seconds[dtype], _convolution_seconds(dtype, "cpu", time.thread_time))
    return seconds[torch.float32] > BF16_MUST_BE_FASTER * seconds[torch.bfloat16]


def _convolution_seconds(dtype: torch.dtype, device: str, clock: Callable[[], float]) -> float:
    """One run of a convolution like the decoder's, after one that does not count, by a clock in seconds."""
    image = torch.ones(1, 128, 32, 64, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    torch.nn.functional.conv2d(image, weight, padding=1)
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = clock()
    torch.nn.functional.conv2d(image, weight, padding=1)
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - start


# What was measured is remembered: a choice that flipped from run to run would change the picture.
def remembered(name: str, measure: Callable[[], Any]) -> Any:
    """A measurement of this machine under this torch, a JSON value: from the cache file, or taken and written there.

    Of processes that take it at the same time the first one is believed, and none loses what another has written.
    """
    file = cache_folder() / "devices.json"
    key = f"{name}, {processor_name()}, torch {torch.__version__}"
    if key in (known := _read_measurements(file)):
        return known[key]
    measured = measure()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(file.parent):
            known = _read_measurements(file)
            if key not in known:
                write_whole(file, [json.dumps(known | {key: measured}, indent=1).encode()])
    except OSError:
        return measured  # a machine without a writable cache measures again
    return known.get(key, measured)


def _read_measurements(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
