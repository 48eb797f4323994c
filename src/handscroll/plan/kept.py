"""Modules that stay in memory from one job to the next, and what they take of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.quantisation import WeightCost
from handscroll.plan.denoise import Sampling
from handscroll.plan.denoise import layer_cost as transformer_cost
from handscroll.plan.plan import Plan
from handscroll.plan.precision import BYTES
from handscroll.plan.stages import DECODE_PART, DENOISE_PART, ENCODE_PART, TEXT_PART, Part
from handscroll.plan.text import layer_cost

PARTS = (TEXT_PART, ENCODE_PART, DENOISE_PART, DECODE_PART)


def module_bytes(part: Part, plan: Plan, spec: CheckpointSpec) -> int:
    """The weights of a part's module, whole and in the plan's precision; of a text encoder without its embeddings."""
    parameters = {
        TEXT_PART: spec.text_encoder.parameter_count - spec.text_encoder.embedding_parameter_count,
        ENCODE_PART: spec.autoencoder.encoder_parameter_count,
        DENOISE_PART: spec.transformer.parameter_count,
        DECODE_PART: spec.autoencoder.decoder_parameter_count,
    }
    n_bytes = parameters[part] * BYTES[getattr(plan.precision, part.component)]
    if part is TEXT_PART:
        n_bytes -= spec.text_encoder.num_hidden_layers * text_cost(plan, spec).spared_bytes
    elif part is DENOISE_PART:
        n_bytes -= spec.transformer.num_layers * _layer_cost(plan, spec).spared_bytes
    return n_bytes


def kept_bytes(part: Part, plan: Plan, spec: CheckpointSpec) -> int:
    """What a part's own module takes because it is kept; 0 where it is not."""
    return module_bytes(part, plan, spec) if part.module in plan.kept else 0


def kept_beside_bytes(part: Part, plan: Plan, spec: CheckpointSpec) -> int:
    """What the modules take that are kept while a part of another module is at work."""
    return sum(kept_bytes(other, plan, spec) for other in PARTS if other is not part)


def rereading_seconds(parts: Iterable[Part], plan: Plan, spec: CheckpointSpec, weight_bytes: float) -> float:
    """Reading anew at every job what is not kept, of the modules that these parts run, and quantising it again.

    weight_bytes: what is read in a second.
    """
    return sum(
        module_bytes(part, plan, spec) / weight_bytes + making_seconds(part, plan, spec)
        for part in parts
        if part.module not in plan.kept
    )


def making_seconds(part: Part, plan: Plan, spec: CheckpointSpec) -> float:
    """What quantising all of a part's module takes while it is read."""
    if part is TEXT_PART:
        return spec.text_encoder.num_hidden_layers * text_cost(plan, spec).making_seconds
    return spec.transformer.num_layers * _layer_cost(plan, spec).making_seconds if part is DENOISE_PART else 0.0


def text_cost(plan: Plan, spec: CheckpointSpec) -> WeightCost:
    """What a layer of the text encoder takes in this plan."""
    storage, stored = plan.precision.text_encoder_storage, spec.quantisation_of("text_encoder")
    return layer_cost(spec.text_encoder, plan.precision.text_encoder, storage, stored)


def _layer_cost(plan: Plan, spec: CheckpointSpec) -> WeightCost:
    storage, stored = plan.precision.transformer_storage, spec.quantisation_of("transformer")
    sampling = Sampling(1, 1, 0, 1, 1, plan.precision.transformer, storage, stored)
    return transformer_cost(spec.transformer, sampling)


def choices(parts: Iterable[Part]) -> Iterator[tuple[str, ...]]:
    """Every set of modules that may be kept, all of them first and none last."""
    modules = [part.module for part in parts]
    for count in reversed(range(len(modules) + 1)):
        yield from combinations(modules, count)
