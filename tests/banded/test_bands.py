"""A picture in bands on several ranks: the same bits as one rank gives, and as many bytes sent as the closed form."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor

import miniatures
from autoencoder_cases import CASES, DTYPES, F32, autoencoder, latent_of
from handscroll.banded import sums
from handscroll.banded.autoencoder import Attention, cut_at_barriers, decode_rows, decoder_units, encode
from handscroll.banded.autoencoder.route import Route
from handscroll.banded.exchange import Exchange
from handscroll.banded.transformer import Branch, predict
from handscroll.bands import Bands
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.denoise import bands_of_branches
from rank_cases import ThreadRanks, on_ranks
from transformer_cases import branches, transformer

SIZES = [(4, 4), (7, 1), (5, 9), (16, 3)]


def predicted(
    model: Any, given: list[Branch], size: int, weights: tuple[float, ...] | None = None, **options: Any
) -> list[list[Tensor]]:
    """What every rank gives of every branch; weights: of rows of stacked branches, else each is cut alike."""
    rows = given[0].latent.shape[-2] // model.config.patch_size
    bands = [Bands.of(rows, size)] * len(given) if weights is None else Bands.stacked(rows, weights, size)

    def work(ranks: ThreadRanks) -> list[Tensor]:
        exchanges = [Exchange(ranks, each) for each in bands]
        own = predict(model, given, exchanges=exchanges, **options)
        scaled = [each.scaled(model.config.patch_size) for each in exchanges]
        return [exchange.whole(each, dim=2) for exchange, each in zip(scaled, own, strict=True)]

    return on_ranks(size, work)


def each(names: Iterable[str], *always: str) -> list[Any]:
    """Every name in both types, most of them only where there is time."""
    marks = {torch.float32: pytest.mark.thorough, torch.bfloat16: pytest.mark.slow}
    return [
        pytest.param(name, dtype, marks=() if name in always else marks[dtype], id=f"{name}-{dtype}")
        for name in names
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("row", "dtype"), each(miniatures.ROWS, "1.6b"))
def test_bands_of_a_transformer_change_no_bit(row: str, dtype: torch.dtype) -> None:
    model = transformer(row, dtype)
    for height, width in SIZES:
        given = branches(model, height, width, texts=(5, 1))
        expected = predict(model, given)
        for size in (1, 2, 3, 4, 7):
            if size > height:
                continue
            for rows, weights in ((1, None), (2, (5.0, 4.0)), (None, (1.0, 1.0))):
                for of_rank in predicted(model, given, size, weights, band_rows=rows):
                    assert all(map(torch.equal, of_rank, expected)), f"{size} ranks, {height} rows, blocks of {rows}"


def test_bands_of_patches_change_no_bit() -> None:
    model = transformer("1.6b", patch_size=2, interpolation_scale=0.5)
    given = branches(model, 10, 6)
    made = predicted(model, given, 3, (1.0, 1.0))
    assert all(map(torch.equal, made[1], predict(model, given)))


def test_bands_of_another_height_are_refused() -> None:
    model = transformer("1.6b")
    with pytest.raises(ValueError, match="bands of 5 rows are not those of the token map"):
        predict(model, branches(model, 4, 4), exchanges=[Exchange(ThreadRanks(0, {}, 1), Bands.of(5, 1))] * 2)


@pytest.mark.parametrize(("name", "dtype"), each(CASES, "f32"))
def test_bands_of_a_decoder_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(autoencoder(name)).to(dtype)
    for height, width in ((2, 2), (5, 7), (9, 1)):
        latent = latent_of(model, height, width, batch=1).to(dtype)
        whole = torch.cat(list(decode_rows(model.decoder, latent, 2)), dim=2)
        sweeps = len(cut_at_barriers(decoder_units(model.decoder), height, width))
        for size, starts, strip_rows in ((2, None, 3), (3, [0] * sweeps, 1), (5, restarted(sweeps), None)):
            if size > height:
                continue
            bands = Bands.of(height, size)

            def work(ranks: ThreadRanks) -> Tensor:
                exchange = Exchange(ranks, bands)  # noqa: B023
                options: Any = {"starts": starts, "exchange": exchange}  # noqa: B023
                return torch.cat(list(decode_rows(model.decoder, latent, strip_rows, **options)), dim=2)  # noqa: B023

            made = on_ranks(size, work)
            scale = whole.shape[2] // height
            assert [each.shape[2] for each in made] == [len(rows) * scale for rows in bands]
            assert torch.equal(torch.cat(made, dim=2), whole), f"{size} ranks, {height}x{width}, starts {starts}"


def restarted(sweeps: int) -> list[int]:
    """All but the first two sweeps begin from map 1."""
    return [min(index, 1) for index in range(sweeps)]


@pytest.mark.parametrize(("name", "dtype"), each(CASES, "f32"))
def test_bands_of_an_encoder_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(autoencoder(name)).to(dtype)
    scale = model.decoder(latent_of(model, 1, 1, batch=1).to(dtype)).shape[-1]
    for height, width, size in ((2, 2, 2), (5, 3, 3), (7, 1, 5)):
        image = torch.randn(1, 3, height * scale, width * scale, generator=torch.Generator().manual_seed(2)).to(dtype)
        whole = encode(model.encoder, image, 2)
        bands = Bands.of(height, size)

        def work(ranks: ThreadRanks) -> Tensor:
            return encode(model.encoder, image, 3, exchange=Exchange(ranks, bands))  # noqa: B023

        for of_rank in on_ranks(size, work):
            assert torch.equal(of_rank, whole), f"{size} ranks, {height}x{width}"


def test_bands_of_unlike_devices_change_no_bit() -> None:
    shares = (1.0, 0.3, 0.6)
    model = transformer("1.6b")
    spec = TransformerSpec.from_config(dict(model.config))
    for height, width in SIZES:
        given = branches(model, height, width, texts=(5, 1))
        bands = bands_of_branches(spec, height, width, (5, 1), 3, shares)

        def work(ranks: ThreadRanks) -> list[Tensor]:
            exchanges = [Exchange(ranks, each) for each in bands]  # noqa: B023
            own = predict(model, given, exchanges=exchanges)  # noqa: B023
            return [exchange.whole(each, dim=2) for exchange, each in zip(exchanges, own, strict=True)]

        for of_rank in on_ranks(3, work):
            assert all(map(torch.equal, of_rank, predict(model, given)))
    coder = autoencoder("f32")
    latent = latent_of(coder, 9, 4, batch=1)
    whole = torch.cat(list(decode_rows(coder.decoder, latent, 2)), dim=2)
    rows = Bands.of(9, 3, shares)
    assert rows.most_rows == 5

    def decoded(ranks: ThreadRanks) -> tuple[Tensor, Tensor]:
        exchange = Exchange(ranks, rows)
        made = torch.cat(list(decode_rows(coder.decoder, latent, 2, exchange=exchange)), dim=2)
        return made, encode(coder.encoder, whole, 2, exchange=exchange)

    found = on_ranks(3, decoded)
    assert torch.equal(torch.cat([made for made, _ in found], dim=2), whole)
    assert all(torch.equal(encoded, encode(coder.encoder, whole, 2)) for _, encoded in found)


def test_sums_of_row_blocks_are_added_in_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA devices, where rows are not added each by itself: near to one rank's, and the same on all."""
    monkeypatch.setattr(sums, "adds_rows", lambda device: False)
    model = transformer("1.6b")
    given = branches(model, 7, 5)
    made = predicted(model, given, 3, (2.0, 1.0))
    for of_rank in made:
        for one, other, expected in zip(of_rank, made[0], predict(model, given), strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, expected, atol=2e-5, rtol=0)


def test_a_whole_attention_gets_its_whole_map() -> None:
    """Of a narrow picture: below head_dim pixels an attention is called whole, at two scales of the latent's here."""
    config = {**F32, "attention_head_dim": 32, "decoder_layers_per_block": (1, 1, 1, 1, 3, 3)}
    config |= {f"{half}_block_out_channels": (8, 8, 8, 32, 32, 32) for half in ("encoder", "decoder")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderDC(**config).eval()
    units = cut_at_barriers(decoder_units(model.decoder), 8, 1)
    route, called = Route(units, range(len(units)), 8, 1), set()
    for own in Bands.of(8, 4):
        for index in range(len(units)):
            for unit, rows in zip(route.units(index), route.needed(index, own), strict=False):
                if isinstance(unit, Attention) and not unit.is_linear(8):
                    called.add(unit.in_scale)
                    assert rows == range(round(8 * unit.in_scale))
    assert called == {1.0, 2.0}
    latent = torch.randn(1, 4, 8, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = torch.cat(list(decode_rows(model.decoder, latent, 2)), dim=2)
    for size in (4, 8):
        bands = Bands.of(8, size)

        def work(ranks: ThreadRanks) -> Tensor:
            return torch.cat(list(decode_rows(model.decoder, latent, 2, exchange=Exchange(ranks, bands))), dim=2)  # noqa: B023

        assert torch.equal(torch.cat(on_ranks(size, work), dim=2), whole)
