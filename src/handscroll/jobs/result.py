"""What a picture was made with and what it took: for its file, for its latent's file, and for whoever asked for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.jobs.job import resolved_name
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.plan import Plan
from handscroll.plan.stages import STAGES
from handscroll.request import Request
from handscroll.runtime.memory import Meter
from handscroll.version import __version__


@dataclass(frozen=True)
class Result:
    """One picture that was written, and what it took. `as_dict` is the JSON of the command line."""

    path: Path
    width: int
    height: int
    seed: int
    steps: int
    guidance: float
    model: str
    precision: str
    decode: str
    exact: bool
    memory: dict[str, Any]
    seconds: dict[str, float]
    note: str = ""
    composed: str = ""
    revision: str | None = None
    resumed_from_step: int | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        spec: CheckpointSpec,
        plan: Plan,
        meter: Meter,
        index: int = 0,
        resumed_from_step: int | None = None,
    ) -> Result:
        """Picture `index` of a plan, which was written to `path`, with what this session's meter says."""
        names = [stage.name for stage in STAGES if stage.name in meter.seconds]
        planned_bytes = {name: plan.planned_bytes[name] for name in names if name in plan.planned_bytes}
        stages = {
            name: {"planned_bytes": planned_bytes.get(name), "measured_bytes": meter.stage_peak_bytes.get(name)}
            for name in names
        }
        seconds = {name: round(meter.seconds[name], 3) for name in names}
        return cls(
            path=path,
            width=plan.width,
            height=plan.height,
            seed=plan.seeds[index],
            steps=plan.steps,
            guidance=plan.guidance,
            model=spec.name,
            revision=spec.commit,
            precision=str(plan.precision),
            decode=plan.decode,
            exact=plan.exact,
            composed=plan.composed,
            memory={
                "budget_bytes": plan.budget_bytes,
                "planned_peak_bytes": max(planned_bytes.values(), default=None) if plan.decode == "rows" else None,
                "measured_peak_bytes": meter.peak_bytes,
                "stages": stages,
            },
            seconds={**seconds, "total": round(sum(seconds.values()), 3)},
            note=plan.precision.note,
            resumed_from_step=resumed_from_step,
        )

    def as_dict(self) -> dict[str, Any]:
        facts = {**dataclasses.asdict(self), "path": str(self.path)}
        if self.resumed_from_step is None:
            del facts["resumed_from_step"]
        return facts


def picture_facts(request: Request, spec: CheckpointSpec, plan: Plan, index: int) -> dict[str, Any]:
    """What the file of picture `index` says about itself: the arguments of `parameters_text`."""
    of_hub = {} if spec.commit is None else {"revision": spec.commit}
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": plan.steps,
        "sampler": spec.scheduler.class_name.removesuffix("Scheduler"),
        "guidance": plan.guidance,
        "seed": plan.seeds[index],
        "width": plan.width,
        "height": plan.height,
        "model": spec.name,
        **of_hub,
        "precision": str(plan.precision),
        "composed": plan.composed,
        "version": __version__,
        "memory_mode": plan.decode,
        "exact": plan.exact,
    }


def latent_facts(request: Request, spec: CheckpointSpec, plan: Plan, index: int) -> dict[str, str]:
    """What a latent's file says about itself: all that decoding and labelling it takes, from any folder."""
    facts = {**picture_facts(request, spec, plan, index), "model": resolved_name(request.model)}
    return {name: str(value) for name, value in facts.items()}


def made_as(plan: Plan, facts: Mapping[str, str]) -> Plan:
    """The plan that decodes a latent: what was done before the decoder is what the latent's facts say."""
    precision = plan.precision.after(facts.get("precision", ""))
    return dataclasses.replace(plan, precision=precision, composed=facts.get("composed", ""))
