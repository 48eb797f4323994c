"""The text encoder in the memory of one of its layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from handscroll.events import OnEvent, ignore
from handscroll.models.checkpoint import CheckpointSpec
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
    """A `Gemma2Model` that runs in the memory of one decoder layer, and the stream to close when it is done with.

    Its own `forward` is what runs: each layer's weights are materialized just before it is called and given back right
    after, while the next layer's are read ahead. The embedding table stays in the file, so the model takes
    `inputs_embeds`, as `encode_prompt` gives them. Values are those of the loaded model, bit for bit.

    Memory: a layer's weights in `dtype` (78 M of them for gemma-2-2b; twice that on a CUDA device), and 16 MiB where
    dtypes are converted. `on_layer` is called before each layer. Raises CheckpointError as `load_module` does, and when
    a layer cannot be read.
    """
    encoder: Any
    encoder, stream = open_module(
        spec, "text_encoder", dtype=dtype, device=device, leave={EMBEDDING_TABLE}, storage=storage, on_event=on_event
    )
    stream.make_resident(encoder, but=[encoder.layers])
    _materialize_in_turn(stream, list(encoder.layers), on_layer)
    return encoder, stream


def _materialize_in_turn(stream: WeightStream, layers: list[nn.Module], on_layer: Callable[[], None]) -> None:
    for index, layer in enumerate(layers):
        held = ExitStack()
        following = layers[index + 1 : index + 2]

        def before(layer: nn.Module, _: Any, held: ExitStack = held, following: list[nn.Module] = following) -> None:
            on_layer()
            held.enter_context(stream.materialize(layer))
            stream.prefetch(*following)

        def after(_: nn.Module, __: Any, ___: Any, held: ExitStack = held) -> None:
            held.close()

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, always_call=True)
