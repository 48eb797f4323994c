"""What a session's earlier jobs have left in this process: free for its next job, though it counts as used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from handscroll.plan.inputs import MIB, Hardware, PlanInputs
from handscroll.system import resident_bytes

# Measured memory is never twice the same. What differs by less makes no other plan, and is well within what a plan
# counts beside tensors.
BASE_STEP_BYTES = 16 * MIB
FREE_STEP_SHARE = 0.05


@dataclass
class Given:
    """What a job has made for its caller, who holds it from then on."""

    n_bytes: int = 0


class Holdings:
    """The memory of one session between its jobs."""

    def __init__(self) -> None:
        self._left_bytes = 0  # of a CPU's process: modules, code that was touched, kernels that were compiled
        self._known: PlanInputs | None = None

    @contextmanager
    def counted(self, before: int | None = None) -> Iterator[Given]:
        """What the process holds more at the end than before is the session's own, but for what it gave away.

        before: what it held when it was looked at, where that was earlier.
        """
        before, given = resident_bytes() if before is None else before, Given()
        try:
            yield given
        finally:
            after = resident_bytes()
            if before is not None and after is not None:
                self._left_bytes = max(0, self._left_bytes + after - before - given.n_bytes)

    def without(self, inputs: PlanInputs, held_bytes: int) -> PlanInputs:
        """Inputs as they would be, had the session done nothing yet; those of the job before, if little has changed.

        held_bytes: of its modules on a CUDA device, where nothing else is left.
        """
        hardware = inputs.hardware
        if hardware.base_bytes is not None:
            own_bytes = held_bytes if hardware.is_cuda else self._left_bytes
            hardware = dataclasses.replace(hardware, base_bytes=max(0, hardware.base_bytes - own_bytes))
        known = self._known
        if known is not None and is_as_before(hardware, known.hardware):
            tokenizer_bytes = max(inputs.tokenizer_bytes, known.tokenizer_bytes)
            inputs = dataclasses.replace(inputs, hardware=known.hardware, tokenizer_bytes=tokenizer_bytes)
        else:
            inputs = dataclasses.replace(inputs, hardware=hardware)
        self._known = inputs
        return inputs


def is_as_before(now: Hardware, before: Hardware) -> bool:
    """Whether a plan made for the hardware as it was before is as good now."""
    same = dataclasses.replace(
        now,
        base_bytes=before.base_bytes,
        free_bytes=before.free_bytes,
        host_bytes=before.host_bytes,
        scratch_bytes=before.scratch_bytes,
    )
    amounts = ("free_bytes", "host_bytes", "scratch_bytes")
    return (
        same == before
        and _is_near(now.base_bytes, before.base_bytes, BASE_STEP_BYTES)
        and all(_is_near(getattr(now, each), getattr(before, each)) for each in amounts)
    )


def _is_near(now: int | None, before: int | None, step_bytes: int = 0) -> bool:
    if now is None or before is None:
        return now is before
    return abs(now - before) <= max(step_bytes, int(FREE_STEP_SHARE * before) if not step_bytes else 0)
