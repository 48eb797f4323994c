"""Numbers that are not finite: whose they are, and no advice that will fail again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handscroll import Handscroll, Request, decode_latent, generate
from handscroll.cli import main as cli
from handscroll.errors import NumericsError
from handscroll.events import Progress
from handscroll.weights import files
from handscroll.weights.files import first_not_finite
from handscroll.weights.header import read_header

Miniature = Callable[..., Path]
WEIGHTS = {
    "text": ("text_encoder/model.safetensors", "layers.1.mlp.up_proj.weight"),
    "denoise": ("transformer/diffusion_pytorch_model.safetensors", "transformer_blocks.1.attn2.to_v.weight"),
    "decode": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
}


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "model"))


def fill(folder: Path, stage: str, value: float, *, all_of_it: bool = False) -> Path:
    """Puts a value into one weight of a stage, or into all of it; the file."""
    name, tensor = WEIGHTS[stage]
    tensors = load_file(folder / name)
    tensors[tensor].view(-1)[slice(None) if all_of_it else slice(-1, None)] = value
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder / name


def request_for(folder: Path, **options: Any) -> Request:
    return Request("a lake", model=str(folder), width=64, height=64, steps=2, seed=3, **options)


@pytest.mark.parametrize("stage", WEIGHTS)
@pytest.mark.parametrize(("precision", "value"), [("fp32", float("nan")), ("bf16", float("-inf"))])
def test_a_weight_is_named_and_nothing_is_tried_again(
    folder: Path, tmp_path: Path, stage: str, value: float, precision: Any
) -> None:
    file = fill(folder, stage, value)
    lines: list[str] = []

    def listen(event: Progress) -> None:
        if event.stage == "notice":
            lines.append(event.detail)

    with pytest.raises(NumericsError) as caught:
        generate(request_for(folder, precision=precision), tmp_path / "p.png", on_event=listen)
    assert f"{file}: the tensor {WEIGHTS[stage][1]} holds numbers that are not finite" in str(caught.value)
    assert not lines
    assert "resume" not in " ".join(getattr(caught.value, "__notes__", ()))


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_computation_that_overflows_in_fp32_says_that_the_weights_are_finite(
    folder: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, stage, 3e38, all_of_it=True)
    arguments = ["generate", "a lake", "--model", str(folder), "--size", "64", "--steps", "2", "--seed", "3"]
    assert cli.run([*arguments, "-o", str(tmp_path / "p.png"), "--precision", "fp32"]) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error")]
    assert "its weights are finite and it computed in fp32" in line
    assert "handscroll resume" not in line


def test_what_decoding_does_not_read_is_not_blamed(folder: Path, tmp_path: Path) -> None:
    """The autoencoder's encoder lies in the same file."""
    fill(folder, "decode", 3e38, all_of_it=True)
    name = "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(folder / name)
    encoder = next(each for each in tensors if each.startswith("encoder."))
    tensors[encoder].fill_(float("nan"))
    save_file(tensors, folder / name, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"its weights are finite.*change the prompt"):
        generate(request_for(folder, precision="fp32"), tmp_path / "p.png")


def test_who_decodes_a_latent_has_no_prompt_to_change(folder: Path, tmp_path: Path) -> None:
    latent = tmp_path / "latent.safetensors"
    generate(request_for(folder), tmp_path / "p.png", save_latent=latent)
    fill(folder, "decode", 3e38, all_of_it=True)
    with pytest.raises(NumericsError, match="decode another latent, or use another checkpoint") as caught:
        decode_latent(latent, tmp_path / "q.png", precision="fp32")
    assert "prompt" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_is_named(folder: Path, tmp_path: Path, value: float) -> None:
    latent = tmp_path / "latent.safetensors"
    generate(request_for(folder), tmp_path / "p.png", save_latent=latent)
    tensors = load_file(latent)
    tensors["latent"][0, 0, 0, 0] = value
    save_file(tensors, latent, metadata={"model": str(folder), "width": "64", "height": "64"})
    with pytest.raises(NumericsError, match="the latent holds numbers that are not finite"):
        decode_latent(latent, tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()


def test_the_class_names_the_weight_too(folder: Path) -> None:
    file = fill(folder, "denoise", float("nan"))
    scroll = Handscroll.from_pretrained(folder)
    with pytest.raises(NumericsError, match=r"transformer_blocks\.1\.attn2\.to_v\.weight") as caught:
        scroll("a lake", size="64", steps=1, seed=1)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 499, 999])
def test_every_piece_of_every_tensor_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, place: int
) -> None:
    monkeypatch.setattr(files, "STAGING_BYTES", 256)
    tensors = {"a": torch.ones(10, 100), "b": torch.ones(1000), "c": torch.tensor(7), "d": torch.zeros(0, 3)}
    tensors = {name: tensor.to(dtype) if name in "ab" else tensor for name, tensor in tensors.items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    assert first_not_finite(read_header(file)) is None
    tensors["b"][place] = float("nan")
    save_file(tensors, file)
    found = first_not_finite(read_header(file))
    assert found is not None
    assert found.name == "b"
