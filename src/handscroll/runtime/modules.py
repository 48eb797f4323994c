"""Open a checkpoint, and build its modules from it: diffusers' and transformers' own classes, filled strictly.

A module is built on the meta device from the checkpoint's config, its tensors are compared with the safetensors
headers by name and shape, and only then are weights read, by `weights.py`. Nothing is unpickled, nothing is
downloaded here but through `open_checkpoint`, and no diffusers pipeline is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from handscroll.errors import CheckpointError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.config import read_config
from handscroll.units import first_line
from handscroll.weights.dtypes import DTYPES
from handscroll.weights.file_state import promises_of
from handscroll.weights.files import read_rows
from handscroll.weights.folder import WeightFiles
from handscroll.weights.header import TensorEntry
from handscroll.weights.stream import WeightStream

Component = Literal["transformer", "vae", "text_encoder"]
Half = Literal["encoder", "decoder"]
SCHEDULERS = {
    "DPMSolverMultistepScheduler": "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "FlowMatchEulerDiscreteScheduler": "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "SCMScheduler": "diffusers.schedulers.scheduling_scm",
}


def load_module(
    spec: CheckpointSpec,
    component: Component,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    part: Half | None = None,
    leave: Collection[str] = (),
) -> nn.Module:
    """Build `AutoencoderDC`, `SanaTransformer2DModel` or `Gemma2Model` and fill it from the checkpoint.

    The module comes back in eval mode, without gradients, floating-point tensors in `dtype` on `device`. With `part`,
    only that half of the autoencoder is read, and the other attribute is None. Tensors named in `leave` are not read
    and stay on the meta device: `leave={"embed_tokens.weight"}` saves the largest table of a text encoder, of which
    `load_rows` gives single rows.

    Memory: the module and 16 MiB, never two copies of a tensor. On the CPU, tensors that the file holds in `dtype`
    already are not copied at all: they are the file's pages, mapped privately, which enter memory when first touched
    (and count as resident then); writing to one changes this process's copy and not the file.

    Raises CheckpointError, naming file and tensor, for a tensor that is missing, unexpected or of another shape.
    """
    module, stream = open_module(spec, component, dtype=dtype, device=device, part=part, leave=leave)
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
) -> tuple[nn.Module, WeightStream]:
    """What `load_module` builds, before its weights are read, and the stream that fills it part by part.

    Every tensor has been compared with the files by name and shape, all of them are on the meta device, and
    `stream.make_resident` or `stream.materialize` makes them real. Only buffers that no file stores are there already,
    but for those named in `leave`, which are not computed either: `leave={"patch_embed.pos_embed"}` saves a
    transformer's position embedding of [1, sample_size**2, width] fp32 (and fp64 on the way). No stream fills what is
    named in `leave`.

    Raises CheckpointError as `load_module` does.
    """
    device = torch.device(device)
    with torch.device("meta"):
        module = _build(spec, component)
    if part is not None:
        if component != "vae":
            raise ValueError(f"part {part!r} is for the autoencoder, not the {component}")
        setattr(module, "encoder" if part == "decoder" else "decoder", None)

    entries = _match(spec, component, module, part)
    for parameter in module.parameters():  # so that a module tells its dtype before its weights are there
        parameter.data = parameter.data.to(dtype)
    _recompute_buffers(module, dtype, device, leave)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in entries and name not in leave:
            raise CheckpointError(f"{spec.folder / component}: the tensor {name} is neither stored nor computable")
    module.eval().requires_grad_(False)
    entries = {name: entry for name, entry in entries.items() if name not in leave}
    states = spec.weights_of(component).state_of
    return module, WeightStream(module, entries, dtype, device, states=states)


def load_rows(spec: CheckpointSpec, component: Component, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows of one stored matrix [N, C]: [*rows.shape, C] in its published dtype, and nothing else is read.

    `name` is the module's name for it, such as `embed_tokens.weight`; `rows` are integers. Raises CheckpointError if
    the matrix or a row is not there.
    """
    weights = spec.weights_of(component)
    for entry in weights.tensors:
        if _module_name(component, entry.name) == name:
            return read_rows(entry, rows, promises_of([entry], weights.state_of))
    raise CheckpointError(f"{spec.folder / component}: the tensor {name} is missing")


def load_tokenizer(spec: CheckpointSpec) -> Any:
    """The checkpoint's tokenizer, padding on the right; never runs code from the folder. Raises CheckpointError."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    folder = spec.folder / "tokenizer"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{folder}: holds no tokenizer; expected tokenizer.json or tokenizer.model")
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, padding_side="right"
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise CheckpointError(f"{folder}: cannot be read as a tokenizer: {first_line(error)}") from error


def load_scheduler(spec: CheckpointSpec) -> Any:
    """The checkpoint's diffusers scheduler, of a class that handscroll knows. Raises CheckpointError."""
    file = spec.folder / "scheduler" / "scheduler_config.json"
    name = spec.scheduler.class_name
    if name not in SCHEDULERS:
        raise CheckpointError(f"{file}: scheduler is a {name}; handscroll runs {' or '.join(SCHEDULERS)}")
    try:
        return getattr(importlib.import_module(SCHEDULERS[name]), name).from_config(spec.scheduler.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: {first_line(error)}") from error


# Building: the classes' own submodules, so that no pipeline is imported.
def _build(spec: CheckpointSpec, component: Component) -> nn.Module:
    file = spec.folder / component / "config.json"
    config = read_config(file)
    try:
        match component:
            case "transformer":
                from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

                return SanaTransformer2DModel.from_config(config)
            case "vae":
                from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

                return AutoencoderDC.from_config(config)
            case "text_encoder":
                from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
                from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

                return Gemma2Model(Gemma2Config.from_dict(config))
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{file}: describes no {component}: {first_line(error)}") from error
    raise ValueError(f"no component {component!r}")


# Matching: every tensor of the module against the headers, before a weight is read.
def _match(spec: CheckpointSpec, component: Component, module: nn.Module, part: str | None) -> dict[str, TensorEntry]:
    """The entry for each tensor of the module's state dict, in file order."""
    weights = spec.weights_of(component)
    where = _where(spec, component, weights)
    wanted = module.state_dict()
    computed = {name for name, _ in module.named_buffers()} - wanted.keys()
    other_half = {"decoder": "encoder.", "encoder": "decoder."}.get(part or "")

    found: dict[str, TensorEntry] = {}
    for entry in weights.tensors:
        name = _module_name(component, entry.name)
        if name is None or name in computed or (other_half and name.startswith(other_half)):
            continue
        if name not in wanted:
            raise CheckpointError(f"{entry.file}: unexpected tensor {entry.name}; the config has no place for it")
        if name in found:
            raise CheckpointError(f"{entry.file}: the tensor {name} is there twice, once as {found[name].name}")
        shape = tuple(wanted[name].shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: the tensor {entry.name} has shape {_shape(entry.shape)}, "
                f"the config asks for {_shape(shape)}"
            )
        if entry.dtype not in DTYPES or DTYPES[entry.dtype].is_floating_point != wanted[name].is_floating_point():
            raise CheckpointError(
                f"{entry.file}: the tensor {entry.name} is stored as {entry.dtype}; quantised files are not supported"
            )
        found[name] = entry
    if missing := [name for name in wanted if name not in found]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: the tensor {missing[0]}{more} is missing")
    return found


def _module_name(component: Component, stored: str) -> str | None:
    """A stored name as the module's; None for what a text encoder's language-model head adds to it."""
    if component != "text_encoder":
        return stored
    # Saved as Gemma2ForCausalLM: its Gemma2Model lies under `model.`, and text features need no head.
    return None if stored == "lm_head.weight" else stored.removeprefix("model.")


def _where(spec: CheckpointSpec, component: Component, weights: WeightFiles) -> Path:
    return weights.files[0] if len(weights.files) == 1 else spec.folder / component


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


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
