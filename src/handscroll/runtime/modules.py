"""Open a checkpoint, and build its modules from it: diffusers' and transformers' own classes, filled strictly.

A module is built on the meta device from the checkpoint's config, its tensors are compared with the safetensors
headers by name and shape, and only then are weights read, by `weights.py`. Nothing is unpickled, nothing is
downloaded here but through `open_checkpoint`, and no diffusers pipeline is imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn

from handscroll.errors import CheckpointError, is_out_of_memory
from handscroll.events import OnEvent, ignore
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.config import read_config
from handscroll.models.quantisation import form_of, is_native, is_quantisable
from handscroll.runtime.matching import check_amount, match_tensors, named
from handscroll.runtime.tokenizer import read_tokenizer
from handscroll.units import one_line
from handscroll.weights.file_state import promises_of
from handscroll.weights.files import read_rows
from handscroll.weights.json_text import MAX_MESSAGE
from handscroll.weights.sources import Source
from handscroll.weights.stream import WeightStream

Component = Literal["transformer", "vae", "text_encoder"]
Half = Literal["encoder", "decoder"]
SCHEDULERS = {
    "DPMSolverMultistepScheduler": "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "FlowMatchEulerDiscreteScheduler": "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "SCMScheduler": "diffusers.schedulers.scheduling_scm",
}

# Of a text encoder's config, as earlier releases of transformers wrote them.
OLDER_TEXT_SETTINGS = ("rope_theta", "rope_scaling")


def load_module(
    spec: CheckpointSpec,
    component: Component,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    part: Half | None = None,
    leave: Collection[str] = (),
    on_event: OnEvent = ignore,
) -> nn.Module:
    """Build `AutoencoderDC`, `SanaTransformer2DModel` or `Gemma2Model` and fill it from the checkpoint.

    The module comes back in eval mode, without gradients, floating-point tensors in `dtype` on `device`. With `part`,
    only that half of the autoencoder is read, and the other attribute is None. Tensors named in `leave` are not read
    and stay on the meta device: `leave={"embed_tokens.weight"}` saves the largest table of a text encoder, of which
    `load_rows` gives single rows.

    Memory: the module and 16 MiB, never two copies of a tensor. On the CPU, tensors that the file holds in `dtype`
    already are not copied at all: they are the file's pages, mapped privately, which enter memory when first touched
    (and count as resident then); writing to one changes this process's copy and not the file.

    Tensors that the module has no place for are not read, and `on_event` is told of them once. Raises CheckpointError,
    naming file and tensor, for a tensor that is missing or of another shape.
    """
    module, stream = open_module(
        spec, component, dtype=dtype, device=device, part=part, leave=leave, wide=True, on_event=on_event
    )
    stream.make_resident(module)
    return module


def open_module(
    spec: CheckpointSpec,
    component: Component,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    part: Half | None = None,
    leave: Collection[str] = (),
    storage: str = "",
    wide: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[nn.Module, WeightStream]:
    """What `load_module` builds, before its weights are read, and the stream that fills it part by part.

    Every tensor has been compared with the files by name and shape, all of them are on the meta device, and
    `stream.make_resident` or `stream.materialize` makes them real. Only buffers that no file stores are there already,
    but for those named in `leave`, which are not computed either: `leave={"patch_embed.pos_embed"}` saves a
    transformer's position embedding of [1, sample_size**2, width] fp32 (and fp64 on the way). No stream fills what is
    named in `leave`. storage: what matrices are kept in (quantisation.STORAGES), quantised while they are read where
    they are not stored so; a transformer's are computed with as they are kept where that can be. wide: what is stored
    in 8 or 4 bits is kept plainly, as other tools want it.

    Raises CheckpointError as `load_module` does.
    """
    device = torch.device(device)
    check_amount(spec, component, part)
    with torch.device("meta"):
        module = _build(spec, component)
    if part is not None:
        if component != "vae":
            raise ValueError(f"part {part!r} is for the autoencoder, not the {component}")
        setattr(module, "encoder" if part == "decoder" else "decoder", None)

    sources = match_tensors(spec, component, module, part, on_event)
    for parameter in module.parameters():  # so that a module tells its dtype before its weights are there
        parameter.data = parameter.data.to(dtype)
    _recompute_buffers(module, dtype, device, leave)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in sources and name not in leave:
            raise CheckpointError(f"{spec.folder / component}: the tensor {name} is neither stored nor computable")
    module.eval().requires_grad_(False)
    # What is stored so already is kept as it is, those of its matrices among it that were left in 16 bits.
    quantising = "" if spec.quantisation_of(component) else storage
    sources = {n: kept_in(quantising, component, n, source) for n, source in sources.items() if n not in leave}
    if wide:
        sources = {name: dataclasses.replace(source, form=None) for name, source in sources.items()}
    states = spec.weights_of(component).state_of
    native = {storage} if is_native(component, storage) else set()
    return module, WeightStream(module, sources, dtype, device, states=states, native=native)


def kept_in(storage: str, component: Component, name: str, source: Source) -> Source:
    """A parameter as it is kept in memory: as it is stored, or quantised while it is read.

    What others quantised beyond the layers' matrices is kept plainly.
    """
    if not source.is_plain:
        return source if is_quantisable(component, name) else dataclasses.replace(source, form=None)
    return dataclasses.replace(source, form=form_of(component, storage, name, source.shape))


def load_rows(spec: CheckpointSpec, component: Component, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows of one stored matrix [N, C]: [*rows.shape, C] in its published dtype, and nothing else is read.

    `name` is the module's name for it, such as `embed_tokens.weight`; `rows` are integers. Raises CheckpointError if
    the matrix or a row is not there.
    """
    weights = spec.weights_of(component)
    for module_name, entry in named(component, weights):
        if module_name == name:
            if entry.dtype not in ("fp32", "bf16", "fp16") or len(entry.shape) != 2:
                raise CheckpointError(
                    f"{entry.file}: the tensor {one_line(entry.name, MAX_MESSAGE)} is stored in {entry.dtype}, and its "
                    "rows are read one by one, in a floating-point type alone; leave it out when quantising"
                )
            return read_rows(entry, rows, promises_of([entry], weights.state_of))
    raise CheckpointError(f"{spec.folder / component}: the tensor {name} is missing")


def load_tokenizer(spec: CheckpointSpec) -> Any:
    """The checkpoint's tokenizer, padding on the right; never runs code from the folder. Raises CheckpointError."""
    return read_tokenizer(spec)


def load_scheduler(spec: CheckpointSpec) -> Any:
    """The checkpoint's diffusers scheduler, of a class that handscroll knows. Raises CheckpointError."""
    file = spec.folder / "scheduler" / "scheduler_config.json"
    name = spec.scheduler.class_name
    if name not in SCHEDULERS:
        raise CheckpointError(f"{file}: scheduler is a {name}; handscroll runs {' or '.join(SCHEDULERS)}")
    try:
        cls = getattr(importlib.import_module(SCHEDULERS[name]), name)
        return cls.from_config(_known(cls, spec.scheduler.config))
    except Exception as error:  # settings of other types than the class takes fail anywhere in it
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{file}: no settings of a {name}: {one_line(error, MAX_MESSAGE)}") from error


# Building: the classes' own submodules, so that no pipeline is imported.
def _build(spec: CheckpointSpec, component: Component) -> nn.Module:
    file = spec.folder / component / "config.json"
    config = read_config(file)
    try:
        match component:
            case "transformer":
                from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

                return SanaTransformer2DModel.from_config(_known(SanaTransformer2DModel, config))
            case "vae":
                from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

                return AutoencoderDC.from_config(_known(AutoencoderDC, config))
            case "text_encoder":
                from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
                from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

                # What is for all models (labels, ...) is left out: it says nothing here, and could be of any size.
                known = {*Gemma2Config.__annotations__, *OLDER_TEXT_SETTINGS}
                settings = {name: value for name, value in config.items() if name in known}
                return Gemma2Model(Gemma2Config.from_dict(settings))
    except Exception as error:  # what a config says of other types than its class takes fails anywhere in it
        if is_out_of_memory(error):
            raise
        said = one_line(error, MAX_MESSAGE)
        raise CheckpointError(f"{file}: describes no {component} that can be made: {said}") from error
    raise ValueError(f"no component {component!r}")


def _known(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What a class of diffusers takes of a config; of the rest it would print every value."""
    taken = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in config.items() if name in taken}


# What no file stores.


def _recompute_buffers(module: nn.Module, dtype: torch.dtype, device: torch.device, leave: Collection[str]) -> None:
    """Fill the buffers that no file stores, as the modules' own constructors do on the CPU."""
    for path, each in module.named_modules():
        lacking = [name for name, buffer in each.named_buffers(recurse=False) if buffer.is_meta]
        lacking = [name for name in lacking if f"{path}.{name}".removeprefix(".") not in leave]
        if not lacking:
            continue
        for name, tensor in _computed(each, dtype).items():
            if name in lacking:
                setattr(each, name, tensor.to(device))


def _computed(module: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    match type(module).__name__:
        case "PatchEmbed":
            from diffusers.models.embeddings import get_2d_sincos_pos_embed

            table = get_2d_sincos_pos_embed(
                module.proj.out_channels,
                module.height,
                base_size=module.base_size,
                interpolation_scale=module.interpolation_scale,
                output_type="pt",
            )
            return {"pos_embed": table.float().unsqueeze(0)}  # [1, tokens, width] fp32 whatever the weights are
        case "Gemma2RotaryEmbedding":
            return dict(type(module)(module.config).named_buffers())
        case "Gemma2TextScaledWordEmbedding":
            return {"embed_scale": torch.tensor(module.scalar_embed_scale, dtype=dtype)}
    return {}
