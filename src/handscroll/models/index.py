"""What `model_index.json` says: which pipeline a checkpoint is for, and that nothing in it is left out of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError
from handscroll.models.config import read_config
from handscroll.units import shown
from handscroll.weights.foreign import strange_folder

LAYOUT = "model_index.json, tokenizer/, text_encoder/, transformer/, vae/ and scheduler/"
FEW_STEP_PIPELINE = "SanaSprintPipeline"
# The pipelines that are run, and the schedulers that each samples with in diffusers.
PIPELINES = {
    "SanaPipeline": ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
    FEW_STEP_PIPELINE: ("SCMScheduler",),
}
# Others of the family: what of each is not implemented, and what runs without it.
_NO_PICTURES = ("videos are not implemented", "use a model that makes pictures")
OTHER_PIPELINES = {
    "SanaPAGPipeline": (
        "perturbed-attention guidance is not implemented",
        'to paint without it, write "SanaPipeline" as the _class_name of a copy, or use the model it was made from',
    ),
    "SanaControlNetPipeline": (
        "a controlnet and its control picture are not implemented",
        'to paint from text alone, write "SanaPipeline" as the _class_name of a copy and take its controlnet entry '
        "out, or use the model it was made from",
    ),
    "SanaSprintImg2ImgPipeline": (
        "beginning from a picture is not implemented",
        f'to paint from text alone, write "{FEW_STEP_PIPELINE}" as the _class_name of a copy, or use the model it was '
        "made from",
    ),
    "SanaVideoPipeline": _NO_PICTURES,
    "SanaImageToVideoPipeline": _NO_PICTURES,
}
CLASSES = {
    "text_encoder": frozenset({"Gemma2Model", "Gemma2ForCausalLM"}),
    "transformer": frozenset({"SanaTransformer2DModel"}),
    "vae": frozenset({"AutoencoderDC"}),
    "scheduler": frozenset({"DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler"}),
}


@dataclass(frozen=True, slots=True)
class Index:
    """The class of the pipeline, that of its scheduler, and the names of settings that no pipeline here takes."""

    pipeline: str
    scheduler: str
    unused: tuple[str, ...] = ()

    @property
    def is_few_step(self) -> bool:
        return self.pipeline == FEW_STEP_PIPELINE


def read_index(folder: Path) -> Index:
    """The index of a checkpoint's folder, which holds all that its pipeline needs and nothing that is not run.

    Raises CheckpointError for another layout, for a pipeline that is not implemented, and for a further component.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a checkpoint folder holds {LAYOUT}")
    file = folder / "model_index.json"
    if not file.is_file():
        raise CheckpointError(_no_checkpoint(folder))
    config = read_config(file)
    pipeline = config.get("_class_name")
    _check_pipeline(file, pipeline)
    for component in CLASSES:
        _check_component(file, component, config.get(component))
    _check_tokenizer(file, config.get("tokenizer"))
    others = {name: value for name, value in config.items() if name not in (*CLASSES, "tokenizer")}
    unused = _unused_settings(file, others)
    for component in ("tokenizer", *CLASSES):
        if not (folder / component).is_dir():
            raise CheckpointError(f"{folder / component}: missing; a checkpoint folder holds {LAYOUT}")
    return Index(str(pipeline), config["scheduler"][1], unused)


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


def check_class(file: Path, component: str, name: object) -> None:
    """Raises CheckpointError for a class of a component that is not run, and for what is no name of one."""
    allowed = CLASSES[component]
    if not isinstance(name, str) or name not in allowed:
        raise CheckpointError(f"{file}: {component} is {shown(name)}; handscroll runs {' or '.join(sorted(allowed))}")


def _check_pipeline(file: Path, pipeline: Any) -> None:
    name = str(pipeline)
    if name in PIPELINES:
        return
    known = " and ".join(PIPELINES)
    if name in OTHER_PIPELINES:
        missing, way_out = OTHER_PIPELINES[name]
        raise CheckpointError(f"{file}: a {name} cannot be run: {missing}; {way_out}")
    if name.startswith("Sana"):
        raise CheckpointError(f"{file}: a {shown(pipeline)} is not implemented; handscroll runs {known}")
    raise CheckpointError(f"{file}: {shown(pipeline)} is not a Sana pipeline; handscroll runs {known}")


def _check_component(file: Path, component: str, entry: Any) -> None:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(f"{file}: names no {component}; a checkpoint folder holds {LAYOUT}")
    check_class(file, component, entry[1])
    library = "transformers" if component == "text_encoder" else "diffusers"
    if entry[0] != library:
        raise CheckpointError(
            f"{file}: {component} is the {entry[1]} of {shown(entry[0])}; handscroll runs that of {library}, and no "
            "code that comes with a checkpoint"
        )


def _check_tokenizer(file: Path, entry: Any) -> None:
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise CheckpointError(f"{file}: names no tokenizer: {shown(entry)}")
    if entry[0] != "transformers":
        raise CheckpointError(
            f"{file}: the tokenizer is the {shown(entry[1])} of {shown(entry[0])}; handscroll runs those of "
            "transformers, and no code that comes with a checkpoint"
        )


def _unused_settings(file: Path, entries: dict[str, Any]) -> tuple[str, ...]:
    """The names of settings that ask for something. Raises CheckpointError for a component."""
    settings = []
    for name, value in entries.items():
        if name.startswith("_") or not value:
            continue
        if not isinstance(value, list):
            settings.append(name)
        elif any(part is not None for part in value):
            raise CheckpointError(
                f"{file}: names the component {shown(name)}, which is not implemented; to paint without it, take its "
                "entry out of a copy, or use the model it was made from"
            )
    return tuple(settings)
