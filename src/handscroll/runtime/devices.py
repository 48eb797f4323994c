"""What this machine computes on."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from handscroll.errors import UsageError
from handscroll.plan.hardware import Hardware, Rates
from handscroll.runtime.memory import resident_bytes

BF16_MUST_BE_FASTER = 1.3
TIMINGS = 5
CONVOLUTION_FLOP = 2 * 128 * 128 * 9 * 32 * 64
HOST_SHARE = 0.7  # of the host's free memory, for maps that a device has no room for

# What the stages import when they first need it.
LIBRARIES = (
    "diffusers.models.transformers.sana_transformer",
    "diffusers.models.autoencoders.autoencoder_dc",
    "diffusers.pipelines.sana.pipeline_sana",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.auto.tokenization_auto",
    "pyvips",
)


def find_hardware(device: str, precision: str, scratch: Path = Path()) -> Hardware:
    """Resolves `auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError for a device that is not here.

    bf16 is timed against fp32 only where the answer matters: `precision` auto, on a CPU with bf16 instructions. Speeds
    are measured once per device and remembered. `scratch` is the folder where maps may be put.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch_bytes = _free_disk_bytes(scratch)
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.partition(":")[2] or 0)
        if index >= count:
            raise UsageError(f"device {device} is not here: this machine has {count} CUDA devices; use --device cpu")
        device = f"cuda:{index}"
        return Hardware(
            device,
            free_bytes=torch.cuda.mem_get_info(device)[0],
            host_bytes=int((available_bytes() or 0) * HOST_SHARE),
            scratch_bytes=scratch_bytes,
            rates=_rates(device),
        )
    import_libraries()
    base_bytes = resident_bytes()
    available = available_bytes()
    return Hardware(
        "cpu",
        bf16_is_faster=precision == "auto" and _cpu_bf16_is_faster(),
        base_bytes=base_bytes,
        free_bytes=None if available is None else base_bytes + available,
        scratch_bytes=scratch_bytes,
        rates=_rates("cpu"),
    )


def scratch_folder(beside: Path | None) -> Path | None:
    """Where maps may be put on disk: HANDSCROLL_SCRATCH, or a folder of the job's own, or the system's (None)."""
    return Path(own) if (own := os.environ.get("HANDSCROLL_SCRATCH")) else beside


def import_libraries() -> None:
    """Imports what the stages will need, so that what the process holds before them can be measured."""
    for name in LIBRARIES:
        importlib.import_module(name)


def available_bytes() -> int | None:
    """What the system could still give to this process, or None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    of_system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:  # a container may have less
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        of_container = int(limit) - int(used)
    except (OSError, ValueError):
        return of_system
    return of_container if of_system is None else min(of_system, of_container)


def _free_disk_bytes(folder: Path) -> int:
    """Room for a scratch file; none where there can be no file. Raises UsageError for a folder that the user named."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free
    except OSError as error:
        if os.environ.get("HANDSCROLL_SCRATCH"):
            raise UsageError(f"no file can be made in HANDSCROLL_SCRATCH {folder}: {error.strerror}") from error
        return 0


# How fast the device is: for the seconds of a plan and the choices between its ways, never for the picture.


def _rates(device: str) -> Rates:
    threads = torch.get_num_threads() if device == "cpu" else 0
    name = f"rates of {torch.cuda.get_device_name(device) if threads == 0 else f'{threads} threads'}"
    found = remembered(name, lambda: dataclasses.asdict(_measure_rates(device)))
    try:
        return Rates(**found)
    except TypeError:  # written by another version
        return Rates()


def _measure_rates(device: str) -> Rates:
    flops = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if device == "cpu" and dtype == torch.float16:
            continue  # the transformer alone may be fp16, and nobody asks for it on a CPU
        flops[f"{precision}_flops"] = CONVOLUTION_FLOP / min(
            _convolution_seconds(dtype, device, time.perf_counter) for _ in range(TIMINGS)
        )
    if device == "cpu":
        return Rates(**flops)
    block = torch.ones(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    start = time.perf_counter()
    block.to(device)
    torch.cuda.synchronize(device)
    host_bytes = block.nbytes / (time.perf_counter() - start)
    return Rates(**flops, host_bytes=host_bytes)


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


def cache_folder() -> Path:
    """Where measurements of this machine are kept: HANDSCROLL_CACHE, or `handscroll` in the user's cache folder."""
    if own := os.environ.get("HANDSCROLL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handscroll"


def remembered(name: str, measure: Callable[[], Any]) -> Any:
    """A measurement of this machine under this torch, a JSON value: from the cache file, or taken and written there."""
    file = cache_folder() / "devices.json"
    key = f"{name}, {processor_name()}, torch {torch.__version__}"
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


def processor_name() -> str:
    """What the processor calls itself, or its kind where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
