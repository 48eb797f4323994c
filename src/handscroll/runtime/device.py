"""What this machine computes on."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path

import torch

from handscroll.errors import UsageError
from handscroll.plan.inputs import Hardware
from handscroll.runtime.rates import cpu_bf16_is_faster, rates_of
from handscroll.system import available_bytes, free_disk_bytes, own_resident_bytes, resident_bytes

HOST_SHARE = 0.7  # of the host's free memory, for what a device has no room for
UNKNOWN_DISK_BYTES = 2**62
FP8_CAPABILITY = 8, 9  # the first that multiplies fp8
# What the stages import when they first need it.
LIBRARIES = (
    "diffusers.models.transformers.sana_transformer",
    "diffusers.models.autoencoders.autoencoder_dc",
    "diffusers.pipelines.sana.pipeline_sana",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.auto.tokenization_auto",
    "pyvips",
)


def find_hardware(device: str, scratch: Path = Path()) -> Hardware:
    """Resolves `auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError for a device that is not here.

    Speeds are measured once per device and remembered, bf16's against fp32's on a CPU with instructions for it among
    them. `scratch` is the folder where maps may be put.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch_bytes = _free_disk_bytes(scratch)
    if device.startswith("cuda"):
        return _cuda_hardware(device, scratch_bytes)
    import_libraries()
    available, own_bytes = available_bytes(), own_resident_bytes()
    return Hardware(
        "cpu",
        bf16_is_faster=cpu_bf16_is_faster(),
        base_bytes=resident_bytes(),
        free_bytes=None if available is None else available + (own_bytes or 0),
        scratch_bytes=scratch_bytes,
        rates=rates_of("cpu"),
    )


def _cuda_hardware(device: str, scratch_bytes: int) -> Hardware:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise UsageError(f"device {device} is not here: this machine has {count} CUDA devices; use --device cpu")
    device = f"cuda:{index}"
    rates = rates_of(device)  # first, for measuring takes memory
    return Hardware(
        device,
        base_bytes=torch.cuda.memory_allocated(device),
        free_bytes=torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device),
        host_bytes=int((available_bytes() or 0) * HOST_SHARE),
        scratch_bytes=scratch_bytes,
        rates=rates,
        has_fp8=torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY,
    )


def scratch_folder(beside: Path | None) -> Path | None:
    """Where maps may be put on disk: HANDSCROLL_SCRATCH, or a folder of the job's own, or the system's (None)."""
    return Path(own) if (own := os.environ.get("HANDSCROLL_SCRATCH")) else beside


def import_libraries() -> None:
    """Imports what the stages will need, so that what the process holds before them can be measured."""
    for name in LIBRARIES:
        importlib.import_module(name)


def _free_disk_bytes(folder: Path) -> int:
    """Room for a scratch file; none where there can be no file. Raises UsageError for a folder that the user named."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            free_bytes = free_disk_bytes(folder)
    except OSError as error:
        if os.environ.get("HANDSCROLL_SCRATCH"):
            raise UsageError(f"no file can be made in HANDSCROLL_SCRATCH {folder}: {error.strerror}") from error
        return 0
    return UNKNOWN_DISK_BYTES if free_bytes is None else free_bytes
