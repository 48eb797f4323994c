"""Folders whose matrices bitsandbytes stored, in 8 bits and in 4: read as that library reads them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from handscroll import Request, generate
from handscroll.errors import CheckpointError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.quantisation import Quantisation, weight_cost
from handscroll.plan.inputs import Hardware, PlanInputs
from handscroll.plan.search import make_plan
from handscroll.runtime.modules import load_module, open_module
from handscroll.weights import quantised

Miniature = Callable[..., Path]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# The sixteen values that nf4 names, as QLoRA gives them (https://arxiv.org/abs/2305.14314, appendix E), rounded.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407]
NF4 += [0.5626, 0.7230, 1]


def in_4_bits(name: str, weight: torch.Tensor, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that stand for a matrix, and the numbers that they name."""
    table, count = torch.tensor(NF4), weight.numel()
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -count % 64)).view(-1, 64)
    scales = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    made: dict[str, torch.Tensor] = {}
    if nested:
        offset = float(scales.mean())
        of_blocks = torch.nn.functional.pad(scales - offset, (0, -len(scales) % 256)).view(-1, 256).abs().amax(1)
        nested_map = torch.linspace(-1, 1, 256)
        kinds = ((scales - offset) / of_blocks.repeat_interleave(256)[: len(scales)])[:, None] - nested_map
        kinds = kinds.abs().argmin(1)
        scales = nested_map[kinds] * of_blocks.repeat_interleave(256)[: len(scales)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        made |= {f"{name}.absmax": kinds.byte(), f"{name}.nested_absmax": of_blocks}
        made[f"{name}.nested_quant_map"] = nested_map
    else:
        made[f"{name}.absmax"] = scales
    indices = ((blocks / scales[:, None])[:, :, None] - table).abs().argmin(2).flatten()[:count].byte()
    made[name] = ((indices[::2] << 4) | indices[1::2])[:, None]
    made[f"{name}.quant_map"] = table
    made[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    wide = table[indices.int()] * scales.repeat_interleave(64)[:count]
    return made, wide.view(weight.shape)


def in_8_bits(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round().char()
    owner = name.removesuffix("weight")
    made = {name: numbers, f"{owner}SCB": largest, f"{owner}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return made, numbers * (largest * (1 / 127))[:, None]


def settings(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "8", "load_in_4bit": kind != "8"}
    return found | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": None, "bnb_4bit_use_double_quant": True}


def stored(model: Path, component: str, file: str, kind: str) -> dict[str, torch.Tensor]:
    """Stores every linear layer as bitsandbytes does, in place; gives the numbers that these stand for."""
    tensors = load_file(model / component / file)
    made: dict[str, torch.Tensor] = {}
    wide: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        is_linear = name.endswith(".weight") and tensor.ndim == 2 and "embed_tokens" not in name
        if not is_linear:
            made[name] = wide[name] = tensor
            continue
        weight = tensor.float()
        parts, wide[name] = in_8_bits(name, weight) if kind == "8" else in_4_bits(name, weight, kind == "4 nested")
        made |= parts
    save_file(made, model / component / file)
    config = json.loads((model / component / "config.json").read_text())
    (model / component / "config.json").write_text(json.dumps(config | {"quantization_config": settings(kind)}))
    return wide


@pytest.fixture(params=["8", "4", "4 nested"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("pieces", [quantised.PIECE_NUMBERS, 1000])
def test_numbers_are_those_that_are_stored(
    miniature: Miniature, tmp_path: Path, kind: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "PIECE_NUMBERS", pieces)
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    wide = stored(model, "transformer", "diffusion_pytorch_model.safetensors", kind)
    stored(model, "text_encoder", "model.safetensors", kind)
    spec = CheckpointSpec.from_folder(model)
    storage = "int8-weights" if kind == "8" else "nf4"
    assert spec.quantisation_of("transformer") is not None
    module: Any
    module, stream = open_module(spec, "transformer", dtype=torch.float32, device="cpu", storage=storage)
    with stream.materialize(module):
        for name, tensor in module.named_parameters():
            assert torch.equal(tensor, wide[name].view(tensor.shape)), name
    asked: dict[str, Any] = {"width": 64, "height": 64, "steps": 1, "seed": 1, "device": "cpu"}
    (result,) = generate(Request("a lake", model=str(model), **asked), tmp_path / "p.png")
    assert result.precision == f"text encoder {storage}+fp32, transformer {storage}+fp32, autoencoder fp32"
    assert not result.exact
    (tight,) = generate(Request("a lake", model=str(model), memory_bytes=2**31, **asked), tmp_path / "q.png")
    assert tight.path.read_bytes() == result.path.read_bytes() or same_pixels(tight.path, result.path)


def same_pixels(one: Path, other: Path) -> bool:
    import pyvips

    return bool(np.array_equal(*(pyvips.Image.new_from_file(str(path)).numpy() for path in (one, other))))


def test_plan_and_stream_count_the_same_bytes(miniature: Miniature, tmp_path: Path, kind: str) -> None:
    model = shutil.copytree(miniature("1.6b", dtype=torch.bfloat16), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", kind)
    spec = CheckpointSpec.from_folder(model)
    found = spec.quantisation_of("transformer")
    assert found is not None
    module: Any
    module, stream = open_module(spec, "transformer", dtype=torch.bfloat16, device="cpu", storage=found.storage)
    dit = spec.transformer
    cost = weight_cost("transformer", found.storage, dit.block_matrices(), dit.block_parameter_count, 2, found)
    assert cost.resident_bytes == stream.sent_bytes_of(module.transformer_blocks[0])
    assert cost.working_bytes == stream.bytes_of(module.transformer_blocks[0])


def test_8_bits_multiply_in_8_bits_where_that_is_asked_for(miniature: Miniature, tmp_path: Path) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", "8")
    asked: dict[str, Any] = {"width": 64, "height": 64, "steps": 1, "seed": 1, "device": "cpu"}
    (result,) = generate(Request("a lake", model=str(model), precision="int8", **asked), tmp_path / "p.png")
    assert "transformer int8+fp32" in result.precision
    with pytest.raises(UsageError, match="is stored in int8-weights already and cannot be made int4"):
        generate(Request("a lake", model=str(model), precision="int4", **asked), tmp_path / "q.png")


# What cannot be


def refused(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)
    spec = CheckpointSpec.from_folder(model)
    with pytest.raises(CheckpointError) as error:
        load_module(spec, "transformer", dtype=torch.float32, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


NAME = "transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    "gone", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"]
)
def test_parts_that_are_missing(miniature: Miniature, tmp_path: Path, gone: str) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", "4 nested")
    said = refused(model, lambda tensors: tensors.pop(f"{NAME}.{gone}"))
    assert f"the tensor {gone.partition('.')[0]} is missing" in said
    assert "to_q" in said


@pytest.mark.parametrize(
    ("part", "made"),
    [
        ("", torch.zeros(3, 1, dtype=torch.uint8)),
        (".absmax", torch.zeros(2, dtype=torch.uint8)),
        (".quant_map", torch.zeros(15)),
        (".nested_quant_map", torch.zeros(255)),
        (".nested_absmax", torch.zeros(9)),
        (".nested_absmax", torch.tensor([math.nan])),
        (".quant_state.bitsandbytes__nf4", torch.tensor(list(b"{}"), dtype=torch.uint8)),
        (".quant_state.bitsandbytes__nf4", torch.tensor(list(b"[" * 200), dtype=torch.uint8)),
        (".quant_state.bitsandbytes__nf4", torch.tensor([255, 254], dtype=torch.uint8)),
        (".quant_state.bitsandbytes__nf4", torch.zeros(5000, dtype=torch.uint8)),
        (".quant_state.bitsandbytes__nf4", torch.zeros(3)),
        (
            ".quant_state.bitsandbytes__nf4",
            torch.tensor(list(b'{"blocksize": 0, "shape": [32, 32]}'), dtype=torch.uint8),
        ),
        (
            ".quant_state.bitsandbytes__nf4",
            torch.tensor(list(b'{"blocksize": 64, "shape": [32, 32], "nested_offset": NaN}'), dtype=torch.uint8),
        ),
        (
            ".quant_state.bitsandbytes__nf4",
            torch.tensor(
                list(
                    b'{"blocksize": 64, "shape": [32, 32], "nested_blocksize": 256, "nested_offset": 1'
                    + b"0" * 350
                    + b"}"
                ),
                dtype=torch.uint8,
            ),
        ),
    ],
)
def test_parts_that_do_not_fit(miniature: Miniature, tmp_path: Path, part: str, made: torch.Tensor) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", "4 nested")
    said = refused(model, lambda tensors: tensors.update({f"{NAME}{part}": made}))
    assert "to_q" in said


def test_a_row_of_zeros_has_no_scale(miniature: Miniature, tmp_path: Path) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    tensors[NAME][3] = 0
    save_file(tensors, model / WEIGHTS)
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", "8")
    tensors = load_file(model / WEIGHTS)
    owner = NAME.removesuffix("weight")
    assert tensors[f"{owner}SCB"][3] == 0
    tensors[NAME][3] = 0
    save_file(tensors, model / WEIGHTS)
    spec = CheckpointSpec.from_folder(model)
    module: Any = load_module(spec, "transformer", dtype=torch.float32, device="cpu")
    assert module.transformer_blocks[0].attn1.to_q.weight.isfinite().all()


@pytest.mark.parametrize("order", [torch.tensor(3, dtype=torch.uint8), torch.tensor(0.0), torch.zeros(2).byte()])
def test_orders_of_older_versions(miniature: Miniature, tmp_path: Path, order: torch.Tensor) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", "8")
    owner = NAME.removesuffix("weight")
    assert "older versions" in refused(model, lambda tensors: tensors.update({f"{owner}weight_format": order}))


def test_rows_of_a_quantised_table_are_not_read(miniature: Miniature, tmp_path: Path) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    stored(model, "text_encoder", "model.safetensors", "8")
    tensors = load_file(file)
    (name,) = [each for each in tensors if each.endswith("embed_tokens.weight")]
    parts, _ = in_8_bits(name, tensors.pop(name).float())
    save_file(tensors | parts, file)
    request = Request("a", model=str(model), width=64, height=64, steps=1, seed=1, device="cpu")
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is stored in int8, and its rows are read one by"):
        generate(request, tmp_path / "p.png")


def test_a_plan_needs_no_weights(miniature: Miniature, tmp_path: Path, kind: str) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", kind)
    spec = CheckpointSpec.from_configs(model)
    request = Request("a", width=64, height=64, device="cpu")
    assert make_plan(spec, request, PlanInputs(hardware=Hardware("cpu"), tokens=6), seed=1).denoise is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_that_are_none(miniature: Miniature, tmp_path: Path, value: float) -> None:
    model = shutil.copytree(miniature("1.6b"), tmp_path / "model")
    stored(model, "transformer", "diffusion_pytorch_model.safetensors", "8")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer_blocks.0.attn1.to_q.SCB"][3] = value

    assert "a scale of zero, NaN or infinity" in refused(model, spoil)


def test_older_settings_name_no_method() -> None:
    assert Quantisation.from_config({"load_in_8bit": True}) == Quantisation("int8-weights", is_bitsandbytes=True)


@pytest.mark.parametrize(
    "change",
    [
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_4bit": False, "load_in_8bit": False},
        {"load_in_4bit": "yes", "load_in_8bit": False},
        {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "int4"},
    ],
)
def test_settings_that_are_not_read(change: dict[str, Any]) -> None:
    assert Quantisation.from_config(settings("8") | change) is None
