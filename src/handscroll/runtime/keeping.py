"""What a process keeps from one job to the next: modules in memory, and what earlier jobs have left of its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handscroll.events import OnEvent, ignore
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import PlanInputs
from handscroll.plan.plan import Plan
from handscroll.runtime.distributed import Team
from handscroll.runtime.holdings import Holdings
from handscroll.runtime.session import Session


class Keeping:
    """For the jobs of a process, one after the other. Of one checkpoint at a time as many modules stay in memory as
    there is room for beside the work; within a budget, none.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._holdings = Holdings()

    @contextmanager
    def job(self, found: PlanInputs, *, keeps: bool) -> Iterator[PlanInputs]:
        """A job, from what was found of this machine to its end: what it is planned from.

        What earlier jobs have left here counts as free. keeps: whether modules may stay.
        """
        hardware = found.hardware
        with self._holdings.counted(None if hardware.is_cuda else hardware.base_bytes):
            held_bytes = 0 if self._session is None else self._session.held_bytes
            yield self._holdings.without(dataclasses.replace(found, keeps_modules=keeps), held_bytes)

    @contextmanager
    def opened(
        self, spec: CheckpointSpec, plan: Plan, scratch: Path | None, on_event: OnEvent, team: Team | None = None
    ) -> Iterator[Session]:
        """The session of a job: the one before, where that was of the same checkpoint, with what the plan keeps."""
        session = self._session
        if session is None or session.spec != spec or team is not None:
            self.free()
            session = self._session = Session(spec, team=team)
        session.scratch, session.on_event = scratch, on_event
        session.free_but(plan.kept)
        try:
            yield session
        finally:
            session.on_event = ignore
            session.free_but(plan.kept)

    def free(self) -> None:
        """Gives the memory of all modules back."""
        if self._session is not None:
            self._session.free()
            self._session = None
