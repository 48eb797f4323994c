"""Pictures that are composed small and grow: against the same steps made with diffusers' own modules, whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from torch import Tensor

from handscroll import Handscroll, Request, api, decode_latent, generate, pipeline
from handscroll.errors import BudgetError, UsageError
from handscroll.events import Progress
from handscroll.models.opening import open_checkpoint
from handscroll.pictures.metadata import read_parameters
from handscroll.pictures.resizing import enlarged
from handscroll.plan.growth import first_step
from handscroll.plan.inputs import MIB, Hardware, PlanInputs
from handscroll.plan.plan import Plan
from handscroll.plan.search import make_plan, minimum_bytes
from handscroll.runtime import denoise
from handscroll.runtime.encode import enlarge_latent
from handscroll.runtime.probe import probe
from handscroll.runtime.sampling.noise import starting_noise
from handscroll.runtime.session import Session, Transformer
from handscroll.runtime.text import instruction_of
from handscroll.units import parse_compose

Miniature = Callable[..., Path]
PROMPT = "Snowy Mountains at dusk, a red sun"
STEPS, SEED, GUIDANCE = 5, 3, 4.5
WIDE: dict[str, Any] = {"width": 256, "height": 128, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE}


def pillows(pixels: np.ndarray, width: int, height: int) -> Tensor:
    """[height, width, 3] in -1 ... 1, enlarged by Pillow a channel at a time, since it knows no more in float."""
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    large = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return (torch.from_numpy(np.stack(large, axis=-1)) / 127.5 - 1).clamp(-1, 1)


@pytest.mark.parametrize(("before", "after"), [((5, 7), (9, 16)), ((32, 32), (64, 64)), ((33, 1), (50, 3))])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_strips_are_enlarged_as_pillow_enlarges(before: tuple[int, int], after: tuple[int, int], rows: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*before, 3), np.uint8)
    row_blocks = list(enlarged(pixels, *after, rows, torch.float32))
    assert {row_block.shape[1] for row_block in row_blocks[:-1]} <= {rows}
    ours = torch.cat(row_blocks, dim=1)[0]
    assert (ours - pillows(pixels, after[1], after[0])).abs().max() < 1e-5
    assert torch.equal(ours, torch.cat(list(enlarged(pixels, *after, 3, torch.float32)), dim=1)[0])
    half = torch.cat(list(enlarged(pixels, *after, rows, torch.bfloat16)), dim=1)[0]
    assert torch.equal(half, ours.bfloat16())


@torch.no_grad()
def whole_latent(folder: Path, sizes: list[tuple[int, int]]) -> Tensor:
    """The latent of a picture that grows through (width, height), by nothing of handscroll's but its noise."""
    spec = open_checkpoint(folder)
    pipe = SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    lines = instruction_of(spec).split("\n") if spec.instruction else None
    text = pipe.encode_prompt(PROMPT, True, negative_prompt="", complex_human_instruction=lines)
    embeddings, mask = torch.cat([text[2], text[0]]), torch.cat([text[3], text[1]])
    vae, scheduler = pipe.vae, pipe.scheduler
    latent: Tensor | None = None
    for number, (width, height) in enumerate(sizes):
        noise, _ = starting_noise(32, height // 32, width // 32, SEED, number)
        scheduler = scheduler.from_config(scheduler.config)
        scheduler.set_timesteps(STEPS)
        begin = first_step(STEPS, number - 1) if number else 0
        scheduler.set_begin_index(begin)
        if latent is None:
            latent = noise
        else:
            small = vae.decode(latent / vae.config.scaling_factor).sample
            pixels = ((small[0] * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            source = vae.encode(pillows(pixels, width, height).permute(2, 0, 1)[None]).latent
            source = source * vae.config.scaling_factor
            sigma = scheduler.sigmas[begin]
            latent = (1 - sigma) * source + sigma * noise
        for t in scheduler.timesteps[begin:]:
            made = pipe.transformer(
                torch.cat([latent] * 2),
                encoder_hidden_states=embeddings,
                encoder_attention_mask=mask,
                timestep=t.expand(2) * pipe.transformer.config.timestep_scale,
                return_dict=False,
            )[0]
            without, with_prompt = made.chunk(2)
            latent = scheduler.step(without + GUIDANCE * (with_prompt - without), t, latent, return_dict=False)[0]
    assert latent is not None
    return latent


@pytest.mark.parametrize(
    ("width", "height", "sizes"),
    [
        (256, 128, [(64, 32), (128, 64), (256, 128)]),
        (128, 128, [(64, 64), (128, 128)]),
        (96, 128, [(64, 96), (96, 128)]),
    ],
)
def test_a_picture_grows_as_diffusers_own_modules_make_it(
    miniature: Miniature, width: int, height: int, sizes: list[tuple[int, int]]
) -> None:
    folder = miniature("1.6b")
    scroll = Handscroll.from_pretrained(folder)
    ours = scroll(PROMPT, width=width, height=height, compose=64, seed=SEED, steps=STEPS, guidance=GUIDANCE)
    assert [(plan.width, plan.height) for plan in ours.plan.sizes] == sizes
    theirs = whole_latent(folder, sizes)
    # Of the smaller picture a few samples of uint8 may be rounded to the other side.
    assert (ours.latent - theirs).abs().max() < 0.02 * theirs.std()
    assert theirs.std() > 0.1


def test_a_small_picture_shows_what_the_large_one_will_be(
    miniature: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Tensor] = []

    def watched(session: Session, plan: Plan, latent: Tensor) -> Tensor:
        begun.append(latent)
        return enlarge_latent(session, plan, latent)

    monkeypatch.setattr(denoise, "enlarge_latent", watched)
    scroll = Handscroll.from_pretrained(miniature("1.6b"))
    small = scroll(PROMPT, width=64, height=64, seed=4, steps=3).latent
    assert not begun
    scroll(PROMPT, width=256, height=256, compose=64, seed=4, steps=3)
    scroll(PROMPT, width=128, height=128, compose=64, seed=4, steps=3)
    assert torch.equal(begun[0], small)
    assert torch.equal(begun[2], small)
    assert [each.shape[-1] for each in begun] == [2, 4, 2]


def test_the_picture_is_the_same_in_any_memory(miniature: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    scroll = Handscroll.from_pretrained(miniature("1.6b"))
    roomy = scroll(PROMPT, compose=64, **WIDE)

    def cramped(*arguments: Any, **options: Any) -> PlanInputs:
        return dataclasses.replace(probe(*arguments, **options), hardware=Hardware("cpu", free_bytes=MIB))

    monkeypatch.setattr(api, "probe", cramped)
    tight = scroll(PROMPT, compose=64, **WIDE)
    plans = [picture.plan for picture in (roomy, tight)]
    assert plans[0].encoding != plans[1].encoding
    assert plans[0].planned_bytes["denoise"] > plans[1].planned_bytes["denoise"]
    assert torch.equal(roomy.latent, tight.latent)


@pytest.mark.parametrize("stop_after", [2, 5, 6, 7, 8])
def test_a_run_goes_on_within_any_of_its_sizes(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    from handscroll.runtime.sampling import schedule

    monkeypatch.setattr(schedule, "worth_saving", lambda *_: True)
    request = Request(PROMPT, model=str(miniature("1.6b")), compose_px=64, **WIDE)
    (whole,) = generate(request, tmp_path / "whole.png")

    def stop(event: Progress) -> None:
        if event.stage == "denoise" and event.done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        generate(request, tmp_path / "cut.png", on_event=stop)
    assert f"goes on from step {stop_after} of 9" in caught.value.__notes__[0]
    events: list[Progress] = []
    (again,) = generate(request, tmp_path / "cut.png", on_event=events.append)
    assert again.resumed_from_step == stop_after
    painting = [event for event in events if event.stage == "denoise"]
    assert [event.done for event in painting if not event.detail] == list(range(stop_after, 10))
    # Between sizes the steps stand still for as long as a decode and an encode take; the bar says why.
    assert [(event.done, event.detail) for event in painting if event.detail] == [
        (done, told) for done, told in ((5, "enlarging to 128x64"), (7, "enlarging to 256x128")) if done >= stop_after
    ]
    assert whole.path.read_bytes() == again.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.png", "whole.png"]


def test_what_a_size_begins_from_is_kept(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took a decode and an encode; a run that is cut off in its first step does not make them again."""
    request = Request(PROMPT, model=str(miniature("1.6b")), compose_px=64, **WIDE)
    (whole,) = generate(request, tmp_path / "whole.png")

    def cut(transformer: Transformer, branches: Any) -> list[Tensor]:
        if transformer.plan.latent_height == 4:  # the last size, 256x128
            raise KeyboardInterrupt
        return predict(transformer, branches)

    predict = Transformer.predict
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "predict", cut)
        with pytest.raises(KeyboardInterrupt):
            generate(request, tmp_path / "cut.png")
    monkeypatch.setattr(denoise, "enlarge_latent", lambda *_: pytest.fail("grown again"))
    (again,) = generate(request, tmp_path / "cut.png")
    assert whole.path.read_bytes() == again.path.read_bytes()


def test_another_composition_is_another_job(miniature: Miniature, tmp_path: Path) -> None:
    request = Request(PROMPT, model=str(miniature("1.6b")), compose_px=64, **WIDE)

    def stop(event: Progress) -> None:
        if event.stage == "denoise" and event.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(request, tmp_path / "p.png", on_event=stop)
    told: list[str] = []
    generate(
        dataclasses.replace(request, compose_px=0),
        tmp_path / "p.png",
        on_event=lambda event: told.append(event.detail) if event.stage == "notice" else None,
    )
    assert "starting over" in told[0]
    assert "composition" in told[0]


def test_the_file_says_where_it_began(miniature: Miniature, tmp_path: Path) -> None:
    request = Request(PROMPT, model=str(miniature("1.6b")), compose_px=64, **WIDE)
    (made,) = generate(request, tmp_path / "a.png", save_latent=tmp_path / "a.safetensors")
    assert "First pass size: 64x32" in read_parameters(made.path)
    assert made.as_dict()["composed"] == "64x32"
    again = decode_latent(tmp_path / "a.safetensors", tmp_path / "b.png")
    assert read_parameters(again.path) == read_parameters(made.path)
    (plain,) = generate(dataclasses.replace(request, compose_px=0), tmp_path / "c.png")
    assert "First pass" not in read_parameters(plain.path)
    assert plain.composed == ""


def test_each_way_to_decode_takes_the_same_latent(miniature: Miniature, tmp_path: Path) -> None:
    request = Request(PROMPT, model=str(miniature("1.6b")), compose_px=64, decode="whole", **WIDE)
    scroll = Handscroll.from_pretrained(request.model)
    assert generate(request, tmp_path / "p.png")[0].memory["planned_peak_bytes"] is None
    latents = [scroll(PROMPT, compose=64, decode=decode, **WIDE).latent for decode in ("rows", "tiled")]
    assert torch.equal(*latents)


def test_a_model_composes_small_where_it_says_so() -> None:
    plan = pipeline.plan_of(Request(PROMPT, width=2048, height=1024))[1]
    assert [(size.width, size.height) for size in plan.sizes] == [(704, 352), (1216, 608), (2048, 1024)]
    assert plan.composed == "704x352"
    assert len(pipeline.plan_of(Request(PROMPT, width=512, height=512))[1].sizes) == 1
    assert len(pipeline.plan_of(Request(PROMPT, width=2048, compose_px=0))[1].sizes) == 1
    assert len(pipeline.plan_of(Request(PROMPT, width=2048, steps=1))[1].sizes) == 1


def test_the_official_models_are_left_as_they_are(miniature: Miniature) -> None:
    request = Request(PROMPT, model=str(miniature("1.6b-4k")), width=1024)
    assert len(pipeline.plan_of(request)[1].sizes) == 1
    assert len(pipeline.plan_of(dataclasses.replace(request, compose_px=256))[1].sizes) == 3


def test_what_grows_keeps_its_budget_or_is_refused() -> None:
    spec = open_checkpoint("tiny-landscape")
    inputs = PlanInputs(Hardware("cpu", base_bytes=400 * MIB), tokens=5)

    def planned(memory_bytes: int | None, compose_px: int | None = None) -> Plan:
        request = Request(PROMPT, width=2048, height=2048, memory_bytes=memory_bytes, compose_px=compose_px)
        return make_plan(spec, request, inputs, 1)

    roomy, at_once = planned(None), planned(None, compose_px=0)
    least_bytes = minimum_bytes(roomy, spec, inputs)
    at_once_bytes = minimum_bytes(at_once, spec, inputs)
    assert least_bytes is not None
    assert at_once_bytes is not None
    assert at_once_bytes < least_bytes - 32 * MIB
    assert planned(least_bytes).planned_bytes["denoise"] <= least_bytes
    assert [size.composed for size in roomy.sizes] == ["", "", "512x512"]
    with pytest.raises(BudgetError, match="--compose off"):
        planned(at_once_bytes)
    with pytest.raises(BudgetError, match=r"allowed$"):
        planned(at_once_bytes // 2)


def test_a_few_step_model_does_not_grow(miniature: Miniature) -> None:
    request = Request(PROMPT, model=str(miniature("sprint-1.6b")), width=512)
    assert len(pipeline.plan_of(request)[1].sizes) == 1
    with pytest.raises(UsageError, match="--compose"):
        pipeline.plan_of(dataclasses.replace(request, compose_px=128))


@pytest.mark.parametrize(("text", "expected"), [("auto", None), (" Off ", 0), ("512", 512), ("131072", 131072)])
def test_what_compose_takes(text: str, expected: int | None) -> None:
    assert parse_compose(text) == expected


@pytest.mark.parametrize("text", ["", "on", "512x512", "-1", "0", "32", "999999999", "1.5", "１０２４"])
def test_what_compose_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="compose"):
        parse_compose(text)
