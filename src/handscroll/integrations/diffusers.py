"""The drop-in: diffusers' own pipelines and autoencoders, decoding and encoding by rows.

`attach` sets two instance attributes on an `AutoencoderDC`, `_decode` and `_encode`, behind its public methods:
slicing, `return_dict`, offloading hooks and callbacks work as before. `detach` deletes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from handscroll.banded.autoencoder import decode_rows, encode
from handscroll.errors import BudgetError, UsageError
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.plan.decode import decode_stages
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.inputs import Hardware
from handscroll.runtime.arithmetic import full_fp32
from handscroll.runtime.memory import trim
from handscroll.units import check_range, gibibytes, parse_bytes

_METHODS = ("_decode", "_encode")
# In somebody else's process the heap is left as it is, with holes between what is in use.
_HEAP_SHARE = 0.7


def attach(target: Any, strip_rows: int | None = None, memory: str | int | None = None) -> Any:
    """Makes a diffusers pipeline's autoencoder, or an `AutoencoderDC`, run row by row. Returns `target`.

    The results are those of the whole network up to the order of summation, in the autoencoder's dtype and on its
    device; tiling is not used while attached. strip_rows: rows of the map at the last attention to take at a time.
    memory: bytes, or text such as '1GiB', that decoding may take above weights, latent and result; the row block height
    follows from it. Attaching again changes the settings. Raises UsageError if there is no AutoencoderDC; decoding and
    encoding raise BudgetError where the memory is too little for the size.
    """
    autoencoder = _autoencoder(target)
    check_range("strip_rows", strip_rows, 1, 1_000_000)
    if strip_rows is not None and memory is not None:
        raise UsageError("strip_rows and memory exclude each other; give one of them")
    memory_bytes = parse_bytes(memory) if isinstance(memory, str) else memory
    for name, function in zip(_METHODS, (_decode, _encode), strict=True):
        autoencoder.__dict__[name] = partial(
            _computed, function, autoencoder, strip_rows=strip_rows, memory_bytes=memory_bytes
        )
    return target


def detach(target: Any) -> Any:
    """Undoes `attach`; does nothing where it was not attached. Returns `target`. Raises UsageError as `attach`."""
    autoencoder = _autoencoder(target)
    for name in _METHODS:
        autoencoder.__dict__.pop(name, None)
    return target


def _computed(function: Callable[..., Tensor], autoencoder: Any, given: Tensor, **settings: Any) -> Tensor:
    """What a function makes of its input, in fp32 that is fp32: PyTorch's convolutions on CUDA are TF32 by default."""
    with full_fp32("cuda" if torch.cuda.is_initialized() else "cpu"):
        return function(autoencoder, given, **settings)


def _autoencoder(target: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    autoencoder = getattr(target, "vae", target)
    if not isinstance(autoencoder, AutoencoderDC):
        raise UsageError(f"attach takes a pipeline with an AutoencoderDC, or one itself, not {type(target).__name__}")
    return autoencoder


def _decode(autoencoder: Any, z: Tensor, *, strip_rows: int | None, memory_bytes: int | None) -> Tensor:
    """[B, C, h, w] -> [B, 3, H, W], in place of `AutoencoderDC._decode`."""
    decoder = autoencoder.decoder
    z = _moved(decoder, z)
    batch, _, height, width = z.shape
    route = {} if memory_bytes is None else _route_within(DecoderShape, autoencoder, z, height, width, memory_bytes)
    factor = autoencoder.spatial_compression_ratio
    out = z.new_empty(batch, autoencoder.config.in_channels, height * factor, width * factor)
    row = 0
    for row_block in decode_rows(decoder, z, strip_rows, on_sweep=lambda done, of: trim(), **route):
        out[:, :, row : row + row_block.shape[2]] = row_block
        row += row_block.shape[2]
    return out


def _encode(autoencoder: Any, x: Tensor, *, strip_rows: int | None, memory_bytes: int | None) -> Tensor:
    """[B, 3, H, W] -> [B, C, h, w], in place of `AutoencoderDC._encode`."""
    encoder = autoencoder.encoder
    x = _moved(encoder, x)
    route: dict[str, Any] = {}
    if memory_bytes is not None:
        height, width = (-(-side // autoencoder.spatial_compression_ratio) for side in x.shape[2:])
        route = _route_within(EncoderShape, autoencoder, x, height, width, memory_bytes)
    return encode(encoder, x, strip_rows, on_sweep=lambda done, of: trim(), **route)


def _moved(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The input in the module's dtype and on its device, as a pipeline whose parts sit apart hands it over."""
    parameter = next(module.parameters())
    if parameter.is_meta:
        raise UsageError(
            "the autoencoder's weights are offloaded layer by layer; use enable_model_cpu_offload() instead of "
            "enable_sequential_cpu_offload()"
        )
    return x.to(parameter.device, parameter.dtype)


def _route_within(
    half: type[DecoderShape], autoencoder: Any, given: Tensor, rows: int, columns: int, memory_bytes: int
) -> dict[str, Any]:
    """Row block heights and starts of the decoder or encoder whose planned peak stays within `memory_bytes`.

    given: the input, [B, ...]; the latent is `rows` x `columns`. Raises BudgetError with the least that would do.
    """
    batch, element_bytes = len(given), given.element_size()
    shape = half(AutoencoderSpec.from_config(dict(autoencoder.config)), rows, columns * batch, element_bytes, batch)
    precision = {2: "bf16", 4: "fp32"}.get(element_bytes, "fp32")
    limit_bytes = int(memory_bytes * _HEAP_SHARE)
    candidates = list(decode_stages(shape, precision, Hardware(str(given.device), scratch_bytes=0), limit_bytes))
    fitting = [candidate for candidate in candidates if candidate.peak_bytes <= limit_bytes]
    if not fitting:
        least_bytes = int(min(candidate.peak_bytes for candidate in candidates) / _HEAP_SHARE) + 1
        factor = autoencoder.spatial_compression_ratio
        raise BudgetError(
            f"a picture of {columns * factor}x{rows * factor} needs at least {gibibytes(least_bytes)} above weights, "
            f"input and result; {gibibytes(memory_bytes)} were allowed",
            least_bytes,
        )
    best = min(fitting, key=lambda candidate: candidate.seconds)
    return {"heights": best.strip_rows, "starts": best.starts}
