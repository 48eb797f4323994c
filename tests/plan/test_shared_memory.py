"""Memory that several things share is counted once: modules kept between jobs, and the host beside a CUDA device."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handscroll.errors import UsageError
from handscroll.limits import MAP_CHUNK_BYTES, SLOTS
from handscroll.models.autoencoder import F32C32_SANA
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.plan import kept
from handscroll.plan.budget import FREE_SHARE
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.host import host_map_bytes, layers_on_host, staging_bytes
from handscroll.plan.inputs import MIB, Hardware, PlanInputs, Rates
from handscroll.plan.plan import Plan
from handscroll.plan.precision import BYTES
from handscroll.plan.search import make_plan, shrink
from handscroll.plan.stages import BY_NAME, DECODE_PART, DENOISE_PART, TEXT_PART
from handscroll.request import Request
from handscroll.weights.folder import NO_WEIGHTS
from handscroll.weights.pinned import pinned_blocks, pinned_bytes

Miniature = Callable[..., Path]
GIB = 1024 * MIB
GPU_RATES = Rates(fp32_flops=4e13, bf16_flops=4e14, fp16_flops=4e14, weight_bytes=2e9, host_bytes=2.5e10)


@pytest.fixture(scope="module")
def sana(miniature: Miniature) -> CheckpointSpec:
    """Sana 1.6B by its shapes, published in bf16."""
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    return replace(
        spec,
        transformer=TransformerSpec(),
        autoencoder=F32C32_SANA,
        text_encoder=TextEncoderSpec(),
        published="bf16",
        transformer_weights=NO_WEIGHTS,
        autoencoder_weights=NO_WEIGHTS,
        text_encoder_weights=NO_WEIGHTS,
    )


def planned(
    spec: CheckpointSpec, hardware: Hardware, side_px: int = 1024, *, keeps: bool = True, **options: Any
) -> Plan:
    request = Request("a lake", width=side_px, height=side_px, steps=20, seed=0, precision="bf16", **options)
    return make_plan(spec, request, PlanInputs(hardware, tokens=300, keeps_modules=keeps), 0)


def weights_bytes(plan: Plan, spec: CheckpointSpec) -> int:
    return sum(kept.kept_bytes(part, plan, spec) for part in kept.PARTS)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_all_is_kept_where_there_is_room_and_counted_in_every_stage(sana: CheckpointSpec, device: str) -> None:
    hardware = Hardware(device, base_bytes=300 * MIB, free_bytes=64 * GIB, rates=GPU_RATES)
    plan = planned(sana, hardware)
    assert plan.kept == ("text_encoder", "transformer", "decoder")
    assert plan.denoise is not None
    assert plan.denoise.resident_layers == sana.transformer.num_layers
    assert weights_bytes(plan, sana) > 7 * GIB
    for n_bytes in plan.planned_bytes.values():
        assert n_bytes > 300 * MIB + weights_bytes(plan, sana)
    alone = planned(sana, hardware, keeps=False)
    assert alone.kept == ()
    assert max(alone.planned_bytes.values()) < max(plan.planned_bytes.values())


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("free_gib", [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24])
@pytest.mark.parametrize("side_px", [1024, 4096])
def test_what_is_kept_fits_beside_every_stage(sana: CheckpointSpec, device: str, free_gib: int, side_px: int) -> None:
    hardware = Hardware(device, base_bytes=300 * MIB, free_bytes=free_gib * GIB, host_bytes=32 * GIB, rates=GPU_RATES)
    plan = planned(sana, hardware, side_px)
    if plan.kept:
        assert max(plan.planned_bytes.values()) <= FREE_SHARE * free_gib * GIB
    none = planned(sana, hardware, side_px, keeps=False)

    # Reading anew what is not kept counts: what is kept is no slower than keeping nothing.
    def seconds(each: Plan) -> float:
        parts = (TEXT_PART, DENOISE_PART, DECODE_PART)
        return sum(each.planned_seconds.values()) + kept.rereading_seconds(parts, each, sana, 2e9)

    assert seconds(plan) <= seconds(none)


def test_more_memory_keeps_more(sana: CheckpointSpec) -> None:
    found = [
        weights_bytes(planned(sana, Hardware("cuda:0", free_bytes=gib * GIB, rates=GPU_RATES)), sana)
        for gib in (2, 4, 6, 8, 10, 12, 16)
    ]
    assert found == sorted(found)
    assert found[0] < found[2] < found[-1]


def test_what_grows_keeps_the_encoder_too(sana: CheckpointSpec) -> None:
    hardware = Hardware("cuda:0", free_bytes=64 * GIB, rates=GPU_RATES)
    plan = planned(sana, hardware, 2048, compose_px=1024)
    assert plan.kept == ("text_encoder", "encoder", "transformer", "decoder")
    assert plan.smaller is not None
    assert plan.smaller.kept == plan.kept


def test_with_a_budget_and_for_ways_that_keep_none_nothing_is_kept(sana: CheckpointSpec) -> None:
    hardware = Hardware("cuda:0", free_bytes=64 * GIB, rates=GPU_RATES)
    inputs = PlanInputs(hardware, tokens=300, keeps_modules=False)
    assert make_plan(sana, Request("a", width=1024, seed=0, memory_bytes=20 * GIB), inputs, 0).kept == ()
    inputs = replace(inputs, keeps_modules=True)
    assert make_plan(sana, Request("a", width=1024, seed=0, decode="whole"), inputs, 0).kept == ()


def test_when_memory_runs_out_what_is_kept_goes_first(sana: CheckpointSpec) -> None:
    inputs = PlanInputs(Hardware("cuda:0", free_bytes=64 * GIB, rates=GPU_RATES), tokens=300, keeps_modules=True)
    plan = make_plan(sana, Request("a", width=1024, seed=0), inputs, 0)
    smaller = shrink(plan, sana, inputs, BY_NAME["denoise"])
    assert smaller is not None
    assert smaller.kept == ()
    assert smaller.planned_bytes["denoise"] < plan.planned_bytes["denoise"] - 4 * GIB


def test_a_budget_needs_to_know_what_the_process_holds(sana: CheckpointSpec) -> None:
    hardware = Hardware("cpu", base_bytes=None, free_bytes=None)
    with pytest.raises(UsageError, match=r"nothing tells how much memory this process holds; leave --memory out$"):
        planned(sana, hardware, keeps=False, memory_bytes=8 * GIB)
    assert planned(sana, hardware, keeps=False).planned_peak_bytes


# The host's memory beside a CUDA device


def test_pinned_blocks_are_powers_of_two_and_hold_every_piece() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        count, each = rng.randint(1, 60), rng.randint(1, 400 * MIB)
        blocks = pinned_blocks(count, each)
        assert all(block == pinned_bytes(block) for block in blocks)
        assert sum(block // each for block in blocks) >= count
        assert sum(blocks) <= count * pinned_bytes(each)
        room = rng.randint(0, 2 * count * each)
        within = pinned_blocks(count, each, room)
        assert sum(within) <= room
        assert all(block >= each for block in within)
    assert pinned_blocks(20, 160 * MIB) == [2 * GIB, GIB, 256 * MIB, 256 * MIB]
    assert pinned_blocks(0, 5) == []
    assert [pinned_bytes(count) for count in (0, 1, 2, 3, 4, 5, 2**20, 2**20 + 1)] == [0, 1, 2, 4, 4, 8, 2**20, 2**21]


def test_layers_on_the_host_leave_room_to_read_the_others_through() -> None:
    layer = 160 * MIB
    assert layers_on_host(20, layer, 2**62)[0] == 20
    for room in range(0, 5 * GIB, 97 * MIB):
        count, n_bytes = layers_on_host(20, layer, room)
        assert n_bytes <= room
        if count and count < 20:
            assert n_bytes + staging_bytes(layer) <= room
    assert staging_bytes(layer) == SLOTS * 256 * MIB
    assert staging_bytes(0) == 0


def test_maps_on_the_host_are_counted_as_their_chunks_are_pinned() -> None:
    for rows, row_bytes in (
        (512, 5 * MIB),
        (512, 9 * MIB),
        (7, 1000),
        (1, 3),
        (4096, 2**20),
        (33, MAP_CHUNK_BYTES + 1),
    ):
        chunk_rows = min(rows, max(1, MAP_CHUNK_BYTES // row_bytes))
        cuts = [min(chunk_rows, rows - top) for top in range(0, rows, chunk_rows)]
        assert host_map_bytes(rows * row_bytes, rows) == sum(pinned_bytes(cut * row_bytes) for cut in cuts)
    assert host_map_bytes(0, 5) == 0


def tight_plans(sana: CheckpointSpec) -> Iterator[tuple[Plan, Hardware]]:
    rng = random.Random(2)
    for _ in range(150):
        hardware = Hardware(
            "cuda:0",
            free_bytes=int(GIB * 2 ** rng.uniform(-0.5, 5)),
            host_bytes=int(GIB * 2 ** rng.uniform(-3, 6)),
            scratch_bytes=rng.choice([0, 2**40]),
            rates=replace(GPU_RATES, weight_bytes=10 ** rng.uniform(8.5, 10)),
        )
        side = rng.choice([1024, 2048, 4096, 8192, 16384])
        yield planned(sana, hardware, side, keeps=rng.random() < 0.3), hardware


def test_layers_and_maps_on_the_host_share_its_memory(sana: CheckpointSpec) -> None:
    on_host = both = 0
    for plan, hardware in tight_plans(sana):
        assert plan.denoise is not None
        patch = sana.transformer.patch_size
        rows, columns = plan.latent_height // patch, plan.latent_width // patch
        stream_bytes = rows * columns * sana.transformer.width * 2
        maps_bytes = 3 * host_map_bytes(stream_bytes, rows) if plan.denoise.residual == "host" else 0
        assert plan.denoise.host_bytes + maps_bytes <= hardware.host_bytes
        streamed = sana.transformer.num_layers - plan.denoise.resident_layers
        assert plan.denoise.host_layers <= streamed
        assert (plan.denoise.host_layers > 0) == (plan.denoise.host_bytes > 0)
        on_host += plan.denoise.host_layers > 0
        both += plan.denoise.host_layers > 0 and maps_bytes > 0
        assert plan.decoding is not None
        shape = DecoderShape(sana.autoencoder, plan.latent_height, plan.latent_width, BYTES["bf16"])
        places = [index for index, sweep in enumerate(plan.decoding.sweeps) if sweep.store == "host"]
        sizes = sorted(host_map_bytes(shape.map_bytes(index), shape.map_rows(index)) for index in places)
        assert sum(sizes[-2:]) <= hardware.host_bytes
    assert on_host > 10
    assert both
