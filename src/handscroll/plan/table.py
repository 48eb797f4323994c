"""A plan as programs read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.communication import Share, Shared
from handscroll.plan.plan import Plan
from handscroll.plan.search import SmallerWeights
from handscroll.plan.unused import guidance_used


def plan_dict(
    spec: CheckpointSpec,
    plan: Plan,
    minimum_bytes: int | None,
    smaller: Iterable[SmallerWeights] = (),
    shared: Shared | None = None,
) -> dict[str, Any]:
    """JSON values: the request's numbers, the budget, for each stage its bytes, seconds and choices, what it would take
    with smaller weights, and what each of several devices does.
    """
    stages = {name: dataclasses.asdict(stage) for name, stage in plan.own_parts.items()}
    growth = [
        {
            "width": size.width,
            "height": size.height,
            "steps": size.steps_here,
            **{name: dataclasses.asdict(part) for name, part in size.own_parts.items()},
        }
        for size in plan.sizes[:-1]
    ]
    return {
        "model": spec.name,
        "width": plan.width,
        "height": plan.height,
        "steps": plan.steps,
        "total_steps": plan.total_steps,
        "composed": plan.composed,
        "guidance": guidance_used(spec, plan),
        "precision": str(plan.precision),
        "device": plan.device,
        "exact": plan.exact,
        "memory": {
            "budget_bytes": plan.budget_bytes,
            "minimum_bytes": minimum_bytes,
            "planned_peak_bytes": plan.planned_peak_bytes,
        },
        "stages": stages,
        "growth": growth,
        "seconds": round(sum(plan.planned_seconds.values()), 1),
        "smaller_weights": [dataclasses.asdict(each) for each in smaller],
        **({"devices": plan.ranks} if plan.ranks > 1 else {}),
        **({} if shared is None or not shared.parts else _shared(shared)),
        "planned_from": "known figures" if spec.from_figures else "files",
        **_texts(plan),
        "notices": list(plan.notices),
    }


def _shared(shared: Shared) -> dict[str, Any]:
    shares = [_share(each) for each in shared.shares]
    return {"shares": shares, "ranks": [dataclasses.asdict(part) for part in shared.parts]}


def _share(share: Share) -> dict[str, Any]:
    return {
        "name": share.name,
        "flops": share.flops,
        "seconds": share.seconds,
        "efficiency": share.efficiency,
        "sent_bytes": share.traffic.bytes,
        "messages": share.traffic.messages,
    }


def _texts(plan: Plan) -> dict[str, Any]:
    """How many tokens each prompt has and how many of them are read, where that is known."""
    texts = {"prompt_tokens": plan.prompt_read, "negative_tokens": plan.negative_read}
    return {name: text.as_dict() for name, text in texts.items() if text is not None}
