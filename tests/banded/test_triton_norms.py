"""The norms against the operators that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from handscroll.banded import backend, quantised, triton
from triton_cases import assert_rounds_as, drawn, of_all_types, on_devices, on_triton, some_channels, some_rows

pytestmark = on_triton


@on_devices
@of_all_types
@pytest.mark.parametrize(
    ("channels", "rows", "activation", "adds"),
    [
        (24, 3, None, True),
        (24, 1, "silu", False),
        (128, 7, "relu", True),
        (1152, 1, None, True),
        (2240, 1, "silu", True),
        (6000, 1, None, False),
    ],
)
def test_rms_norm(
    device: str, dtype: torch.dtype, channels: int, rows: int, activation: str | None, adds: bool
) -> None:
    width = 5 if channels < 1000 else 2
    row_block = drawn(2, rows, width, channels, dtype=dtype, device=device, scale=3.0)
    weight, bias = (drawn(channels, dtype=dtype, device=device) for _ in range(2))
    residual = drawn(2, rows, width, channels, dtype=dtype, device=device) if adds else None
    expected = backend.rms_norm_(row_block.clone(), weight, bias, 1e-5)
    if activation is not None:
        expected = getattr(F, activation)(expected)
    if residual is not None:
        expected = expected + residual
    given = some_rows(row_block)
    before = given.clone()
    residual = None if residual is None else some_rows(residual)
    assert_rounds_as(triton.rms_norm(given, weight, bias, 1e-5, residual, activation), expected)
    assert torch.equal(given, before)
    in_place = triton.rms_norm(given, weight, bias, 1e-5, residual, activation, out=given)
    assert in_place is given
    assert_rounds_as(given, expected)


@on_devices
def test_rms_norm_without_weights_of_some_channels(device: str) -> None:
    row_block = drawn(2, 3, 5, 24, dtype=torch.float32, device=device)
    expected = backend.rms_norm_(row_block.clone(), None, None, 1e-2)
    assert_rounds_as(triton.rms_norm(some_channels(row_block), None, None, 1e-2), expected)


@on_devices
@of_all_types
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_norms_pass_on_what_is_not_finite(device: str, dtype: torch.dtype) -> None:
    row_block = drawn(1, 1, 3, 24, dtype=dtype, device=device)
    row_block[0, 0, 1, 5] = torch.nan
    row_block[0, 0, 2, 5] = torch.inf
    modulation = drawn(1, 1, 1, 24, dtype=dtype, device=device)
    for normed in (
        triton.rms_norm(row_block, None, None, 1e-5, activation="relu"),
        triton.rms_norm(row_block, None, None, 1e-5, activation="silu"),
        triton.layer_norm_modulate(row_block, modulation, modulation, 1e-6),
    ):
        assert normed[0, 0, 0].isfinite().all()
        assert normed[0, 0, 1].isnan().all()
        assert normed[0, 0, 2, 5].isnan()


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows"), [(24, 3), (128, 7), (1152, 1), (2240, 1)])
def test_layer_norm_modulate(device: str, dtype: torch.dtype, channels: int, rows: int) -> None:
    # Sana's residual stream is far from centred.
    width = 5 if channels < 1000 else 2
    row_block = drawn(2, rows, width, channels, dtype=dtype, device=device, scale=3.0) + 7
    modulation = drawn(2, 6, 1, 1, channels, dtype=dtype, device=device)
    shift, scale = modulation.unbind(1)[1], 1 + modulation.unbind(1)[2]
    expected = F.layer_norm(row_block, (channels,), eps=1e-6).mul_(scale).add_(shift)
    given = some_rows(row_block)
    assert_rounds_as(triton.layer_norm_modulate(given, shift, scale, 1e-6), expected)
    assert torch.equal(given, row_block)
    assert triton.layer_norm_modulate(given, shift, scale, 1e-6, out=given) is given
    assert_rounds_as(given, expected)


@on_devices
def test_a_pixel_has_the_same_bits_in_every_strip(device: str) -> None:
    row_block = drawn(1, 3, 5, 2240, dtype=torch.bfloat16, device=device)
    modulation = drawn(1, 1, 1, 2240, dtype=torch.bfloat16, device=device)
    for run in (
        lambda rows: triton.rms_norm(rows, None, None, 1e-6),
        lambda rows: triton.layer_norm_modulate(rows, modulation, modulation, 1e-6),
    ):
        assert torch.equal(run(row_block)[:, 1:2], run(row_block[:, 1:2]))


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows"), [(24, 3), (128, 7), (2240, 1)])
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_activation(
    device: str, dtype: torch.dtype, channels: int, rows: int, activation: str | None, has_bias: bool
) -> None:
    row_block = drawn(2, rows, 5, channels, dtype=dtype, device=device, scale=3.0)
    bias = drawn(channels, dtype=dtype, device=device) if has_bias else None
    expected = row_block if bias is None else row_block + bias
    if activation is not None:
        expected = getattr(F, activation)(expected)
    given = some_rows(row_block)
    assert triton.bias_activation_(given, bias, activation) is given
    assert_rounds_as(given, expected)


@on_devices
@of_all_types
@pytest.mark.parametrize(("rows", "channels"), [(1, 16), (5, 80), (3, 2240)])
def test_quantise_rows(
    device: str, dtype: torch.dtype, rows: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn(rows, channels + 8, dtype=dtype, device=device, scale=3.0)[:, :channels]
    given[0, :3] = torch.tensor([0.5, 1.5, 127.0], dtype=dtype)  # halves go to the even number
    for eight in (torch.int8,) if device == "cpu" else (torch.int8, torch.float8_e4m3fn):
        monkeypatch.setenv("HANDSCROLL_TRITON", "0")
        expected, of_rows = quantised.quantised(given, eight)
        monkeypatch.setenv("HANDSCROLL_TRITON", "1")
        numbers, scales = quantised.quantised(given, eight)
        assert torch.equal(scales, of_rows)
        assert torch.equal(numbers.view(torch.uint8), expected.view(torch.uint8))


@on_devices
@pytest.mark.filterwarnings("ignore:invalid value")
def test_quantised_rows_of_zeros_and_nan(device: str) -> None:
    given = torch.zeros(3, 32, device=device)
    given[1, 5], given[2, 5] = torch.nan, torch.inf
    numbers, scales = triton.quantise_rows(given, torch.int8, 1 / 127, 1e-38)
    assert not numbers[0].any()
    assert scales[0].isfinite().all()
    assert not scales[1:].isfinite().any()
