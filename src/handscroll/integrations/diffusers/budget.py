"""How a decoder or encoder runs within `attach(memory=...)`: the plan, and the line that says what it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from handscroll.banded import kernels
from handscroll.banded.backend import has_onednn
from handscroll.errors import BudgetError, UsageError
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.plan.budget import CUDA_EXTRA_SHARE, PartBudget
from handscroll.plan.decode import DecodeStage, decode_stages, taller
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.inputs import MIB, Hardware
from handscroll.plan.kernels import Kernel, compiled_bytes
from handscroll.runtime import heap
from handscroll.units import allowance_text, budget_text

# In a process that already works a call takes little beside its tensors: small blocks and scratch, and where fused
# kernels are used those that oneDNN compiles for shapes that it has not met (plan/kernels.py).
CPU_FUSED_EXTRA_BYTES, CPU_EXTRA_BYTES, CPU_EXTRA_SHARE = 4 * MIB, 16 * MIB, 0.02
# Tried in steps: how much of the memory kernels take, which depends on the row blocks that are chosen beside them.
KERNEL_STEP_BYTES, MOST_KERNEL_BYTES = 2 * MIB, 96 * MIB
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
    """The fastest way that fits, or None; and the least that would do.

    It stays as it was planned first: other row blocks would make oneDNN compile more kernels.
    """
    on_cpu = job.device.type == "cpu"
    compiles = on_cpu and has_onednn(torch.empty(0, dtype=job.dtype))
    half = DecoderShape if job.half == "decoder" else EncoderShape
    fused = compiles or not on_cpu
    shape = half(spec, job.rows, job.columns * job.batch, job.dtype.itemsize, job.batch, fused, job.resident)
    hardware, precision = Hardware(str(job.device), scratch_bytes=0), _PRECISIONS[job.dtype]
    extra_bytes, extra_share = CPU_EXTRA_BYTES, CPU_EXTRA_SHARE
    if not on_cpu:
        extra_bytes, extra_share = CUDA_EXTRA_BYTES, CUDA_EXTRA_SHARE
    elif compiles:
        extra_bytes = CPU_FUSED_EXTRA_BYTES
    budget = PartBudget(0, extra_bytes, extra_share, memory_bytes)
    assert budget.tensor_bytes is not None
    met = [Kernel(*kernel) for kernel in kernels.MET.all()] if compiles else []

    def whole(stage: DecodeStage, met: Sequence[Kernel] = met) -> DecodeStage:
        """With all that is taken of the memory, the kernels that are compiled by then among it."""
        compiled = compiled_bytes(shape, stage, met) if compiles else [0] * len(stage.sweeps)
        sweeps = zip(stage.sweeps, compiled, strict=True)
        return replace(stage, peak_bytes=max(budget.total_bytes(sweep.peak_bytes) + taken for sweep, taken in sweeps))

    def stages(tensor_bytes: int) -> list[DecodeStage]:
        return list(decode_stages(shape, precision, hardware, tensor_bytes, held_bytes=job.held_bytes))

    # Whatever has run here: what is refused once is always refused.
    smallest = stages(0)
    least_bytes = min(whole(stage, met=[]).peak_bytes for stage in smallest)
    if memory_bytes < least_bytes:
        return None, least_bytes
    fitting = [stage for stage in map(whole, smallest) if stage.peak_bytes <= memory_bytes]
    # What kernels take is known of row blocks, and row blocks of what is left to tensors: so several shares are tried.
    kernel_bytes = range(0, 1 if not compiles else min(MOST_KERNEL_BYTES, budget.tensor_bytes), KERNEL_STEP_BYTES)
    for tensor_bytes in (budget.tensor_bytes - taken for taken in kernel_bytes):
        for stage in sorted(stages(tensor_bytes), key=_by_seconds):
            if stage.peak_bytes > tensor_bytes or (made := whole(stage)).peak_bytes > memory_bytes:
                continue
            filled = whole(taller(shape, precision, hardware, stage, tensor_bytes, job.held_bytes))
            fitting += [made, filled] if filled.peak_bytes <= memory_bytes else [made]
            break
    return min(fitting, key=_by_seconds), least_bytes


def _by_seconds(stage: DecodeStage) -> tuple[float, int]:
    return stage.seconds, stage.peak_bytes
