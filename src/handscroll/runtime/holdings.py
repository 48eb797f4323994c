"""What a session's earlier jobs have left in this process: free for its next job, though it counts as used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from handscroll.plan.inputs import MIB, Hardware, PlanInputs
from handscroll.system import resident_bytes

# Measured memory is never twice the same. What differs by less makes no other plan, and is well within what a plan
# counts beside tensors.
BASE_STEP_BYTES = 16 * MIB
FREE_STEP_SHARE = 0.05
# What a session leaves beside its modules: libraries that it loaded and kernels that were compiled.
MOST_BESIDE_BYTES = 256 * MIB


@dataclass
class Given:
    """What a job has made for its caller, who holds it from then on."""

    n_bytes: int = 0


class Holdings:
    """The memory of one session between its jobs."""

    def __init__(self) -> None:
        self._left_bytes = 0  # of a CPU's process: modules, code that was touched, kernels that were compiled
        self._before_error_bytes: int | None = None  # what the process held before a job that ended in an error
        self._known: PlanInputs | None = None

    @contextmanager
    def counted(self, before: int | None = None) -> Iterator[Given]:
        """What the process holds more at the end than before is the session's own, but for what it gave away.

        before: what it held when it was looked at, where that was earlier.
        """
        before, given = resident_bytes() if before is None else before, Given()
        self._settle(before)
        try:
            yield given
        except BaseException:
            # The error holds the tensors of every frame that it passes: what stays is seen at the next look.
            self._before_error_bytes = before
            raise
        after = resident_bytes()
        if before is not None and after is not None:
            self._left_bytes += after - before - given.n_bytes  # less than nothing where it made room

    def without(self, inputs: PlanInputs, held_bytes: int) -> PlanInputs:
        """Inputs as they would be, had the session done nothing yet; those of the job before, if little has changed.

        held_bytes: of its modules on a CUDA device, where nothing else is left.
        """
        hardware = inputs.hardware
        if hardware.base_bytes is not None:
            own_bytes = held_bytes
            if not hardware.is_cuda:
                self._settle(hardware.base_bytes)
                # Others of the process may have taken some of it meanwhile.
                own_bytes = min(self._left_bytes, held_bytes + MOST_BESIDE_BYTES)
            hardware = dataclasses.replace(hardware, base_bytes=max(0, hardware.base_bytes - own_bytes))
        if self._known is not None:
            hardware = settled(hardware, self._known.hardware)
            if _is_near(inputs.tokenizer_bytes, self._known.tokenizer_bytes, BASE_STEP_BYTES):
                inputs = dataclasses.replace(inputs, tokenizer_bytes=self._known.tokenizer_bytes)
        self._known = dataclasses.replace(inputs, hardware=hardware)
        return self._known

    def _settle(self, now_bytes: int | None) -> None:
        """What a job that ended in an error has left, now that the error is gone with what it held."""
        if self._before_error_bytes is not None and now_bytes is not None:
            self._left_bytes += min(now_bytes - self._before_error_bytes, MOST_BESIDE_BYTES)
            self._before_error_bytes = None


def settled(now: Hardware, before: Hardware) -> Hardware:
    """The hardware as it is now, where every amount that has changed little is what it was before."""
    amounts = {"base_bytes": BASE_STEP_BYTES, "free_bytes": 0, "host_bytes": 0, "scratch_bytes": 0}
    kept: dict[str, Any] = {
        name: getattr(before, name)
        for name, step_bytes in amounts.items()
        if _is_near(getattr(now, name), getattr(before, name), step_bytes)
    }
    return dataclasses.replace(now, **kept)


def _is_near(now: int | None, before: int | None, step_bytes: int) -> bool:
    if now is None or before is None:
        return now is before
    return abs(now - before) <= (step_bytes or int(FREE_STEP_SHARE * before))
