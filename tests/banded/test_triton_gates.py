"""The gates against the operators that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handscroll.banded import backend, triton
from triton_cases import assert_rounds_as, drawn, of_all_types, on_devices, on_triton, some_channels, some_rows

pytestmark = on_triton


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows"), [(24, 3), (1152, 2), (2240, 1)])
def test_gate_add(device: str, dtype: torch.dtype, channels: int, rows: int) -> None:
    out, residual = (drawn(2, rows, 5, channels, dtype=dtype, device=device) for _ in range(2))
    gate = drawn(2, 6, 1, 1, channels, dtype=dtype, device=device).unbind(1)[2]
    for limit in (None, 0.5):
        expected = (out if limit is None else out.clamp(-limit, limit)) * gate + residual
        ours = some_rows(out)
        assert triton.gate_add_(ours, gate, some_rows(residual), limit) is ours
        # The same roundings of the same two operations: the same bits.
        assert torch.equal(ours, expected)


@on_devices
@of_all_types
def test_a_limit_passes_on_nan(device: str, dtype: torch.dtype) -> None:
    out = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device, dtype=dtype).view(1, 1, 1, 4)
    one = torch.ones(1, 1, 1, 4, device=device, dtype=dtype)
    triton.gate_add_(out, one, torch.zeros_like(out), 65504.0)
    assert out[..., 0].isnan().all()
    assert out[..., 1:].isfinite().all()


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows", "width"), [(24, 1, 1), (24, 9, 7), (64, 2, 8), (80, 1, 9)])
def test_depthwise_gate(device: str, dtype: torch.dtype, channels: int, rows: int, width: int) -> None:
    row_block = drawn(2, rows + 2, width, 2 * channels, dtype=dtype, device=device)
    weight = drawn(2 * channels, 1, 3, 3, dtype=dtype, device=device)
    bias = drawn(2 * channels, dtype=dtype, device=device)

    def expected(bias: Tensor | None) -> Tensor:
        image = row_block.float().permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(allow_tf32=False):
            convolved = F.conv2d(image, weight.float(), bias, padding=(0, 1), groups=2 * channels)
        return backend.gate_(convolved.to(dtype).permute(0, 2, 3, 1).contiguous())

    # Values and gates in one row block, as the decoder has them, and each in its own, as the transformer has.
    of_values, of_gates = weight.chunk(2)
    values, gates = some_rows(row_block).chunk(2, dim=-1)
    biases = bias.chunk(2)
    ours = triton.depthwise_gate(values, gates, (of_values, of_gates), (biases[0], biases[1]))
    assert_rounds_as(ours, expected(bias.float()))
    out = some_channels(torch.zeros_like(row_block[:, 2:, :, :channels]))
    values, gates = (half.contiguous() for half in row_block.chunk(2, dim=-1))
    assert triton.depthwise_gate(values, gates, (of_values, of_gates), (None, None), out) is out
    assert_rounds_as(out, expected(None))


@on_devices
def test_depthwise_gate_has_the_same_bits_at_every_height(device: str) -> None:
    row_block = drawn(1, 9, 5, 48, dtype=torch.bfloat16, device=device)
    weight = drawn(48, 1, 3, 3, dtype=torch.bfloat16, device=device)

    def gated(row_block: Tensor) -> Tensor:
        (values, gates), (of_values, of_gates) = row_block.chunk(2, dim=-1), weight.chunk(2)
        return triton.depthwise_gate(values, gates, (of_values, of_gates), (None, None))

    rows = [gated(row_block[:, row : row + 3]) for row in range(7)]
    assert torch.equal(torch.cat(rows, dim=1), gated(row_block))
