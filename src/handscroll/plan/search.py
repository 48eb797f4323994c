"""(spec, request, inputs) -> a frozen Plan: every default filled in, every choice made, before a weight is read."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from handscroll.errors import BudgetError, SizeError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan import kept as kept_modules
from handscroll.plan.budget import limit_of, part_budget
from handscroll.plan.candidates import best_candidate
from handscroll.plan.growth import with_smaller_sizes
from handscroll.plan.inputs import MIB, PlanInputs
from handscroll.plan.plan import Plan
from handscroll.plan.precision import Precision, resolve_precision, split
from handscroll.plan.stages import BY_NAME, DECODE, DENOISE, DENOISE_PART, ENCODE_PART, TEXT, Part, Stage
from handscroll.plan.unused import unused, uses_negative
from handscroll.request import DEFAULT_PATCHES, Request
from handscroll.units import MAX_SIDE_PX, budget_text

# A stated minimum is rounded up, so that it still does when the process itself takes a little more the next time.
MINIMUM_STEP_BYTES = 16 * MIB
# What smaller weights are offered in, and from what share of the memory on.
OFFERED, WORTH_IT = ("int8", "int4"), 0.95
# Quantising while reading is worth a word from here on.
NOTICED_SECONDS = 20
# What a stage that ran out of memory may take of what it was planned to take, at its next try.
SHRINKS_TO = 0.7


def make_plan(spec: CheckpointSpec, request: Request, inputs: PlanInputs, seed: int) -> Plan:
    """Fills in a request's defaults from the checkpoint, and chooses how each stage runs within the budget.

    `seed` stands in for one that was left out. Of the candidates that fit, each stage takes the fastest; without a
    budget, of those that this machine has the memory for.

    Raises SizeError where the model has a largest size, UsageError for what this kind of model cannot do, BudgetError
    with the least that would do.
    """
    factor = spec.autoencoder.spatial_compression_ratio * spec.transformer.patch_size
    width = request.width or request.height or spec.native_px
    height = request.height or request.width or spec.native_px
    if max(width, height) > MAX_SIDE_PX:
        raise SizeError(f"size {width}x{height} is out of range; use at most {MAX_SIDE_PX} pixels a side")
    if spec.is_sprint and request.negative:
        raise UsageError(f"{spec.name} is a few-step model and takes no negative prompt; leave --negative out")
    first_seed = seed if request.seed is None else request.seed
    hardware = inputs.hardware
    plan = Plan(
        width=width,
        height=height,
        latent_width=-(-width // factor) * spec.transformer.patch_size,
        latent_height=-(-height // factor) * spec.transformer.patch_size,
        steps=request.steps or spec.default_steps,
        guidance=spec.default_guidance if request.guidance is None else request.guidance,
        seeds=tuple(first_seed + index for index in range(request.count)),
        precision=resolve_precision(
            spec,
            request.precision,
            hardware.device,
            hardware.bf16_is_faster,
            request.text_precision,
            hardware.has_fp8,
        ),
        device=hardware.device,
        decode=request.decode,
        patches=request.patches or DEFAULT_PATCHES,
        strip_rows=request.strip_rows,
        budget_bytes=request.memory_bytes,
        prompt_read=inputs.prompt_read,
        ranks=inputs.ranks,
        speeds=inputs.speeds,
    )
    if inputs.tokens is not None:
        plan = with_smaller_sizes(plan, spec, request.compose_px)
    _check_ranks(plan, spec, inputs.ranks)
    if uses_negative(spec, plan):
        plan = dataclasses.replace(plan, negative_read=inputs.negative_read)
    plan = dataclasses.replace(plan, notices=(*inputs.notices, *unused(request, spec, plan)))
    plan = plan_stages(plan, spec, inputs)
    return dataclasses.replace(plan, notices=(*plan.notices, *_made_anew(plan, spec, request.model)))


def _check_ranks(plan: Plan, spec: CheckpointSpec, ranks: int) -> None:
    """Raises UsageError for more devices than rows of the token map, of any size that a picture grows through."""
    if ranks > 1 and plan.decode != "rows":
        raise UsageError(
            f"several devices decode by rows alone, and this is decoded {plan.decode}; use one device, or --decode rows"
        )
    patch = spec.transformer.patch_size
    smallest = min(plan.sizes, key=lambda size: size.latent_height)
    rows = smallest.latent_height // patch
    if ranks > rows:
        growing = ", which the picture grows from" if smallest is not plan else ""
        pixels = spec.autoencoder.spatial_compression_ratio * patch
        raise UsageError(
            f"{ranks} devices cannot share the {rows} rows of {smallest.width}x{smallest.height}{growing}, of {pixels} "
            f"pixels each: use --devices {rows} or fewer"
        )


def _made_anew(plan: Plan, spec: CheckpointSpec, model: str) -> Iterator[str]:
    """What takes long because weights are quantised while they are read, and how to have it done once."""
    stage, layers = plan.denoise, spec.transformer.num_layers
    if stage is None:
        return
    seconds = kept_modules.making_seconds(DENOISE_PART, plan, spec)
    anew = (layers - stage.resident_layers - stage.host_layers) / layers
    anew *= 1 if stage.together or not uses_negative(spec, plan) else 2
    when, told = ("at every step", anew * seconds) if anew else ("before the first step", seconds)
    if max(told, anew * seconds * plan.steps_here) < NOTICED_SECONDS:
        return
    storage = plan.precision.transformer_storage
    yield (
        f"{storage} is made from the model's own weights {when}, which takes about {told:.0f} s; "
        f"`handscroll quantize {shlex.quote(model)} --precision {storage} -o FOLDER` makes it once"
    )


def plan_stages(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs) -> Plan:
    """The plan with its stages chosen anew for its precision and budget. Raises BudgetError."""
    _refuse_unknown(plan, inputs)
    limit_bytes = limit_of(plan.budget_bytes, inputs.hardware)
    planned = _keeping(plan, spec, inputs, limit_bytes)
    if plan.budget_bytes is not None and max(planned.planned_bytes.values(), default=0) > plan.budget_bytes:
        raise _too_small(planned, spec, inputs)
    return planned


def _refuse_unknown(plan: Plan, inputs: PlanInputs) -> None:
    if plan.budget_bytes is not None and inputs.hardware.base_bytes is None:
        raise UsageError(
            "--memory cannot be kept here: nothing tells how much memory this process holds; leave --memory out"
        )


def _keeping(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, limit_bytes: int | None) -> Plan:
    """The plan with its stages chosen, and with the modules that are worth keeping for the next job, where any may be.

    Of all choices whose stages fit beside what is kept, the fastest: reading anew what is not kept counts as well.
    """
    stages = _planned_stages(plan, inputs)
    parts = [part for stage in stages for part in _parts_of(stage, plan)]
    may_keep = inputs.keeps_modules and plan.decode == "rows"
    found: list[tuple[float, Plan]] = []
    for kept in kept_modules.choices(dict.fromkeys(parts) if may_keep else ()):
        planned = _chosen(dataclasses.replace(plan, kept=kept), spec, inputs, stages, limit_bytes)
        if kept and limit_bytes is not None and max(planned.planned_bytes.values(), default=0) > limit_bytes:
            continue
        seconds = sum(planned.planned_seconds.values())
        seconds += kept_modules.rereading_seconds(parts, planned, spec, inputs.hardware.rates.weight_bytes)
        found.append((seconds, planned))
    return min(found, key=lambda each: each[0])[1]


def _parts_of(stage: Stage, plan: Plan) -> list[Part]:
    """What a stage consists of in this plan."""
    return [part for part in stage.parts if part is not ENCODE_PART or plan.smaller is not None]


def replan(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, stage: Stage) -> Plan:
    """The plan with one stage chosen anew, for inputs that have changed. Raises BudgetError if it does not fit."""
    if stage not in _planned_stages(plan, inputs):
        return plan
    limit_bytes = limit_of(plan.budget_bytes, inputs.hardware)
    planned = _chosen(plan, spec, inputs, [stage], limit_bytes)
    if plan.budget_bytes is not None and planned.planned_bytes[stage.name] > plan.budget_bytes:
        raise _too_small(planned, spec, inputs)
    return planned


def replan_in_precision(
    plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, stage: Stage, precision: Precision
) -> Plan:
    """The plan with what runs in one stage in a precision, chosen anew where that is a change. Raises BudgetError."""
    own = {component: getattr(precision, component) for component in stage.components}
    changed = dataclasses.replace(plan, precision=dataclasses.replace(plan.precision, **own))
    return plan if changed == plan else replan(changed, spec, inputs, stage)


def shrink(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, stage: Stage) -> Plan | None:
    """The plan with less memory for one stage, after it ran out; None where all of it takes the least already.

    Of a stage of several parts nobody knows which one ran out, nor at how much: the largest are shrunk first, and
    where they cannot be, the next. Nothing is kept for the next job any more.
    """
    parts = plan.parts[stage.name]
    if not parts:
        return None

    def total_bytes(plan: Plan) -> int:
        return sum(part.peak_bytes for part in plan.parts[stage.name])

    base_bytes, used_bytes = inputs.hardware.base_bytes or 0, total_bytes(plan)
    plan = dataclasses.replace(plan, kept=())  # what is kept for the next job goes first
    if total_bytes(_chosen(plan, spec, inputs, [stage], limit_bytes=0)) >= used_bytes:
        return None
    limit_bytes, smaller = max(part.peak_bytes for part in parts), plan
    while total_bytes(smaller) >= used_bytes:
        limit_bytes = base_bytes + int(SHRINKS_TO * max(limit_bytes - base_bytes, 0))
        smaller = _chosen(plan, spec, inputs, [stage], limit_bytes)
    return smaller


def minimum_bytes(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs) -> int | None:
    """The smallest budget that this plan's job would be accepted with; None where it keeps no budget."""
    if plan.decode != "rows":
        return None
    unlimited = dataclasses.replace(plan, budget_bytes=0)
    least = _chosen(unlimited, spec, inputs, _planned_stages(plan, inputs), limit_bytes=0)
    least_bytes = max(least.planned_bytes.values())
    return -(-(least_bytes + MINIMUM_STEP_BYTES // 2) // MINIMUM_STEP_BYTES) * MINIMUM_STEP_BYTES


@dataclass(frozen=True, slots=True)
class SmallerWeights:
    """The same job with the transformer's weights kept otherwise, as `--precision` says it."""

    precision: str
    planned_peak_bytes: int | None
    minimum_bytes: int | None
    seconds: float


def with_smaller_weights(
    plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, request: Request
) -> Iterator[SmallerWeights]:
    """What the request's job would take with smaller weights, where nothing is quantised yet and it would take less."""
    peak_bytes = plan.planned_peak_bytes
    if plan.denoise is None or not plan.precision.exact or peak_bytes is None:
        return
    least_bytes = minimum_bytes(plan, spec, inputs)
    for storage in OFFERED:
        asked, precision = _kept_in(storage, request.precision, spec, inputs)
        changed = dataclasses.replace(plan, precision=precision)
        try:
            planned = plan_stages(changed, spec, inputs)
        except BudgetError:
            continue
        needed_bytes = minimum_bytes(planned, spec, inputs)
        is_less = [
            new is not None and old is not None and new < WORTH_IT * old
            for new, old in ((planned.planned_peak_bytes, peak_bytes), (needed_bytes, least_bytes))
        ]
        if any(is_less):
            seconds = sum(planned.planned_seconds.values())
            yield SmallerWeights(asked, planned.planned_peak_bytes, needed_bytes, seconds)


def _kept_in(storage: str, asked: str, spec: CheckpointSpec, inputs: PlanInputs) -> tuple[str, Precision]:
    """What keeps weights in a storage and computes as was asked for: the option's text, and what it comes to."""
    computed = split(asked)[1]
    option = storage if computed == "auto" else f"{storage}+{computed}"
    hardware = inputs.hardware
    return option, resolve_precision(spec, option, hardware.device, hardware.bf16_is_faster)


def _planned_stages(plan: Plan, inputs: PlanInputs) -> list[Stage]:
    stages = [] if inputs.tokens is None else [TEXT, DENOISE]
    return [*stages, DECODE] if plan.decode == "rows" else stages


def _chosen(
    plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, stages: Iterable[Stage], limit_bytes: int | None
) -> Plan:
    """The plan with these stages chosen anew, each part of them within the limit where it can be."""
    parts = [part for stage in stages for part in _parts_of(stage, plan)]
    if DENOISE_PART in parts and plan.smaller is not None:
        smaller = dataclasses.replace(
            plan.smaller, precision=plan.precision, budget_bytes=plan.budget_bytes, kept=plan.kept
        )
        smaller = _chosen(smaller, spec, inputs, [DENOISE, DECODE], limit_bytes)
        plan = dataclasses.replace(plan, smaller=smaller)
    found: dict[str, Any] = {}
    for part in parts:
        budget = part_budget(part, plan, spec, inputs, limit_bytes)
        found[part.field] = best_candidate(part, plan, spec, inputs, budget)
    return dataclasses.replace(plan, **found)


def _too_small(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs) -> BudgetError:
    least_bytes, allowed_bytes = minimum_bytes(plan, spec, inputs), plan.budget_bytes
    assert least_bytes is not None
    assert allowed_bytes is not None
    planned_bytes = plan.planned_bytes
    largest = BY_NAME[max(planned_bytes, key=lambda name: planned_bytes[name])]
    line = (
        f"{plan.width}x{plan.height} with {spec.name} in {plan.precision} needs at least "
        f"--memory {budget_text(least_bytes)}, for {largest.title}; {allowed_bytes // MIB} MiB were allowed"
    )
    if plan.smaller is not None:
        at_once = dataclasses.replace(plan, smaller=None, encoding=None, first_step=0)
        at_once_bytes = minimum_bytes(at_once, spec, inputs)
        assert at_once_bytes is not None
        if at_once_bytes <= allowed_bytes:
            line += ", which --compose off would do with"
    if plan.precision.exact:
        for storage in OFFERED:
            # As the option alone would have it, which leaves what is computed in to this machine.
            _, precision = _kept_in(storage, "auto", spec, inputs)
            needed_bytes = minimum_bytes(dataclasses.replace(plan, precision=precision), spec, inputs)
            if needed_bytes is not None and needed_bytes <= allowed_bytes:
                line += f"; it fits with --precision {storage}, which changes the picture a little"
                break
    return BudgetError(line, least_bytes)
