"""A stage that ran out of memory, or out of numbers, is tried again another way, and nothing that was finished is lost.

Other programs take memory in the middle of a run, and half precisions overflow. The retry starts outside the `except`
block: an exception's traceback keeps alive every tensor of the frames that it came through.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

from handscroll.errors import BudgetError, NumericsError, OutOfMemoryError, is_out_of_memory
from handscroll.events import OnEvent, notice
from handscroll.plan.inputs import MIB, Situation
from handscroll.plan.plan import COMPONENTS, in_precision, shrunk
from handscroll.plan.precision import Precision
from handscroll.runtime.session import Stages
from handscroll.units import one_line

Result = TypeVar("Result")


# When a stage takes the least already, only another program can make room: it is given some time to.
LAST_TRIES, WAIT_SECONDS = 3, 1.0


MAX_LINE = 120  # of what a library says of an error, in characters

NAMES = {"text": "reading the prompt", "denoise": "denoising", "decode": "decoding"}


class Recovery:
    """Runs the stages of one job. `situation` is what it was planned in."""

    def __init__(self, stages: Stages, situation: Situation, on_event: OnEvent) -> None:
        self.stages, self.situation, self.on_event = stages, situation, on_event
        self.precision = stages.plan.precision

    def run(self, stage: str, work: Callable[[], Result], picture: int = 0) -> Result:
        """The result of `work`, which reads `stages.plan` anew at every try, and may go on from what it has saved.

        Out of memory: again with smaller strips or bands, and at last as it is. Not finite: again with the component
        that it came from in fp32, where it was in less; that holds for this stage of this picture alone. Raises
        OutOfMemoryError or NumericsError when nothing is left to try.
        """
        tries_left = LAST_TRIES
        self._plan_in(stage, self.precision)
        while True:
            try:
                return work()
            except NumericsError as error:
                overflowed, line = error.component or COMPONENTS[stage][0], str(error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                overflowed, line = None, one_line(error, MAX_LINE)
            self.stages.free()
            if overflowed is not None:
                self._in_fp32(stage, overflowed, line, picture)
                continue
            if self._shrink(stage, line, picture):
                continue
            tries_left -= 1
            if not tries_left:
                raise OutOfMemoryError(
                    f"out of memory while {NAMES[stage]}, which takes the least already: {line}; close other programs, "
                    "or use a smaller --size"
                )
            self.on_event(notice(f"out of memory while {NAMES[stage]} ({line}); trying again", picture))
            time.sleep(WAIT_SECONDS)

    def _plan_in(self, stage: str, precision: Precision) -> None:
        self.stages.plan = in_precision(self.stages.plan, self.stages.spec, self.situation, stage, precision)

    def _shrink(self, stage: str, line: str, picture: int) -> bool:
        """Plans a stage with less memory, and says so; False where it takes the least already."""
        smaller = shrunk(self.stages.plan, self.stages.spec, self.situation, stage)
        if smaller is None:
            return False
        self.stages.plan = smaller
        planned = smaller.planned_bytes[stage] // MIB
        self.on_event(
            notice(f"out of memory while {NAMES[stage]} ({line}); trying again within {planned} MiB", picture)
        )
        return True

    def _in_fp32(self, stage: str, component: str, line: str, picture: int) -> None:
        """Plans a stage with one component in fp32. Raises NumericsError where it was, or where fp32 does not fit."""
        precision = self.stages.plan.precision
        if getattr(precision, component) == "fp32":
            raise NumericsError(line)
        try:
            self._plan_in(stage, dataclasses.replace(precision, **{component: "fp32"}))
        except BudgetError as error:
            raise NumericsError(f"{line}; fp32 does not fit: {error}") from error
        self.on_event(notice(f"{line}: {NAMES[stage]} again in fp32", picture))
