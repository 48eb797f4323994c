"""What a part of a stage may take within a limit, and what it then takes of the process in total."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from handscroll.limits import STAGING_BYTES
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import MIB, Hardware, PlanInputs
from handscroll.plan.kept import kept_beside_bytes
from handscroll.plan.plan import Plan
from handscroll.plan.stages import TEXT_PART, Part

# On a CPU a stage takes more of the process's memory than its tensors (`Part.cpu_extra_bytes`), and a share of small
# blocks between others.
CPU_EXTRA_SHARE = 0.03
# And after each smaller size that a picture grew from, kernels compiled for its shapes, and holes between small blocks.
CPU_GROWTH_BYTES = 32 * MIB
# Without a budget the heap keeps holes between what is in use.
CPU_HEAP_SHARE = 0.6
# In half precision oneDNN compiles more kernels and keeps more scratch.
CPU_HALF_EXTRA_BYTES = 12 * MIB
# CUDA's caching allocator reserves in blocks of 2 and 20 MiB, and some of what it holds is between two tensors; norms
# and sums of whole row blocks are made in fp32 there. Estimates by the same code on a CPU: no device measured them.
CUDA_EXTRA_BYTES, CUDA_EXTRA_SHARE = 96 * MIB, 0.3
# Of the memory that the machine has left, what a run without a budget may take.
FREE_SHARE = 0.9


class _Candidate(Protocol):
    @property
    def peak_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


AnyCandidate = TypeVar("AnyCandidate", bound=_Candidate)


@dataclass(frozen=True, slots=True)
class PartBudget:
    """What one part of a stage may take. `base_bytes` is held before it begins; `extra_bytes` and `extra_share` are
    what comes on top of its tensors. `limit_bytes` None: there is no limit.
    """

    base_bytes: int
    extra_bytes: int
    extra_share: float
    limit_bytes: int | None

    @property
    def tensor_bytes(self) -> int | None:
        """What its tensors may take, which is what candidates count."""
        if self.limit_bytes is None:
            return None
        return max(0, int((self.limit_bytes - self.base_bytes - self.extra_bytes) / (1 + self.extra_share)))

    def total_bytes(self, tensor_bytes: int) -> int:
        """What the process (or the CUDA allocator) holds at most while its tensors take so much."""
        return int(self.base_bytes + self.extra_bytes + tensor_bytes * (1 + self.extra_share)) + 1

    def choose(self, candidates: Iterable[AnyCandidate]) -> AnyCandidate:
        """The fastest that fits, with its bytes in total; the smallest where none does."""
        options = list(candidates)
        fitting = [
            option
            for option in options
            if self.limit_bytes is None or self.total_bytes(option.peak_bytes) <= self.limit_bytes
        ]
        if fitting:
            best = min(fitting, key=lambda option: (option.seconds, option.peak_bytes))
        else:
            best = min(options, key=lambda option: (option.peak_bytes, option.seconds))
        return dataclasses.replace(best, peak_bytes=self.total_bytes(best.peak_bytes))  # type: ignore[type-var]


def part_budget(
    part: Part, plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, limit_bytes: int | None
) -> PartBudget:
    """The budget of one part of a plan within a limit of the whole process (or of the CUDA allocator)."""
    base_bytes = (inputs.hardware.base_bytes or 0) + kept_beside_bytes(part, plan, spec)
    if inputs.hardware.is_cuda:
        return PartBudget(base_bytes, CUDA_EXTRA_BYTES, CUDA_EXTRA_SHARE, limit_bytes)
    share = CPU_HEAP_SHARE if plan.budget_bytes is None else CPU_EXTRA_SHARE
    return PartBudget(base_bytes, _cpu_extra_bytes(part, plan, spec), share, limit_bytes)


def _cpu_extra_bytes(part: Part, plan: Plan, spec: CheckpointSpec) -> int:
    """What a part takes beside tensors: kernels, and a buffer to read weights of another dtype through.

    An official model, which may be planned before its weights are here, has that buffer always.
    """
    precision = getattr(plan.precision, part.component)
    stored = {entry.dtype for entry in spec.weights_of(part.folder).tensors} or {spec.dtype_of(part.folder)}
    growths = 0 if part is TEXT_PART else len(plan.sizes) - 1
    extra_bytes = part.cpu_extra_bytes + growths * CPU_GROWTH_BYTES
    extra_bytes += (1 + growths) * CPU_HALF_EXTRA_BYTES if precision != "fp32" else 0
    return extra_bytes + (STAGING_BYTES if spec.recommended or stored - {precision} else 0)


def limit_of(budget_bytes: int | None, hardware: Hardware) -> int | None:
    """What a stage may take: the budget, or without one what this machine has left."""
    if budget_bytes is not None or hardware.free_bytes is None:
        return budget_bytes
    return int(hardware.free_bytes * FREE_SHARE)
