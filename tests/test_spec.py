"""Specs against the models they describe, and folders that are not checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2Model

import miniatures
from handscroll.errors import CheckpointError
from handscroll.models.autoencoder import F32C32_SANA, AutoencoderSpec
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.scheduler import SchedulerSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.weights.folder import find_weight_files
from handscroll.weights.header import read_header

SANA_06B = TransformerSpec(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
SANA_16B = TransformerSpec()
NORMED: dict[str, Any] = {"qk_norm": "rms_norm_across_heads"}
SPRINT: dict[str, Any] = {**NORMED, "guidance_embeds": True}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def folder(miniature: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a miniature, to be damaged."""
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))


def edit(file: Path, **changes: Any) -> None:
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(folder: Path, *says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointSpec.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


# Counting.


@pytest.mark.parametrize(
    ("spec", "millions"),
    [
        (SANA_06B, 591.7),
        (SANA_16B, 1604.5),
        (replace(SANA_16B, interpolation_scale=2.0, sample_size=128), 1604.5),
        (replace(SANA_16B, **NORMED), 1604.6),
        (replace(SANA_16B, num_layers=60, **NORMED), 4721.8),
        (replace(SANA_06B, **SPRINT), 593.5),
        (replace(SANA_16B, **SPRINT), None),
        (replace(SANA_16B, num_layers=2, patch_size=2, attention_bias=True, norm_elementwise_affine=True), None),
    ],
)
def test_a_transformer_has_as_many_parameters_as_its_spec_says(spec: TransformerSpec, millions: float | None) -> None:
    with torch.device("meta"):
        assert count(SanaTransformer2DModel(**asdict(spec))) == spec.parameter_count
    assert millions is None or round(spec.parameter_count / 1e6, 1) == millions


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
        {"encoder_layers_per_block": (0, 1, 1, 2, 2, 1), "decoder_layers_per_block": (0, 2, 1, 1, 1, 1)},
        {
            "encoder_layers_per_block": (0, 1, 1, 2, 2, 1),
            "decoder_layers_per_block": (0, 2, 0, 1, 1, 1),
            "decoder_norm_types": ("batch_norm", "layer_norm") * 3,
            "upsample_block_type": "pixel_shuffle",
            "downsample_block_type": "pixel_unshuffle",
        },
        {"decoder_qkv_multiscales": ((), (), (), (), (3, 5), (5, 7)), "attention_head_dim": 48},
    ],
)
def test_an_autoencoder_has_as_many_parameters_as_its_spec_says(changes: dict[str, Any]) -> None:
    spec = replace(F32C32_SANA, **changes)
    with torch.device("meta"):
        model = AutoencoderDC(**asdict(spec))
    assert count(model.encoder) == spec.encoder_parameter_count
    assert count(model.decoder) == spec.decoder_parameter_count
    assert spec.parameter_count == count(model)
    assert spec.spatial_compression_ratio == model.spatial_compression_ratio == 32
    if not changes:
        assert round(spec.encoder_parameter_count / 1e6, 1) == 153.0
        assert round(spec.decoder_parameter_count / 1e6, 1) == 159.2


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, "attention_bias": True, "num_key_value_heads": 2}])
def test_a_text_encoder_has_as_many_parameters_as_its_spec_says(changes: dict[str, Any]) -> None:
    spec = replace(TextEncoderSpec(), **changes)
    with torch.device("meta"):
        assert count(Gemma2Model(Gemma2Config(**asdict(spec)))) == spec.parameter_count
    if not changes:
        assert round(spec.parameter_count / 1e6, 1) == 2614.3
        assert round(spec.embedding_parameter_count / 1e6, 1) == 589.8


# Reading a folder.


@pytest.mark.parametrize("row", miniatures.ROWS)
def test_every_row_is_read_as_it_was_written(miniature: Callable[..., Path], row: str) -> None:
    spec = CheckpointSpec.from_folder(miniature(row))
    written = {**miniatures.TRANSFORMER, **miniatures.ROWS[row]}
    assert {name: getattr(spec.transformer, name) for name in written} == written
    assert spec.name == row
    assert spec.native_px == 32 * spec.transformer.sample_size
    assert spec.is_sprint == row.startswith("sprint")
    assert (spec.default_steps, spec.default_guidance) == ((2 if spec.is_sprint else 20), 4.5)
    assert spec.scheduler.class_name == ("SCMScheduler" if spec.is_sprint else "DPMSolverMultistepScheduler")
    assert spec.instruction
    assert spec.instruction_lines is None
    for component, parameters in (
        ("transformer", spec.transformer.parameter_count),
        ("vae", spec.autoencoder.parameter_count),
        ("text_encoder", spec.text_encoder.parameter_count),
    ):
        weights = spec.weights_of(component)
        assert sum(math.prod(entry.shape) for entry in weights.tensors) == parameters
        assert (weights.dtype, weights.n_bytes) == ("fp32", 4 * parameters)
    assert spec.n_bytes == sum(path.stat().st_size for path in spec.folder.rglob("*.safetensors")) - headers(spec)


def headers(spec: CheckpointSpec) -> int:
    files = [file for component in ("transformer", "vae", "text_encoder") for file in spec.weights_of(component).files]
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def test_a_spec_is_a_value(miniature: Callable[..., Path]) -> None:
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(CheckpointSpec.from_folder(str(miniature("1.6b"))))
    assert spec.scheduler.config["flow_shift"] == 3.0
    with pytest.raises(ValueError, match="no component"):
        spec.weights_of("unet")


def test_fields_that_an_older_config_lacks_take_diffusers_defaults(folder: Path) -> None:
    edit(folder / "transformer/config.json", qk_norm=..., guidance_embeds=..., timestep_scale=..., out_channels=None)
    spec = CheckpointSpec.from_folder(folder)
    assert spec.transformer.qk_norm is None
    assert spec.transformer.out_channels == 32
    edit(folder / "vae/config.json", decoder_norm_types=["rms_norm"] * 6, decoder_act_fns=...)
    assert CheckpointSpec.from_folder(folder).autoencoder == spec.autoencoder
    assert AutoencoderSpec.from_config({}) == AutoencoderSpec()


def test_our_own_file_overrides(folder: Path) -> None:
    own = folder / "handscroll.json"
    overrides = {"name": "hills", "native_px": 512, "licence": "CC0", "default_steps": 12, "default_guidance": 0}
    own.write_text(json.dumps({**overrides, "max_prompt_tokens": 120}))
    spec = CheckpointSpec.from_folder(folder)
    assert (spec.name, spec.native_px, spec.licence) == ("hills", 512, "CC0")
    assert (spec.default_steps, spec.default_guidance, spec.max_prompt_tokens) == (12, 0.0, 120)
    assert spec.instruction

    own.write_text('{"complex_human_instruction": null}')
    assert not CheckpointSpec.from_folder(folder).instruction
    own.write_text('{"complex_human_instruction": ["Say more:", "- in colours"]}')
    assert CheckpointSpec.from_folder(folder).instruction_lines == ("Say more:", "- in colours")

    own.write_text('{"nativepx": 512}')
    refused(folder, "handscroll.json", "nativepx", "native_px")
    own.write_text('{"native_px": 0}')
    refused(folder, "handscroll.json", "native_px")


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_shards_and_variants(tmp_path: Path, variant: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[variant]
    folder = miniatures.make_checkpoint(tmp_path / "v", dtype=dtype, variant=variant, max_shard_size="50KB")
    spec = CheckpointSpec.from_folder(folder)
    assert len(spec.transformer_weights.files) > 1
    assert {spec.weights_of(component).dtype for component in ("transformer", "vae", "text_encoder")} == {variant}

    shard = spec.transformer_weights.files[0]
    shard.unlink()
    refused(folder, shard.name, "missing")


def test_plain_files_come_before_variants_unless_a_shard_is_missing(folder: Path) -> None:
    transformer = folder / "transformer"
    plain, variant = (transformer / f"diffusion_pytorch_model{each}.safetensors" for each in ("", ".bf16"))
    shutil.copy(plain, variant)
    assert find_weight_files(transformer) == (plain,)
    plain.unlink()
    assert find_weight_files(transformer) == (variant,)
    index = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert find_weight_files(transformer) == (variant,)


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "../transformer/diffusion_pytorch_model.safetensors"}}
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "index.json", "../transformer")


# What is no checkpoint.


def test_a_missing_folder_or_component_is_named(folder: Path) -> None:
    refused(folder / "nowhere", "nowhere", "no such folder", "model_index.json")
    for component in ("tokenizer", "scheduler", "vae"):
        shutil.move(folder / component, folder / "aside")
        refused(folder, component, "missing", "text_encoder/, transformer/, vae/")
        shutil.move(folder / "aside", folder / component)
    (folder / "model_index.json").unlink()
    refused(folder, "model_index.json", "missing")


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, ["FluxPipeline", "SanaPipeline"]),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, ["AutoencoderKL", "AutoencoderDC"]),
        ("model_index.json", {"transformer": ...}, ["names no transformer"]),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, ["T5EncoderModel", "Gemma2Model"]),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, ["PNDMScheduler", "SCMScheduler"]),
        ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, ["PixArtTransformer2DModel"]),
        ("transformer/config.json", {"num_layers": "two"}, ["num_layers should be int, found 'two'"]),
        ("transformer/config.json", {"num_layers": 0}, ["num_layers should be above 0"]),
        ("transformer/config.json", {"num_layers": True}, ["num_layers should be int, found True"]),
        ("transformer/config.json", {"cross_attention_dim": 7}, ["cross_attention_dim is 7", "width is 32"]),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, ["layer_norm"]),
        ("transformer/config.json", {"quantization_config": {"bits": 4}}, ["quantised"]),
        ("vae/config.json", {"decoder_layers_per_block": [1, 2]}, ["decoder_layers_per_block has 2 entries for 6"]),
        ("vae/config.json", {"decoder_block_types": "Conv"}, ["decoder_block_types 'Conv'"]),
        ("vae/config.json", {"encoder_block_out_channels": 8}, ["encoder_block_out_channels should be a list"]),
        ("text_encoder/config.json", {"architectures": ["LlamaModel"]}, ["LlamaModel"]),
        ("text_encoder/config.json", {"head_dim": None}, ["head_dim should be int, found None"]),
    ],
)
def test_what_a_config_gets_wrong_is_named(folder: Path, file: str, changes: dict[str, Any], says: list[str]) -> None:
    edit(folder / file, **changes)
    refused(folder, file, *says)


def test_components_that_do_not_fit_each_other(folder: Path) -> None:
    edit(folder / "text_encoder/config.json", hidden_size=64)
    refused(folder, "48", "64", "text encoder")


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000])
def test_broken_json_is_named(folder: Path, text: str) -> None:
    (folder / "vae/config.json").write_text(text, errors="surrogateescape")
    refused(folder, "vae/config.json")


def test_pickles_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "transformer/diffusion_pytorch_model.safetensors").rename(folder / "transformer/pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "can run code", "safe_serialization")
    (folder / "transformer/pytorch_model.bin").unlink()
    refused(folder, "transformer", "holds no weights")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 30_000, -1])
def test_a_truncated_file_is_named_before_anything_is_read(folder: Path, kept: int) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    refused(folder, str(file), "truncated")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    ],
)
def test_a_header_that_makes_no_sense(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(file)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(file)


def test_headers_are_read_as_safetensors_wrote_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    entries = {entry.name: entry for entry in read_header(tmp_path / "model.safetensors")}
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (), "b": (2, 3), "empty": (0, 4)}
    for name, tensor in tensors.items():
        entry = entries[name]
        assert data[entry.start : entry.start + entry.n_bytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_in_two_shards(folder: Path) -> None:
    vae = folder / "vae"
    plain = vae / "diffusion_pytorch_model.safetensors"
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard in shards:
        shutil.copy(plain, vae / shard)
    plain.unlink()
    (vae / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    refused(folder, "occurs in 2 shards")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CONFIGS = ("transformer/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_config_says_the_only_error_is_ours(miniature: Callable[..., Path], data: st.DataObject) -> None:
    file = miniature("1.6b") / data.draw(st.sampled_from((*CONFIGS, "model_index.json")))
    original = file.read_text()
    config = json.loads(original)
    key = data.draw(st.sampled_from(sorted(config)))
    try:
        file.write_text(json.dumps({**config, key: data.draw(JSON)}))
        with contextlib.suppress(CheckpointError):
            CheckpointSpec.from_folder(miniature("1.6b"))
    finally:
        file.write_text(original)


def test_a_scheduler_gives_its_config_back() -> None:
    spec = SchedulerSpec("SCMScheduler", (("sigma_data", 0.5), ("trained_betas", (0.1, 0.2))))
    assert spec.config == {"sigma_data": 0.5, "trained_betas": [0.1, 0.2]}


def test_reading_a_spec_loads_no_torch(miniature: Callable[..., Path]) -> None:
    code = (
        "import sys; from handscroll.models import registry; from handscroll.models.checkpoint import CheckpointSpec;"
        f"CheckpointSpec.from_folder({str(miniature('1.6b'))!r}); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
