"""Both networks with Triton's kernels in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miniatures
from handscroll.banded.autoencoder import decode_rows
from handscroll.banded.transformer import Branch, predict
from handscroll.banded.triton import launch
from triton_cases import drawn, on_devices, on_triton

pytestmark = on_triton


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that the networks have called."""
    names: set[str] = set()
    run = launch.Kernel.launch

    def noted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.add(kernel.function.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setenv("HANDSCROLL_TRITON", "1")
    monkeypatch.setattr(launch.Kernel, "launch", noted)
    return names


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ["1.6b", "1.5-1.6b"])
@torch.no_grad()
def test_the_transformer_predicts_the_same(device: str, dtype: torch.dtype, row: str, used: set[str]) -> None:
    model = miniatures.make_transformer(row, num_layers=1).to(device, dtype)
    latent, text = drawn(1, 32, 4, 6, dtype=dtype, device=device), drawn(1, 5, 48, dtype=dtype, device=device)
    branch = Branch(latent, text[..., : model.config.caption_channels], None, torch.tensor([411.0], device=device))
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = model(latent, encoder_hidden_states=branch.text, timestep=branch.timestep, return_dict=False)[0]
    assert not used
    # The second slab and the last row block are smaller than the others.
    out = predict(model, [branch], band_rows=3)[0]
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    assert used >= {
        "layer_norm_modulate_kernel",
        "gate_add_kernel",
        "depthwise_gate_kernel",
        "attention_sums_kernel",
        "attention_apply_kernel",
    }
    assert ("rms_norm_kernel" in used) == (model.transformer_blocks[0].attn1.norm_q is not None)


@on_devices
@torch.no_grad()
def test_the_decoder_gives_the_same_rows(device: str, used: set[str]) -> None:
    decoder = miniatures.make_autoencoder().decoder.to(device)
    latent = drawn(1, 32, 3, 3, dtype=torch.float32, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decoder(latent)
        assert not used
        out = torch.cat(list(decode_rows(decoder, latent, 40)), dim=2)
    torch.testing.assert_close(out, expected, atol=2e-5 if device == "cpu" else 1e-4, rtol=0)
    assert used == ({"bias_activation_kernel"} if device == "cuda" else set()) | {
        "rms_norm_kernel",
        "depthwise_gate_kernel",
        "attention_sums_kernel",
        "add_parts_kernel",
        "attention_apply_kernel",
        "upsample_row_phase_kernel",
    }
