"""A rank that does what the leader tells, until that says that there is no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from handscroll.errors import HandscrollError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.stages import DECODE, DENOISE
from handscroll.runtime.decode import own_rows
from handscroll.runtime.distributed.rows import send_rows
from handscroll.runtime.distributed.team import Command, Team
from handscroll.runtime.encode import encode_picture
from handscroll.runtime.memory import Meter
from handscroll.runtime.session import Session
from handscroll.runtime.settings import job_settings

STAGE_OF = {"predict": DENOISE, "encode": DENOISE, "decode": DECODE}


def do_as_told(team: Team, spec: CheckpointSpec) -> None:
    """Does what the leader tells, until that tells the end. Raises HandscrollError."""
    meter, before = Meter(team.device), ""
    with Session(spec, team=team) as session:
        while (command := team.hear()).do != "end":
            if command.do == "report":
                team.collect({"stage_peak_bytes": meter.stage_peak_bytes})
                continue
            plan = command.plan
            if command.do not in _DOES or plan is None:
                raise HandscrollError(f"the leader tells what is not known: {command.do}")
            session.scratch = _scratch_of(command)
            if command.do != before:
                session.free_but(plan.kept)  # here, so that no stage is measured with the one before
            before = command.do
            with (
                job_settings(plan.device, plan.budget_bytes),
                torch.inference_mode(),
                meter.stage(STAGE_OF[command.do].name),
            ):
                _DOES[command.do](session, team, command)


def _scratch_of(command: Command) -> Path | None:
    """The leader's scratch folder, where this host has it too."""
    folder = Path(command.scratch) if command.scratch else None
    return folder if folder is not None and folder.is_dir() else None


def _predict(session: Session, team: Team, command: Command) -> None:
    assert command.plan is not None
    session.open_transformer(command.plan).predict(team.branches_of(command))


def _decode(session: Session, team: Team, command: Command) -> None:
    assert command.plan is not None
    send_rows(team, own_rows(session, command.plan, command.tensors["latent"]), session.scratch)


def _encode(session: Session, team: Team, command: Command) -> None:
    assert command.plan is not None
    encode_picture(session, command.plan, command.tensors["picture"].numpy())


_DOES: dict[str, Callable[[Session, Team, Command], None]] = {
    "predict": _predict,
    "decode": _decode,
    "encode": _encode,
}
