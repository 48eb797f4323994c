"""The official checkpoints as they are known without their files: enough for a plan, and for nothing else.

Shapes are those of their published configs (https://huggingface.co/Efficient-Large-Model), held by a test to their
numbers of parameters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from handscroll.models.autoencoder import F32C32_SANA
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.registry import BY_NAME, Entry
from handscroll.models.scheduler import SchedulerSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec

GEMMA_2_2B = TextEncoderSpec()
SANA_16B = TransformerSpec()
SANA_06B = TransformerSpec(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
NORMED = "rms_norm_across_heads"
SANA_15_16B = replace(SANA_16B, qk_norm=NORMED)
SANA_15_48B = replace(SANA_15_16B, num_layers=60)
SPRINT_06B = replace(SANA_06B, qk_norm=NORMED, guidance_embeds=True)
SPRINT_16B = replace(SANA_16B, qk_norm=NORMED, guidance_embeds=True)

# As diffusers' scripts/convert_sana_to_diffusers.py saves them; what transformers are stored in differs.
STORED_IN = (("text_encoder", "bf16"), ("vae", "fp32"))

# By the names of the registry. `sample_size` follows from the entry's pixels.
TRANSFORMERS = {
    "sana-0.6b-512": SANA_06B,
    "sana-0.6b": SANA_06B,
    "sana-1.6b-512": SANA_16B,
    "sana-1.6b-512-multiling": SANA_16B,
    "sana-1.6b": SANA_16B,
    "sana-1.6b-fp16": SANA_16B,
    "sana-1.6b-multiling": SANA_16B,
    "sana-1.6b-2k": replace(SANA_16B, interpolation_scale=1.0),
    "sana-1.6b-4k": replace(SANA_16B, interpolation_scale=2.0),
    "sana-1.5-1.6b": SANA_15_16B,
    "sana-1.5-4.8b": SANA_15_48B,
    "sana-sprint-0.6b": SPRINT_06B,
    "sana-sprint-1.6b": SPRINT_16B,
}


def known_spec(entry: Entry) -> CheckpointSpec:
    """What is known of an official checkpoint, to plan by before anything of it is fetched. Raises KeyError for others.

    Its folder is the hub id, where nothing lies that could be read.
    """
    transformer = TRANSFORMERS[entry.name]
    if entry.hub_id is None:
        raise KeyError(entry.name)
    few_step = transformer.guidance_embeds
    spec = CheckpointSpec(
        folder=Path(entry.hub_id),
        name=entry.name,
        transformer=replace(transformer, sample_size=entry.native_px // F32C32_SANA.spatial_compression_ratio),
        autoencoder=F32C32_SANA,
        text_encoder=GEMMA_2_2B,
        scheduler=_few_step_scheduler() if few_step else _flow_scheduler(6.0 if entry.native_px == 4096 else 3.0),
        native_px=entry.native_px,
        default_steps=2 if few_step else 20,
        default_guidance=4.5,
        from_figures=True,
        remarks=(f"{entry.name} is not on this machine: planned from known figures, and nothing was fetched",),
    )
    return as_official(spec, entry)


def as_official(spec: CheckpointSpec, entry: Entry) -> CheckpointSpec:
    """What is known of an official checkpoint, from its files or without, and what its publisher says beside it."""
    return replace(
        spec,
        name=entry.name,
        licence=entry.licence,
        published=entry.precision,
        recommended=entry.precision,
        stored_in=spec.stored_in or STORED_IN,
    )


def known_specs() -> dict[str, CheckpointSpec]:
    """By name, every model that can be planned before it is fetched."""
    return {name: known_spec(BY_NAME[name]) for name in TRANSFORMERS}


def _flow_scheduler(shift: float) -> SchedulerSpec:
    settings = {
        "algorithm_type": "dpmsolver++",
        "flow_shift": shift,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "use_flow_sigmas": True,
    }
    return SchedulerSpec("DPMSolverMultistepScheduler", tuple(settings.items()))


def _few_step_scheduler() -> SchedulerSpec:
    return SchedulerSpec("SCMScheduler", (("prediction_type", "trigflow"), ("sigma_data", 0.5)))
