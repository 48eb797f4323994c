"""The measure: what a scene answers, what the scorer sees, and what the evaluation counts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training.claims import ATTRIBUTES, claims
from training.evaluate import (
    NAMES,
    Onlooker,
    Shot,
    checksum,
    guidance_shots,
    held_out_prompts,
    kept_claims,
    look_at_all,
    negative_shots,
    octaves,
    report_attributes,
    report_guidance,
    report_negatives,
)
from training.gallery import LARGE, SENTENCES, nearest, thumbnail
from training.scorer import (
    READ,
    SIDE,
    Scorer,
    ScorerTraining,
    answers,
    draw,
    load_scorer,
    loss_of,
    read,
    scorer_file,
    to_scorer,
)
from training.world import multiplied, places, render, sample_scene


def test_every_attribute_has_an_answer_or_none() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = answers(sample_scene(rng))
        assert len(found) == len(ATTRIBUTES)
        assert all(-1 <= answer < len(a.labels) for answer, a in zip(found, ATTRIBUTES, strict=True))


def test_a_multiplied_scene_shows_several_of_one_thing_and_claims_no_side_of_it() -> None:
    rng = np.random.default_rng(4)
    lights = subjects = 0
    for _ in range(200):
        scene = sample_scene(rng)
        several = multiplied(scene, rng)
        found = dict(zip((a.name for a in READ), answers(several, READ), strict=True))
        assert found["lights"] == (-1 if scene.light == "none" else int(bool(several.more_lights)))
        assert found["subjects"] == (-1 if scene.subject == "none" else int(bool(several.more_subjects)))
        if several.more_lights:
            lights += 1
            assert found["light side"] == -1
            apart = [abs(x - scene.light_x) + abs(y - scene.light_y) for x, y in several.more_lights]
            assert min(apart) > 2 * scene.light_radius
        if several.more_subjects:
            subjects += 1
            assert found["subject side"] == -1
            assert places(several, 64, 64)["subject"] == places(scene, 64, 64)["subject"]
        if several != scene:
            assert not np.array_equal(render(several, 64, 64), render(scene, 64, 64))
        else:
            assert not several.more_lights
            assert not several.more_subjects
    assert lights > 40
    assert subjects > 20


@pytest.mark.parametrize("size", [128, 256, 512])
def test_a_picture_of_any_size_is_seen_at_one_size(size: int) -> None:
    seen = to_scorer(render(sample_scene(np.random.default_rng(1)), size, size))
    assert seen.shape == (3, SIDE, SIDE)
    assert seen.dtype == np.uint8


def test_the_same_scene_looks_alike_from_two_sizes() -> None:
    scene = sample_scene(np.random.default_rng(2))
    small, large = (to_scorer(render(scene, size, size)).astype(float) for size in (256, 512))
    assert np.abs(small - large).mean() < 4


def test_an_attribute_that_is_not_shown_teaches_nothing() -> None:
    logits = torch.randn(2, sum(len(a.labels) for a in ATTRIBUTES), requires_grad=True)
    truths = torch.full((2, len(ATTRIBUTES)), -1)
    truths[0, 0] = 1
    loss_of(logits, truths).backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[1]) == 0
    assert torch.count_nonzero(logits.grad[0]) == len(ATTRIBUTES[0].labels)


def test_a_training_can_be_cut_off_and_read(tmp_path: Path) -> None:
    options = argparse.Namespace(
        work=tmp_path, device="cpu", rate=1e-3, steps=10, jobs=1, processes=1, minutes=math.inf
    )
    training = ScorerTraining(options)
    training.step = 7
    training.save()
    assert ScorerTraining(options).step == 7
    assert scorer_file(tmp_path) == tmp_path / "scorer.safetensors"
    readings = read(load_scorer(scorer_file(tmp_path)), render(sample_scene(np.random.default_rng(3)), 64, 64))
    assert set(readings) == {a.name for a in READ}
    assert all(reading.label in reading.attribute.labels for reading in readings.values())


def test_the_scorer_that_is_kept_reads_renders(tmp_path: Path) -> None:
    scorer, right = load_scorer(scorer_file(tmp_path)), []
    for seed in range(10_000_100, 10_000_102):
        pictures, truths = draw(seed)
        for picture, truth in zip(pictures, truths, strict=True):
            found = read(scorer, picture.transpose(1, 2, 0))
            right += [found[a.name].label == a.labels[t] for a, t in zip(READ, truth, strict=True) if t >= 0]
    assert sum(right) > 0.85 * len(right)


def test_a_seed_draws_the_same_pictures_again() -> None:
    (pictures, truths), (again, _) = draw(5), draw(5)
    assert np.array_equal(pictures, again)
    assert truths.shape == (len(pictures), len(READ))


def test_a_scorer_has_a_logit_for_each_label() -> None:
    assert Scorer()(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, sum(len(a.labels) for a in READ))


def test_claims_are_counted_as_read() -> None:
    seen = {"time": "dusk", "light": "moon", "light colour": "red", "relief": "alpine", "snow": "yes"}
    labels = {a.name: seen.get(a.name, a.labels[0]) for a in ATTRIBUTES}
    kept = kept_claims("snowy mountains at dusk, a red sun", labels)
    assert kept == {"time": True, "light": False, "light colour": True, "relief": True, "snow": True}


class Painted:
    """Stands for a picture that was made."""

    def numpy(self) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)


def test_an_evaluation_that_was_cut_off_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def scroll(prompt: str, **arguments: object) -> Painted:
        made.append(prompt)
        return Painted()

    look, path = Onlooker(scroll, Scorer().eval()), tmp_path / "attributes.jsonl"
    for count in (3, 5, 5):
        shots = [Shot(text, 64, n, 20, 3.0, scene=scene) for n, scene, text in held_out_prompts(count)]
        rows = look_at_all(path, shots, lambda left: map(look, left))
        assert len(rows) == count
        report_attributes(rows, 64)
    assert made == [text for _, _, text in held_out_prompts(5)]
    assert len(path.read_text().splitlines()) == 5
    *_, judged, spectra = capsys.readouterr().out.splitlines()
    assert judged.startswith("attributes at 64, 5 prompts: generated ")
    assert "ratio" in judged
    assert spectra.count("0.00") == 4, "a black picture has no detail"


def test_one_is_told_from_several(capsys: pytest.CaptureFixture[str]) -> None:
    blank = {attribute.name: "" for attribute in READ} | {"light": "none", "subject": "none"}

    def seen(**labels: str) -> dict[str, object]:
        return {"labels": blank | labels, "octaves": [1.0]}

    both = seen(light="sun", lights="one", water="lake")
    rows = [
        {"prompt": "a lake", "generated": seen(light="sun", lights="several"), "rendered": seen()},
        {"prompt": "a lake", "generated": seen(light="moon", lights="one"), "rendered": both},
        {"prompt": "a lake", "generated": seen(lights="several"), "rendered": seen()},
    ]
    report_attributes(rows, 64)
    lines = capsys.readouterr().out.splitlines()
    assert "lights at 64: one alone where there are any: rendered 1.000 of 1, generated 0.500 of 2" in lines
    assert not any(line.startswith("subjects") for line in lines)


def test_guidance_is_judged_by_the_claims_it_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    shots = guidance_shots(64, 1, 20, 3.0)
    rows = []
    for shot in shots:
        labels = {attribute.name: "" for attribute in ATTRIBUTES}
        if shot.guidance > 1:
            labels.update((name, next(iter(allowed))) for name, allowed in claims(shot.prompt).items())
        rows.append({"generated": {"labels": labels}})
    report_guidance(shots, rows)
    assert capsys.readouterr().out == "guidance 1: 0.000 of claims, guidance 3: 1.000 of claims\n"


def test_what_is_shown_unasked_is_named_against(capsys: pytest.CaptureFixture[str]) -> None:
    """A painter that drops whatever a negative prompt names, and once more drops what it does not name."""
    blank = {attribute.name: "" for attribute in ATTRIBUTES}
    shots = [Shot("a lake at night", 64, seed, 20, 3.0) for seed in range(2)]
    shown = [{"water": "lake", "stars": "yes", "mist": "no"}, {"stars": "yes", "clouds": "yes"}]
    cases = negative_shots(shots, [{"generated": {"labels": blank | labels}} for labels in shown])
    assert [thing for thing, *_ in cases] == [("stars", "yes"), ("clouds", "yes"), ("stars", "yes")]
    rows = []
    for number, (thing, own, other) in enumerate(cases):
        assert own.negative == NAMES[thing] != other.negative
        assert (own.prompt, own.seed) == (other.prompt, other.seed)
        assert other.negative not in ("a lake", "a river", "clouds"), "asked for, or seen"
        rows += [
            {"generated": {"labels": blank}},
            {"generated": {"labels": blank | ({} if number == 2 else dict([thing]))}},
        ]
    report_negatives([thing for thing, *_ in cases], rows)
    assert capsys.readouterr().out.splitlines() == [
        "stars: seen unasked in 2; against its name 0.00 stay, against another's 0.50",
        "clouds: seen unasked in 1; against its name 0.00 stay, against another's 1.00",
        "all: seen unasked in 3; against its name 0.00 stay, against another's 0.67",
    ]


def test_other_weights_have_another_name(tmp_path: Path) -> None:
    names = []
    for weights in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        names.append(checksum([tmp_path / "model.safetensors"]))
    assert names[0] == names[2] != names[1]


def test_held_out_prompts_stay_the_same() -> None:
    first, more = list(held_out_prompts(5)), list(held_out_prompts(8))
    assert [text for _, _, text in first] == [text for _, _, text in more[:5]]
    assert [number for number, _, _ in more] == list(range(8))


def test_octaves_tell_fine_detail_from_coarse() -> None:
    fine = np.indices((64, 64)).sum(axis=0) % 2 * 255
    coarse = (np.indices((64, 64)) // 8).sum(axis=0) % 2 * 255
    energies = [octaves(np.repeat(p[..., None], 3, axis=2).astype(np.uint8)) for p in (fine, coarse)]
    assert energies[0].argmax() == 0
    assert energies[1].argmax() == 3


def test_the_nearest_render_of_a_render_is_itself() -> None:
    pictures = [render(sample_scene(np.random.default_rng(i)), 64, 64) for i in range(6)]
    thumbnails = np.stack([thumbnail(picture) for picture in pictures])
    assert [nearest(picture, thumbnails) for picture in pictures] == list(range(6))


def test_the_gallery_asks_for_many_different_things() -> None:
    assert len(set(SENTENCES)) == 32
    assert len(set(LARGE)) == 8
    assert all(claims(sentence) for sentence in SENTENCES)
    assert {name for sentence in SENTENCES for name in claims(sentence)} >= {
        "style",
        "time",
        "relief",
        "subject",
        "weather",
    }
