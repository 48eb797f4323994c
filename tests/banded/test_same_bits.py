"""Maps one row tall or one position wide, where a row block may be a single position: the same bits at every height.

A product of one position is made by other code than one of many, and rounds otherwise.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor

import miniatures
from autoencoder_cases import EXACT, as_if_trained, latent_of, stages
from handscroll.banded.autoencoder import cut_at_barriers, decode_rows, decoder_units, encode, encoder_units
from handscroll.banded.transformer import Branch, predict

SHAPES = ((1, 1), (1, 2), (1, 5), (2, 1), (5, 1))
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 2)
TWO = pytest.param(2, marks=pytest.mark.thorough)
TWO_OF = pytest.param(2, False, marks=pytest.mark.thorough)

# As wide as the published models where maps are smallest, and narrow where they are large.
WIDE = stages(6, (8, 8, 16, 64, 128, 512), (1,) * 6, (1,) * 6) | {"attention_head_dim": 32, "latent_channels": 32}
SHUFFLED = {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}
BATCH_NORM = {"decoder_norm_types": "batch_norm", "decoder_conv_act_fn": "silu"}
NETWORKS = {
    "narrow": stages(6, (8, 8, 8, 8, 16, 16), (1,) * 6, (1,) * 6) | {"attention_head_dim": 4, "latent_channels": 4},
    "wide": WIDE,
    "wide, shuffled, three scales": stages(6, (8, 8, 16, 32, 64, 256), (1,) * 6, (1,) * 6, scales=(3, 5))
    | {"attention_head_dim": 32, "latent_channels": 32}
    | SHUFFLED,
    "odd channels and batch norms": stages(5, (9, 18, 18, 36, 36), (1,) * 5, (1,) * 5)
    | {"attention_head_dim": 9, "latent_channels": 12}
    | BATCH_NORM,
}


@functools.cache
def network(name: str, dtype: torch.dtype) -> Any:
    if dtype is not torch.float32:
        return copy.deepcopy(network(name, torch.float32)).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"} | NETWORKS[name]
        return as_if_trained(AutoencoderDC(**config))


@pytest.mark.parametrize(("batch", "plain"), [(1, False), (1, True), TWO_OF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_decode_at_every_height(name: str, dtype: torch.dtype, batch: int, plain: bool) -> None:
    model = network(name, dtype)
    for height, width in SHAPES:
        latent = latent_of(model, height, width, batch).to(dtype)
        sweeps = cut_at_barriers(decoder_units(model.decoder), height, width)

        def decoded(heights: list[int], latent: Tensor = latent) -> Tensor:
            return torch.cat(list(decode_rows(model.decoder, latent, heights=heights, plain=plain)), dim=2)

        expected = decoded([10**6] * len(sweeps))
        for rows in range(1, height):
            assert decoded([rows] * len(sweeps)).equal(expected), (height, width, rows)
        # Maps are taller behind the first sweeps, and their row blocks may be cut otherwise.
        assert decoded([1] + [3] * (len(sweeps) - 1)).equal(expected), (height, width)


@pytest.mark.parametrize("batch", [1, TWO])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_encode_at_every_height(name: str, dtype: torch.dtype, batch: int) -> None:
    model = network(name, dtype)
    factor = model.spatial_compression_ratio
    for height, width in ((1, 1), (1, 3), (2, 1), (3, 1)):
        image = torch.randn(batch, 3, height * factor, width * factor, generator=torch.Generator().manual_seed(3))
        image = image.to(dtype)
        sweeps = cut_at_barriers(encoder_units(model.encoder), height * factor, width * factor)
        expected = encode(model.encoder, image, heights=[10**6] * len(sweeps))
        for rows in (1, 3, factor + 1):
            heights = [rows] * len(sweeps)
            assert encode(model.encoder, image, heights=heights).equal(expected), (height, width, rows)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_decode_at_every_height_on_two_threads(name: str, dtype: torch.dtype) -> None:
    """Work that is shared out is cut by how many rows there are, and sums with it."""
    model = network(name, dtype)
    for height, width in ((1, 14), (3, 1), (2, 5)):
        latent = latent_of(model, height, width, 1).to(dtype)
        sweeps = cut_at_barriers(decoder_units(model.decoder), height, width)
        expected, *others = (
            torch.cat(list(decode_rows(model.decoder, latent, heights=[rows] * len(sweeps))), dim=2)
            for rows in (10**6, 1, 2, 5)
        )
        assert all(other.equal(expected) for other in others), (height, width)


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_the_whole_up_to_rounding(name: str) -> None:
    """In fp32 near the whole pass; in bf16 no farther from fp32 than the whole pass is."""
    model, half = network(name, torch.float32), network(name, torch.bfloat16)
    ours = theirs = 0.0
    for (height, width), batch in ((shape, batch) for shape in SHAPES for batch in BATCHES):
        latent = latent_of(model, height, width, batch)
        truth = copy.deepcopy(model.decoder).double()(latent.double())
        whole = model.decoder(latent)
        rows = torch.cat(list(decode_rows(model.decoder, latent, 1)), dim=2)
        own = (whole - truth).abs().max().item()  # some random networks amplify rounding
        assert (rows - truth).abs().max().item() <= max(EXACT, 4 * own), (height, width, batch)
        theirs += (half.decoder(latent.bfloat16()) - truth).abs().mean().item()
        in_half = torch.cat(list(decode_rows(half.decoder, latent.bfloat16(), 1)), dim=2)
        ours += (in_half - truth).abs().mean().item()
    if name.startswith("wide"):  # errors of narrow networks with random weights are a few large ones, by chance
        assert ours <= 1.1 * theirs


@functools.cache
def transformer(row: str, dtype: torch.dtype, wide: bool) -> Any:
    sizes = {"num_attention_heads": 16, "attention_head_dim": 32, "num_cross_attention_heads": 8}
    sizes |= {"cross_attention_head_dim": 64, "cross_attention_dim": 512}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Module.to(miniatures.make_transformer(row, **(sizes if wide else {})), dtype)


@pytest.mark.parametrize(("batch", "wide"), [(1, False), (1, True), TWO_OF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ["1.6b-4k", "sprint-0.6b"])
def test_predictions_at_every_height(row: str, dtype: torch.dtype, batch: int, wide: bool) -> None:
    model = transformer(row, dtype, wide)
    draw = torch.Generator().manual_seed(1)
    guidance = torch.full((batch,), 0.45).to(dtype) if model.config.guidance_embeds else None
    for height, width in ((1, 2), (3, 1)) if wide else SHAPES:
        latent = torch.randn(batch, model.config.in_channels, height, width, generator=draw).to(dtype)
        given = [
            Branch(
                latent,
                torch.randn(batch, tokens, model.config.caption_channels, generator=draw).to(dtype),
                None,
                torch.full((batch,), 411.0),
                guidance,
            )
            for tokens in (1, 6)
        ]
        for lay_out, plain in ((False, False), (True, False), (False, True)):
            options: dict[str, Any] = {"lay_out": lay_out, "plain": plain}
            expected = predict(model, given, band_rows=height, **options)
            for rows in range(1, height):
                found = predict(model, given, band_rows=rows, **options)
                same = [one.equal(other) for one, other in zip(found, expected, strict=True)]
                assert all(same), (height, width, rows, options)
        for branch, out in zip(given, predict(model, given, band_rows=1), strict=True):
            with torch.no_grad():
                whole = model(
                    branch.latent,
                    encoder_hidden_states=branch.text,
                    timestep=branch.timestep,
                    guidance=branch.guidance,
                    return_dict=False,
                )[0]
            atol = 2e-5 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(out, whole, atol=atol, rtol=0)
