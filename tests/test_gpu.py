"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from handscroll import Request, generate
from handscroll.banded.autoencoder import decode_rows

Miniature = Callable[..., Path]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_rows_are_the_whole_decode() -> None:
    import miniatures

    torch.manual_seed(0)
    decoder = miniatures.make_autoencoder().eval().cuda().decoder
    latent = torch.randn(2, 32, 5, 7, device="cuda")
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        whole = decoder(latent)
        for strip_rows in (1, 3, None):
            rows = torch.cat(list(decode_rows(decoder, latent, strip_rows)), dim=2)
            assert (rows - whole).abs().max().item() <= 1e-4


def test_bf16_rows_err_no_more_than_the_whole_decode() -> None:
    import miniatures

    ours = theirs = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        decoder = miniatures.make_autoencoder().eval().decoder
        latent = torch.randn(1, 32, 6, 6)
        with torch.no_grad():
            reference = decoder(latent)
            half, half_latent = decoder.cuda().bfloat16(), latent.cuda().bfloat16()
            theirs += (half(half_latent).float().cpu() - reference).abs().mean().item()
            rows = torch.cat(list(decode_rows(half, half_latent, 2)), dim=2)
            ours += (rows.float().cpu() - reference).abs().mean().item()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("row", ["1.6b", "sprint-1.6b"])
def test_a_picture_is_made_on_the_device(miniature: Miniature, row: str, tmp_path: Path) -> None:
    request = Request("a lake", model=str(miniature(row)), width=128, height=96, steps=2, seed=1, device="cuda")
    (result,) = generate(request, tmp_path / "p.png")
    assert result.path.stat().st_size > 1000
    assert 0 < result.memory["measured_peak_bytes"] < 2**30
