"""How a decoder or encoder runs within `attach(memory=...)`: the plan, and the line that says what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from handscroll.banded.backend import has_onednn
from handscroll.errors import BudgetError, UsageError
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.plan.budget import CUDA_EXTRA_SHARE, PartBudget
from handscroll.plan.decode import DecodeStage, decode_stages, taller
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.inputs import MIB, Hardware
from handscroll.runtime import heap
from handscroll.units import allowance_text, budget_text

# In a process that already works a call takes little beside its tensors: small blocks, scratch, and where fused kernels
# are used those that oneDNN compiles for shapes that it has not met: 38 MiB were seen in decoders and 56 in encoders, 3
# when they come again.
CPU_FUSED_EXTRA_BYTES = {"decoder": 42 * MIB, "encoder": 60 * MIB}
CPU_EXTRA_BYTES, CPU_EXTRA_SHARE = 16 * MIB, 0.02
# On a CUDA device, beside the share of all jobs there: blocks of 2 and 20 MiB that are in part empty. cuDNN's scratch
# is not in it, since the allocator's limit makes cuDNN find a way with less.
CUDA_EXTRA_BYTES = 48 * MIB
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What each half does, as events and diffusers' methods name it.
VERBS = {"decoder": "decode", "encoder": "encode"}


@dataclass(frozen=True)
class Job:
    """One call: what of the autoencoder (`decoder`, `encoder`), and for what.

    rows, columns: of each of `batch` latents. width, height: of each picture, in pixels. held_bytes: what is held all
    the time beside what the half itself makes. resident: whether the weights stay where they are, and as they are.
    """

    half: str
    batch: int
    rows: int
    columns: int
    width: int
    height: int
    dtype: torch.dtype
    device: torch.device
    held_bytes: int = 0
    resident: bool = True

    @property
    def title(self) -> str:
        of = "a picture" if self.batch == 1 else f"{self.batch} pictures"
        return f"to {VERBS[self.half]} {of} of {self.width}x{self.height} in {_PRECISIONS[self.dtype]}"


def spec_of(config: Mapping[str, Any]) -> AutoencoderSpec:
    """Raises UsageError for a config that cannot be planned."""
    try:
        return AutoencoderSpec.from_config(dict(config))
    except ValueError as error:
        raise UsageError(f"memory cannot be kept with this autoencoder: {error}; leave memory out") from None


def check_allocator(device: torch.device) -> None:
    """Raises UsageError where what this process takes on a device cannot be kept to a budget."""
    if device.type == "cpu" and not heap.is_known():
        raise UsageError(
            "memory can only be kept where glibc gives this process its memory, as on Linux without another allocator; "
            "use strip_rows=1 instead"
        )


def route_within(spec: AutoencoderSpec, job: Job, memory_bytes: int) -> DecodeStage:
    """Row block heights and starts of every sweep, with what is taken at most in `peak_bytes`, within `memory_bytes`.

    Raises BudgetError with the least that would do, UsageError where this process's memory cannot be kept to.
    """
    check_allocator(job.device)
    stage, least_bytes = _planned(spec, job, memory_bytes)
    if stage is None:
        raise BudgetError(
            f"{job.title} needs at least {budget_text(least_bytes)} above weights, input and result; "
            f"{allowance_text(memory_bytes)} were allowed",
            least_bytes,
        )
    return stage


@lru_cache(maxsize=16)
def _planned(spec: AutoencoderSpec, job: Job, memory_bytes: int) -> tuple[DecodeStage | None, int]:
    """The fastest way that fits, or None; and the least that would do."""
    half = DecoderShape if job.half == "decoder" else EncoderShape
    fused = job.device.type != "cpu" or has_onednn(torch.empty(0, dtype=job.dtype))
    shape = half(spec, job.rows, job.columns * job.batch, job.dtype.itemsize, job.batch, fused, job.resident)
    on_cuda = job.device.type == "cuda"
    hardware, precision = Hardware(str(job.device), scratch_bytes=0), _PRECISIONS[job.dtype]
    cpu_extra_bytes = CPU_FUSED_EXTRA_BYTES[job.half] if fused else CPU_EXTRA_BYTES
    extra_bytes, extra_share = (CUDA_EXTRA_BYTES, CUDA_EXTRA_SHARE) if on_cuda else (cpu_extra_bytes, CPU_EXTRA_SHARE)
    budget = PartBudget(0, extra_bytes, extra_share, memory_bytes)
    stages = list(decode_stages(shape, precision, hardware, budget.tensor_bytes, held_bytes=job.held_bytes))
    best = budget.choose(stages)
    least_bytes = min(budget.total_bytes(stage.peak_bytes) for stage in stages)
    if best.peak_bytes > memory_bytes:
        return None, least_bytes
    assert budget.tensor_bytes is not None
    filled = taller(shape, precision, hardware, best, budget.tensor_bytes, job.held_bytes)
    return replace(filled, peak_bytes=budget.total_bytes(filled.peak_bytes)), least_bytes
