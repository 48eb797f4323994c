"""The benchmark's random checkpoints are whole, load strictly, and are reproducible."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderDC

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.runtime.modules import load_module, load_tokenizer

SCRIPT = Path(__file__).parents[1] / "bench" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", str(out), "--miniature", *options])
    script.main()
    return out


@pytest.mark.parametrize("model", ["sana-0.6b-512", "sana-1.6b-4k", "sana-1.5-4.8b", "sana-sprint-1.6b"])
def test_it_loads(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    folder = make(script, monkeypatch, tmp_path / model, "--model", model, "--shard-bytes", "100000")
    spec = CheckpointSpec.from_folder(folder)
    assert spec.transformer_weights.dtype == "bf16"
    assert len(spec.autoencoder_weights.files) > 1
    assert spec.is_sprint == ("sprint" in model)
    assert (spec.transformer.interpolation_scale is not None) == model.endswith("4k")
    assert len(load_tokenizer(spec)) <= spec.text_encoder.vocab_size

    transformer = load_module(spec, "transformer", dtype=torch.float32, device="cpu")
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1 and "scale_shift" not in name and parameter.numel() > 1000:
            fan_in = parameter[0].numel()
            assert 0.8 < parameter.std() * fan_in**0.5 < 1.2, name
    with torch.no_grad():
        vae: AutoencoderDC = load_module(spec, "vae", dtype=torch.float32, device="cpu")
        picture = vae.decode(torch.randn(1, 32, 4, 4)).sample
        text = load_module(spec, "text_encoder", dtype=torch.float32, device="cpu")(torch.arange(4, 20)[None])
    assert 0.05 < picture.std() < 20
    assert text.last_hidden_state.isfinite().all()


def test_the_same_seed_writes_the_same_bytes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = []
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        folder = make(script, monkeypatch, tmp_path / name, "--seed", seed, "--no-text-encoder", "--dtype", "fp32")
        assert not (folder / "text_encoder").exists()
        files.append((folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
