"""What ranks send is the closed form of the plan: bytes and messages, counted where they are sent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoencoder_cases import autoencoder, latent_of
from handscroll.banded.autoencoder import cut_at_barriers, decode_rows, decoder_units, encode, encoder_units
from handscroll.banded.exchange import Exchange
from handscroll.banded.transformer import predict
from handscroll.bands import Bands
from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.models.known import known_specs
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.communication import (
    Traffic,
    keys_and_values_bytes,
    speeds_of,
    step_flops,
    step_traffic,
    sweeps_traffic,
)
from handscroll.plan.decode import DecodeStage, SweepStage, decode_stages
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.denoise import Sampling, bands_of_branches
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.inputs import Hardware, Rates
from rank_cases import ThreadRanks, on_ranks
from transformer_cases import branches, transformer


def counted(ranks: ThreadRanks) -> Traffic:
    return Traffic(sum(ranks.sent), len(ranks.sent), sum(ranks.gathered), len(ranks.gathered))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_step_of_the_transformer(size: int) -> None:
    model = transformer("1.6b")
    given = branches(model, 11, 3)
    spec = TransformerSpec.from_config(dict(model.config))
    job = Sampling(11, 3, tokens=9, steps=1, branches=len(given), precision="fp32", ranks=size)

    tokens = [branch.text.shape[1] for branch in given]

    def work(ranks: ThreadRanks) -> Traffic:
        exchanges = [Exchange(ranks, bands) for bands in bands_of_branches(spec, 11, 3, tokens, size)]
        for exchange, each in zip(exchanges, predict(model, given, exchanges=exchanges), strict=True):
            exchange.whole(each, dim=2)
        return counted(ranks)

    assert on_ranks(size, work) == [replace(step_traffic(spec, job, tokens, rank), rounds=0) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", ["f32", "f32 by shuffling"])
def test_decoding_and_encoding(name: str, size: int) -> None:
    model = autoencoder(name)
    spec = AutoencoderSpec.from_config(dict(model.config))
    latent = latent_of(model, 7, 5, batch=1)
    image = model.decoder(latent)
    for shape, units in (
        (DecoderShape(spec, 7, 5, 4, ranks=size), cut_at_barriers(decoder_units(model.decoder), 7, 5)),
        (EncoderShape(spec, 7, 5, 4, ranks=size), cut_at_barriers(encoder_units(model.encoder), *image.shape[2:])),
    ):
        for restart in (len(units), 1, 2):
            starts = [min(index, restart) for index in range(len(units))]
            of_units = [
                unit for sweep in units for unit in ([sweep.attention] if sweep.attention else []) + [*sweep.local]
            ]
            assert [unit.reach for unit in shape.units()] == [unit.reach for unit in of_units]

            def work(ranks: ThreadRanks) -> Traffic:
                options = {"exchange": Exchange(ranks, Bands.of(7, size)), "starts": starts}  # noqa: B023
                if type(shape) is DecoderShape:  # noqa: B023
                    for _ in decode_rows(model.decoder, latent, 2, **options):  # type: ignore[arg-type]
                        pass
                    return counted(ranks)
                made = encode(model.encoder, image, 2, **options)  # type: ignore[arg-type]
                gathered = made[:, :, : -(-7 // size)].nbytes
                assert ranks.gathered[1 - size :] == [gathered] * (size - 1)
                ranks.gathered[1 - size :] = []
                return counted(ranks)

            stage = DecodeStage(tuple(SweepStage(1, start, None, 0, 0.0) for start in starts), 0, 0.0)
            assert on_ranks(size, work) == [
                replace(sweeps_traffic(shape, stage, rank), rounds=0) for rank in range(size)
            ]


def test_speeds_are_of_devices_that_differ_by_more_than_measuring_does() -> None:
    slow, fast, busy = Rates(1e11, 2e11, 1e11), Rates(1e12, 1e12, 1e12), Rates(1e11, 1e11, 1e11)
    assert speeds_of([slow, slow], ["a", "a"]) == ()
    assert speeds_of([fast, busy, fast], ["a", "a", "a"]) == ()  # another process was at work while it measured
    assert speeds_of([fast, Rates(8.5e11, 1e11, 1e11)], ["a", "b"]) == ()
    assert speeds_of([slow, fast, slow], ["a", "b", "a"]) == (0.2, 1.0, 0.2)
    assert speeds_of([fast, busy, fast, slow], ["a", "a", "a", "b"]) == (1.0, 1.0, 1.0, 0.2)


def test_unlike_devices_are_planned_by_the_one_with_most_rows() -> None:
    spec, speeds = known_specs()["sana-1.6b-4k"], (1.0, 0.25, 0.25)
    alike = DecoderShape(spec.autoencoder, 128, 128, 2, ranks=3)
    unlike = DecoderShape(spec.autoencoder, 128, 128, 2, ranks=3, speeds=speeds)
    assert (alike.own_rows, unlike.own_rows) == (43, 85)
    assert alike.map_bytes(1) < unlike.map_bytes(1) < DecoderShape(spec.autoencoder, 128, 128, 2).map_bytes(1)
    job = Sampling(128, 128, tokens=64, steps=1, branches=2, precision="bf16", ranks=3, speeds=speeds)
    assert job.own_rows == 85
    work = [step_flops(spec.transformer, job, [64, 64], rank) / speed for rank, speed in enumerate(speeds)]
    assert max(work) < 1.05 * step_flops(spec.transformer, at_4096(1), [64, 64], 0) / sum(speeds)


def at_4096(ranks: int) -> Sampling:
    return Sampling(128, 128, tokens=64, steps=1, branches=2, precision="bf16", ranks=ranks)


def test_eight_ranks_send_a_fiftieth_of_keys_and_values() -> None:
    spec = known_specs()["sana-1.6b-4k"].transformer
    most = max(step_traffic(spec, at_4096(8), [300, 300], rank).bytes for rank in range(8))
    assert most <= keys_and_values_bytes(spec, at_4096(8)) / 50


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [(300, 300), (300, 1), (64, 1), (20, 20), (150, 40)])
def test_work_is_shared_evenly_at_4096(ranks: int, tokens: tuple[int, int]) -> None:
    """Of 20 steps and the decoder, without the text's keys and values, which all ranks make."""
    spec = known_specs()["sana-1.6b-4k"]
    whole, own = (
        20 * max(step_flops(spec.transformer, at_4096(count), tokens, rank) for rank in range(count))
        for count in (1, ranks)
    )
    shape = DecoderShape(spec.autoencoder, 128, 128, 2)
    hardware = Hardware("cuda:0")

    def decoding(shape: DecoderShape) -> float:
        return sum(shape.pass_shape(index, index, 4).flops for index in range(len(shape)))

    assert next(iter(decode_stages(shape, "bf16", hardware, None))).starts == tuple(range(len(shape)))
    whole += decoding(shape)
    own += decoding(replace(shape, ranks=ranks))
    assert own <= 1.05 * whole / ranks, own * ranks / whole
