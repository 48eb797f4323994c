"""By how much one forward of an official model's true shape errs in each precision, and by which of its matrices.

    python bench/quantised_errors.py --models sana-1.6b-4k,sana-1.5-4.8b --px 384

Weights are random, in bf16: once all channels alike, and once with heavy-tailed ones, as training leaves them (each
channel that is read times exp(n / 2), of normal n, and one in 500 times 8 more). All variants pass through a layer
before the next one is made, so that memory is a layer's. A row is `|quantised - plain| / |plain|` of the prediction,
with all matrices quantised and with those of one kind alone. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from handscroll.banded.layers import LayerPass
from handscroll.banded.rows import RowMap
from handscroll.banded.transformer import Branch
from handscroll.banded.transformer.block import BlockPass
from handscroll.banded.transformer.branch import BranchState
from handscroll.banded.transformer.embed import embedded, projected
from handscroll.models.quantisation import NATIVE, form_of
from handscroll.weights.forms import SCALE, packed_bytes
from handscroll.weights.low_rank import quantise
from handscroll.weights.quantised import views, widen
from make_checkpoint import TRANSFORMERS, Noise, empty_module, fill

KINDS = {
    "all": ("",),
    "self-attention": ("attn1.",),
    "attention to the text": ("attn2.",),
    "Mix-FFN, first": ("conv_inverted",),
    "Mix-FFN, last": ("conv_point",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sana-1.6b-4k,sana-1.5-4.8b")
    parser.add_argument("--px", type=int, default=384)
    parser.add_argument("--precisions", default="int8-weights,int8,int4")
    parser.add_argument("--layers", type=int, help="of the model's (default all)")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for model in options.models.split(","):
        for weights in ("random", "heavy-tailed"):
            begun = time.perf_counter()
            errors, of_matrices = measured(model, weights == "heavy-tailed", options)
            found.append({"model": model, "weights": weights, "errors": errors, "matrices": of_matrices})
            print(f"{model}, {weights} weights, {time.perf_counter() - begun:.0f} s", flush=True)
            for precision, by_kind in errors.items():
                print(f"  {precision:13}" + "".join(f"  {kind} {error:.4f}" for kind, error in by_kind.items()))
            print("  of matrices: ", of_matrices, flush=True)
    print(json.dumps(found))


@torch.inference_mode()
def measured(model: str, heavy: bool, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """Errors by precision and kind of matrices, and the mean errors of the matrices themselves."""
    spec = TRANSFORMERS[model]
    layers = options.layers or spec.num_layers
    with torch.device("meta"):
        transformer = empty_module(replace(spec, num_layers=1))
    noise = Noise(0)
    fill(transformer, torch.float32, "cpu", noise)
    transformer.eval().requires_grad_(False)
    block = transformer.transformer_blocks[0]
    variants = [("", "all"), *((each, kind) for each in options.precisions.split(",") for kind in KINDS)]
    side = options.px // 32
    generator = torch.Generator().manual_seed(1)
    branch = Branch(
        torch.randn(1, spec.in_channels, side, side, generator=generator),
        torch.randn(1, 64, spec.caption_channels, generator=generator),
        None,
        torch.tensor([500.0]),
    )
    states = [BranchState.of(transformer, branch, None) for _ in variants]
    for state in states:
        rows = range(state.rows)
        state.refill(RowMap, embedded(transformer.patch_embed, branch.latent, rows, state.band_rows, LayerPass(False)))
    matrix_errors: dict[str, list[float]] = {}
    for _ in range(layers):
        restore(block)
        fill(block, torch.float32, "cpu", noise)
        plain = dict(matrices(block, heavy, generator))
        made = {
            precision: {name: kept(precision, name, weight) for name, weight in plain.items()}
            for precision in options.precisions.split(",")
        }
        for precision, of_layer in made.items():
            matrix_errors.setdefault(precision, []).extend(error for *_, error in of_layer.values())
        for (precision, kind), state in zip(variants, states, strict=True):
            restore(block)
            for name, weight in plain.items():
                owner = block.get_submodule(name)
                if precision and any(part in name for part in KINDS[kind]):
                    hang(owner, *made[precision][name][:2])
                else:
                    hang(owner, weight, None)
            state.refill(RowMap, BlockPass(block, state, LayerPass(False)).row_blocks())
    predictions = [projected(transformer, state, LayerPass(False)) for state in states]
    errors: dict[str, Any] = {}
    for (precision, kind), prediction in zip(variants[1:], predictions[1:], strict=True):
        errors.setdefault(precision, {})[kind] = off(prediction, predictions[0])
    return errors, {precision: sum(each) / len(each) for precision, each in matrix_errors.items()}


def matrices(block: nn.Module, heavy: bool, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of a block that are quantised, in numbers that bf16 holds."""
    for name, each in block.named_modules():
        weight = getattr(each, "weight", None)
        if (
            weight is None
            or form_of("transformer", "int8", f"transformer_blocks.0.{name}.weight", weight.shape) is None
        ):
            continue
        weight = weight.detach()
        if heavy:
            channels = torch.exp(torch.randn(weight.shape[1], generator=generator) / 2)
            channels[torch.rand(weight.shape[1], generator=generator) < 1 / 500] *= 8
            channels /= channels.square().mean().sqrt()
            weight = weight * channels.view(1, -1, *[1] * (weight.ndim - 2))
        yield name, weight.bfloat16().float()


def kept(precision: str, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """A matrix as a precision has it: its numbers and their scales, or made wide; and by how much it errs."""
    shape = tuple(weight.shape)
    form = form_of("transformer", precision, f"transformer_blocks.0.{name}.weight", shape)
    assert form is not None
    packed = torch.empty(packed_bytes(form, shape), dtype=torch.uint8)
    quantise(form, weight, packed)
    parts = views(form, shape, packed)
    wide = torch.empty_like(weight)
    widen(form, parts, wide)
    error = off(wide, weight)
    return (parts["weight"], parts[SCALE], error) if precision in NATIVE else (wide, None, error)


def hang(owner: nn.Module, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    owner.weight = nn.Parameter(weight, requires_grad=False)
    if scale is not None:
        setattr(owner, SCALE, scale)


def restore(block: nn.Module) -> None:
    for each in block.modules():
        if hasattr(each, SCALE):
            delattr(each, SCALE)


def off(made: torch.Tensor, plain: torch.Tensor) -> float:
    return float((made - plain).norm() / plain.norm())


if __name__ == "__main__":
    main()
