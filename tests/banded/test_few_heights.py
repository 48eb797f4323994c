"""On CUDA devices convolutions are given few different heights: the same rows, fewer shapes to choose a way for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import miniatures
from handscroll.banded import backend
from handscroll.banded.autoencoder import cut_at_barriers, decode_rows, decoder_units, encode, strip_heights
from handscroll.banded.backend import Conv
from handscroll.banded.triton import launch
from handscroll.limits import few_heights, few_heights_below

HEIGHTS = {few_heights(rows) for rows in range(1, 2**12 + 1)}


@given(st.integers(1, 2**20))
def test_heights_are_few_and_near(rows: int) -> None:
    assert rows <= few_heights(rows) < max(5, 1.5 * rows)
    assert few_heights(few_heights(rows)) == few_heights(rows)
    assert 1 <= few_heights_below(rows) <= rows < 1.5 * few_heights_below(rows) + 1
    below = few_heights_below(rows)
    assert few_heights(below) == max(4, below)
    assert few_heights_below(2 * below) == 2 * below  # at the next level of the picture too


def test_there_are_two_of_each_octave() -> None:
    assert sorted(HEIGHTS)[:8] == [4, 6, 8, 12, 16, 24, 32, 48]
    assert len(HEIGHTS) == 21


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "pad_columns"),
    [
        ((1, 1), 1, 1, None),
        ((1, 1), 1, 4, None),
        ((3, 3), 1, 1, None),
        ((3, 3), 2, 1, None),
        ((5, 5), 1, 8, None),
        ((2, 2), 1, 1, 1),
    ],
)
@pytest.mark.parametrize("activation", [None, nn.SiLU(), nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_same_rows(
    kernel: tuple[int, int],
    stride: int,
    groups: int,
    pad_columns: int | None,
    activation: nn.Module | None,
    has_bias: bool,
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(16, 8 // groups, *kernel), torch.randn(16) if has_bias else None
    conv = Conv(weight, bias, stride=stride, groups=groups, pad_columns=pad_columns, activation=activation, plain=True)
    for rows in (1, 2, 5, 9, 16):
        row_block = torch.randn(2, (rows - 1) * stride + kernel[0], 7, 8)
        given, expected = row_block.clone(), conv(row_block)
        made = conv.of_few_heights(row_block)
        assert torch.equal(row_block, given)
        assert made.is_contiguous()
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strip_rows", [1, 3, None])
def test_the_networks_are_the_same(strip_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no convolution but a pointwise one is given another height than a few."""
    torch.manual_seed(0)
    model = miniatures.make_autoencoder().eval()
    latent, image = torch.randn(1, 32, 9, 5), torch.rand(1, 3, 288, 160)
    with torch.no_grad():
        picture, code = model.decoder(latent), model.encoder(image)
    monkeypatch.setattr(backend, "has_onednn", lambda weight: False)
    monkeypatch.setattr(Conv, "_made", Conv.of_few_heights)
    conv2d, given_rows = torch.nn.functional.conv2d, set()

    def noted(image: torch.Tensor, weight: torch.Tensor, bias: Any, stride: int, *given: Any, **more: Any) -> Any:
        out = conv2d(image, weight, bias, stride, *given, **more)
        given_rows.add(out.shape[2])
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)
    rows = torch.cat(list(decode_rows(model.decoder, latent, strip_rows)), dim=2)
    torch.testing.assert_close(rows, picture, atol=1e-4, rtol=0)
    torch.testing.assert_close(encode(model.encoder, image, strip_rows), code, atol=1e-3, rtol=0)
    assert given_rows <= HEIGHTS


def test_default_heights_need_no_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(torch.Tensor):
        is_cuda = True

    model = miniatures.make_autoencoder().eval()
    latent = torch.randn(1, 32, 300, 77).as_subclass(OnDevice)
    monkeypatch.setattr("handscroll.banded.autoencoder.sweeps.STRIP_BYTES", 2**18)
    sweeps = cut_at_barriers(decoder_units(model.decoder), 300, 77)
    heights = strip_heights(sweeps, latent, None)
    assert all(few_heights_below(height) == height for height in heights)


def test_where_triton_cannot_compile_pytorch_runs_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*given: Any, **more: Any) -> None:
        calls.append(given)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(launch.Kernel, "launch", fails)
    launch._works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"Failed to find C compiler\.\). What is mostly missing"):
            assert not launch._works(torch.device("cpu"))
        assert not launch._works(torch.device("cpu"))
        assert len(calls) == 1
    finally:
        launch._works.cache_clear()


@pytest.mark.parametrize(("asked", "used"), [(None, True), ("1", True), ("0", False)])
def test_kernels_are_used_on_devices_unless_they_are_forbidden(
    asked: str | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnDevice:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(launch, "available", lambda tensor: True)
    monkeypatch.setattr(launch, "_works", lambda device: True)
    if asked is None:
        monkeypatch.delenv("HANDSCROLL_TRITON", raising=False)
    else:
        monkeypatch.setenv("HANDSCROLL_TRITON", asked)
    assert launch.in_use(OnDevice()) is used  # type: ignore[arg-type]


def test_the_interpreter_is_used_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available", lambda tensor: True)
    monkeypatch.delenv("HANDSCROLL_TRITON", raising=False)
    assert not launch.in_use(torch.zeros(1))
    monkeypatch.setenv("HANDSCROLL_TRITON", "1")
    assert launch.in_use(torch.zeros(1))
