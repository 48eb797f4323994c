"""Training from enlarged pictures: the way it teaches is the one that the sampler goes, and it can be cut off."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from PIL import Image
from training.claims import ATTRIBUTES, claims
from training.evaluate import octaves
from training.export import assemble, scheduler
from training.growth import (
    START,
    GrowthTraining,
    PairFiles,
    enlarged,
    growth_sigma,
    make_pairs,
    on_the_way,
    paint_pair,
    softened,
)
from training.latents import Bucket
from training.scorer import answers
from training.transformer import Painter, from_noise
from training.world import render, sample_scene
from transformers import Gemma2Model, PreTrainedTokenizerFast

from handscroll.models.registry import BUILTIN_FOLDER
from handscroll.plan.growth import GROWTH_STRENGTHS, first_step

BUILT_IN = BUILTIN_FOLDER / "tiny-landscape"
SMALL, LARGE = Bucket(128, 128), Bucket(256, 128)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few pairs of two sizes, in place of the plan's."""
    monkeypatch.setattr("training.growth.PLAN", ((SMALL, 8, 0.5, False), (LARGE, 8, 0.5, True)))
    rng = np.random.default_rng(0)
    for bucket, grown in ((SMALL, False), (LARGE, True)):
        files = PairFiles(tmp_path, bucket, grown)
        files.append(rng.normal(size=(8, *files.shape)).astype(np.float16), ["a lake\thills at noon"] * 8)
    return tmp_path


def options(work: Path, **changes: object) -> argparse.Namespace:
    plain = {"steps": 4, "tokens": 32, "workers": 2, "rate": 1e-3, "decay": 0.5, "horizon": 10, "minutes": 5.0}
    return argparse.Namespace(work=work, folder=BUILT_IN, device="cpu", precision="fp32", **{**plain, **changes})


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_growth_begins_where_the_training_says(steps: int) -> None:
    made = scheduler()
    made.set_timesteps(steps)
    begin = first_step(steps, len(GROWTH_STRENGTHS) - 1)
    assert float(made.sigmas[begin]) == pytest.approx(START, abs=0.015)
    sigma = growth_sigma(20_000, torch.Generator().manual_seed(0))
    assert sigma.max() <= START + 1e-6
    # No step of the schedule has less than three quarters of an even share, and little noise has more.
    inner = made.sigmas[begin:-1].float()
    share = torch.histogram(sigma, inner.flip(0).contiguous()).hist / len(sigma) * (steps - begin)
    assert share.min() > 0.7
    assert (sigma < START / 8).float().mean() > 0.25 / 8


def test_the_way_runs_from_the_enlarged_under_noise_to_the_sharp() -> None:
    z, e, noise = torch.randn(3, 2, 32, 3, 5).unbind()
    start, middle, end = (torch.full((2,), sigma) for sigma in (START, START / 2, 0.0))
    assert torch.allclose(on_the_way(z, e, start, noise), (1 - START) * e + START * noise, atol=1e-6)
    assert torch.equal(on_the_way(z, e, end, noise), z)
    slope = noise + (1 - START) / START * e - z / START
    halfway = on_the_way(z, e, middle, noise)
    assert torch.allclose(halfway - START / 2 * slope, z, atol=1e-5)


def test_softer_pictures_lack_the_finest_octaves() -> None:
    rng = np.random.default_rng(3)
    picture = render(sample_scene(rng), 256, 256)
    assert np.abs(softened(picture, 0.0).astype(int) - picture).max() <= 1
    before, half, after = (octaves(softened(picture, amount)) for amount in (0.0, 0.5, 1.0))
    assert (after[:3] < half[:3]).all()
    assert (half[:3] < before[:3]).all()
    assert after[0] < 0.4 * before[0]  # these octaves are of boxes, those of cubics
    assert after[4:] == pytest.approx(before[4:], rel=0.1)


def test_pictures_are_enlarged_as_pillow_does() -> None:
    picture = np.random.default_rng(1).integers(80, 176, (24, 40, 3), dtype=np.uint8)  # nothing for it to clip midway
    theirs = np.asarray(Image.fromarray(picture).resize((80, 48), Image.Resampling.BICUBIC))
    assert np.abs(theirs.astype(int) - enlarged(picture)).max() <= 1


def test_pairs_go_on_where_they_were_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.growth.PLAN", ((Bucket(64, 64), 3, 0.5, False), (SMALL, 2, 0.5, True)))
    asked = argparse.Namespace(work=tmp_path, folder=BUILT_IN, scale=0.5, processes=1)
    make_pairs(asked)
    assert PairFiles(tmp_path, SMALL, grown=True).count() == 1
    with (tmp_path / f"pairs-{SMALL.name}.f16").open("ab") as out:
        out.write(b"cut off")
    asked.scale = 1.0
    make_pairs(asked)
    latents, captions = PairFiles(tmp_path, SMALL, grown=True).read()
    assert latents.shape == (2, 2, 32, 4, 4)
    assert len(captions) == 2
    # The enlarged picture is of the same scene.
    likeness = np.corrcoef(latents[1].astype(np.float32).reshape(2, -1))[0, 1]
    assert likeness > 0.8


def test_captions_of_pairs_are_of_their_scenes(tmp_path: Path) -> None:
    files = PairFiles(tmp_path, Bucket(64, 64), grown=False)
    for seed in range(8):
        truths = answers(files.scene(seed))
        labels = {a.name: a.labels[t] for a, t in zip(ATTRIBUTES, truths, strict=True) if t >= 0}
        _, captions = paint_pair((files.bucket, seed, False, BUILT_IN / "vae"))
        for line in captions.split("\t"):
            for name, allowed in claims(line).items():
                assert labels[name] in allowed


@torch.no_grad()
def test_it_begins_as_the_folder_that_ships(work: Path) -> None:
    training = GrowthTraining(options(work))
    shipped = SanaTransformer2DModel.from_pretrained(BUILT_IN / "transformer", low_cpu_mem_usage=False).float()
    text_encoder = Gemma2Model.from_pretrained(BUILT_IN / "text_encoder", dtype=torch.float32)
    batch = training.sets[0].held_out(1)
    noised = from_noise(batch.latents[:, 0], torch.Generator().manual_seed(0))
    painted = training.model.eval()(noised.latents, noised.sigma, batch.tokens, batch.mask)
    theirs = shipped(
        noised.latents,
        encoder_hidden_states=text_encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state,
        encoder_attention_mask=batch.mask,
        timestep=noised.sigma * 1000,
    ).sample
    assert torch.allclose(painted.velocity, theirs, atol=1e-5)


def test_it_goes_on_from_what_was_trained_before_with_its_readers(work: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUILT_IN / "tokenizer")
    torch.manual_seed(7)
    before = Painter(tokenizer)
    torch.save({"average": before.state_dict()}, work / "painter.pt")
    begun = GrowthTraining(options(work)).model.state_dict()
    assert all(torch.equal(begun[name], weight) for name, weight in before.state_dict().items())


def test_a_training_that_was_cut_off_goes_on_and_ships(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = GrowthTraining(options(work, steps=2))
    before = first.model.transformer.proj_out.weight.clone()
    first.run()
    second = GrowthTraining(options(work))
    assert second.step == 2
    second.run()
    assert second.step == 4
    told = capsys.readouterr().out
    assert f"step      4  held-out loss {SMALL.name}: flow" in told
    assert f"held-out loss {SMALL.name} grown" not in told
    assert not torch.equal(second.model.transformer.proj_out.weight, before)
    made, average = assemble(work, BUILT_IN), second.average.model
    assert torch.equal(made.transformer.proj_out.weight, average.transformer.proj_out.weight)
    assert torch.equal(made.text_encoder.embed_tokens.weight, average.text_encoder.embed_tokens.weight)


def test_large_sizes_learn_both_ways(work: Path) -> None:
    training = GrowthTraining(options(work))
    assert list(training.ways(training.sets[0])) == [""]
    ways = training.ways(training.sets[1])
    assert sum(share for share, _ in ways.values()) == pytest.approx(1)
    batch = training.sets[1].held_out(1)
    for name, (_, way) in ways.items():
        sigmas = torch.cat([way(batch.latents, torch.Generator().manual_seed(seed)).sigma for seed in range(60)])
        assert (sigmas.max() > START + 0.01) == (name == "")


def test_a_folder_without_pairs_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="recipe"):
        GrowthTraining(options(tmp_path)).run()
