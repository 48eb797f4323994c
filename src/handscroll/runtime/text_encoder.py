"""The text encoder in the memory of a unit of a layer (its attention, a matrix), on a CUDA device of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from handscroll.events import OnEvent, ignore
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.text_encoder import LAYER_UNITS
from handscroll.runtime.lending import lend
from handscroll.runtime.modules import open_module
from handscroll.weights.stream import WeightStream

EMBEDDING_TABLE = "embed_tokens.weight"


def open_text_encoder(
    spec: CheckpointSpec,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    storage: str = "",
    on_event: OnEvent = ignore,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, WeightStream]:
    """A `Gemma2Model` that runs in the memory of little of it, and the stream to close when it is done with.

    Its own `forward` is what runs: the weights of each unit of a layer (models.text_encoder.LAYER_UNITS), on a CUDA
    device of each layer, are materialized just before it is called and given back right after, while those of the next
    layer are read ahead. The embedding table stays in the file, so the model takes `inputs_embeds`, as `encode_prompt`
    gives them. Values are those of the loaded model, bit for bit.

    Memory: a unit in `dtype` (21 M numbers for gemma-2-2b; on a CUDA device two layers of 78 M), and 16 MiB where
    dtypes are converted. `on_layer` is called before each layer. Raises CheckpointError as `load_module` does, and when
    a layer cannot be read.
    """
    encoder: Any
    encoder, stream = open_module(
        spec, "text_encoder", dtype=dtype, device=device, leave={EMBEDDING_TABLE}, storage=storage, on_event=on_event
    )
    # On a device many small copies take longer than a few large ones.
    on_cuda = torch.device(device).type == "cuda"
    layers = list(encoder.layers)
    units = [[layer] if on_cuda else [layer.get_submodule(name) for name in LAYER_UNITS] for layer in layers]
    stream.make_resident(encoder, but=itertools.chain(*units))
    for layer, its, following in zip(layers, units, [*units[1:], []], strict=True):
        layer.register_forward_pre_hook(lambda *_: on_layer())
        for unit in its:
            lend(unit, stream, following if unit is its[0] else [])
    return encoder, stream
