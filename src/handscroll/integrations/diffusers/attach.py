"""`attach` and `detach`: what they take, and what they set."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch import nn

from handscroll.errors import UsageError
from handscroll.events import OnEvent, ignore
from handscroll.integrations.diffusers.attachment import METHODS, Attachment, Settings
from handscroll.integrations.diffusers.pipelines import (
    bar_of,
    check_before_steps,
    halves_of,
    is_pipeline,
    stop_checking,
)
from handscroll.integrations.diffusers.wrappers import unwrapped
from handscroll.units import check_range, parse_bytes, shown

_MOST_STRIP_ROWS = 1_000_000
_MOST_BYTES = 2**60


def attach(
    target: Any,
    strip_rows: int | None = None,
    memory: str | int | None = None,
    *,
    group: Any = None,
    on_event: OnEvent = ignore,
) -> Any:
    """Makes a diffusers pipeline's autoencoder, or an `AutoencoderDC`, run row by row. Returns `target`.

    The results are those of the whole network up to the order of summation, in the autoencoder's dtype and on its
    device; tiling is not used while attached. Where rows cannot give that (gradients are wanted, autocast is on, a
    layer was replaced or has a hook), the whole module is run, and a line of the logger `handscroll` says so once.
    Weights that diffusers or accelerate offload or cast are moved a layer at a time.

    strip_rows: rows of the map at the last attention to take at a time. memory: bytes, or text such as '1GiB', that
    decoding or encoding may take above weights, input and result: of the process's resident memory on a CPU, of what
    PyTorch's allocator reserves on a CUDA device. The row block heights follow from it. on_event: hears of each sweep
    that is done, as `Progress("decode" or "encode", done, of)`; a pipeline also shows its own progress bar.
    group: a process group of torch.distributed, or True for all ranks, as under torchrun: each rank makes a band of
    the rows, and every one gets the whole result, to the bits of one. All must decode and encode the same inputs.
    Attaching again changes the settings. A pipeline that is made of another's parts (`from_pipe`) is to be attached
    itself, or its sizes are looked at only when it decodes.

    Raises UsageError if there is no AutoencoderDC, or for settings that cannot be meant or kept. Where the memory is
    too little for a size, BudgetError: by a pipeline before its first step, else by decoding or encoding.
    """
    settings = replace(_settings(strip_rows, memory, on_event), group=_group(group))
    if settings.group is not None and memory is not None:
        raise UsageError("memory is planned for one rank alone; leave memory or group out")
    autoencoder = _autoencoder(target)
    _check_methods(autoencoder)
    pipeline = target if is_pipeline(target) else None
    attachment = Attachment(autoencoder, settings, None if pipeline is None else bar_of(pipeline))
    if pipeline is None:
        attachment.check_memory()
    else:
        attachment.check_memory(halves_of(pipeline))
        attachment.check_any_size()
    for half, name in METHODS.items():
        autoencoder.__dict__[name] = attachment.decode if half == "decoder" else attachment.encode
    if pipeline is not None:
        check_before_steps(pipeline)
    return target


def detach(target: Any) -> Any:
    """Undoes `attach`; does nothing where it was not attached. Returns `target`. Raises UsageError as `attach`."""
    autoencoder = _autoencoder(target)
    for name in METHODS.values():
        autoencoder.__dict__.pop(name, None)
    if is_pipeline(target):
        stop_checking(target)
    return target


def _settings(strip_rows: int | None, memory: str | int | None, on_event: OnEvent) -> Settings:
    if strip_rows is not None and memory is not None:
        raise UsageError("strip_rows and memory exclude each other; give one of them")
    if strip_rows is not None:
        strip_rows = _whole_number("strip_rows", strip_rows, "a number of rows such as 4")
        check_range("strip_rows", strip_rows, 1, _MOST_STRIP_ROWS)
    if not callable(on_event):
        raise UsageError(f"on_event {shown(on_event)} cannot be called; give a function of one event")
    if memory is None:
        return Settings(strip_rows, None, on_event)
    given = parse_bytes(memory) if isinstance(memory, str) else memory
    memory_bytes = _whole_number("memory", given, "bytes, or text such as '1GiB'")
    if not 1 <= memory_bytes <= _MOST_BYTES:
        raise UsageError(
            f"memory {shown(memory)} is no amount that a machine can allow; give bytes, or text such as '1GiB'"
        )
    return Settings(None, memory_bytes, on_event)


def _group(group: Any) -> Any:
    """The process group that is meant, None for a single rank. Raises UsageError."""
    import torch.distributed as dist

    if group is None or group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("group: no ranks are there; start the script with torchrun and call init_process_group first")
    found = dist.group.WORLD if group is True else group
    if not isinstance(found, dist.ProcessGroup):
        raise UsageError(f"group {shown(group)} is no process group; give True for all ranks, or one of new_group")
    return found if dist.get_world_size(found) > 1 else None


def _whole_number(name: str, value: object, meant: str) -> int:
    """An int of any library, but no bool. Raises UsageError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # whatever another library's array or tensor raises
        raise UsageError(f"{name} {shown(value)} is no whole number; give {meant}") from None


def _autoencoder(target: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    found = unwrapped(target if isinstance(target, nn.Module) else getattr(target, "vae", target))
    if not isinstance(found, AutoencoderDC):
        raise UsageError(f"attach takes a pipeline with an AutoencoderDC, or one itself, not {_kind(target, found)}")
    return found


def _kind(target: Any, found: Any) -> str:
    name = type(target).__name__
    if found is None and target is not None:
        return f"a {name} without an autoencoder"
    return name if found is target else f"a {name} with a {type(found).__name__}"


def _check_methods(autoencoder: Any) -> None:
    """Raises UsageError for an autoencoder whose ways of decoding and encoding are not diffusers' own."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    for name in METHODS.values():
        own = vars(autoencoder).get(name)
        replaced = own is not None and not isinstance(getattr(own, "__self__", None), Attachment)
        if replaced or getattr(type(autoencoder), name) is not getattr(AutoencoderDC, name):
            raise UsageError(f"this {type(autoencoder).__name__} has a {name} of its own, which attach would replace")
