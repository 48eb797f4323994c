"""What a picture was made with and what it took: for its file, for its latent's file, and for whoever asked for it.

What is not known is left out everywhere, as of a latent that another tool saved.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import UnknownModelError
from handscroll.jobs.job import resolved_name
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.registry import resolve
from handscroll.plan.inputs import TextRead
from handscroll.plan.plan import Plan
from handscroll.plan.precision import precisions_before
from handscroll.plan.stages import STAGES
from handscroll.plan.unused import guidance_used, uses_negative
from handscroll.request import MAX_SEED, Request
from handscroll.runtime.memory import Meter
from handscroll.version import __version__

Facts = Mapping[str, Any]

# Numbers as files of latents write them; Python's own reader also takes 1_0, -5 and nan.
_NUMBER: dict[type, re.Pattern[str]] = {
    int: re.compile(r"[0-9]{1,20}"),
    float: re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?(e[+-]?[0-9]{1,2})?"),
}
# Of a latent's file: what denoising decided, with what its value is.
_KINDS: dict[str, type] = {
    "prompt": str,
    "prompt_read": str,
    "negative": str,
    "negative_read": str,
    "steps": int,
    "sampler": str,
    "guidance": float,
    "seed": int,
    "composed": str,
}


@dataclass(frozen=True)
class Result:
    """One picture that was written, and what it took. `as_dict` is the JSON of the command line.

    None stands for what is not known, or not so of this picture. model: what denoised it; autoencoder: what decoded it,
    where that is not the model's own. prompt_tokens and negative_tokens: how many each has, and how many were read.
    notices: what was asked for and not used, a line each. ranks: what each of several processes took.
    """

    path: Path
    width: int
    height: int
    seed: int | None
    steps: int | None
    guidance: float | None
    model: str | None
    precision: str
    decode: str
    exact: bool
    memory: dict[str, Any]
    seconds: dict[str, float]
    note: str = ""
    composed: str = ""
    revision: str | None = None
    resumed_from_step: int | None = None
    autoencoder: str | None = None
    prompt_tokens: dict[str, int] | None = None
    negative_tokens: dict[str, int] | None = None
    notices: tuple[str, ...] = ()
    ranks: tuple[dict[str, Any], ...] | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        spec: CheckpointSpec,
        plan: Plan,
        meter: Meter,
        facts: Facts,
        resumed_from_step: int | None = None,
        ranks: tuple[dict[str, Any], ...] | None = None,
    ) -> Result:
        """A picture of these facts, which was written to `path` by a plan, with what this session's meter says."""
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
            seed=facts.get("seed"),
            steps=facts.get("steps"),
            guidance=facts.get("guidance"),
            model=facts.get("model"),
            autoencoder=facts.get("autoencoder"),
            revision=facts.get("revision"),
            precision=facts["precision"],
            decode=plan.decode,
            exact=plan.exact,
            composed=facts.get("composed", ""),
            memory={
                "budget_bytes": plan.budget_bytes,
                "planned_peak_bytes": max(planned_bytes.values(), default=None) if plan.decode == "rows" else None,
                "measured_peak_bytes": meter.peak_bytes,
                "stages": stages,
            },
            seconds={**seconds, "total": round(sum(seconds.values()), 3)},
            note=plan.precision.note,
            resumed_from_step=resumed_from_step,
            ranks=ranks,
            prompt_tokens=None if plan.prompt_read is None else plan.prompt_read.as_dict(),
            negative_tokens=None if plan.negative_read is None else plan.negative_read.as_dict(),
            notices=plan.notices,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values; of what is None, only the revision of a model that has none is told."""
        facts = {**dataclasses.asdict(self), "path": str(self.path), "notices": list(self.notices)}
        return {name: value for name, value in facts.items() if value is not None or name == "revision"}


def picture_facts(request: Request, spec: CheckpointSpec, plan: Plan, index: int) -> dict[str, Any]:
    """What the file of picture `index` says about itself: the arguments of `parameters_text`."""
    facts = {
        "prompt": request.prompt,
        "prompt_read": _read(plan.prompt_read),
        "negative": request.negative if uses_negative(spec, plan) else None,
        "negative_read": _read(plan.negative_read),
        "steps": plan.steps,
        "sampler": spec.scheduler.class_name.removesuffix("Scheduler"),
        "guidance": guidance_used(spec, plan),
        "seed": plan.seeds[index],
        "model": spec.name,
        "revision": spec.commit,
        "precision": str(plan.precision),
        "composed": plan.composed,
        **_decoded(plan),
    }
    return {name: value for name, value in facts.items() if value is not None}


def latent_facts(request: Request, spec: CheckpointSpec, plan: Plan, index: int) -> dict[str, str]:
    """What a latent's file says about itself: all that decoding and labelling it takes, from any folder."""
    facts = {**picture_facts(request, spec, plan, index), "model": resolved_name(request.model)}
    return {name: str(value) for name, value in facts.items()}


def decoded_facts(facts: Mapping[str, str], request: Request, spec: CheckpointSpec, plan: Plan) -> dict[str, Any]:
    """What the file of a decoded latent says: of how it was made what the latent's own file says, and nothing else.

    request: what decodes it, by its model; another than made it is named for its autoencoder alone.
    """
    found = {name: _value(facts.get(name), kind) for name, kind in _KINDS.items()}
    named, commit = facts.get("model"), facts.get("revision")
    if named is not None and _meant(named) == _meant(request.model):
        found["model"] = spec.name
        if commit and spec.commit and commit != spec.commit:
            found["autoencoder"] = f"{spec.name}@{spec.commit}"
    else:
        found["model"] = Path(named).name if named is not None and Path(named).is_absolute() else named
        found["autoencoder"] = spec.name
    found["revision"] = commit or None
    told = precisions_before(facts.get("precision", ""))
    found["precision"] = str(plan.precision) if told else f"autoencoder {plan.precision.autoencoder}"
    return {name: value for name, value in {**found, **_decoded(plan)}.items() if value is not None}


def made_as(plan: Plan, facts: Mapping[str, str]) -> Plan:
    """The plan that decodes a latent: what was done before the decoder is what the latent's facts say."""
    precision = plan.precision.after(facts.get("precision", ""))
    return dataclasses.replace(plan, precision=precision, composed=facts.get("composed", ""))


def _decoded(plan: Plan) -> dict[str, Any]:
    return {
        "width": plan.width,
        "height": plan.height,
        "version": __version__,
        "memory_mode": plan.decode,
        "exact": plan.exact,
    }


def _read(text: TextRead | None) -> str | None:
    """How much of a prompt was read, where that is not all of it."""
    return str(text) if text is not None and text.is_cut else None


def _value(told: str | None, kind: type) -> Any:
    """A fact as what it is; None where the file does not tell it, or not so that it can be read."""
    if not told:
        return None
    if kind is str:
        return told
    if not _NUMBER[kind].fullmatch(told):
        return None
    value = kind(told)
    return value if 0 <= value <= MAX_SEED else None


def _meant(model: str) -> object:
    """What a name stands for, the same for every name of it; the name itself where that is nothing here."""
    try:
        found = resolve(model)
    except UnknownModelError:
        return model
    return found.resolve() if isinstance(found, Path) else found
