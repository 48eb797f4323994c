"""What every plan keeps, whatever is asked of whatever machine: random checkpoints, sizes, budgets and hardware."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from handscroll.errors import BudgetError
from handscroll.models.autoencoder import F32C32_SANA
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.decode import DecodeStage
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.encoder_shape import EncoderShape
from handscroll.plan.inputs import MIB, Hardware, PlanInputs, Rates
from handscroll.plan.plan import Plan
from handscroll.plan.precision import BYTES
from handscroll.plan.search import MINIMUM_STEP_BYTES, make_plan, minimum_bytes, shrink
from handscroll.plan.stages import BY_NAME
from handscroll.request import Request

Miniature = Callable[..., Path]
BUILTIN = Path(__file__).parents[2] / "src" / "handscroll" / "builtin" / "tiny-landscape"
DRAWS_A_PART = 500

SANA_06B = TransformerSpec(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
OFFICIAL = (
    TransformerSpec(),
    TransformerSpec(qk_norm="rms_norm_across_heads"),
    TransformerSpec(qk_norm="rms_norm_across_heads", num_layers=60),
    SANA_06B,
    replace(SANA_06B, qk_norm="rms_norm_across_heads", guidance_embeds=True),
)
F64C128 = replace(
    F32C32_SANA,
    latent_channels=128,
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024, 2048),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024, 2048),
    encoder_layers_per_block=(0, 4, 8, 2, 2, 2, 2),
    decoder_layers_per_block=(0, 5, 10, 2, 2, 2, 2),
    encoder_qkv_multiscales=((),) * 7,
    decoder_qkv_multiscales=((),) * 7,
    decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 4,
    decoder_act_fns=("relu",) * 3 + ("silu",) * 4,
    upsample_block_type="pixel_shuffle",
)


@pytest.fixture(scope="module")
def specs(miniature: Miniature) -> list[CheckpointSpec]:
    """Official shapes, the built-in model and miniatures, whose weights are stored in this and that."""
    built_in = CheckpointSpec.from_folder(BUILTIN)
    mini = CheckpointSpec.from_folder(miniature("1.6b"))
    official = replace(built_in, autoencoder=F32C32_SANA, text_encoder=TextEncoderSpec())
    return [
        built_in,
        mini,
        CheckpointSpec.from_folder(miniature("sprint-1.6b")),
        *(replace(official, transformer=transformer) for transformer in OFFICIAL),
        *(
            replace(mini, transformer=each, autoencoder=F32C32_SANA, text_encoder=TextEncoderSpec())
            for each in OFFICIAL
        ),
        replace(mini, transformer=replace(SANA_06B, in_channels=128, out_channels=128), autoencoder=F64C128),
        replace(mini, transformer=replace(OFFICIAL[0], patch_size=2)),
    ]


@dataclass(frozen=True)
class Draw:
    spec: CheckpointSpec
    request: Request
    inputs: PlanInputs
    budget_bytes: int

    def plan(self, budget_bytes: int | None) -> Plan:
        return make_plan(self.spec, replace(self.request, memory_bytes=budget_bytes), self.inputs, 0)


def draw_one(rng: random.Random, specs: list[CheckpointSpec]) -> Draw:
    def log_uniform(least: float, most: float) -> int:
        return int(least * (most / least) ** rng.random())

    on_cuda = rng.random() < 0.4
    rates = Rates(*(10 ** rng.uniform(9, 15) for _ in range(3)), *(10 ** rng.uniform(7, 11) for _ in range(3)))
    hardware = Hardware(
        "cuda:0" if on_cuda else "cpu",
        bf16_is_faster=rng.random() < 0.5,
        base_bytes=0 if on_cuda else log_uniform(100 * MIB, 2048 * MIB),
        free_bytes=None if rng.random() < 0.2 else log_uniform(64 * MIB, 2**38),
        host_bytes=rng.choice([0, log_uniform(MIB, 2**36)]) if on_cuda else 0,
        scratch_bytes=rng.choice([0, 2**62, log_uniform(MIB, 2**40)]),
        rates=Rates() if rng.random() < 0.3 else rates,
    )
    request = Request(
        "a lake",
        width=min(32768, log_uniform(32, 32769)),
        height=min(32768, log_uniform(32, 32769)),
        steps=rng.randint(1, 50),
        guidance=rng.choice([1.0, 4.5]),
        seed=0,
        precision=rng.choice(["auto", "fp32", "bf16", "fp16"]),
        strip_rows=rng.choice([1, 7, 64]) if rng.random() < 0.1 else None,
        compose_px=rng.choice([None, 64, 1000, 1024, 2048]) if rng.random() < 0.15 else 0,
    )
    tokens = None if rng.random() < 0.1 else rng.randint(1, 2000)
    inputs = PlanInputs(hardware, tokens, rng.choice([0, 150 * MIB]))
    spec = rng.choice(specs)
    if spec.is_sprint:
        request = replace(request, compose_px=None)
    return Draw(spec, request, inputs, log_uniform(64 * MIB, 2**39))


def check(draw: Draw) -> None:
    """All that is promised, of one draw."""
    unlimited = draw.plan(None)
    minimum = minimum_bytes(unlimited, draw.spec, draw.inputs)
    assert minimum is not None
    assert minimum % MINIMUM_STEP_BYTES == 0

    # It is the least that would do, plus half a step, rounded up to a step.
    too_small = minimum - 3 * MINIMUM_STEP_BYTES // 2 - 1
    if too_small > 0:
        with pytest.raises(BudgetError) as refused:
            draw.plan(too_small)
        assert refused.value.minimum_bytes == minimum
    refusals: list[tuple[int, int]] = []
    plans = [draw.plan(minimum - MINIMUM_STEP_BYTES // 2), draw.plan(minimum)]
    for budget_bytes in sorted({draw.budget_bytes, minimum + draw.budget_bytes // 7}):
        try:
            plans.append(draw.plan(budget_bytes))
        except BudgetError as error:
            refusals.append((budget_bytes, error.minimum_bytes))
    assert all(budget_bytes < minimum == least_bytes for budget_bytes, least_bytes in refusals)
    for plan in plans:
        check_plan(draw, plan)
        assert plan.budget_bytes is not None
        assert plan.planned_peak_bytes is not None
        assert plan.planned_peak_bytes <= plan.budget_bytes
    plans.sort(key=lambda plan: plan.budget_bytes or 0)
    seconds = [total_seconds(plan) for plan in plans]
    assert seconds == sorted(seconds, reverse=True), "more budget made a plan slower"
    free_bytes = draw.inputs.hardware.free_bytes
    if free_bytes is None:
        assert total_seconds(unlimited) <= seconds[-1]
    check_plan(draw, unlimited)


def total_seconds(plan: Plan) -> float:
    return sum(plan.planned_seconds.values())


def check_plan(draw: Draw, plan: Plan) -> None:
    hardware = draw.inputs.hardware
    assert plan.decoding is not None
    if draw.inputs.tokens is None:
        assert plan.text is None
        assert plan.denoise is None
    else:
        assert plan.denoise is not None
        assert 0 <= plan.denoise.resident_layers <= draw.spec.transformer.num_layers
        assert 1 <= plan.denoise.band_rows <= -(-plan.latent_height // draw.spec.transformer.patch_size)
        assert plan.denoise.residual != "host" or hardware.is_cuda

    check_growth(draw, plan)
    for size in plan.sizes:
        assert size.decoding is not None
        check_sweeps(DecoderShape, size.decoding, draw, size)
        if size.smaller is not None:
            assert size.encoding is not None
            check_sweeps(EncoderShape, size.encoding, draw, size)

    for name in plan.planned_bytes:
        tries, before, smaller = 0, plan, shrink(plan, draw.spec, draw.inputs, BY_NAME[name])
        while smaller is not None and tries < 2:
            now, used = ([part.peak_bytes for part in each.parts[name]] for each in (smaller, before))
            assert sum(now) < sum(used)
            assert all(a <= b for a, b in zip(now, used, strict=True))
            others = {other: n_bytes for other, n_bytes in plan.planned_bytes.items() if other != name}
            assert others.items() <= smaller.planned_bytes.items()
            tries, before, smaller = tries + 1, smaller, shrink(smaller, draw.spec, draw.inputs, BY_NAME[name])


def check_growth(draw: Draw, plan: Plan) -> None:
    """Each size is larger than the one before, and all are planned for the same machine."""
    steps = 0
    for before, size in pairwise((None, *plan.sizes)):
        assert size is not None
        assert size.smaller == before
        assert (size.first_step == 0) == (before is None)
        assert size.steps_before + size.first_step == steps
        steps += size.steps - size.first_step
        assert size.precision == plan.precision
        assert size.budget_bytes == plan.budget_bytes
        assert size.on_the_way == (size is not plan)
        assert (size.encoding is None) == (before is None)
        if before is not None:
            assert before.width <= size.latent_width * draw.spec.autoencoder.spatial_compression_ratio
            assert before.latent_width * before.latent_height < size.latent_width * size.latent_height
            assert before.denoise is not None
    assert steps == plan.total_steps


def check_sweeps(half: type[DecoderShape], stage: DecodeStage, draw: Draw, plan: Plan) -> None:
    hardware, starts = draw.inputs.hardware, stage.starts
    precision = plan.precision.autoencoder
    shape = half(draw.spec.autoencoder, plan.latent_height, plan.latent_width, BYTES[precision])
    assert len(stage.sweeps) == len(shape)
    assert starts[0] == 0
    for index, sweep in enumerate(stage.sweeps):
        assert sweep.strip_rows >= 1
        assert 0 <= sweep.start <= index
        assert (sweep.store is not None) == (index in starts), "a map exists where a sweep starts from it"
        assert sweep.store != "host" or hardware.is_cuda
        assert sweep.seconds > 0
    assert stage.sweeps[0].store == "memory"
    room: dict[str | None, int] = {"disk": hardware.scratch_bytes, "host": hardware.host_bytes}
    for first, second in zip(stage.sweeps[:-1], stage.sweeps[1:], strict=True):
        index = stage.sweeps.index(second)
        for place in {first.store, second.store} & room.keys():
            both = [shape.map_bytes(i) for i in (index - 1, index) if stage.sweeps[i].store == place]
            assert sum(both) <= room[place]


def check_draws(specs: list[CheckpointSpec], seed: int, draws: int) -> None:
    rng = random.Random(seed)
    for number in range(draws):
        draw = draw_one(rng, specs)
        try:
            check(draw)
        except BaseException as error:
            error.add_note(f"draw {number} of seed {seed}: {draw.spec.name} {draw.request} {draw.inputs}")
            error.add_note(f"budget {draw.budget_bytes}, transformer {dataclasses.asdict(draw.spec.transformer)}")
            raise


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(4))
def test_what_every_plan_keeps(specs: list[CheckpointSpec], seed: int) -> None:
    check_draws(specs, seed, DRAWS_A_PART)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_what_ten_thousand_plans_keep(specs: list[CheckpointSpec], seed: int) -> None:
    check_draws(specs, seed, 1000)
