"""Latents that other tools saved: found under their names, in their scale, and nothing invented of their making."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from handscroll import Request, decode_latent, generate
from handscroll.cli import main as cli
from handscroll.errors import CheckpointError
from handscroll.pictures.metadata import read_parameters

Miniature = Callable[..., Path]
Pixels = np.ndarray
LATENT = torch.randn(1, 32, 3, 4, generator=torch.Generator().manual_seed(5))
INVENTED = ("unknown", "Steps", "Sampler", "CFG scale", "Seed", "Model", "Negative", "text encoder", "transformer")


@pytest.fixture
def model(miniature: Miniature) -> str:
    return str(miniature("1.6b"))


def pixels_of(path: Path) -> Pixels:
    import pyvips

    return np.asarray(pyvips.Image.new_from_file(str(path)).numpy())


@pytest.fixture
def expected(model: str) -> Pixels:
    """What diffusers makes of `LATENT` as its pipelines give it."""
    vae = AutoencoderDC.from_pretrained(Path(model) / "vae")
    with torch.no_grad():
        whole = vae.decode(LATENT / vae.config.scaling_factor, return_dict=False)[0]
    return ((whole[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def assert_decodes(file: Path, model: str, expected: Pixels) -> str:
    """To the expected picture, within a level of rounding. Gives what the picture's file says of itself."""
    result = decode_latent(file, file.with_suffix(".png"), model=model)
    assert np.abs(pixels_of(result.path).astype(int) - expected).max() <= 1
    return read_parameters(result.path)


# Names, shapes and scales


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents_96x128": LATENT[0].contiguous(), "original_size": torch.zeros(2)},
        {"pred": LATENT[0].contiguous()},
        {"z": torch.zeros(3), "out": LATENT},
        {"z": torch.zeros(3), "latents": LATENT},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_a_latent_is_found_among_what_cannot_be_one(
    tmp_path: Path, model: str, expected: Pixels, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    assert_decodes(tmp_path / "a.safetensors", model, expected)


@pytest.mark.parametrize("name", ["latent", "latents", "samples", "image_latents", "z", "anything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_latent_is_found_by_its_name_or_as_the_only_one(
    tmp_path: Path, model: str, expected: Pixels, name: str, dtype: torch.dtype
) -> None:
    tensors = {name: LATENT.to(dtype), "seed": torch.tensor(7), "prompt_embeds": torch.zeros(1, 7, 48)}
    save_file(tensors, tmp_path / "a.safetensors")
    if dtype is not torch.bfloat16:
        assert_decodes(tmp_path / "a.safetensors", model, expected)
    else:
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model)


@pytest.mark.parametrize("name", ["latent", "latents", "z"])
def test_a_latent_without_a_batch(tmp_path: Path, model: str, expected: Pixels, name: str) -> None:
    save_file({name: LATENT[0].contiguous()}, tmp_path / "a.safetensors")
    assert_decodes(tmp_path / "a.safetensors", model, expected)


def comfy(latent: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """As ComfyUI's SaveLatent writes it."""
    return {"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([]), **others}


def test_comfyui_saves_in_the_autoencoders_own_scale(tmp_path: Path, model: str, expected: Pixels) -> None:
    scale = json.loads((Path(model) / "vae/config.json").read_text())["scaling_factor"]
    graph = {"prompt": json.dumps({"3": {"class_type": "KSampler"}}), "workflow": "{}"}
    save_file(comfy(LATENT / scale, noise_mask=torch.ones(1, 1, 96, 128)), tmp_path / "a.latent", metadata=graph)
    assert "KSampler" not in assert_decodes(tmp_path / "a.latent", model, expected)
    result = decode_latent(tmp_path / "a.latent", tmp_path / "a.png", model=model)
    assert any("ComfyUI" in line for line in result.notices)


def test_how_another_tools_latent_was_understood_is_told(tmp_path: Path, model: str) -> None:
    save_file({"latents": LATENT}, tmp_path / "a.safetensors")
    (line,) = decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model).notices
    assert "'latents' is taken as diffusers' pipelines give it" in line


def test_the_pipelines_of_diffusers_and_ours_mean_the_same_latent(tmp_path: Path, model: str) -> None:
    pipe = SanaPipeline.from_pretrained(model)
    size: dict[str, Any] = {"width": 64, "height": 96}
    images = pipe(
        "a lake",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        use_resolution_binning=False,
        **size,
    ).images
    request = Request("a lake", model=model, steps=2, seed=3, guidance=4.5, **size)
    generate(request, tmp_path / "ours.png", save_latent=tmp_path / "ours.safetensors")
    assert (load_file(tmp_path / "ours.safetensors")["latent"] - images).abs().max() < 1e-4
    save_file({"latents": images}, tmp_path / "theirs.safetensors")
    theirs = decode_latent(tmp_path / "theirs.safetensors", tmp_path / "theirs.png", model=model)
    difference = pixels_of(theirs.path).astype(int) - pixels_of(tmp_path / "ours.png")
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": LATENT, "b": LATENT}, ["'a' and 'b'", "which"]),
        ({"latents": LATENT, "image_latents": LATENT}, ["'image_latents' and 'latents'"]),
        ({"latent": LATENT, "samples": LATENT}, ["'latent' and 'samples'"]),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, ["no latent", "'a' and 'b'"]),
        ({"latents": LATENT.repeat(2, 1, 1, 1)}, ["2 latents"]),
        ({"latents": LATENT[None]}, ["'latents'", "5"]),
        ({"latents": torch.zeros(1, 32, 3, 4, dtype=torch.int64)}, ["'latents'", "int64"]),
        ({"latents": torch.zeros(1, 32, 0, 4)}, ["'latents'", "0"]),
        ({"latents": torch.zeros(1, 16, 3, 4)}, ["16 channels", "decodes 32"]),
        ({"anything": torch.zeros(1, 16, 3, 4)}, ["16 channels", "decodes 32"]),
        ({"latent_tensor": LATENT}, ["latent_format_version_0", "scaled"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_clear_is_refused_by_naming_the_tensors(
    tmp_path: Path, model: str, tensors: dict[str, Tensor], says: list[str]
) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model)
    assert "\n" not in str(caught.value)
    for each in says:
        assert each in str(caught.value)
    assert not (tmp_path / "a.png").exists()


def test_among_several_the_one_with_the_right_channels(tmp_path: Path, model: str, expected: Pixels) -> None:
    save_file({"image": torch.zeros(1, 3, 96, 128), "encoded": LATENT}, tmp_path / "a.safetensors")
    assert_decodes(tmp_path / "a.safetensors", model, expected)


def test_a_latent_without_a_model_asks_for_one(tmp_path: Path) -> None:
    save_file({"latents": LATENT}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="name it with --model"):
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png")


# Facts


def test_nothing_is_invented_of_a_latent_that_says_nothing(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"latents": LATENT}, "a.safetensors")
    assert cli.run(["decode", "a.safetensors", "--model", model, "-o", "a.png"]) == 0
    assert "seed" not in capsys.readouterr().err
    text = read_parameters(Path("a.png"))
    for each in INVENTED:
        assert each not in text
    assert text.startswith("Size: 128x96, VAE: 1.6b, Precision: autoencoder fp32, Version: handscroll ")
    assert text.endswith("Memory mode: rows, Exact: true")

    assert cli.run(["decode", "a.safetensors", "--model", model, "-o", "a.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found.keys() & {"seed", "steps", "guidance", "model", "prompt_tokens", "negative_tokens"}
    assert (found["autoencoder"], found["precision"], found["width"]) == ("1.6b", "autoencoder fp32", 128)
    assert cli.run(["info", "a.png"]) == 0
    shown = capsys.readouterr().out
    assert not [each for each in INVENTED if each in shown]


def test_what_a_latent_says_is_kept(tmp_path: Path, model: str) -> None:
    facts = {"prompt": "a red sun", "seed": str(2**64 - 1), "steps": "many", "guidance": "nan", "width": "100"}
    save_file({"latents": LATENT}, tmp_path / "a.safetensors", metadata=facts)
    result = decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model)
    assert (result.seed, result.steps, result.guidance, result.width) == (2**64 - 1, None, None, 100)
    text = read_parameters(result.path)
    assert text.startswith(f"a red sun\nSeed: {2**64 - 1}, Size: 100x96, VAE: 1.6b, ")


@pytest.mark.parametrize(
    ("facts", "width", "told"),
    [
        ({"seed": "-5", "steps": "1_0", "guidance": "-1"}, 128, {}),
        ({"seed": "٣", "steps": " 8", "guidance": "inf"}, 128, {}),
        ({"seed": "0", "steps": "8", "guidance": "2.50"}, 128, {"seed": 0, "steps": 8, "guidance": 2.5}),
        ({"width": "", "height": " "}, 128, {}),
        ({"width": "100.0", "height": "96.00"}, 100, {}),
        ({"revision": "v1", "seed": str(2**64)}, 128, {"revision": "v1"}),
    ],
    ids=str,
)
def test_only_what_can_be_so_is_taken_from_a_latent(
    tmp_path: Path, model: str, facts: dict[str, str], width: int, told: dict[str, Any]
) -> None:
    save_file({"latents": LATENT}, tmp_path / "a.safetensors", metadata=facts)
    result = decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model)
    assert result.width == width
    found = result.as_dict()
    assert {
        name: found[name] for name in ("seed", "steps", "guidance", "revision") if found.get(name) is not None
    } == told


@pytest.mark.parametrize("width", ["wide", "64.5", "-64", "1e3", "0x40", "6_4"])
def test_a_side_that_is_none_is_told_with_a_way_out(tmp_path: Path, model: str, width: str) -> None:
    save_file({"latents": LATENT}, tmp_path / "a.safetensors", metadata={"width": width})
    with pytest.raises(CheckpointError, match=f"width is '{width}'; take it out there, and the whole of the latent is"):
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model)


def test_numbers_beyond_fp32_are_the_files(tmp_path: Path, model: str) -> None:
    save_file({"latents": LATENT.double() * 1e300}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="'latents' holds numbers too large for fp32, which no model makes"):
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", model=model)


def test_another_models_autoencoder_is_not_the_model(tmp_path: Path, miniature: Miniature, model: str) -> None:
    request = Request("a lake", model=model, width=64, height=64, steps=1, seed=1)
    generate(request, tmp_path / "a.png", save_latent=tmp_path / "a.safetensors")
    own = decode_latent(tmp_path / "a.safetensors", tmp_path / "b.png", model=model)
    assert read_parameters(own.path) == read_parameters(tmp_path / "a.png")
    assert own.autoencoder is None
    other = decode_latent(tmp_path / "a.safetensors", tmp_path / "c.png", model=str(miniature("1.6b-2k")))
    text = read_parameters(other.path)
    assert "Model: 1.6b, VAE: 1.6b-2k, " in text
    assert (other.model, other.autoencoder, other.seed) == ("1.6b", "1.6b-2k", 1)


def test_info_knows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tensors in {"a.safetensors": {"latents": LATENT}, "b.latent": comfy(LATENT)}.items():
        save_file(tensors, tmp_path / name, metadata={"prompt": "a graph"})
        assert cli.run(["info", str(tmp_path / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["kind"], found["shape"]) == ("latent", [1, 32, 3, 4])
        assert found["facts"] == ({} if name == "b.latent" else {"prompt": "a graph"})


def test_a_peak_that_was_not_measured_is_not_told() -> None:
    from handscroll.cli.output import _summary
    from handscroll.jobs.result import Result

    memory: dict[str, Any] = {
        "budget_bytes": None,
        "planned_peak_bytes": None,
        "measured_peak_bytes": None,
        "stages": {},
    }
    result = Result(Path("a.png"), 64, 32, None, None, None, None, "x", "rows", True, memory, {"total": 1.0})
    assert _summary([result]) == "64x32, 1.0 s"
