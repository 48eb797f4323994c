"""What a checkpoint is, read from its own JSON: shapes, sizes and defaults. No torch, no weight is read.

A checkpoint is a folder in diffusers' layout: `model_index.json` and the folders `tokenizer`, `text_encoder`,
`transformer`, `vae` and `scheduler`. Field names follow diffusers' and transformers' configs, and so do the defaults
for fields that an older file lacks. A folder may also hold `handscroll.json`, which overrides what cannot be known
from the components alone: `name`, `native_px`, `complex_human_instruction` (null, or a list of lines), `licence`,
`default_steps`, `default_guidance`, `max_prompt_tokens`, `compose_px`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from handscroll.errors import CheckpointError
from handscroll.weight_files import NO_WEIGHTS, WeightFiles

Spec = TypeVar("Spec")

COMPONENTS = ("text_encoder", "transformer", "vae")
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

BLOCK_TYPES = frozenset({"ResBlock", "EfficientViTBlock"})
NORM_TYPES = frozenset({"rms_norm", "layer_norm", "batch_norm"})


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """A `SanaTransformer2DModel`. The defaults are diffusers', and are those of Sana 1.6B at 1024 pixels."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "in_channels", "out_channels", "num_attention_heads", "attention_head_dim")
        _require_positive(self, "num_layers", "num_cross_attention_heads", "cross_attention_head_dim", "mlp_ratio")
        _require_positive(self, "caption_channels", "sample_size", "patch_size")
        if self.cross_attention_dim != self.width:
            raise ValueError(f"cross_attention_dim is {self.cross_attention_dim}, but the width is {self.width}")
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f"qk_norm {self.qk_norm!r} is not one that Sana uses (null, rms_norm_across_heads)")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the contents of `transformer/config.json`. Raises ValueError naming the field."""
        if config.get("out_channels", 32) is None:  # diffusers: as many as come in
            config = {**config, "out_channels": config.get("in_channels", 32)}
        return _from_config(cls, config)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_width(self) -> int:
        """Channels of the queries, keys and values of the attention to the text."""
        return self.num_cross_attention_heads * self.cross_attention_head_dim

    @property
    def hidden_channels(self) -> int:
        """Channels inside a Mix-FFN after its gate; the two convolutions before the gate have twice as many."""
        return int(self.mlp_ratio * self.width)

    @property
    def block_parameter_count(self) -> int:
        """Parameters of one of the `num_layers` blocks."""
        width, cross, hidden = self.width, self.cross_width, self.hidden_channels
        self_attention = 3 * _linear(width, width, self.attention_bias) + _linear(width, width)
        cross_attention = _linear(width, cross) + 2 * _linear(self.cross_attention_dim, cross) + _linear(cross, width)
        if self.qk_norm is not None:
            self_attention += 2 * width
            cross_attention += 2 * cross
        feed_forward = _linear(width, 2 * hidden) + _convolution(1, 2 * hidden, 3) + _linear(hidden, width, bias=False)
        norms = 2 * width if self.norm_elementwise_affine else 0
        return self_attention + cross_attention + feed_forward + norms + 6 * width  # the last: scale_shift_table

    @property
    def parameter_count(self) -> int:
        width = self.width
        patch_embed = _convolution(self.in_channels, width, self.patch_size)
        embedders = 2 if self.guidance_embeds else 1
        time_embed = embedders * (_linear(256, width) + _linear(width, width)) + _linear(width, 6 * width)
        caption = _linear(self.caption_channels, width) + _linear(width, width) + width
        output = 2 * width + _linear(width, self.patch_size**2 * self.out_channels)
        return patch_embed + time_embed + caption + self.num_layers * self.block_parameter_count + output


@dataclass(frozen=True, slots=True)
class AutoencoderSpec:
    """An `AutoencoderDC`: every field of its config, what may be one value or one a stage spelled out a stage.

    The defaults are diffusers', except that stages are listed; `F32C32_SANA` is the one that Sana ships.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "in_channels", "latent_channels", "attention_head_dim", "scaling_factor")
        for half in ("encoder", "decoder"):
            channels = getattr(self, f"{half}_block_out_channels")
            if len(channels) < 2 or min(channels) < 1:
                raise ValueError(f"{half}_block_out_channels {list(channels)} describe no stages")
            for field in ("block_types", "layers_per_block", "qkv_multiscales"):
                _require_a_stage(f"{half}_{field}", getattr(self, f"{half}_{field}"), len(channels))
            _require_known(f"{half}_block_types", getattr(self, f"{half}_block_types"), BLOCK_TYPES)
        if len(self.encoder_block_out_channels) != len(self.decoder_block_out_channels):
            raise ValueError("encoder and decoder have different numbers of stages")
        for field in ("decoder_norm_types", "decoder_act_fns"):
            _require_a_stage(field, getattr(self, field), len(self.decoder_block_out_channels))
        _require_known("decoder_norm_types", self.decoder_norm_types, NORM_TYPES)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the contents of `vae/config.json`. Raises ValueError naming the field."""
        config = dict(config)
        for half in ("encoder", "decoder"):
            stages = config.get(f"{half}_block_out_channels", (0,) * 6)
            count = len(stages) if isinstance(stages, list | tuple) else 0
            fields = ["block_types"] if half == "encoder" else ["block_types", "norm_types", "act_fns"]
            for field in (f"{half}_{field}" for field in fields):
                value = config.get(field, _default(cls, field)[0])
                if isinstance(value, str):
                    config[field] = [value] * count
        return _from_config(cls, config)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels a side for each latent position."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def encoder_parameter_count(self) -> int:
        channels, layers = self.encoder_block_out_channels, self.encoder_layers_per_block
        pixel_unshuffle = self.downsample_block_type == "pixel_unshuffle"
        if layers[0] > 0:
            total = _convolution(self.in_channels, channels[0], 3)
        else:
            total = _convolution(self.in_channels, channels[1] // 4 if pixel_unshuffle else channels[1], 3)
        for stage, (width, count) in enumerate(zip(channels, layers, strict=True)):
            scales = self.encoder_qkv_multiscales[stage]
            total += count * self._layer(self.encoder_block_types[stage], width, scales, "rms_norm")
            if stage < len(channels) - 1 and count > 0:
                below = channels[stage + 1]
                total += _convolution(width, below // 4 if pixel_unshuffle else below, 3)
        return total + _convolution(channels[-1], self.latent_channels, 3)

    @property
    def decoder_parameter_count(self) -> int:
        channels, layers = self.decoder_block_out_channels, self.decoder_layers_per_block
        spread = 1 if self.upsample_block_type == "interpolate" else 4  # pixel shuffle makes four pixels of channels
        total = _convolution(self.latent_channels, channels[-1], 3)
        for stage, (width, count) in enumerate(zip(channels, layers, strict=True)):
            scales, norm = self.decoder_qkv_multiscales[stage], self.decoder_norm_types[stage]
            total += count * self._layer(self.decoder_block_types[stage], width, scales, norm)
            if stage < len(channels) - 1 and count > 0:
                total += _convolution(channels[stage + 1], spread * width, 3)
        last = channels[0] if layers[0] > 0 else channels[1]
        total += 2 * last  # norm_out
        return total + _convolution(last, self.in_channels if layers[0] > 0 else spread * self.in_channels, 3)

    @property
    def parameter_count(self) -> int:
        return self.encoder_parameter_count + self.decoder_parameter_count

    def _layer(self, block_type: str, width: int, scales: tuple[int, ...], norm: str) -> int:
        affine = 2 * width  # every norm type has a weight and a bias
        if block_type == "ResBlock":
            return _convolution(width, width, 3) + _convolution(width, width, 3, bias=False) + affine
        head_dim = self.attention_head_dim
        inner = width // head_dim * head_dim
        attention = 3 * width * inner + inner * (1 + len(scales)) * width + affine
        attention += sum(3 * inner * size**2 + 3 * inner * head_dim for size in scales)
        hidden = 4 * width
        feed_forward = _linear(width, 2 * hidden) + _convolution(1, 2 * hidden, 3) + hidden * width + affine
        return attention + feed_forward


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """A `Gemma2Model`. The defaults are transformers', and are those of gemma-2-2b."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 8192
    sliding_window: int | None = 4096
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        _require_positive(self, "num_attention_heads", "num_key_value_heads")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the contents of `text_encoder/config.json`. Raises ValueError naming the field."""
        return _from_config(cls, config)

    @property
    def embedding_parameter_count(self) -> int:
        """The table of token embeddings, of which a prompt needs a row a token."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameter_count(self) -> int:
        hidden, bias = self.hidden_size, self.attention_bias
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = _linear(hidden, queries, bias) + 2 * _linear(hidden, keys, bias) + _linear(queries, hidden, bias)
        return attention + 3 * hidden * self.intermediate_size + 4 * hidden

    @property
    def parameter_count(self) -> int:
        return self.embedding_parameter_count + self.num_hidden_layers * self.layer_parameter_count + self.hidden_size


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A diffusers scheduler: its class and its settings, as hashable name and value pairs in file order."""

    class_name: str = "DPMSolverMultistepScheduler"
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        return {name: _thaw(value) for name, value in self.settings}


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """Everything that planning and running need to know about a checkpoint before its weights are read.

    `folder` is where it lies. `instruction` says whether the complex human instruction goes before a prompt;
    `instruction_lines` is the checkpoint's own text for it, and None means diffusers' text. A prompt longer than
    `max_prompt_tokens` is cut. Much larger pictures are composed at about `compose_px` squared and grow from
    there, None for never. The weight files are empty in a spec that describes a checkpoint which is not on this
    machine; `published` is then what is known of its precision.
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
    max_prompt_tokens: int = 300
    compose_px: int | None = None
    transformer_weights: WeightFiles = NO_WEIGHTS
    autoencoder_weights: WeightFiles = NO_WEIGHTS
    text_encoder_weights: WeightFiles = NO_WEIGHTS

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read a checkpoint folder: its JSON and the headers of its safetensors files, nothing else.

        Raises CheckpointError, one line naming the file, for whatever is missing, broken, truncated or not Sana's.
        """
        folder = Path(folder)
        return dataclasses.replace(
            cls.from_configs(folder),
            transformer_weights=WeightFiles.from_folder(folder / "transformer"),
            autoencoder_weights=WeightFiles.from_folder(folder / "vae"),
            text_encoder_weights=WeightFiles.from_folder(folder / "text_encoder"),
        )

    @classmethod
    def from_configs(cls, folder: str | Path) -> Self:
        """Read only the JSON of a checkpoint folder, whose weights may not be there yet. Raises CheckpointError."""
        folder = Path(folder)
        _check_layout(folder)
        configs = {component: _read_component(folder, component) for component in COMPONENTS}
        transformer = _build(TransformerSpec, folder / "transformer/config.json", configs["transformer"])
        autoencoder = _build(AutoencoderSpec, folder / "vae/config.json", configs["vae"])
        text_encoder = _build(TextEncoderSpec, folder / "text_encoder/config.json", configs["text_encoder"])
        scheduler = _read_scheduler(folder)
        _check_agreement(folder, transformer, autoencoder, text_encoder)

        own = _read_own(folder)
        sprint = scheduler.class_name == "SCMScheduler" or transformer.guidance_embeds
        return cls(
            folder=folder,
            name=own.name or folder.resolve().name,
            transformer=transformer,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            scheduler=scheduler,
            native_px=own.native_px or transformer.sample_size * autoencoder.spatial_compression_ratio,
            default_steps=own.default_steps or (2 if sprint else 20),
            default_guidance=4.5 if own.default_guidance is None else own.default_guidance,
            instruction=own.instruction,
            instruction_lines=own.complex_human_instruction,
            licence=own.licence,
            max_prompt_tokens=own.max_prompt_tokens,
            compose_px=own.compose_px,
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

    def dtype_of(self, component: str) -> str:
        """The dtype that a component's weights were published in: `fp32`, `bf16` or `fp16`."""
        return self.weights_of(component).dtype or self.published


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file if there is none."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: broken JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


# Reading a folder.


@dataclass(frozen=True, slots=True)
class _Own:
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
                _require_positive(self, field)


def _read_own(folder: Path) -> _Own:
    file = folder / "handscroll.json"
    if not file.exists():
        return _Own()
    config = read_config(file)
    known = {field.name for field in dataclasses.fields(_Own)} - {"instruction"}
    if unknown := sorted(config.keys() - known):
        raise CheckpointError(f"{file}: {unknown[0]!r} is not a setting; the settings are {', '.join(sorted(known))}")
    # Left out means diffusers' text; null means no instruction at all.
    silent = config.get("complex_human_instruction", ()) is None
    return _build(_Own, file, {**config, "instruction": not silent})


def _check_layout(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a checkpoint folder holds {LAYOUT}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{index}: missing; a checkpoint folder holds {LAYOUT}")
    config = read_config(index)
    pipeline = config.get("_class_name")
    if str(pipeline) not in PIPELINES:
        known = ", ".join(sorted(PIPELINES))
        raise CheckpointError(f"{index}: {_shown(pipeline)} is not a Sana pipeline; known are {known}")
    for component, allowed in CLASSES.items():
        entry = config.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise CheckpointError(f"{index}: names no {component}; a checkpoint folder holds {LAYOUT}")
        _check_class(index, component, entry[1], allowed)
    for component in ("tokenizer", *CLASSES):
        if not (folder / component).is_dir():
            raise CheckpointError(f"{folder / component}: missing; a checkpoint folder holds {LAYOUT}")


def _check_class(file: Path, component: str, name: str, allowed: frozenset[str]) -> None:
    if name not in allowed:
        raise CheckpointError(f"{file}: {component} is {_shown(name)}; handscroll runs {' or '.join(sorted(allowed))}")


def _read_component(folder: Path, component: str) -> dict[str, Any]:
    file = folder / component / "config.json"
    config = read_config(file)
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{file}: this {component} is stored quantised, which is not supported; use the original")
    names = config.get("architectures") if component == "text_encoder" else [config.get("_class_name")]
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str):
            _check_class(file, component, name, CLASSES[component])
    return config


def _read_scheduler(folder: Path) -> SchedulerSpec:
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    name = config.get("_class_name") or read_config(folder / "model_index.json")["scheduler"][1]
    _check_class(file, "scheduler", str(name), CLASSES["scheduler"])
    settings = tuple((key, _freeze(value)) for key, value in config.items() if not key.startswith("_"))
    for key, value in settings:
        if isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} should be a plain value or a list, found {_shown(value)}")
    return SchedulerSpec(str(name), settings)


def _check_agreement(folder: Path, dit: TransformerSpec, vae: AutoencoderSpec, text: TextEncoderSpec) -> None:
    if dit.in_channels != vae.latent_channels:
        raise CheckpointError(
            f"{folder}: the transformer takes {dit.in_channels} channels, the autoencoder makes {vae.latent_channels}"
        )
    if dit.caption_channels != text.hidden_size:
        raise CheckpointError(
            f"{folder}: the transformer takes text of {dit.caption_channels} channels, "
            f"the text encoder makes {text.hidden_size}"
        )


def _build(cls: type[Spec], file: Path, config: dict[str, Any]) -> Spec:
    try:
        return getattr(cls, "from_config", functools.partial(_from_config, cls))(config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {_one_line(error)}") from error


# From JSON values to typed fields. Fields that a config lacks take the dataclass's default; what it has besides the
# fields (`_diffusers_version`, ...) says nothing about the shape of the model.


def _from_config(cls: type[Spec], config: dict[str, Any]) -> Spec:
    hints = typing.get_type_hints(cls)
    return cls(**{name: _typed(name, config[name], hint) for name, hint in hints.items() if name in config})


def _default(cls: type, field: str) -> Any:
    return next(each.default for each in dataclasses.fields(cls) if each.name == field)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type: int, float, bool, str, a tuple of one of them, or None where allowed."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} should be a list, found {_shown(value)}")
        return tuple(_typed(name, element, typing.get_args(hint)[0]) for element in value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{name} should be {hint.__name__}, found {_shown(value)}")
    return value


def _require_positive(spec: Any, *fields: str) -> None:
    for field in fields:
        if not getattr(spec, field) > 0:
            raise ValueError(f"{field} should be above 0, found {getattr(spec, field)}")


def _require_a_stage(field: str, values: tuple[Any, ...], stages: int) -> None:
    if len(values) != stages:
        raise ValueError(f"{field} has {len(values)} entries for {stages} stages")


def _require_known(field: str, values: tuple[str, ...], known: frozenset[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{field} {value!r} is not one of {', '.join(sorted(known))}")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(element) for element in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    return [_thaw(element) for element in value] if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# Parameters of a layer.


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _convolution(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    """`inputs` are the channels that one output channel sees: 1 in a depthwise convolution."""
    return inputs * outputs * kernel**2 + (outputs if bias else 0)


# The autoencoder that every Sana checkpoint ships.
F32C32_SANA = AutoencoderSpec(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
