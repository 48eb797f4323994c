"""The painted world: deterministic, one composition at every size, and every attribute to be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from training.world import Scene, render, sample_scene
from training.world.scene import RELIEFS, SEASONS, SKIES, TIMES


def scenes(count: int, seed: int = 0, wanted: Callable[[Scene], bool] = lambda scene: True) -> list[Scene]:
    rng, found = np.random.default_rng(seed), list[Scene]()
    while len(found) < count:
        scene = sample_scene(rng)
        if wanted(scene):
            found.append(scene)
    return found


def shrink(picture: np.ndarray, factor: int) -> np.ndarray:
    h, w, c = picture.shape
    return picture.reshape(h // factor, factor, w // factor, factor, c).astype(np.float32).mean(axis=(1, 3))


def test_a_seed_is_a_scene_and_a_scene_is_a_picture() -> None:
    first, again = scenes(5, seed=3), scenes(5, seed=3)
    assert first == again
    assert np.array_equal(render(first[0], 128, 96), render(again[0], 128, 96))
    assert not np.array_equal(render(first[0], 128, 96), render(replace(first[0], seed=first[0].seed + 1), 128, 96))


@pytest.mark.parametrize("index", range(12))
def test_the_composition_is_the_same_at_two_sizes(index: int) -> None:
    scene = scenes(12, seed=1)[index]
    small, large = render(scene, 128, 128), render(scene, 512, 512)
    difference = np.abs(shrink(large, 8) - shrink(small, 2))
    assert difference.mean() < 5.0


@pytest.mark.parametrize(("width", "height"), [(256, 128), (128, 256), (416, 96), (32, 32), (65, 33)])
def test_any_aspect_ratio(width: int, height: int) -> None:
    for scene in scenes(12, seed=2):
        picture = render(scene, width, height)
        assert picture.shape == (height, width, 3)
        assert picture.dtype == np.uint8


def test_attributes_do_not_contradict_each_other() -> None:
    for scene in scenes(800):
        assert scene.sky in (*SKIES[scene.time], "grey", "paper")
        assert (scene.sky == "paper") == (scene.style == "ink")
        assert (scene.light == "moon") <= (scene.time == "night")
        assert (scene.light == "sun") <= (scene.time != "night")
        assert (scene.light != "none") <= (scene.weather == "clear")
        assert scene.stars <= (scene.time == "night")
        assert scene.snow_caps <= (scene.relief in ("alpine", "volcano"))
        assert (scene.relief == "none") == (scene.layers == 0)
        assert (scene.relief == "none") <= (scene.water == "sea")
        assert (scene.season == "none") == (scene.relief in ("mesa", "dunes"))
        assert (scene.weather == "snowfall") <= (scene.season == "winter")
        assert (scene.subject == "boat") <= (scene.water in ("lake", "sea"))
        assert scene.island <= (scene.water in ("lake", "sea"))
        if scene.near_tree != "none":
            hidden = "left" if scene.near_tree_on_left else "right"
            assert scene.light_side != hidden
            assert scene.subject_side != hidden


def test_every_kind_of_everything_is_drawn() -> None:
    drawn = scenes(800)
    assert {s.relief for s in drawn} == set(RELIEFS)
    assert {s.season for s in drawn} == set(SEASONS)
    assert {s.near_tree for s in drawn} == {s.forest for s in drawn} == {"none", "pines", "leafy", "bare"}
    assert {s.weather for s in drawn} == {"clear", "rain", "snowfall"}
    assert {s.subject for s in drawn} == {"none", "boat", "pagoda", "cabin"}


def natural(scene: Scene) -> bool:
    return scene.style == "natural" and scene.weather == "clear" and scene.near_tree == "none"


def test_every_time_of_day_has_its_brightness_and_night_is_not_black() -> None:
    means: dict[str, list[float]] = {time: [] for time in TIMES}
    for scene in scenes(60, wanted=lambda s: natural(s) and not s.light_is_large):
        means[scene.time].append(float(render(scene, 64, 64)[:20].mean()))
    assert min(means["night"]) > 15
    assert max(means["night"]) < 105
    assert min(means["noon"]) > 110


def test_the_sun_is_where_the_scene_says() -> None:
    for scene in scenes(6, wanted=lambda s: natural(s) and s.light_colour == "red" and not s.light_is_low):
        picture = render(scene, 192, 128).astype(np.float32)[: int(128 * min(scene.shore, 0.5))]
        target = np.abs(picture - np.array([235, 48, 31])).sum(axis=-1)
        column = np.median(np.nonzero(target < 12)[1]) / 192
        assert column == pytest.approx(scene.light_x, abs=0.05)


def test_stars_are_seen() -> None:
    for scene in scenes(4, wanted=lambda s: natural(s) and s.stars and s.clouds == "none" and not s.aurora):
        with_them = render(scene, 256, 256)[:90].astype(int)
        without = render(replace(scene, stars=False), 256, 256)[:90].astype(int)
        assert 20 < ((with_them - without).max(axis=-1) > 60).sum() < 2000


def test_ink_is_almost_grey() -> None:
    for scene in scenes(6, wanted=lambda s: s.style == "ink" and s.forest == s.near_tree == s.subject == "none"):
        picture = render(scene, 96, 96).astype(np.float32)
        assert np.median(picture.max(axis=-1) - picture.min(axis=-1)) < 60


@pytest.mark.parametrize(
    ("season", "holds"),
    [
        ("summer", lambda r, g, b: g > r and g > b),
        ("autumn", lambda r, g, b: r > g > b),
        ("winter", lambda r, g, b: min(r, g, b) > 150),
    ],
)
def test_a_meadow_has_the_colour_of_its_season(season: str, holds: Callable[[float, float, float], bool]) -> None:
    def wanted(scene: Scene) -> bool:
        return natural(scene) and (scene.time, scene.season, scene.water) == ("noon", season, "none")

    for scene in scenes(3, wanted=wanted):
        assert holds(*render(scene, 96, 96)[88:, 40:56].reshape(-1, 3).mean(axis=0))


CHANGES: dict[str, tuple[Callable[[Scene], bool], dict[str, Any]]] = {
    "clouds": (lambda s: s.clouds == "many" and s.weather == "clear", {"clouds": "none"}),
    "rain": (lambda s: s.weather == "rain", {"weather": "clear"}),
    "snowfall": (lambda s: s.weather == "snowfall", {"weather": "clear"}),
    "snow on top": (lambda s: s.snow_caps and s.style == "natural" and s.time == "noon", {"snow_caps": False}),
    "forest": (lambda s: s.forest != "none", {"forest": "none"}),
    "river": (lambda s: s.water == "river", {"water": "none"}),
    "lake": (lambda s: s.water == "lake", {"water": "none"}),
    "island": (lambda s: s.island, {"island": False}),
    "mist": (lambda s: s.mist and s.layers > 2, {"mist": False}),
    "near tree": (lambda s: s.near_tree != "none", {"near_tree": "none"}),
    "boat": (lambda s: s.subject == "boat", {"subject": "none"}),
    "pagoda": (lambda s: s.subject == "pagoda", {"subject": "none"}),
    "cabin": (lambda s: s.subject == "cabin", {"subject": "none"}),
    "birds": (lambda s: s.birds, {"birds": False}),
    "aurora": (lambda s: s.aurora, {"aurora": False}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_is_seen_even_at_128_rows(name: str) -> None:
    wanted, change = CHANGES[name]
    for scene in scenes(3, wanted=wanted):
        picture = render(scene, 128, 128).astype(int)
        changed = render(replace(scene, **change), 128, 128).astype(int)
        assert (np.abs(picture - changed).max(axis=-1) > 20).sum() > 15, scene


def test_a_subject_stands_where_the_scene_says() -> None:
    for scene in scenes(12, wanted=lambda s: s.subject != "none" and not s.island and s.water == "none"):
        picture = render(scene, 256, 256).astype(int)
        without = render(replace(scene, subject="none", forest="none"), 256, 256).astype(int)
        picture = render(replace(scene, forest="none"), 256, 256).astype(int)
        columns = np.nonzero((np.abs(picture - without).max(axis=-1) > 12).sum(axis=0) > 4)[0]
        assert np.median(columns) / 256 == pytest.approx(scene.subject_x, abs=0.06)
