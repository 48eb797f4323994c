"""Streaming gives what diffusers' own forward gives, for every configuration, row block height and size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from autoencoder_cases import (
    CASES,
    EXACT,
    F32,
    STRIP_ROWS,
    autoencoder,
    decode,
    latent_of,
    steady_autoencoder,
    streamed,
)
from handscroll.banded.autoencoder import decode_rows, encode

# Of the case that most others differ from in one thing every size; of these the first and the last.
EACH = [
    pytest.param(
        name,
        *size,
        id=f"{name}-{size[0]}x{size[1]}",
        marks=() if name == "f32" or size in (case.sizes[0], case.sizes[-1]) else pytest.mark.thorough,
    )
    for name, case in CASES.items()
    for size in case.sizes
]


@pytest.mark.parametrize(("name", "height", "width"), EACH)
def test_decode_is_the_whole_decode(name: str, height: int, width: int) -> None:
    model = steady_autoencoder(name, height, width)
    latent = latent_of(model, height, width)
    given = latent.clone()
    whole = model.decoder(latent)
    assert whole.std() > 1e-2
    results = [decode(model, latent, strip_rows) for strip_rows in STRIP_ROWS]
    for strip_rows, result in zip(STRIP_ROWS, results, strict=True):
        assert result.shape == whole.shape
        assert torch.equal(result, results[0]), strip_rows
    assert (results[0] - whole).abs().max() <= EXACT
    assert (decode(model, latent, 3, plain=True) - whole).abs().max() <= EXACT
    assert torch.equal(latent, given)


@pytest.mark.parametrize(("name", "height", "width"), EACH)
def test_encode_is_the_whole_encode(name: str, height: int, width: int) -> None:
    model = autoencoder(name)
    scale = model.decoder(latent_of(model, 1, 1, batch=1)).shape[-1]
    image = torch.randn(2, 3, height * scale, width * scale, generator=torch.Generator().manual_seed(2))
    given = image.clone()
    whole = model.encoder(image)
    assert whole.std() > 1e-2
    results = [encode(model.encoder, image, strip_rows) for strip_rows in (2, None)]
    results.append(encode(model.encoder, image, 3, plain=True))
    for result in results:
        assert result.shape == whole.shape
        assert (result - whole).abs().max() <= EXACT
        assert (result - results[0]).abs().max() <= EXACT
    assert torch.equal(image, given)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second of": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_input(layout: str) -> None:
    model = autoencoder("f32")
    latent = LAYOUTS[layout](latent_of(model, 3, 2))
    image = LAYOUTS[layout](torch.randn(2, 3, 32, 64))
    assert (decode(model, latent, 3) - model.decoder(latent)).abs().max() <= EXACT
    assert (encode(model.encoder, image, 3) - model.encoder(image)).abs().max() <= EXACT


def test_no_graph_is_built_where_gradients_are_enabled() -> None:
    model = autoencoder("f32")
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            latent = latent_of(model, 3, 2).requires_grad_()
            rows = list(decode_rows(model.decoder, latent, 2))
            quadratic = list(decode_rows(model.decoder, latent[:, :, :1, :1], 2))
            encoded = encode(model.encoder, torch.randn(1, 3, 32, 64).requires_grad_())
            assert torch.is_grad_enabled()
        assert not any(result.requires_grad for result in [*rows, *quadratic, encoded])
    finally:
        model.requires_grad_(False)


def test_the_caller_keeps_its_gradient_mode_between_rows() -> None:
    model = autoencoder("f32")
    rows = decode_rows(model.decoder, latent_of(model, 3, 2), 1)
    with torch.enable_grad():
        next(rows)
        assert torch.is_grad_enabled()
        rows.close()
        assert torch.is_grad_enabled()


def test_rows_stay_as_they_were_given() -> None:
    """A consumer may keep a row block, or write over it: no row block is memory that the decoder uses again."""
    model = autoencoder("f32")
    latent = latent_of(model, 3, 2)
    kept, copies = [], []
    for row_block in decode_rows(model.decoder, latent, 2):
        kept.append(row_block)
        copies.append(row_block.clone())
    assert all(torch.equal(row_block, copy) for row_block, copy in zip(kept, copies, strict=True))

    overwritten = []
    for row_block in decode_rows(model.decoder, latent, 2):
        overwritten.append(row_block.clone())
        row_block.fill_(float("nan"))
    assert torch.equal(torch.cat(overwritten, dim=2), torch.cat(copies, dim=2))


def test_it_may_be_left_early_and_run_twice_at_once() -> None:
    model = autoencoder("f32")
    latent = latent_of(model, 3, 2)
    expected = decode(model, latent, 2)
    left = decode_rows(model.decoder, latent, 2)
    next(left)
    left.close()
    with pytest.raises(StopIteration):
        next(left)
    pairs = zip(decode_rows(model.decoder, latent, 2), decode_rows(model.decoder, -latent, 2), strict=True)
    assert torch.equal(torch.cat([first for first, _ in pairs], dim=2), expected)


def test_the_model_is_left_as_it_was() -> None:
    model = autoencoder("f32 with batch norm and relu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decode(model, latent_of(model, 3, 2), 2)
    encode(model.encoder, torch.randn(1, 3, 32, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(48, 64), (64, 33), (31, 32)])
def test_sides_that_do_not_halve_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        encode(autoencoder("f32").encoder, torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    "latent",
    [torch.zeros(1, 5, 3, 3), torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16), torch.zeros(1, 4, 0, 3)],
    ids=["channels", "type", "no rows"],
)
def test_a_latent_that_does_not_fit_is_refused(latent: Tensor) -> None:
    with pytest.raises(ValueError, match="expected channels, type and device"):
        decode(autoencoder("f32"), latent)
    with pytest.raises(ValueError, match="expected channels, type and device"):
        encode(autoencoder("no layers in the first stage").encoder, latent)


def test_double_precision() -> None:
    decoder = copy.deepcopy(autoencoder("batch norm in attention").decoder).double()
    latent = latent_of(autoencoder("batch norm in attention"), 3, 4).double()
    assert (streamed(decoder, latent, 4) - decoder(latent)).abs().max() <= EXACT


@pytest.mark.parametrize("strip_rows", [0, -1])
def test_strips_have_rows(strip_rows: int) -> None:
    model = autoencoder("f32")
    with pytest.raises(ValueError, match="rows"):
        decode(model, latent_of(model, 3, 2), strip_rows)


def test_sweeps_are_counted() -> None:
    model = autoencoder("f32")
    told: list[tuple[int, int]] = []
    list(decode_rows(model.decoder, latent_of(model, 3, 2), 2, on_sweep=lambda done, of: told.append((done, of))))
    assert told == [(done, 5) for done in range(1, 6)]  # four attentions part five sweeps


def test_a_layer_it_cannot_stream_is_refused() -> None:
    class Quantised(nn.Conv2d):
        pass

    model = AutoencoderDC(**F32).eval()
    model.decoder.conv_in = Quantised(4, 16, 3, padding=1)
    with pytest.raises(TypeError, match="Quantised"):
        decode(model, latent_of(model, 2, 2))


def test_bf16_is_as_near_to_fp32_as_the_whole_decode() -> None:
    """Over several networks: in a single one rounding is chaotic, and either way may be ahead by a third."""
    errors = {"whole": 0.0, "rows": 0.0, "plain": 0.0}
    for name in ("f32", "f32 by shuffling", "f32 with batch norm and relu", "without shortcuts"):
        for seed in range(4):
            half = copy.deepcopy(autoencoder(name, seed).decoder).to(torch.bfloat16)
            # The reference has the weights that bf16 can hold: what is compared is the arithmetic.
            reference = copy.deepcopy(half).float()
            latent = latent_of(autoencoder(name, seed), 3, 4, batch=4, seed=seed).to(torch.bfloat16)
            expected = reference(latent.float())
            results = {
                "whole": half(latent),
                "rows": streamed(half, latent, 4),
                "plain": streamed(half, latent, 4, plain=True),
            }
            for way, result in results.items():
                assert result.dtype == torch.bfloat16
                errors[way] += (result.float() - expected).abs().mean().item()
    assert errors["rows"] <= 1.1 * errors["whole"], errors
    assert errors["plain"] <= 1.1 * errors["whole"], errors
