"""What a checkpoint is, read from its own JSON: shapes, sizes and defaults. No torch, no weight is read.

A checkpoint is a folder in diffusers' layout: `model_index.json` and the folders `tokenizer`, `text_encoder`,
`transformer`, `vae` and `scheduler`. Field names follow diffusers' and transformers' configs, and so do the defaults
for fields that an older file lacks. A folder may also hold `handscroll.json`, which overrides what cannot be known
from the components alone: `name`, `native_px`, `complex_human_instruction` (null, or a list of lines), `licence`,
`default_steps`, `default_guidance`, `max_prompt_tokens`, `compose_px`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from handscroll.errors import printable
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.models.config import build_spec, read_config
from handscroll.models.folder import (
    COMPONENTS,
    check_agreement,
    quantisation_in,
    read_component,
    read_own_settings,
    read_scheduler,
)
from handscroll.models.index import Index, read_index
from handscroll.models.quantisation import Quantisation
from handscroll.models.scheduler import SchedulerSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.units import listed
from handscroll.weights.folder import NO_WEIGHTS, WeightFiles

# As transformers' configs name the precision that a text encoder was saved in.
CONFIG_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """Everything that planning and running need to know about a checkpoint before its weights are read.

    `folder` is where it lies. `instruction` says whether the complex human instruction goes before a prompt;
    `instruction_lines` is the checkpoint's own text for it, and None means diffusers' text. A prompt longer than
    `max_prompt_tokens` is cut. Much larger pictures are composed at about `compose_px` squared and grow from
    there, None for never. The weight files are empty in a spec that describes a checkpoint which is not on this
    machine; `stored_in` is then what is known of a component's dtype, and `published` that of the others.
    `recommended` is the precision that the model's publisher runs its transformer in, None where nobody says.
    `quantised`: how those components are stored that are in 8 or 4 bits. `from_figures`: no file of it is here, and all
    of this is from the table of known models. `commit` is the hub's, of a model that came from there. `remarks`: what
    the user should know of it, a line each.
    """

    folder: Path
    name: str
    transformer: TransformerSpec
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec
    scheduler: SchedulerSpec
    native_px: int
    default_steps: int
    default_guidance: float
    instruction: bool = True
    instruction_lines: tuple[str, ...] | None = None
    licence: str | None = None
    published: str = "fp32"
    recommended: str | None = None
    max_prompt_tokens: int = 300
    compose_px: int | None = None
    commit: str | None = None
    from_figures: bool = False
    stored_in: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    transformer_weights: WeightFiles = NO_WEIGHTS
    autoencoder_weights: WeightFiles = NO_WEIGHTS
    text_encoder_weights: WeightFiles = NO_WEIGHTS
    quantised: tuple[tuple[str, Quantisation], ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read a checkpoint folder: its JSON and the headers of its safetensors files, nothing else.

        Raises CheckpointError, one line naming the file, for whatever is missing, broken, truncated or not Sana's.
        """
        folder = Path(folder)
        spec = dataclasses.replace(
            cls.from_configs(folder),
            transformer_weights=WeightFiles.from_folder(folder / "transformer"),
            autoencoder_weights=WeightFiles.from_folder(folder / "vae"),
            text_encoder_weights=WeightFiles.from_folder(folder / "text_encoder"),
        )
        return dataclasses.replace(spec, quantised=tuple((name, spec._with_layers(name)) for name, _ in spec.quantised))

    @classmethod
    def from_configs(cls, folder: str | Path) -> Self:
        """Read only the JSON of a checkpoint folder, whose weights may not be there yet. Raises CheckpointError."""
        folder = Path(folder)
        index = read_index(folder)
        configs = {component: read_component(folder, component) for component in COMPONENTS}
        transformer = build_spec(TransformerSpec, folder / "transformer/config.json", configs["transformer"])
        autoencoder = build_spec(AutoencoderSpec, folder / "vae/config.json", configs["vae"])
        text_encoder = build_spec(TextEncoderSpec, folder / "text_encoder/config.json", configs["text_encoder"])
        scheduler = read_scheduler(folder, index)
        check_agreement(folder, index, transformer, autoencoder, text_encoder)

        own = read_own_settings(folder)
        sprint = scheduler.class_name == "SCMScheduler" or transformer.guidance_embeds
        return cls(
            folder=folder,
            name=printable(own.name or folder.resolve().name),
            transformer=transformer,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            scheduler=scheduler,
            native_px=own.native_px or transformer.sample_size * autoencoder.spatial_compression_ratio,
            default_steps=own.default_steps or (2 if sprint else 20),
            default_guidance=4.5 if own.default_guidance is None else own.default_guidance,
            instruction=own.instruction,
            instruction_lines=own.complex_human_instruction,
            licence=None if own.licence is None else printable(own.licence),
            max_prompt_tokens=own.max_prompt_tokens,
            compose_px=own.compose_px,
            published=_published(configs["text_encoder"]),
            quantised=tuple(
                (component, found)
                for component, config in configs.items()
                if (found := quantisation_in(component, config)) is not None
            ),
            remarks=(*_unused_settings(folder, index), *_unused_code(folder, configs)),
        )

    @property
    def is_sprint(self) -> bool:
        """Whether this is a few-step model, which takes its guidance as an input instead of a second forward."""
        return self.scheduler.class_name == "SCMScheduler" or self.transformer.guidance_embeds

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights as published."""
        return sum(self.weights_of(component).n_bytes for component in COMPONENTS)

    def weights_of(self, component: str) -> WeightFiles:
        """The weight files of `text_encoder`, `transformer` or `vae`; `.dtype` is the dtype they were published in."""
        match component:
            case "transformer":
                return self.transformer_weights
            case "vae":
                return self.autoencoder_weights
            case "text_encoder":
                return self.text_encoder_weights
        raise ValueError(f"no component {component!r}; the components with weights are {', '.join(COMPONENTS)}")

    def quantisation_of(self, component: str) -> Quantisation | None:
        """How a component is stored, where that is in 8 or 4 bits."""
        return dict(self.quantised).get(component)

    def _with_layers(self, component: str) -> Quantisation:
        """How a component is stored, with what its files' headers say of it."""
        stored = dict(self.quantised)[component]
        if component == "transformer":
            matrices, layers = self.transformer.block_matrices(), self.transformer.num_layers
        else:
            matrices, layers = self.text_encoder.layer_matrices(), self.text_encoder.num_hidden_layers
        return stored.with_layers(matrices, layers, self.weights_of(component).tensors)

    def dtype_of(self, component: str) -> str:
        """The dtype that a component's weights were published in: `fp32`, `bf16` or `fp16`."""
        quantised = self.quantisation_of(component)
        if quantised is not None and quantised.dtype:
            return quantised.dtype
        return self.weights_of(component).dtype or dict(self.stored_in).get(component, self.published)


def _unused_code(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Whose config names classes of the checkpoint's own, in place of which the libraries' run."""
    files = [folder / component / "config.json" for component, config in configs.items() if config.get("auto_map")]
    settings = folder / "tokenizer" / "tokenizer_config.json"
    if settings.is_file() and read_config(settings).get("auto_map"):
        files.append(settings)
    return tuple(f"{file}: auto_map names code that comes with the checkpoint; it is not run" for file in files)


def _unused_settings(folder: Path, index: Index) -> tuple[str, ...]:
    """What the index asks for and nothing takes, as diffusers' own pipeline takes none of it."""
    if not index.unused:
        return ()
    return (
        f"{folder / 'model_index.json'}: {listed(index.unused)} is no setting of a {index.pipeline} and is not used",
    )


def _published(text_encoder: dict[str, Any]) -> str:
    """What a text encoder's config says of its precision, the only one that does."""
    said = text_encoder.get("dtype") or text_encoder.get("torch_dtype")
    return CONFIG_DTYPES.get(str(said), "fp32")
