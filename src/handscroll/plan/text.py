"""The text stage: bytes and FLOPs of encoding a prompt, a unit of a layer in memory at a time, on CUDA a layer."""

from __future__ import annotations

from dataclasses import dataclass

from handscroll.limits import SLOTS
from handscroll.models.quantisation import Quantisation, WeightCost, weight_cost
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.plan.inputs import PlanInputs
from handscroll.plan.precision import BYTES


@dataclass(frozen=True, slots=True)
class TextStage:
    """`tokens` of the longer prompt; `peak_bytes` of the whole stage; `seconds` by the hardware's rates."""

    tokens: int
    peak_bytes: int
    seconds: float


def layer_cost(
    spec: TextEncoderSpec, precision: str, storage: str = "", stored: Quantisation | None = None
) -> WeightCost:
    """What one of its layers takes; stored: how the files hold it, None for plainly."""
    matrices, parameters = spec.layer_matrices(), spec.layer_parameter_count
    return weight_cost("text_encoder", storage, matrices, parameters, BYTES[precision], stored)


def text_stage(
    spec: TextEncoderSpec,
    tokens: int,
    prompts: int,
    precision: str,
    inputs: PlanInputs,
    kept: bool = False,
    cost: WeightCost | None = None,
) -> TextStage:
    """Encoding `prompts` prompts of at most `tokens` tokens in `precision`; kept: by layers that are in memory."""
    hardware = inputs.hardware
    layer = layer_cost(spec, precision) if cost is None else cost
    working_bytes = layer.working_bytes if hardware.is_cuda else spec.unit_parameter_count * BYTES[precision]
    if kept:
        held = spec.num_hidden_layers * layer.resident_bytes + (layer.widened_bytes and working_bytes)
    elif hardware.is_cuda:
        held = SLOTS * layer.resident_bytes + (layer.widened_bytes and working_bytes)
    else:
        held = working_bytes
    held += 4 * spec.num_hidden_layers * spec.hidden_size * BYTES[precision]  # norms
    held += activation_bytes(spec, tokens, precision) + layer.making_bytes
    if not hardware.is_cuda:
        held += inputs.tokenizer_bytes
    read_bytes = 0 if kept else prompts * spec.num_hidden_layers * layer.stored_bytes
    seconds = prompts * flops(spec, tokens) / hardware.rates.flops(precision) + read_bytes / hardware.rates.weight_bytes
    seconds += (1 if kept else prompts) * spec.num_hidden_layers * layer.making_seconds
    return TextStage(tokens, held, seconds)


def activation_bytes(spec: TextEncoderSpec, tokens: int, precision: str) -> int:
    """The most that a layer holds beside its weights: in its gated MLP, or in its attention's scores.

    Scores are made in `precision` and soft-capped; their softmax is fp32, and so is a copy of what half precisions give
    it: 8 or 10 bytes a head and pair of tokens in all. Positions are rotated by a cosine and a sine a token and channel
    of a head.
    """
    element_bytes = BYTES[precision]
    hidden = tokens * spec.hidden_size * element_bytes
    heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
    projected = tokens * heads * spec.head_dim * element_bytes
    masks = 2 * tokens**2 * element_bytes
    mlp = 4 * tokens * spec.intermediate_size * element_bytes
    score_bytes = 8 if element_bytes == 4 else element_bytes + 8
    attention = score_bytes * tokens**2 * spec.num_attention_heads + 2 * projected
    rotations = 4 * tokens * spec.head_dim * element_bytes
    return 3 * hidden + masks + rotations + max(mlp, attention)


def flops(spec: TextEncoderSpec, tokens: int) -> float:
    """Of one prompt: two a weight and token, and the scores and their application."""
    matrices = 2 * tokens * spec.layer_parameter_count
    scores = 4 * tokens**2 * spec.num_attention_heads * spec.head_dim
    return float(spec.num_hidden_layers * (matrices + scores))
