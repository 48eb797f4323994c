"""A checkpoint's folder: what it must hold, and what its own settings say."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.models.config import build_spec, freeze, read_config, require_positive, require_within
from handscroll.models.index import FEW_STEP_PIPELINE, PIPELINES, Index, check_class
from handscroll.models.quantisation import Quantisation
from handscroll.models.scheduler import SchedulerSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.units import MAX_SIDE_PX, shown
from handscroll.weights.foreign import USE_THE_ORIGINAL, quantised_by_config

COMPONENTS = ("text_encoder", "transformer", "vae")
MAX_TEXT = 20_000  # characters of one text in handscroll.json
TEXT_ENCODER_KIND = "gemma2"


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """The contents of `handscroll.json`."""

    name: str | None = None
    native_px: int | None = None
    licence: str | None = None
    default_steps: int | None = None
    default_guidance: float | None = None
    max_prompt_tokens: int = 300
    compose_px: int | None = None
    complex_human_instruction: tuple[str, ...] | None = None
    instruction: bool = True

    def __post_init__(self) -> None:
        for field in ("native_px", "default_steps", "max_prompt_tokens", "compose_px"):
            if getattr(self, field) is not None:
                require_positive(self, field)
        require_within(
            self,
            native_px=(1, MAX_SIDE_PX),
            compose_px=(1, MAX_SIDE_PX),
            default_steps=(1, 1000),
            default_guidance=(0, 1000),
            max_prompt_tokens=(1, 2**13),
        )
        for text in (self.name, self.licence, *(self.complex_human_instruction or ())):
            if text is not None and len(text) > MAX_TEXT:
                raise ValueError(f"a text has {len(text)} characters; at most {MAX_TEXT} are read: {shown(text)}")


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint's components, always in the same order."""
    for part in ("model_index.json", "tokenizer/*", "text_encoder/*", "transformer/*", "vae/*", "scheduler/*"):
        yield from (path for path in sorted(folder.glob(part)) if path.is_file())


def read_own_settings(folder: Path) -> OwnSettings:
    file = folder / "handscroll.json"
    if not os.path.lexists(file):
        return OwnSettings()
    config = read_config(file)
    known = {field.name for field in dataclasses.fields(OwnSettings)} - {"instruction"}
    if unknown := sorted(config.keys() - known):
        raise CheckpointError(
            f"{file}: {shown(unknown[0])} is not a setting; the settings are {', '.join(sorted(known))}"
        )
    # Left out means diffusers' text; null means no instruction at all.
    silent = config.get("complex_human_instruction", ()) is None
    return build_spec(OwnSettings, file, {**config, "instruction": not silent})


def read_component(folder: Path, component: str) -> dict[str, Any]:
    """The config.json of one component. Raises CheckpointError for what is not run, naming the file."""
    file = folder / component / "config.json"
    config = read_config(file)
    if config.get("quantization_config") is not None and quantisation_in(component, config) is None:
        how = quantised_by_config(config["quantization_config"])
        raise CheckpointError(
            f"{file}: this {component} is stored {how}, which handscroll does not read; {USE_THE_ORIGINAL}"
        )
    adapter = folder / component / "adapter_config.json"
    if adapter.exists():
        raise CheckpointError(
            f"{adapter}: a LoRA adapter beside the weights is not implemented; fuse it into them with diffusers "
            "(pipe.fuse_lora()) and save the pipeline, or move its files away to paint without it"
        )
    names = config.get("architectures" if component == "text_encoder" else "_class_name")
    for name in names if isinstance(names, list) and component == "text_encoder" else [names]:
        if name is not None:
            check_class(file, component, name)
    kind = config.get("model_type") or TEXT_ENCODER_KIND
    if component == "text_encoder" and kind != TEXT_ENCODER_KIND:
        raise CheckpointError(f"{file}: model_type is {shown(kind)}; handscroll runs {TEXT_ENCODER_KIND}")
    return config


def quantisation_in(component: str, config: dict[str, Any]) -> Quantisation | None:
    """How a component's config says that it is stored; None for plainly, or in a way that is not read."""
    if component == "vae":
        return None
    return Quantisation.from_config(config.get("quantization_config"))


def read_scheduler(folder: Path, index: Index) -> SchedulerSpec:
    """The scheduler, whose class both files name. Raises CheckpointError for one that its pipeline does not run."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = str(config.get("_class_name") or index.scheduler)
    check_class(file, "scheduler", name)
    if name != index.scheduler:
        raise CheckpointError(
            f"{file}: is that of a {name}, and model_index.json names a {index.scheduler}; write in both which is meant"
        )
    if name not in PIPELINES[index.pipeline]:
        runs = " or ".join(PIPELINES[index.pipeline])
        raise CheckpointError(f"{file}: a {index.pipeline} samples by {runs}, not by {name}")
    settings = tuple((key, freeze(value)) for key, value in config.items() if not key.startswith("_"))
    return build_spec(SchedulerSpec, file, {"class_name": name, "settings": settings})


def check_agreement(
    folder: Path, index: Index, dit: TransformerSpec, vae: AutoencoderSpec, text: TextEncoderSpec
) -> None:
    """Raises CheckpointError for components that do not fit each other or the pipeline."""
    if dit.in_channels != vae.latent_channels:
        raise CheckpointError(
            f"{folder}: the transformer takes {dit.in_channels} channels, the autoencoder makes {vae.latent_channels}"
        )
    if dit.caption_channels != text.hidden_size:
        raise CheckpointError(
            f"{folder}: the transformer takes text of {dit.caption_channels} channels, "
            f"the text encoder makes {text.hidden_size}"
        )
    # The flow pipeline drops a second half, a learned variance; the few-step one knows of none.
    allowed = (dit.in_channels,) if index.is_few_step else (dit.in_channels, 2 * dit.in_channels)
    if dit.out_channels not in allowed:
        raise CheckpointError(
            f"{folder}: the transformer makes {dit.out_channels} channels; a {index.pipeline} takes "
            f"{' or '.join(map(str, allowed))}"
        )
    if dit.guidance_embeds and not index.is_few_step:
        raise CheckpointError(
            f"{folder}: the transformer takes guidance as an input (guidance_embeds), which a {index.pipeline} does "
            f"not give; is it a {FEW_STEP_PIPELINE} with an SCMScheduler?"
        )
    if vae.in_channels != 3:
        raise CheckpointError(f"{folder}: the autoencoder has {vae.in_channels} channels; pictures have 3")
    if "layer_norm" in vae.decoder_norm_types:
        raise CheckpointError(f"{folder}: decoder_norm_types 'layer_norm' is not implemented, here as in diffusers")
