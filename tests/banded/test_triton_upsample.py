"""Upsampling against `pixel_shuffle`."""

from __future__ import annotations

import pytest
import torch

from handscroll.banded import backend, triton
from triton_cases import drawn, of_all_types, on_devices, on_triton, some_rows

pytestmark = on_triton


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "repeats"), [(24, 2), (24, 4), (24, 1), (40, 8), (136, None)])
def test_upsample_row_phase(device: str, dtype: torch.dtype, channels: int, repeats: int | None) -> None:
    batch, rows, width = 2, 3, 19
    pairs = [drawn(batch, rows, width + 1, 2 * channels, dtype=dtype, device=device) for _ in range(2)]
    source = None
    expected = torch.empty(batch, rows, 2, width, 2, channels, dtype=dtype, device=device)
    for row_phase, pair in enumerate(pairs):
        expected[:, :, row_phase, :, 0] = pair[:, :, :-1, :channels]
        expected[:, :, row_phase, :, 1] = pair[:, :, 1:, channels:]
    expected = expected.view(batch, 2 * rows, 2 * width, channels)
    if repeats is not None:
        source = some_rows(drawn(batch, rows, width, 4 * channels // repeats, dtype=dtype, device=device))
        expected += backend.pixel_shuffle(source.repeat_interleave(repeats, dim=-1))
    out = torch.zeros_like(expected)
    for row_phase, pair in enumerate(pairs):
        triton.upsample_row_phase(pair, source, repeats or 1, row_phase, out)
    assert torch.equal(out, expected)
