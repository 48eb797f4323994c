"""A stage that ran out of memory, or out of numbers, is tried again another way, and nothing that was finished is lost.

    for attempt in recovery.attempts(DECODE, plan):
        with attempt:
            write_picture(session, attempt.plan, ...)

Other programs take memory in the middle of a run, and half precisions overflow. The next attempt starts outside the
`except` block: an exception's traceback keeps alive every tensor of the frames that it came through.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from handscroll.errors import BudgetError, NumericsError, OutOfMemoryError, is_out_of_memory
from handscroll.events import OnEvent, Progress, notice
from handscroll.plan.inputs import MIB, PlanInputs
from handscroll.plan.plan import Plan
from handscroll.plan.precision import Precision
from handscroll.plan.search import replan_in_precision, shrink
from handscroll.plan.stages import DECODE, Stage
from handscroll.runtime.session import Session
from handscroll.units import one_line
from handscroll.weights.files import first_not_finite
from handscroll.weights.header import MAX_NAME

# When a stage takes the least already, only another program can make room: it is given some time to.
LAST_TRIES, WAIT_SECONDS = 3, 1.0

# Whose numbers may be wrong, and the component that holds the weights.
WEIGHTS_OF = {"text_encoder": "text_encoder", "transformer": "transformer", "autoencoder": "vae"}

MAX_LINE = 120  # of what a library says of an error, in characters


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an attempt failed, in one line. `component`: whose numbers were not finite; None where memory ran out."""

    line: str
    component: str | None = None

    @classmethod
    def of(cls, error: BaseException | None, stage: Stage) -> Fault | None:
        """None for what trying again does not mend."""
        if isinstance(error, NumericsError):
            component = error.component or stage.components[0]
            return cls(str(error), component) if component in WEIGHTS_OF else None
        if isinstance(error, Exception) and is_out_of_memory(error):
            return cls(one_line(error, MAX_LINE))
        return None


class Attempt:
    """One try of a stage by `plan`. A context manager, which holds back what the next attempt may mend.

    That is never what the listener raised, whatever it is.
    """

    def __init__(self, stage: Stage, plan: Plan, listener: _Listener, is_last: bool = False) -> None:
        self.stage, self.plan, self._listener, self._is_last = stage, plan, listener, is_last
        self.fault: Fault | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        is_listeners = error is not None and self._listener.raised is error
        self._listener.raised = None  # or its traceback would keep the tensors of every frame
        self.fault = None if is_listeners else Fault.of(error, self.stage)
        if self._is_last and self.fault is not None:
            assert error is not None
            error.add_note("on one device it is tried again another way: leave --devices out")
            self.fault = None
        return self.fault is not None


class _Listener:
    """A job's listener. `raised` is what it ended the job with."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.raised: BaseException | None = None

    def __call__(self, event: Progress) -> None:
        try:
            self.on_event(event)
        except BaseException as error:
            self.raised = error
            raise


class Recovery:
    """Plans the attempts at the stages of one job. `inputs` and `precision` are what it was planned from and in.

    All that the job tells goes by its `on_event`, also what the session tells between two blocks.
    """

    def __init__(self, session: Session, inputs: PlanInputs, precision: Precision, on_event: OnEvent) -> None:
        self.session, self.inputs, self.precision = session, inputs, precision
        self.on_event = session.on_event = _Listener(on_event)

    def attempts(self, stage: Stage, plan: Plan, picture: int = 0) -> Iterator[Attempt]:
        """Attempts at a stage until one succeeds; its plan is what goes on from there.

        After memory ran out: with smaller row blocks, and at last as it is. After numbers that are not finite:
        with the component that they came from in fp32, where it was in less; that holds for this stage of this picture
        alone. Raises OutOfMemoryError or NumericsError when nothing is left to try.
        """
        plan = self._in_precision(plan, stage, self.precision)
        tries_left = LAST_TRIES
        while True:
            # Of several ranks the others are in the middle of what failed here: they cannot begin anew.
            attempt = Attempt(stage, plan, self.on_event, is_last=self.session.team is not None)
            yield attempt
            if attempt.fault is None:
                return
            self.session.free()
            if attempt.fault.component is not None:
                plan = self._in_fp32(plan, stage, attempt.fault, picture)
                continue
            smaller = shrink(plan, self.session.spec, self.inputs, stage)
            tries_left -= smaller is None
            plan = smaller or plan
            self._tell_of_memory(plan, stage, attempt.fault, picture, tries_left, shrunk=smaller is not None)

    def _tell_of_memory(
        self, plan: Plan, stage: Stage, fault: Fault, picture: int, tries_left: int, *, shrunk: bool
    ) -> None:
        """Says what is tried next; where nothing could be shrunk, waits for others to make room, or gives up."""
        if not tries_left:
            raise OutOfMemoryError(
                f"out of memory while {stage.title}, which takes the least already: {fault.line}; close other "
                "programs, or use a smaller --size"
            )
        within = f" within {plan.planned_bytes[stage.name] // MIB} MiB" if shrunk else ""
        self.on_event(notice(f"out of memory while {stage.title} ({fault.line}); trying again{within}", picture))
        if not shrunk:
            time.sleep(WAIT_SECONDS)

    def _in_fp32(self, plan: Plan, stage: Stage, fault: Fault, picture: int) -> Plan:
        """The plan with one component in fp32. Raises NumericsError where that cannot help, or does not fit.

        It cannot where the component was in fp32, or where its weights are not finite themselves.
        """
        component = fault.component
        assert component is not None
        weights = self.session.spec.weights_of(WEIGHTS_OF[component])
        unread = ("encoder.",) if stage is DECODE else ()  # decoding reads nothing of the autoencoder's other half
        if entry := first_not_finite(entry for entry in weights.tensors if not entry.name.startswith(unread)):
            raise NumericsError(
                f"{entry.file}: the tensor {one_line(entry.name, MAX_NAME)} holds numbers that are not finite, so no "
                "picture can be made with it; fetch the file again, or use another checkpoint",
                component,
            )
        if getattr(plan.precision, component) == "fp32":
            is_made_here = plan.prompt_read is not None  # and not a latent that somebody gave
            instead = "change the prompt, --seed, --steps or --guidance" if is_made_here else "decode another latent"
            raise NumericsError(
                f"{fault.line}: its weights are finite and it computed in fp32, so the same again gives the same; "
                f"{instead}, or use another checkpoint",
                component,
            )
        try:
            plan = self._in_precision(plan, stage, dataclasses.replace(plan.precision, **{component: "fp32"}))
        except BudgetError as error:
            raise NumericsError(f"{fault.line}; fp32 does not fit: {error}", component) from error
        self.on_event(notice(f"{fault.line}: {stage.title} again in fp32", picture))
        return plan

    def _in_precision(self, plan: Plan, stage: Stage, precision: Precision) -> Plan:
        return replan_in_precision(plan, self.session.spec, self.inputs, stage, precision)
