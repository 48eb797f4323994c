"""Corrections of low rank beside matrices in 4 bits: how good they are, their bytes, and folders that hold them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quantised_cases
from handscroll import Request, generate
from handscroll.errors import CheckpointError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.quantisation import Quantisation, weight_cost
from handscroll.runtime.modules import open_module
from handscroll.runtime.quantising import quantise_folder
from handscroll.weights import low_rank, quantised
from handscroll.weights.forms import LOW_RANK, Form, packed_bytes, parts_of
from handscroll.weights.quantised import views
from quantised_cases import packed_of, widened

Miniature = Callable[..., Path]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def trained_like(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall off, with some channels much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    outs, ins = (torch.randn(size, count, generator=generator) for size in (rows, columns))
    weight = outs * (torch.arange(count) + 1.0) ** -0.7 @ ins.t()
    return weight * torch.exp(torch.randn(columns, generator=generator))


def off(made: torch.Tensor, weight: torch.Tensor) -> float:
    return float((made - weight).norm() / weight.norm())


def by_whole_matrices(weight: torch.Tensor, form: Form) -> torch.Tensor:
    """The same in turns of singular value decompositions, as a book would write it."""
    plain = Form(form.storage, form.group)

    def in_4_bits(matrix: torch.Tensor) -> torch.Tensor:
        return widened(plain, tuple(matrix.shape), packed_of(plain, matrix))

    def in_8_bits(factor: torch.Tensor, dim: int) -> torch.Tensor:
        scale = factor.abs().amax(dim, keepdim=True) / 127
        return (factor / scale).round() * scale

    rest = torch.zeros_like(weight)
    for _ in range(low_rank.ROUNDS):
        outs, values, ins = torch.linalg.svd((weight - rest).double(), full_matrices=False)
        outs = in_8_bits(outs[:, : form.rank] * values[: form.rank], 0)
        correction = (outs @ in_8_bits(ins[: form.rank], 1)).float()
        rest = in_4_bits(weight - correction)
    return rest + correction


@pytest.mark.parametrize("shape", [(64, 96), (192, 192), (40, 320), (320, 64)])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_it_is_as_good_as_by_whole_matrices(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "PIECE_NUMBERS", 4096)  # several pieces, the last of them ragged
    weight = trained_like(*shape, seed=rank)
    form = Form("int4", 32, rank)
    made = widened(form, shape, packed_of(form, weight))
    alone = widened(Form("int4", 32), shape, packed_of(Form("int4", 32), weight))
    assert off(made, weight) < off(alone, weight)
    assert off(made, weight) == pytest.approx(off(by_whole_matrices(weight, form), weight), rel=0.05)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**31))
def test_matrices_of_any_shape_err_little(rows: int, groups: int, rank: int, seed: int) -> None:
    shape = rows, 32 * groups
    form = Form("int4", 32, min(rank, *shape))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = packed_of(form, weight)
    assert off(widened(form, shape, packed), weight) < 0.14
    assert views(form, shape, packed)["weight_low_rank_scale"].all()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-35, 1e-30, 1e30])
def test_zeros_and_sizes_at_the_ends(size: float) -> None:
    form = Form("int4", 32, 8)
    weight = torch.randn(48, 64) * size
    packed = packed_of(form, weight)
    made = widened(form, (48, 64), packed)
    assert made.isfinite().all()
    assert float((made - weight).norm()) <= 0.2 * float(weight.norm()) + 1e-38
    parts = views(form, (48, 64), packed)
    for suffix in ("weight_scale", "weight_low_rank_scale"):
        assert parts[suffix].isfinite().all()
        assert parts[suffix].all()


def test_a_matrix_of_lower_rank_than_the_correction() -> None:
    weight = torch.randn(64, 2) @ torch.randn(2, 96)
    form = Form("int4", 32, 16)
    assert off(widened(form, (64, 96), packed_of(form, weight)), weight) < 0.01


def test_the_bytes_do_not_depend_on_threads() -> None:
    weight, form = trained_like(300, 256, seed=1), Form("int4", 32, 32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(packed_of(form, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], each) for each in found)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 32))
def test_bytes_are_the_closed_form(rows: int, groups: int, rank: int) -> None:
    shape = rows, 32 * groups
    form = Form("int4", 32, rank)
    parts = parts_of(form, shape)
    numbers = rows * 32 * groups // 2 + 2 * rows * groups + rank * (rows + 32 * groups) + 4 * rank
    assert sum(part.n_bytes for part in parts) == numbers
    assert packed_bytes(form, shape) - numbers in range(4 * len(parts))
    assert all(part.start % 4 == 0 for part in parts)


# Folders


refused = partial(quantised_cases.refused, kinds=(CheckpointError,))


def test_a_folder_with_corrections_says_that_it_is_ours(small: Path) -> None:
    config = json.loads((small / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "handscroll"
    assert Quantisation.from_config(config) == Quantisation("int4", "fp32", corrected=True)
    assert Quantisation.from_config(config | {"format": "int-quantized"}) is None


@pytest.mark.parametrize("gone", LOW_RANK)
def test_a_part_that_is_missing(small: Path, gone: str) -> None:
    tensors = load_file(small / WEIGHTS)
    name = f"transformer_blocks.0.attn1.to_q.{gone}"
    del tensors[name]
    save_file(tensors, small / WEIGHTS)
    said = refused(small)
    assert f"the tensor {name} is missing" in said


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_scales_that_are_none(small: Path, value: float) -> None:
    tensors = load_file(small / WEIGHTS)
    tensors["transformer_blocks.1.attn2.to_v.weight_low_rank_scale"][1] = value
    save_file(tensors, small / WEIGHTS)
    said = refused(small)
    assert "transformer_blocks.1.attn2.to_v.weight_low_rank_scale" in said
    assert "a scale of zero, NaN or infinity" in said


def test_a_correction_of_8_bits_is_none(miniature: Miniature, tmp_path: Path) -> None:
    quantise_folder(CheckpointSpec.from_folder(miniature("1.6b")), {"transformer": "int8"}, tmp_path / "small")
    tensors = load_file(tmp_path / "small" / WEIGHTS)
    owner = "transformer_blocks.0.attn1.to_q."
    tensors[f"{owner}weight_low_rank_out"] = torch.ones(32, 4, dtype=torch.int8)
    tensors[f"{owner}weight_low_rank_in"] = torch.ones(4, 32, dtype=torch.int8)
    tensors[f"{owner}weight_low_rank_scale"] = torch.ones(4, 1)
    save_file(tensors, tmp_path / "small" / WEIGHTS)
    assert "a correction, which is for matrices in 4 bits" in refused(tmp_path / "small")


@pytest.mark.parametrize("shape", [(32,), (32, 0), (32, 33), (32, 9), (31, 8), (8, 32, 1)])
def test_shapes_that_do_not_fit(small: Path, shape: tuple[int, ...]) -> None:
    tensors = load_file(small / WEIGHTS)
    tensors["transformer_blocks.0.attn1.to_q.weight_low_rank_out"] = torch.ones(shape, dtype=torch.int8)
    save_file(tensors, small / WEIGHTS)
    assert "attn1.to_q" in refused(small)


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_weights_that_are_not_finite(miniature: Miniature, tmp_path: Path, storage: str) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    tensors["transformer_blocks.1.attn1.to_v.weight"][3, 5] = math.nan
    save_file(tensors, model / WEIGHTS)
    said = refused(model, precision=storage)
    assert "transformer_blocks.1.attn1.to_v.weight" in said
    assert "not finite" in said


# What other tools make


def as_others_store(model: Path, component: str, file: str, form: Form, names: Callable[[str], bool]) -> None:
    """Stores the matrices of these names as compressed-tensors does, in place."""
    tensors = load_file(model / component / file)
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not (names(name) and name.endswith(".weight")):
            made[name] = tensor
            continue
        owner = name.removesuffix("weight")
        shape = tuple(tensor.shape)
        parts = views(form, shape, packed_of(form, tensor))
        made |= {f"{owner}{suffix}": part.clone() for suffix, part in parts.items()}
        if form.storage == "int4":
            made[f"{owner}weight_shape"] = torch.tensor(shape[:2])
    save_file(made, model / component / file)
    settings = Quantisation({"int8": "int8-weights"}.get(form.storage, form.storage)).as_config(form.group)
    del settings["handscroll"]
    config = json.loads((model / component / "config.json").read_text())
    (model / component / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize("form", [Form("int8"), Form("int4", 32)], ids=str)
def test_bytes_are_those_of_the_headers(miniature: Miniature, tmp_path: Path, form: Form) -> None:
    """Some matrices are left out, others stored in other groups than ours: plan and stream count what is there."""
    model = shutil.copytree(miniature("1.6b", dtype=torch.bfloat16), tmp_path / "model")
    as_others_store(model, "transformer", "diffusion_pytorch_model.safetensors", form, lambda name: ".attn1.to" in name)
    as_others_store(model, "text_encoder", "model.safetensors", form, lambda name: ".0.mlp.down" in name)
    spec = CheckpointSpec.from_folder(model)
    for component, of_layers in (("transformer", "transformer_blocks"), ("text_encoder", "layers")):
        stored = spec.quantisation_of(component)
        assert stored is not None
        module: Any
        module, stream = open_module(
            spec,
            component,  # type: ignore[arg-type]
            dtype=torch.bfloat16,
            device="cpu",
            storage=stored.storage,
        )
        blocks = getattr(module, of_layers)
        if component == "transformer":
            matrices, parameters = spec.transformer.block_matrices(), spec.transformer.block_parameter_count
        else:
            matrices, parameters = spec.text_encoder.layer_matrices(), spec.text_encoder.layer_parameter_count
        cost = weight_cost(component, stored.storage, matrices, parameters, 2, stored)
        assert cost.resident_bytes == max(stream.sent_bytes_of(block) for block in blocks)
        assert cost.working_bytes == max(stream.bytes_of(block) for block in blocks)
        assert cost.making_seconds == 0


def test_matrices_beyond_the_layers_are_made_wide_once(miniature: Miniature, tmp_path: Path) -> None:
    """As a tool that takes every linear layer would store them."""
    plain = shutil.copytree(miniature("1.6b"), tmp_path / "plain")
    model = shutil.copytree(plain, tmp_path / "model")

    def is_linear(name: str) -> bool:
        parts = ("time_embed", "caption_projection", "proj_out", ".attn1.to", ".attn2.to")
        return name.endswith(".weight") and any(part in name for part in parts)

    as_others_store(model, "transformer", "diffusion_pytorch_model.safetensors", Form("int8"), is_linear)
    asked: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 1, "device": "cpu"}
    (stored,) = generate(Request("a lake", model=str(model), **asked), tmp_path / "stored.png")
    tensors = load_file(plain / WEIGHTS)
    for name, tensor in tensors.items():
        if is_linear(name):
            tensors[name] = widened(Form("int8"), tuple(tensor.shape), packed_of(Form("int8"), tensor))
    save_file(tensors, plain / WEIGHTS)
    (wide,) = generate(Request("a lake", model=str(plain), **asked), tmp_path / "wide.png")
    import numpy as np
    import pyvips

    ours, theirs = (pyvips.Image.new_from_file(str(each.path)).numpy().astype(int) for each in (stored, wide))
    assert np.abs(ours - theirs).max() <= 1
