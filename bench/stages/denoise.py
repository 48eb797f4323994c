"""One step of the transformer under guidance: two branches, or one where guidance is an input.

whole       diffusers' SanaTransformer2DModel on both branches as one batch, prompts padded to 300 tokens, as its
            pipelines call it; compiled: the same under torch.compile
rows        handscroll, on the same module: in row blocks, the branches by turns, no padding; untuned:
            without its Triton kernels
int8, int8-weights, int4, fp8
            the same with matrices kept so: multiplied in 8 bits, or made wide once for each layer

The weights are random and all in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import on_meta
from handscroll.banded.transformer import Branch, predict
from handscroll.models.quantisation import NATIVE, STORAGES, form_of
from handscroll.models.transformer import TransformerSpec
from handscroll.weights.forms import Form, packed_bytes
from handscroll.weights.low_rank import quantise
from handscroll.weights.quantised import views, widen
from make_checkpoint import Noise, empty_module, fill, shapes
from stages import Ready, Size, Stage, in_dtype

PX_PER_LATENT = 32
PADDED_TOKENS = 300
PROMPT_TOKENS, NEGATIVE_TOKENS = 100, 1
TIMESTEP, GUIDANCE = 600.0, 4.5
WARM_UP_SIZE = 64, 64


class Denoise(Stage):
    modes = ("whole", "compiled", "rows", "untuned", *STORAGES)
    limit = "matrix"

    @property
    def spec(self) -> TransformerSpec:
        spec, _, _ = shapes(self.settings.model, miniature=self.settings.miniature)
        return spec if self.settings.layers is None else replace(spec, num_layers=self.settings.layers)

    def model(self) -> Any:
        with torch.device("meta"):
            model = empty_module(self.spec).eval().requires_grad_(False)
        fill(model, self.settings.dtype, self.settings.device, Noise(0))
        # The only buffer is computed, quickly by a module of a single layer.
        positions = empty_module(replace(self.spec, num_layers=1)).patch_embed.pos_embed
        if positions is not None:
            model.patch_embed.pos_embed = positions.to(self.settings.device)
        return model

    def lengths(self) -> list[int]:
        """Tokens of each branch's prompt."""
        return [PROMPT_TOKENS] if self.spec.guidance_embeds else [PROMPT_TOKENS, NEGATIVE_TOKENS]

    def batch(self, size: Size, device: str) -> dict[str, Tensor | None]:
        """What diffusers' module is called with."""
        spec, dtype, count = self.spec, self.settings.dtype, len(self.lengths())
        generator = None if device == "meta" else torch.Generator().manual_seed(1)

        def noise(*shape: int) -> Tensor:
            if generator is None:
                return torch.empty(*shape, dtype=dtype, device=device)
            return torch.randn(*shape, generator=generator).to(device, dtype)

        latent = noise(1, spec.in_channels, size[1] // PX_PER_LATENT, size[0] // PX_PER_LATENT)
        mask = torch.arange(PADDED_TOKENS, device=device) < torch.tensor(self.lengths(), device=device)[:, None]
        return {
            "hidden_states": latent.repeat(count, 1, 1, 1),
            "encoder_hidden_states": noise(count, PADDED_TOKENS, spec.caption_channels),
            "encoder_attention_mask": mask.to(dtype),
            "timestep": torch.full((count,), TIMESTEP, device=device),
            "guidance": torch.full((count,), GUIDANCE, device=device).to(dtype) if spec.guidance_embeds else None,
        }

    def branches(self, batch: dict[str, Any]) -> list[Branch]:
        """The same for handscroll."""
        return [
            Branch(
                batch["hidden_states"][index : index + 1],
                batch["encoder_hidden_states"][index : index + 1, :length],
                None,
                batch["timestep"][index : index + 1],
                batch["guidance"],
            )
            for index, length in enumerate(self.lengths())
        ]

    def ready(self, mode: str, size: Size, compared: bool, scratch: Path) -> Ready:
        model = self.model()
        given, small = (self.batch(each, self.settings.device) for each in (size, WARM_UP_SIZE))
        if mode in STORAGES:
            layer = kept_in(model, mode)
            return Ready(
                lambda: torch.cat(self.by_rows(model, given, layer)),
                lambda: self.by_rows(model, small, layer),
            )
        if mode == "rows":
            return Ready(
                lambda: torch.cat(self.by_rows(model, given)),
                lambda: self.by_rows(model, small),
            )
        if mode == "compiled":
            model.compile(dynamic=False)
            return Ready(lambda: model(**given, return_dict=False)[0], lambda: None)
        return Ready(lambda: model(**given, return_dict=False)[0], lambda: model(**small, return_dict=False))

    def by_rows(self, model: Any, batch: dict[str, Any], layer: Any = None) -> list[Tensor]:
        """As a plan without a budget runs it. layer: materializes each layer, None where all are there."""
        lay_out = self.settings.device == "cpu"
        return predict(model, self.branches(batch), layer=layer, band_rows=self.settings.strip_rows, lay_out=lay_out)

    def on_meta(self, size: Size) -> tuple[Any, dict[str, Tensor | None]]:
        with torch.device("meta"):
            return in_dtype(empty_module(self.spec), self.settings.dtype), self.batch(size, "meta")

    def flop(self, size: Size) -> int:
        model, batch = self.on_meta(size)
        return on_meta.flop_of(lambda: model(**batch, return_dict=False))

    def needed_bytes(self, mode: str, size: Size) -> int | None:
        weights_bytes = self.spec.parameter_count * self.settings.dtype.itemsize
        if mode == "rows" or mode in STORAGES:
            return weights_bytes
        model, batch = self.on_meta(size)
        return weights_bytes + on_meta.peak_bytes_of(lambda: model(**batch, return_dict=False))


def kept_in(model: Any, storage: str) -> Any:
    """Keeps the blocks' matrices in a storage, and gives what materializes a block."""
    kept: list[list[tuple[Any, Form, Tensor]]] = []
    for number, block in enumerate(model.transformer_blocks):
        kept.append([])
        for name, module in block.named_modules():
            weight: Any = getattr(module, "weight", None)
            shape = () if weight is None else tuple(weight.shape)
            form = form_of("transformer", storage, f"transformer_blocks.{number}.{name}.weight", shape)
            if form is not None:
                packed = torch.empty(packed_bytes(form, shape), dtype=torch.uint8)
                quantise(form, weight.detach().cpu(), packed)
                kept[-1].append((module, form, packed.to(weight.device)))
                if storage in NATIVE:
                    numbers, module.weight_scale = views(form, shape, kept[-1][-1][2]).values()
                    module.weight = torch.nn.Parameter(numbers, requires_grad=False)
                else:
                    module.weight = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    buffers: dict[Any, Tensor] = {}

    @contextmanager
    def layer(index: int) -> Iterator[Any]:
        if storage not in NATIVE:
            for place, (module, form, packed) in enumerate(kept[index]):
                shape = tuple(module.weight.shape)
                if place not in buffers:
                    buffers[place] = torch.empty(shape, dtype=model.dtype, device=packed.device)
                widen(form, views(form, shape, packed), buffers[place])
                module.weight = torch.nn.Parameter(buffers[place], requires_grad=False)
        yield model.transformer_blocks[index]

    return layer


STAGE = Denoise
