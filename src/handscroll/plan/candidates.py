"""The candidates for one part of a stage: every way to run it that is worth considering, from a plan and a spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.budget import PartBudget
from handscroll.plan.decode import DecodeStage, decode_stages
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.denoise import DenoiseStage, Sampling, denoise_stages
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.inputs import PlanInputs
from handscroll.plan.kept import kept_bytes, text_cost
from handscroll.plan.plan import PartPlan, Plan
from handscroll.plan.precision import BYTES
from handscroll.plan.stages import DECODE_PART, DENOISE_PART, ENCODE_PART, TEXT_PART, Part
from handscroll.plan.text import TextStage, text_stage
from handscroll.plan.writer import writer_bytes


def best_candidate(part: Part, plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, budget: PartBudget) -> PartPlan:
    """The fastest candidate that fits the budget, with its bytes in total; the smallest where none does."""
    if part is TEXT_PART:
        return budget.choose(_text(plan, spec, inputs))
    if part is DENOISE_PART:
        return budget.choose(_denoise(plan, spec, inputs, budget))
    best = budget.choose(_autoencoder(part, plan, spec, inputs, budget))
    if part is not DECODE_PART or plan.on_the_way or inputs.hardware.is_cuda:
        return best
    # The file is encoded once all rows are there, and what made them is gone.
    writing_bytes = budget.total_bytes(writer_bytes(inputs.suffix, plan.width, plan.height))
    return dataclasses.replace(best, peak_bytes=max(best.peak_bytes, writing_bytes))


def _prompts(plan: Plan, spec: CheckpointSpec) -> int:
    return 2 if plan.guided and not spec.is_sprint else 1


def _text(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs) -> Iterable[TextStage]:
    precision = plan.precision.text_encoder
    kept = TEXT_PART.module in plan.kept
    tokens, cost = inputs.tokens or 0, text_cost(plan, spec)
    return [text_stage(spec.text_encoder, tokens, _prompts(plan, spec), precision, inputs, kept, cost)]


def _denoise(plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, budget: PartBudget) -> Iterable[DenoiseStage]:
    patch = spec.transformer.patch_size
    sampling = Sampling(
        rows=plan.latent_height // patch,
        columns=plan.latent_width // patch,
        tokens=inputs.tokens or 0,
        steps=plan.steps_here,
        branches=_prompts(plan, spec),
        precision=plan.precision.transformer,
        storage=plan.precision.transformer_storage,
        stored=spec.quantisation_of("transformer"),
        ranks=inputs.ranks,
        speeds=inputs.speeds,
    )
    kept = DENOISE_PART.module in plan.kept
    return denoise_stages(spec.transformer, sampling, inputs.hardware, budget.tensor_bytes, kept)


def _autoencoder(
    part: Part, plan: Plan, spec: CheckpointSpec, inputs: PlanInputs, budget: PartBudget
) -> Iterable[DecodeStage]:
    precision = plan.precision.autoencoder
    half, small, strip_rows = DecoderShape, plan if plan.on_the_way else None, plan.strip_rows
    if part is ENCODE_PART:
        half, small, strip_rows = EncoderShape, plan.smaller, None
    sharing: dict[str, Any] = {"ranks": inputs.ranks, "speeds": inputs.speeds}
    shape = half(spec.autoencoder, plan.latent_height, plan.latent_width, BYTES[precision], **sharing)
    # A smaller picture is held whole, in the host's memory, while it is decoded and encoded again.
    picture_bytes = 0 if small is None else 3 * small.width * small.height
    hardware, held_bytes = inputs.hardware, picture_bytes
    if hardware.is_cuda:
        host_bytes = max(0, hardware.host_bytes - picture_bytes)
        hardware, held_bytes = dataclasses.replace(hardware, host_bytes=host_bytes), 0
    kept = kept_bytes(part, plan, spec)
    return decode_stages(shape, precision, hardware, budget.tensor_bytes, strip_rows, held_bytes, kept)
