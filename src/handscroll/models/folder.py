"""A checkpoint's folder: what it must hold, and what its own settings say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from handscroll.errors import CheckpointError
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.models.config import Spec, build_spec, freeze, read_config, require_positive, require_within, shown
from handscroll.models.scheduler import SchedulerSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.units import MAX_SIDE_PX, one_line
from handscroll.weights.foreign import USE_THE_ORIGINAL, quantised_by_config, strange_folder
from handscroll.weights.json_text import MAX_MESSAGE

COMPONENTS = ("text_encoder", "transformer", "vae")
MAX_TEXT = 20_000  # characters of one text in handscroll.json
LAYOUT = "model_index.json, tokenizer/, text_encoder/, transformer/, vae/ and scheduler/"
PIPELINES = frozenset(
    {
        "SanaPipeline",
        "SanaPAGPipeline",
        "SanaControlNetPipeline",
        "SanaSprintPipeline",
        "SanaSprintImg2ImgPipeline",
    }
)
CLASSES = {
    "text_encoder": frozenset({"Gemma2Model", "Gemma2ForCausalLM"}),
    "transformer": frozenset({"SanaTransformer2DModel"}),
    "vae": frozenset({"AutoencoderDC"}),
    "scheduler": frozenset({"DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler"}),
}


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


def read_own_settings(folder: Path) -> OwnSettings:
    file = folder / "handscroll.json"
    if not file.exists():
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


def check_layout(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a checkpoint folder holds {LAYOUT}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(_no_checkpoint(folder))
    config = read_config(index)
    pipeline = config.get("_class_name")
    if str(pipeline) not in PIPELINES:
        known = ", ".join(sorted(PIPELINES))
        raise CheckpointError(f"{index}: {shown(pipeline)} is not a Sana pipeline; known are {known}")
    for component, allowed in CLASSES.items():
        entry = config.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise CheckpointError(f"{index}: names no {component}; a checkpoint folder holds {LAYOUT}")
        _check_class(index, component, entry[1], allowed)
    for component in ("tokenizer", *CLASSES):
        if not (folder / component).is_dir():
            raise CheckpointError(f"{folder / component}: missing; a checkpoint folder holds {LAYOUT}")


def _no_checkpoint(folder: Path) -> str:
    """What is said of a folder without model_index.json."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        return f"{folder}: cannot be listed: {error.strerror}"
    if said := strange_folder(names):
        return f"{folder}: {said}"
    if (folder.resolve().parent / "model_index.json").is_file():
        return f"{folder}: only one part of a checkpoint; give the folder that it lies in, {folder.resolve().parent}"
    inside = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    if inside:
        return f"{folder}: no checkpoint itself; give one of the folders in it, such as {folder / inside[0]}"
    return f"{folder / 'model_index.json'}: missing; a checkpoint folder holds {LAYOUT}"


def _check_class(file: Path, component: str, name: str, allowed: frozenset[str]) -> None:
    if name not in allowed:
        raise CheckpointError(f"{file}: {component} is {shown(name)}; handscroll runs {' or '.join(sorted(allowed))}")


def read_component(folder: Path, component: str, cls: type[Spec]) -> Spec:
    """The spec of one component, from its config.json. Raises CheckpointError naming the file."""
    file = folder / component / "config.json"
    config = read_config(file)
    if config.get("quantization_config") is not None:
        how = quantised_by_config(config["quantization_config"])
        raise CheckpointError(
            f"{file}: this {component} is stored {how}, which handscroll does not read; {USE_THE_ORIGINAL}"
        )
    names = config.get("architectures") if component == "text_encoder" else [config.get("_class_name")]
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str):
            _check_class(file, component, name, CLASSES[component])
    return build_spec(cls, file, config)


def read_scheduler(folder: Path) -> SchedulerSpec:
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = config.get("_class_name") or read_config(folder / "model_index.json")["scheduler"][1]
    _check_class(file, "scheduler", str(name), CLASSES["scheduler"])
    settings = tuple((key, freeze(value)) for key, value in config.items() if not key.startswith("_"))
    try:
        return SchedulerSpec(str(name), settings)
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error, MAX_MESSAGE)}") from error


def check_agreement(folder: Path, dit: TransformerSpec, vae: AutoencoderSpec, text: TextEncoderSpec) -> None:
    if dit.in_channels != vae.latent_channels:
        raise CheckpointError(
            f"{folder}: the transformer takes {dit.in_channels} channels, the autoencoder makes {vae.latent_channels}"
        )
    if dit.caption_channels != text.hidden_size:
        raise CheckpointError(
            f"{folder}: the transformer takes text of {dit.caption_channels} channels, "
            f"the text encoder makes {text.hidden_size}"
        )
