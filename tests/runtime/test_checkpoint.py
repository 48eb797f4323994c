"""Modules built from files against the same modules as the libraries themselves load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel, SCMScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

import miniatures
from handscroll.errors import CheckpointError, UnknownModelError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import open_checkpoint
from handscroll.runtime.modules import (
    Component,
    Half,
    load_module,
    load_rows,
    load_scheduler,
    load_tokenizer,
    open_module,
)
from handscroll.weights import files

WEIGHTS: dict[Component, str] = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
pytestmark = pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")

Miniature = Callable[..., Path]


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    """A copy of a miniature, to be damaged."""
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))


def spec_of(folder: Path) -> CheckpointSpec:
    return CheckpointSpec.from_folder(folder)


def run_transformer(model: SanaTransformer2DModel, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 32, 4, 4, generator=generator).to(dtype)
    text = torch.randn(2, 9, 48, generator=generator).to(dtype)
    timestep = torch.tensor([400.0, 900.0])
    guidance = torch.tensor([4.5, 4.5]) if model.config.guidance_embeds else None
    with torch.no_grad():
        return model(latent, text, timestep, guidance=guidance).sample


def run_autoencoder(model: AutoencoderDC, dtype: torch.dtype) -> torch.Tensor:
    latent = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        return model.decode(latent).sample


def run_text_encoder(model: Gemma2Model, dtype: torch.dtype) -> torch.Tensor:
    ids = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.no_grad():
        return model(ids, attention_mask=mask).last_hidden_state


def same_tensors(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    """Parameters, and buffers whether stored or not, bit for bit and dtype for dtype."""
    a = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    b = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ["1.6b", "1.6b-2k", "1.6b-4k", "1.5-1.6b", "sprint-0.6b"])
def test_the_transformer_is_the_one_that_diffusers_loads(
    miniature: Miniature, row: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    folder = miniature(row, dtype=stored)
    ours = load_module(spec_of(folder), "transformer", dtype=dtype, device="cpu")
    theirs = SanaTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
    ).eval()
    assert same_tensors(ours, theirs)
    if dtype is not torch.float16:
        assert run_transformer(ours, dtype).equal(run_transformer(theirs, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_autoencoder_is_the_one_that_diffusers_loads(miniature: Miniature, dtype: torch.dtype) -> None:
    folder = miniature("1.6b")
    ours = load_module(spec_of(folder), "vae", dtype=dtype, device="cpu")
    theirs = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=dtype, low_cpu_mem_usage=False).eval()
    assert same_tensors(ours, theirs)
    # Where a weight asks for gradients PyTorch folds a product's batch, and some processors then sum in another order.
    theirs.requires_grad_(False)
    assert run_autoencoder(ours, dtype).equal(run_autoencoder(theirs, dtype))


def test_batch_norm_statistics_come_along(tmp_path: Path) -> None:
    norms = ["batch_norm"] * 6
    folder = miniatures.make_checkpoint(tmp_path / "bn", autoencoder={"decoder_norm_types": norms})
    ours = load_module(spec_of(folder), "vae", dtype=torch.bfloat16, device="cpu")
    theirs = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    assert same_tensors(ours, theirs)
    assert any(name.endswith("num_batches_tracked") for name, _ in ours.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_text_encoder_is_the_one_that_transformers_loads(
    miniature: Miniature, stored: torch.dtype, dtype: torch.dtype
) -> None:
    folder = miniature("1.6b", dtype=stored)
    ours = load_module(spec_of(folder), "text_encoder", dtype=dtype, device="cpu")
    theirs = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    assert same_tensors(ours, theirs)
    assert run_text_encoder(ours, dtype).equal(run_text_encoder(theirs, dtype))


def test_a_text_encoder_saved_as_a_language_model(folder: Path) -> None:
    plain = load_module(spec_of(folder), "text_encoder", dtype=torch.float32, device="cpu")
    whole = Gemma2ForCausalLM(Gemma2Config.from_pretrained(folder / "text_encoder"))
    whole.model.load_state_dict(plain.state_dict())
    shutil.rmtree(folder / "text_encoder")
    whole.save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"][1] = "Gemma2ForCausalLM"
    (folder / "model_index.json").write_text(json.dumps(index))

    again = load_module(spec_of(folder), "text_encoder", dtype=torch.float32, device="cpu")
    assert type(again) is Gemma2Model
    assert same_tensors(again, plain)

    # Some tools also write the head out, although it is tied to the embedding.
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert same_tensors(load_module(spec_of(folder), "text_encoder", dtype=torch.float32, device="cpu"), plain)


@pytest.mark.parametrize("options", [{"max_shard_size": "100KB"}, {"variant": "bf16"}, {"variant": "fp16"}])
def test_shards_and_variants_hold_the_same(miniature: Miniature, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = miniatures.make_checkpoint(tmp_path / "other", row="1.6b", **options)
    for component in WEIGHTS:
        plain = load_module(spec_of(miniature("1.6b")), component, dtype=torch.float32, device="cpu")
        other = load_module(spec_of(folder), component, dtype=torch.float32, device="cpu")
        assert same_tensors(plain, other)


@pytest.mark.parametrize(("part", "absent"), [("decoder", "encoder"), ("encoder", "decoder")])
def test_half_an_autoencoder(miniature: Miniature, part: Half, absent: Half) -> None:
    spec = spec_of(miniature("1.6b"))
    half = load_module(spec, "vae", dtype=torch.float32, device="cpu", part=part)
    whole = load_module(spec, "vae", dtype=torch.float32, device="cpu")
    assert getattr(half, absent) is None
    assert same_tensors(getattr(half, part), getattr(whole, part))
    if part == "decoder":
        assert run_autoencoder(half, torch.float32).equal(run_autoencoder(whole, torch.float32))


def test_a_half_is_for_autoencoders_only(miniature: Miniature) -> None:
    with pytest.raises(ValueError, match="autoencoder"):
        load_module(spec_of(miniature("1.6b")), "transformer", dtype=torch.float32, device="cpu", part="decoder")


def test_a_module_comes_ready_to_run(miniature: Miniature) -> None:
    for component in WEIGHTS:
        module = load_module(spec_of(miniature("1.6b")), component, dtype=torch.bfloat16, device="cpu")
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_equal_dtypes_map_the_file_and_writing_does_not_reach_it(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS["transformer"]
    before = file.read_bytes()
    module: SanaTransformer2DModel = load_module(spec_of(folder), "transformer", dtype=torch.float32, device="cpu")
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert len(storages) == 1
    with torch.no_grad():
        module.proj_out.weight.zero_()
    assert file.read_bytes() == before

    converted = load_module(spec_of(folder), "transformer", dtype=torch.bfloat16, device="cpu")
    assert len({parameter.untyped_storage().data_ptr() for parameter in converted.parameters()}) > 50


def test_conversion_in_several_pieces(miniature: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(miniature("1.6b"))
    at_once = load_module(spec, "transformer", dtype=torch.bfloat16, device="cpu")
    monkeypatch.setattr(files, "STAGING_BYTES", 200)
    assert same_tensors(load_module(spec, "transformer", dtype=torch.bfloat16, device="cpu"), at_once)


def test_tensors_that_are_left_stay_on_the_meta_device(miniature: Miniature) -> None:
    spec = spec_of(miniature("1.6b", dtype=torch.bfloat16))
    whole: Gemma2Model = load_module(spec, "text_encoder", dtype=torch.float32, device="cpu")
    lean: Gemma2Model = load_module(
        spec, "text_encoder", dtype=torch.float32, device="cpu", leave={"embed_tokens.weight"}
    )
    assert lean.embed_tokens.weight.is_meta
    ids = torch.tensor([[2, 70, 80, 299, 70]])
    rows = load_rows(spec, "text_encoder", "embed_tokens.weight", ids)
    assert rows.dtype is torch.bfloat16
    assert rows.equal(whole.embed_tokens.weight[ids].bfloat16())
    rows = rows.float() * lean.embed_tokens.embed_scale
    with torch.no_grad():
        assert lean(inputs_embeds=rows).last_hidden_state.equal(whole(ids).last_hidden_state)

    spec = spec_of(miniature("1.6b-4k"))
    transformer: SanaTransformer2DModel = load_module(
        spec, "transformer", dtype=torch.float32, device="cpu", leave={"patch_embed.pos_embed"}
    )
    assert transformer.patch_embed.pos_embed.is_meta


@pytest.mark.parametrize("row", [300, -1])
def test_a_row_that_is_not_there(miniature: Miniature, row: int) -> None:
    with pytest.raises(CheckpointError, match=f"embed_tokens.weight has 300 rows, and row {row} is asked for"):
        load_rows(spec_of(miniature("1.6b")), "text_encoder", "embed_tokens.weight", torch.tensor([[2, row]]))
    with pytest.raises(CheckpointError, match="the tensor embed_weight is missing"):
        load_rows(spec_of(miniature("1.6b")), "text_encoder", "embed_weight", torch.tensor([[2]]))


def test_an_opened_module_has_shapes_and_no_memory(miniature: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(miniature("1.6b-4k"))
    monkeypatch.setattr("diffusers.models.embeddings.get_2d_sincos_pos_embed", _refuse_what_is_real)
    lean: SanaTransformer2DModel
    lean, stream = open_module(spec, "transformer", dtype=torch.bfloat16, device="cpu", leave={"patch_embed.pos_embed"})
    assert all(tensor.is_meta for tensor in (*lean.parameters(), *lean.buffers()))
    stream.make_resident(lean)
    assert lean.patch_embed.pos_embed.is_meta
    assert not any(parameter.is_meta for parameter in lean.parameters())
    monkeypatch.undo()

    table: SanaTransformer2DModel
    table, _ = open_module(spec, "transformer", dtype=torch.bfloat16, device="cpu")
    assert [name for name, tensor in table.named_buffers() if not tensor.is_meta] == ["patch_embed.pos_embed"]
    whole: SanaTransformer2DModel = load_module(spec, "transformer", dtype=torch.bfloat16, device="cpu")
    assert table.patch_embed.pos_embed.equal(whole.patch_embed.pos_embed)


def _refuse_what_is_real(*arguments: Any, **options: Any) -> torch.Tensor:
    table = get_2d_sincos_pos_embed(*arguments, **options)
    assert table.is_meta
    return table


def rewrite(folder: Path, component: Component, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / component / WEIGHTS[component]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("component", "change", "says"),
    [
        ("transformer", lambda t: t.pop("proj_out.weight"), ["proj_out.weight", "missing"]),
        ("vae", lambda t: t.pop("decoder.conv_in.bias"), ["decoder.conv_in.bias", "missing"]),
        ("text_encoder", lambda t: t.pop("norm.weight"), ["norm.weight", "missing"]),
        ("transformer", lambda t: t.update({"proj_out.bias": torch.ones(5)}), ["proj_out.bias", "5", "32"]),
        ("vae", lambda t: t.update({"encoder.conv_in.weight": torch.ones(8, 3, 3)}), ["8x3x3", "8x3x3x3"]),
        ("vae", lambda t: t.update({"decoder.conv_in.bias": torch.ones(64).to(torch.int8)}), ["int8", "quantised"]),
        ("text_encoder", lambda t: t.update({"model.norm.weight": torch.ones(48)}), ["norm.weight", "twice"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, component: Component, change: Callable[[dict[str, torch.Tensor]], None], says: list[str]
) -> None:
    rewrite(folder, component, change)
    with pytest.raises(CheckpointError) as caught:
        load_module(spec_of(folder), component, dtype=torch.float32, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert WEIGHTS[component] in message
    for part in says:
        assert part in message


def test_a_file_that_shrinks_after_it_was_opened(folder: Path) -> None:
    spec = spec_of(folder)
    file = folder / "transformer" / WEIGHTS["transformer"]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: the tensor .* cannot be read"):
        load_module(spec, "transformer", dtype=torch.bfloat16, device="cpu")


def test_the_tokenizer_pads_right_and_runs_no_code(folder: Path) -> None:
    tokenizer = load_tokenizer(spec_of(folder))
    ids = tokenizer(["a fox", "snow"], padding="max_length", max_length=8)["input_ids"]
    assert ids[1][-1] == tokenizer.pad_token_id == 0
    assert ids[0][0] == ids[1][0] == tokenizer.bos_token_id == 2

    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(spec_of(folder))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(spec_of(folder))


def test_the_scheduler_is_the_checkpoints_own(miniature: Miniature) -> None:
    scheduler = load_scheduler(spec_of(miniature("1.6b-4k")))
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert scheduler.config.flow_shift == 6.0
    assert isinstance(load_scheduler(spec_of(miniature("sprint-1.6b"))), SCMScheduler)


def test_open_checkpoint_takes_a_folder(miniature: Miniature) -> None:
    assert open_checkpoint(miniature("1.6b")) == open_checkpoint(str(miniature("1.6b")))
    with pytest.raises(UnknownModelError):
        open_checkpoint("sanna-1.6b")
