"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

import dataclasses
from typing import Any

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.decode import DecodeStage
from handscroll.plan.denoise import DenoiseStage
from handscroll.plan.plan import Part, Plan
from handscroll.plan.text import TextStage
from handscroll.units import budget_text, duration, gibibytes

PLACES = {"memory": "in memory", "host": "in the host's memory", "disk": "on disk"}


def plan_dict(spec: CheckpointSpec, plan: Plan, minimum_bytes: int | None) -> dict[str, Any]:
    """JSON values: the request's numbers, the budget, and for each stage its bytes, seconds and choices."""
    stages = {name: dataclasses.asdict(stage) for name, stage in _stages(plan).items()}
    growth = [
        {
            "width": size.width,
            "height": size.height,
            "steps": size.steps_here,
            **{name: dataclasses.asdict(part) for name, part in _stages(size).items()},
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
        "guidance": plan.guidance,
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
    }


def plan_table(spec: CheckpointSpec, plan: Plan, minimum_bytes: int | None) -> str:
    """A heading, a line a stage, and what it comes to."""
    budget = "no budget" if plan.budget_bytes is None else f"budget {gibibytes(plan.budget_bytes, decimals=2)}"
    heading = (
        f"{spec.name}, {plan.width}x{plan.height}, {_steps(plan)}, guidance {plan.guidance:g}, {plan.precision} "
        f"on {plan.device}, {budget}"
    )
    rows = [("STAGE", "PEAK", "ABOUT", "HOW")]
    for name, stage in _stages(plan).items():
        if name == "encode":
            rows += [_row_on_the_way(size) for size in plan.sizes[:-1]]
        rows.append((name, gibibytes(stage.peak_bytes, decimals=2), duration(stage.seconds), _how(stage, spec)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    total_seconds = sum(plan.planned_seconds.values())
    peak = "" if plan.planned_peak_bytes is None else f"peak {gibibytes(plan.planned_peak_bytes, decimals=2)}, "
    least = "" if minimum_bytes is None else f"; the least that would do is --memory {budget_text(minimum_bytes)}"
    return "\n".join([heading, "", *lines, "", f"{peak}about {duration(total_seconds)} a picture{least}"])


def _stages(plan: Plan) -> dict[str, Part]:
    stages = {"text": plan.text, "encode": plan.encoding, "denoise": plan.denoise, "decode": plan.decoding}
    return {name: stage for name, stage in stages.items() if stage is not None}


def _steps(plan: Plan) -> str:
    return f"{plan.steps} steps" if plan.smaller is None else f"{plan.steps_here} of {plan.steps} steps"


def _row_on_the_way(size: Plan) -> tuple[str, str, str, str]:
    """One line for all parts of a smaller picture."""
    parts = _stages(size).values()
    peak_bytes, seconds = max(part.peak_bytes for part in parts), sum(part.seconds for part in parts)
    name, what = ("compose", "composed") if size.smaller is None else ("grow", "grown")
    steps = f"{size.steps_here} step{'s' * (size.steps_here != 1)}"
    how = f"{what} at {size.width}x{size.height} in {steps}, decoded and enlarged"
    return name, gibibytes(peak_bytes, decimals=2), duration(seconds), how


def _how(stage: Part, spec: CheckpointSpec) -> str:
    match stage:
        case TextStage():
            return f"{stage.tokens} tokens, layers read one at a time"
        case DenoiseStage():
            layers = spec.transformer.num_layers
            streamed = layers - stage.resident_layers
            weights = f"{layers} layers in memory" if not streamed else f"{streamed} of {layers} layers read every step"
            residual = "" if stage.residual == "memory" else f", token maps {PLACES[stage.residual]}"
            weights += " and laid out one at a time" if stage.lay_out else ""
            residual += "" if stage.together else ", one forward after the other"
            return f"bands of {_rows(stage.band_rows)}, {weights}{residual}"
        case DecodeStage():
            heights = [sweep.strip_rows for sweep in stage.sweeps]
            spilled = {sweep.store for sweep in stage.sweeps[1:] if sweep.store in ("host", "disk")}
            remarks = [f"{sum(s.store == where for s in stage.sweeps)} maps {PLACES[where or '']}" for where in spilled]
            if stage.recomputed:
                remarks.append(f"{sum(sweep.store is None for sweep in stage.sweeps)} maps recomputed")
            span = f"{min(heights)} to {max(heights)} rows" if len(set(heights)) > 1 else _rows(heights[0])
            return ", ".join([f"{len(heights)} sweeps in strips of {span}", *(remarks or ["maps in memory"])])


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
