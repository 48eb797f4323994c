"""(spec, request, situation) -> a frozen Plan: every default filled in, every choice made, before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from handscroll.errors import BudgetError, SizeError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.decode import DecodeStage, decode_stages
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.denoise import DenoiseStage, Sampling, denoise_stages
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.growth import first_step, smaller_sizes
from handscroll.plan.inputs import MIB, Hardware, Situation
from handscroll.plan.precision import BYTES, Precision, resolve_precision
from handscroll.plan.text import TextStage, text_stage
from handscroll.plan.writer import writer_bytes
from handscroll.request import Request
from handscroll.units import MAX_SIDE_PX, budget_text

# On a CPU a stage takes more of the process's memory than its tensors: code that is touched for the first time, heaps
# of threads, oneDNN's scratch and compiled kernels, the file writer; and a share of small blocks between others.
CPU_EXTRA_BYTES = {"text": 32 * MIB, "denoise": 40 * MIB, "encode": 68 * MIB, "decode": 68 * MIB}
CPU_EXTRA_SHARE = 0.03
# And after each smaller size that a picture grew from, kernels compiled for its shapes, and holes between small blocks.
CPU_GROWTH_BYTES = 32 * MIB
# Without a budget the heap keeps holes between what is in use.
CPU_HEAP_SHARE = 0.6
# In half precision oneDNN compiles more kernels and keeps more scratch.
CPU_HALF_EXTRA_BYTES = 12 * MIB
# CUDA's caching allocator reserves in blocks of 2 and 20 MiB, and some of what it holds is between two tensors; norms
# and sums of whole strips are made in fp32 there. Estimates, from the same code on a CPU: no device has measured them.
CUDA_EXTRA_BYTES, CUDA_EXTRA_SHARE = 96 * MIB, 0.3
STAGING_BYTES = 16 * MIB
# A stated minimum is rounded up, so that it still does when the process itself takes a little more the next time.
MINIMUM_STEP_BYTES = 16 * MIB
# Of the memory that the machine has left, what a run without a budget may take.
FREE_SHARE = 0.9
# What a stage that ran out of memory may take of what it was planned to take, at its next try.
SHRINKS_TO = 0.7

# Whose precision a stage runs in; a picture that grows is also decoded and encoded while it is denoised.
COMPONENTS = {"text": ("text_encoder",), "denoise": ("transformer", "autoencoder"), "decode": ("autoencoder",)}
# What is planned apart, and where in a plan it stands. A stage is one part, but that denoising a picture that grows
# includes decoding the smaller ones and encoding them for the next size.
PART_FIELDS = {"text": "text", "denoise": "denoise", "encode": "encoding", "decode": "decoding"}


class _Stage(Protocol):
    @property
    def peak_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


AnyStage = TypeVar("AnyStage", bound=_Stage)
Part = TextStage | DenoiseStage | DecodeStage


@dataclass(frozen=True)
class Plan:
    """What will run. Sizes in pixels; `latent_height` and `latent_width` in latent pixels; `seeds` one a picture, none
    for a smaller picture on the way.

    `text`, `denoise` and `decoding` say how each stage runs; their bytes are of the whole process on a CPU, of the
    allocator on a CUDA device. A stage is None where it is not part of the job, `decoding` also for the ways that
    others decode, which keep no budget.

    A picture that grows has a `smaller` one, which is decoded, enlarged, encoded as `encoding` says and denoised on
    from step `first_step` of its schedule. `composed` says, as 512x512, at which size it began.
    """

    width: int
    height: int
    latent_width: int
    latent_height: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    precision: Precision
    device: str
    decode: str
    patches: int
    strip_rows: int | None
    budget_bytes: int | None = None
    text: TextStage | None = None
    denoise: DenoiseStage | None = None
    decoding: DecodeStage | None = None
    encoding: DecodeStage | None = None
    smaller: Plan | None = None
    first_step: int = 0
    composed: str = ""

    @property
    def sizes(self) -> tuple[Plan, ...]:
        """The plans through which the picture grows, smallest first; the last is this one."""
        return (self,) if self.smaller is None else (*self.smaller.sizes, self)

    @property
    def on_the_way(self) -> bool:
        """Whether this is a smaller picture from which another grows."""
        return not self.seeds

    @property
    def steps_here(self) -> int:
        """How many steps of the schedule are made at this size."""
        return self.steps - self.first_step

    @property
    def total_steps(self) -> int:
        """Of all sizes together."""
        return sum(plan.steps_here for plan in self.sizes)

    @property
    def steps_before(self) -> int:
        """How many of the total come before step 0 of this size's schedule would."""
        return self.total_steps - self.steps

    @property
    def guided(self) -> bool:
        """Whether each step needs a second forward with the negative prompt (never for few-step models)."""
        return self.guidance > 1

    @property
    def exact(self) -> bool:
        """Whether the picture is the one that the whole network makes. Tiling is the only way here that is not."""
        return self.decode != "tiled"

    @property
    def planned_bytes(self) -> dict[str, int]:
        """The peak of every stage that was planned: text, denoise, decode."""
        return {name: max(part.peak_bytes for part in parts) for name, parts in self.parts.items() if parts}

    @property
    def planned_seconds(self) -> dict[str, float]:
        """Of every stage that was planned, by the hardware's rates."""
        return {name: sum(part.seconds for part in parts) for name, parts in self.parts.items() if parts}

    @property
    def parts(self) -> dict[str, list[Part]]:
        """What each stage consists of, one after the other; nothing where it was not planned."""
        denoise: list[Part | None] = []
        for plan in self.sizes:
            denoise += [plan.encoding, plan.denoise, plan.decoding if plan.on_the_way else None]
        stages: dict[str, list[Part | None]] = {"text": [self.text], "denoise": denoise, "decode": [self.decoding]}
        return {name: [part for part in parts if part is not None] for name, parts in stages.items()}

    @property
    def planned_peak_bytes(self) -> int | None:
        """The most of any stage; None where one of them cannot be planned."""
        return None if self.decode != "rows" else max(self.planned_bytes.values())


def make_plan(spec: CheckpointSpec, request: Request, situation: Situation, seed: int) -> Plan:
    """Fills in a request's defaults from the checkpoint, and chooses how each stage runs within the budget.

    `seed` stands in for one that was left out. Of the ways that fit, each stage takes the fastest; without a budget, of
    those that this machine has the memory for.

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
    first = seed if request.seed is None else request.seed
    plan = Plan(
        width=width,
        height=height,
        latent_width=-(-width // factor) * spec.transformer.patch_size,
        latent_height=-(-height // factor) * spec.transformer.patch_size,
        steps=request.steps or spec.default_steps,
        guidance=spec.default_guidance if request.guidance is None else request.guidance,
        seeds=tuple(first + index for index in range(request.count)),
        precision=resolve_precision(
            spec, request.precision, situation.hardware.device, situation.hardware.bf16_is_faster
        ),
        device=situation.hardware.device,
        decode=request.decode,
        patches=request.patches,
        strip_rows=request.strip_rows,
        budget_bytes=request.memory_bytes,
    )
    if situation.tokens is not None:
        plan = _grown(plan, spec, request.compose_px)
    return with_stages(plan, spec, situation)


def _grown(plan: Plan, spec: CheckpointSpec, compose_px: int | None) -> Plan:
    """The plan with the smaller ones that it grows from; where nobody asked, as the checkpoint does.

    Raises UsageError where a few-step model is asked to.
    """
    if spec.is_sprint:
        if compose_px:
            raise UsageError(f"{spec.name} is a few-step model and composes at full size; leave --compose out")
        return plan
    compose_px = spec.compose_px if compose_px is None else compose_px
    if not compose_px or not first_step(plan.steps):
        return plan  # of a single step there is no last part to begin a larger size with
    ratio = spec.autoencoder.spatial_compression_ratio
    full, multiple = (plan.latent_width * ratio, plan.latent_height * ratio), ratio * spec.transformer.patch_size
    smaller: Plan | None = None
    for width, height in smaller_sizes(*full, compose_px, multiple):
        smaller = dataclasses.replace(
            plan,
            width=width,
            height=height,
            latent_width=width // ratio,
            latent_height=height // ratio,
            seeds=(),
            decode="rows",
            strip_rows=None,
            smaller=smaller,
            first_step=0 if smaller is None else first_step(plan.steps),
        )
    if smaller is None:
        return plan
    least = smaller.sizes[0]
    return dataclasses.replace(
        plan, smaller=smaller, first_step=first_step(plan.steps), composed=f"{least.width}x{least.height}"
    )


def with_stages(plan: Plan, spec: CheckpointSpec, situation: Situation) -> Plan:
    """The plan with its stages chosen anew for its precision and budget. Raises BudgetError."""
    planned = _chosen(plan, spec, situation, _planned_stages(plan, situation), _limit_bytes(plan, situation))
    if plan.budget_bytes is not None and max(planned.planned_bytes.values(), default=0) > plan.budget_bytes:
        raise _too_small(planned, spec, situation)
    return planned


def shrunk(plan: Plan, spec: CheckpointSpec, situation: Situation, stage: str) -> Plan | None:
    """The plan with less memory for one stage, after it ran out; None where all of it takes the least already.

    Of a stage of several parts nobody knows which one ran out, nor at how much: the largest are shrunk first, and
    where they cannot be, the next.
    """
    parts = plan.parts.get(stage)
    if not parts:
        return None

    def total_bytes(plan: Plan) -> int:
        return sum(part.peak_bytes for part in plan.parts[stage])

    base_bytes, used_bytes = situation.hardware.base_bytes, total_bytes(plan)
    if total_bytes(_chosen(plan, spec, situation, [stage], limit_bytes=0)) >= used_bytes:
        return None
    limit_bytes, smaller = max(part.peak_bytes for part in parts), plan
    while total_bytes(smaller) >= used_bytes:
        limit_bytes = base_bytes + int(SHRINKS_TO * max(limit_bytes - base_bytes, 0))
        smaller = _chosen(plan, spec, situation, [stage], limit_bytes)
    return smaller


def in_precision(plan: Plan, spec: CheckpointSpec, situation: Situation, stage: str, precision: Precision) -> Plan:
    """The plan with what runs in one stage in a precision, chosen anew where that is a change. Raises BudgetError."""
    own = {component: getattr(precision, component) for component in COMPONENTS[stage]}
    changed = dataclasses.replace(plan, precision=dataclasses.replace(plan.precision, **own))
    return plan if changed == plan else chosen_anew(changed, spec, situation, stage)


def chosen_anew(plan: Plan, spec: CheckpointSpec, situation: Situation, stage: str) -> Plan:
    """The plan with one stage chosen anew, for a situation that has changed. Raises BudgetError if it does not fit."""
    if stage not in _planned_stages(plan, situation):
        return plan
    planned = _chosen(plan, spec, situation, [stage], _limit_bytes(plan, situation))
    if plan.budget_bytes is not None and planned.planned_bytes[stage] > plan.budget_bytes:
        raise _too_small(planned, spec, situation)
    return planned


def minimum_bytes(plan: Plan, spec: CheckpointSpec, situation: Situation) -> int | None:
    """The smallest budget that this plan's job would be accepted with; None where it keeps no budget."""
    if plan.decode != "rows":
        return None
    least = _chosen(
        dataclasses.replace(plan, budget_bytes=0), spec, situation, _planned_stages(plan, situation), limit_bytes=0
    )
    least_bytes = max(least.planned_bytes.values())
    return -(-(least_bytes + MINIMUM_STEP_BYTES // 2) // MINIMUM_STEP_BYTES) * MINIMUM_STEP_BYTES


def _limit_bytes(plan: Plan, situation: Situation) -> int | None:
    """What a stage may take: the budget, or without one what this machine has left."""
    free_bytes = situation.hardware.free_bytes
    if plan.budget_bytes is not None or free_bytes is None:
        return plan.budget_bytes
    return int(free_bytes * FREE_SHARE)


def _planned_stages(plan: Plan, situation: Situation) -> list[str]:
    stages = [] if situation.tokens is None else ["text", "denoise"]
    return [*stages, "decode"] if plan.decode == "rows" else stages


def _chosen(
    plan: Plan, spec: CheckpointSpec, situation: Situation, stages: Collection[str], limit_bytes: int | None
) -> Plan:
    """The plan with these stages chosen anew, each part of them within the limit where it can be."""
    parts = list(stages)
    if "denoise" in stages and plan.smaller is not None:
        parts.append("encode")
        smaller = dataclasses.replace(plan.smaller, precision=plan.precision, budget_bytes=plan.budget_bytes)
        plan = dataclasses.replace(plan, smaller=_chosen(smaller, spec, situation, ["denoise", "decode"], limit_bytes))
    found = {PART_FIELDS[part]: _choose(part, plan, spec, situation, limit_bytes) for part in parts}
    return dataclasses.replace(plan, **found)


def _choose(stage: str, plan: Plan, spec: CheckpointSpec, situation: Situation, limit_bytes: int | None) -> Any:
    extra_share = CPU_EXTRA_SHARE if plan.budget_bytes is not None else CPU_HEAP_SHARE
    if situation.hardware.is_cuda:
        extra_share = CUDA_EXTRA_SHARE
    extra_bytes = _extra_bytes(stage, plan, spec, situation)
    room = Room(situation.hardware, limit_bytes, extra_bytes, extra_share)
    best: Any = room.choose(_ways(stage, plan, spec, situation, room))
    if stage != "decode" or plan.on_the_way or situation.hardware.is_cuda:
        return best
    # The file is encoded once all rows are there, and what made them is gone.
    writing_bytes = writer_bytes(situation.suffix, plan.width, plan.height)
    return dataclasses.replace(best, peak_bytes=max(best.peak_bytes, room.total_bytes(writing_bytes)))


def _extra_bytes(stage: str, plan: Plan, spec: CheckpointSpec, situation: Situation) -> int:
    """What a stage takes beside tensors: on a CPU kernels, and a buffer to read weights of another dtype through."""
    if situation.hardware.is_cuda:
        return CUDA_EXTRA_BYTES
    component, precision = {
        "text": ("text_encoder", plan.precision.text_encoder),
        "denoise": ("transformer", plan.precision.transformer),
    }.get(stage, ("vae", plan.precision.autoencoder))
    stored = {entry.dtype for entry in spec.weights_of(component).tensors}
    growths = 0 if stage == "text" else len(plan.sizes) - 1
    extra_bytes = CPU_EXTRA_BYTES[stage] + growths * CPU_GROWTH_BYTES
    extra_bytes += (1 + growths) * CPU_HALF_EXTRA_BYTES if precision != "fp32" else 0
    return extra_bytes + (STAGING_BYTES if stored - {precision} else 0)


def _ways(
    stage: str, plan: Plan, spec: CheckpointSpec, situation: Situation, room: Room
) -> Iterable[TextStage] | Iterable[DenoiseStage] | Iterable[DecodeStage]:
    """The ways to run one stage of a plan."""
    hardware, tokens = situation.hardware, situation.tokens or 0
    prompts = 2 if plan.guided and not spec.is_sprint else 1
    if stage == "text":
        precision = plan.precision.text_encoder
        return [text_stage(spec.text_encoder, tokens, prompts, precision, situation)]
    if stage == "denoise":
        patch = spec.transformer.patch_size
        job = Sampling(
            rows=plan.latent_height // patch,
            columns=plan.latent_width // patch,
            tokens=tokens,
            steps=plan.steps_here,
            branches=prompts,
            precision=plan.precision.transformer,
        )
        return denoise_stages(spec.transformer, job, hardware, room.stage_bytes)
    precision = plan.precision.autoencoder
    half, small, strip_rows = DecoderShape, plan if plan.on_the_way else None, plan.strip_rows
    if stage == "encode":
        half, small, strip_rows = EncoderShape, plan.smaller, None
    shape = half(spec.autoencoder, plan.latent_height, plan.latent_width, BYTES[precision])
    # A smaller picture is held whole, in the host's memory, while it is decoded and encoded again.
    held_bytes = 0 if small is None or hardware.is_cuda else 3 * small.width * small.height
    return decode_stages(shape, precision, hardware, room.stage_bytes, strip_rows, held_bytes)


class Room:
    """What a stage may take within a limit, and what it takes in total."""

    def __init__(self, hardware: Hardware, limit_bytes: int | None, extra_bytes: int, extra_share: float) -> None:
        self.base_bytes = hardware.base_bytes
        self.extra_bytes, self.extra_share = extra_bytes, extra_share
        self.limit_bytes = limit_bytes

    @property
    def stage_bytes(self) -> int | None:
        """What the tensors of a stage may take, which is what stages count."""
        if self.limit_bytes is None:
            return None
        return max(0, int((self.limit_bytes - self.base_bytes - self.extra_bytes) / (1 + self.extra_share)))

    def total_bytes(self, stage_bytes: int) -> int:
        """What the process (or the CUDA allocator) holds at most while a stage's tensors take so much."""
        return int(self.base_bytes + self.extra_bytes + stage_bytes * (1 + self.extra_share)) + 1

    def choose(self, stages: Iterable[AnyStage]) -> AnyStage:
        """The fastest that fits, with its bytes in total; the smallest where none does."""
        options = list(stages)
        fitting = [
            stage
            for stage in options
            if self.limit_bytes is None or self.total_bytes(stage.peak_bytes) <= self.limit_bytes
        ]
        if fitting:
            best = min(fitting, key=lambda stage: (stage.seconds, stage.peak_bytes))
        else:
            best = min(options, key=lambda stage: (stage.peak_bytes, stage.seconds))
        return dataclasses.replace(best, peak_bytes=self.total_bytes(best.peak_bytes))  # type: ignore[type-var]


def _too_small(plan: Plan, spec: CheckpointSpec, situation: Situation) -> BudgetError:
    least_bytes, allowed_bytes = minimum_bytes(plan, spec, situation), plan.budget_bytes
    assert least_bytes is not None
    assert allowed_bytes is not None
    planned_bytes = plan.planned_bytes
    largest = max(planned_bytes, key=lambda name: planned_bytes[name])
    name = {"text": "reading the prompt", "denoise": "denoising", "decode": "decoding"}[largest]
    line = (
        f"{plan.width}x{plan.height} with {spec.name} in {plan.precision} needs at least "
        f"--memory {budget_text(least_bytes)}, for {name}; {allowed_bytes // MIB} MiB were allowed"
    )
    if plan.smaller is not None:
        at_once_bytes = minimum_bytes(
            dataclasses.replace(plan, smaller=None, encoding=None, first_step=0), spec, situation
        )
        assert at_once_bytes is not None
        if at_once_bytes <= allowed_bytes:
            line += ", which --compose off would do with"
    return BudgetError(line, least_bytes)
