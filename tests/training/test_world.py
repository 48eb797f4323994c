"""The painted world: deterministic, and one composition at every size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from training.world import SKIES, TIMES, Scene, render, sample_scene


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def shrink(picture: np.ndarray, factor: int) -> np.ndarray:
    h, w, c = picture.shape
    return picture.reshape(h // factor, factor, w // factor, factor, c).astype(np.float32).mean(axis=(1, 3))


def test_a_seed_is_a_scene_and_a_scene_is_a_picture() -> None:
    first, again = scenes(5, seed=3), scenes(5, seed=3)
    assert first == again
    assert np.array_equal(render(first[0], 128, 96), render(again[0], 128, 96))
    assert not np.array_equal(render(first[0], 128, 96), render(replace(first[0], seed=first[0].seed + 1), 128, 96))


@pytest.mark.parametrize("index", range(6))
def test_the_composition_is_the_same_at_two_sizes(index: int) -> None:
    scene = scenes(6, seed=1)[index]
    small, large = render(scene, 128, 128), render(scene, 512, 512)
    difference = np.abs(shrink(large, 8) - shrink(small, 2))
    assert difference.mean() < 4.0


@pytest.mark.parametrize(("width", "height"), [(256, 128), (128, 256), (416, 96), (32, 32), (65, 33)])
def test_any_aspect_ratio(width: int, height: int) -> None:
    for scene in scenes(4, seed=2):
        picture = render(scene, width, height)
        assert picture.shape == (height, width, 3)
        assert picture.dtype == np.uint8


def test_attributes_do_not_contradict_each_other() -> None:
    for scene in scenes(500):
        assert scene.sky in SKIES[scene.time]
        assert (scene.light == "moon") <= (scene.time == "night")
        assert (scene.light == "sun") <= (scene.time != "night")
        assert scene.stars <= (scene.time == "night")
        assert scene.snow_caps <= (scene.relief == "mountains")
        assert (scene.relief == "none") == (scene.layers == 0)
        assert (scene.relief == "none") <= (scene.water == "sea")


def test_every_time_of_day_has_its_brightness() -> None:
    means: dict[str, list[float]] = {time: [] for time in TIMES}
    for scene in scenes(60):
        means[scene.time].append(float(render(scene, 64, 64)[:20].mean()))
    assert max(means["night"]) < 90
    assert min(means["noon"]) > 110


def test_the_sun_is_where_the_scene_says() -> None:
    suns = [s for s in scenes(200) if s.light_colour == "red" and s.clouds == "none"][:6]
    for scene in suns:
        picture = render(scene, 192, 128).astype(np.float32)[: int(128 * min(scene.shore, 0.5))]
        target = np.abs(picture - np.array([237, 51, 31])).sum(axis=-1)
        column = np.median(np.nonzero(target < 12)[1]) / 192
        assert column == pytest.approx(scene.light_x, abs=0.05)
