"""The kernels that a plan says oneDNN will compile, against those of real passes."""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import AutoencoderDC

from autoencoder_cases import F32, E, R
from handscroll.banded import backend, kernels
from handscroll.banded.autoencoder import decode_rows, encode
from handscroll.integrations.diffusers.budget import spec_of
from handscroll.plan.decode import DecodeStage, SweepStage
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.kernels import KEPT, Kernel, compiled_bytes, kernels_of

# Convolutions of 2x2 with fewer channels are called row by row.
WIDE = {
    "encoder_block_out_channels": (64, 64, 64, 128),
    "decoder_block_out_channels": (64, 64, 64, 128),
    "encoder_block_types": (R, R, E, E),
    "decoder_block_types": (R, R, E, E),
    "encoder_layers_per_block": (1, 2, 1, 2),
    "decoder_layers_per_block": (2, 1, 1, 2),
    "encoder_qkv_multiscales": ((), (), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,), (3, 5)),
    "in_channels": 64,
}
CASES: tuple[dict[str, str], ...] = (
    {},
    {"downsample_block_type": "pixel_unshuffle"},
    {"upsample_block_type": "pixel_shuffle"},
)

pytestmark = pytest.mark.skipif(
    not backend.has_onednn(torch.empty(0)), reason="this PyTorch has no kernels of oneDNN for fp32"
)


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> kernels.KernelsMet:
    fresh = kernels.KernelsMet()
    monkeypatch.setattr(kernels, "MET", fresh)
    return fresh


@pytest.mark.parametrize("half", ["decoder", "encoder"])
@pytest.mark.parametrize("number", range(6))
def test_kernels_of_every_pass_are_those_that_are_predicted(half: str, number: int, met: kernels.KernelsMet) -> None:
    drawing = random.Random(number)
    model = AutoencoderDC(**{**F32, **WIDE, **CASES[number % len(CASES)]}).eval()
    rows, columns, batch = drawing.randint(3, 9), drawing.randint(3, 6), drawing.choice((1, 2))
    kind = DecoderShape if half == "decoder" else EncoderShape
    shape = kind(spec_of(model.config), rows, columns * batch, 4, batch)
    heights = [drawing.randint(1, shape.map_rows(index)) for index in range(len(shape))]
    restart = drawing.choice((len(shape) - 1, drawing.randrange(len(shape))))
    starts = [min(index, restart) for index in range(len(shape))]
    passes = []

    def on_sweep(*_: int) -> None:
        passes.append(set(met.all()))
        met._kernels.clear()

    if half == "decoder":
        given = torch.randn(batch, model.config.latent_channels, rows, columns)
        for _ in decode_rows(model.decoder, given, heights=heights, starts=starts, on_sweep=on_sweep):
            pass
    else:
        image = torch.randn(batch, 64, 8 * rows, 8 * columns)
        encode(model.encoder, image, heights=heights, starts=starts, on_sweep=on_sweep)
    assert passes == [kernels_of(shape, starts[index], index, heights[index]) for index in range(len(shape))]


def test_what_has_run_is_not_counted_again() -> None:
    shape = DecoderShape(spec_of({**F32, **WIDE}), 4, 4, 4)
    stage = DecodeStage(tuple(SweepStage(2, index, "memory", 0, 0.0) for index in range(len(shape))), 0, 0.0)
    needed = set().union(*(kernels_of(shape, index, index, 2) for index in range(len(shape))))
    all_bytes = sum(kernel.bytes for kernel in needed)
    assert compiled_bytes(shape, stage, [])[-1] == all_bytes
    assert compiled_bytes(shape, stage, sorted(needed)) == [0] * len(shape)
    some = sorted(needed)[::2]
    assert compiled_bytes(shape, stage, some)[-1] == all_bytes - sum(kernel.bytes for kernel in some)
    # Where oneDNN keeps no more, old ones go; half of theirs is counted on.
    others = [Kernel(1, 1, 1, 1, False, rows, 1, 4) for rows in range(KEPT)]
    assert compiled_bytes(shape, stage, others)[-1] == all_bytes - all_bytes // 2


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch, met: kernels.KernelsMet) -> None:
    monkeypatch.setattr(kernels, "KEPT", 2)
    first, second, third = ((1, 1, 1, 1, False, rows, 1, 4) for rows in (1, 2, 3))
    for kernel in (first, second, first, third):
        met.add(kernel)
    assert met.all() == [first, third]
