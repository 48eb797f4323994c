"""One picture, painted from the sky down and from far to near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import land, plants, sky, subjects, water, weather
from .canvas import Canvas
from .noise import Floats
from .scene import Scene

PLACED = ("light", "subject", "island", "near tree")  # what has a place that `places` tells


@dataclass(frozen=True)
class Box:
    """Part of a picture, in shares of its width and height; may reach beyond its edges."""

    left: float
    top: float
    right: float
    bottom: float


class _Painting:
    """The order of painting, and where things stand because of each other."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene = scene
        self.canvas = Canvas(scene, width, height)
        self.foot = scene.shore if scene.water in ("lake", "sea") else max(scene.shore, 0.64)
        self.ridges = land.lay_ridges(self.canvas, self.foot)
        self.horizon = scene.shore if scene.relief == "none" else min(self.foot, 0.62)
        self.light_x = self.canvas.x_of(scene.light_x)
        self.light_y = self._clear_of_ridges()
        self.places: dict[str, Box] = {}
        if scene.light != "none":
            radius = scene.light_radius
            self._note("light", self.light_x, self.light_y, aside=radius, above=radius, below=radius)
        if scene.near_tree != "none":
            self._note("near tree", self.canvas.x_of(0.0 if scene.near_tree_on_left else 1.0), 1.0, 0.3, 0.65, 0.0)

    def _note(self, name: str, x: float, y: float, aside: float, above: float, below: float) -> None:
        """Remembers where something is painted; all in heights."""
        left, right = (0.5 + (x + side * aside) / self.canvas.aspect for side in (-1, 1))
        self.places[name] = Box(left, y - above, right, y + below)

    def _clear_of_ridges(self) -> float:
        scene, lowest = self.scene, self.scene.light_y
        near = np.abs(self.canvas.xs - self.light_x) < scene.light_radius * 0.9
        for ridge in self.ridges:
            if near.any():
                lowest = min(lowest, float(np.median(ridge.crest[near])) - 0.55 * scene.light_radius)
        return max(lowest, scene.light_radius + 0.02)

    def paint(self) -> Floats:
        scene, canvas = self.scene, self.canvas
        sky.paint_sky(canvas, self.horizon)
        if scene.stars:
            sky.paint_stars(canvas)
        if scene.aurora:
            sky.paint_aurora(canvas)
        if scene.clouds != "none":
            sky.paint_clouds(canvas, self.horizon, self.light_x, self.light_y)
        if scene.light != "none":
            sky.paint_light(canvas, self.horizon, self.light_x, self.light_y)
            for x, y in scene.more_lights:
                sky.paint_light(canvas, self.horizon, canvas.x_of(x), y)
        if scene.birds:
            sky.paint_birds(canvas)
        self._land()
        self._water()
        if scene.near_tree != "none":
            plants.paint_near_tree(canvas, 1.02)
        if scene.weather == "rain":
            weather.paint_rain(canvas)
        elif scene.weather == "snowfall":
            weather.paint_snowfall(canvas)
        if scene.style == "ink":
            weather.finish_paper(canvas)
        return canvas.picture

    def _land(self) -> None:
        scene, canvas = self.scene, self.canvas
        for layer, ridge in enumerate(self.ridges):
            nearest = layer == len(self.ridges) - 1
            until = self.foot if nearest else min(float(self.ridges[layer + 1].crest.max()) + 0.01, self.foot)
            land.paint_ridge(canvas, ridge, layer, until if not scene.mist else self.foot)
            if scene.forest != "none" and layer == len(self.ridges) - 2 and ridge.kind in ("hills", "karst"):
                self._woods(ridge.crest, layer, 0.035, 0.32)
            if scene.mist and not (nearest and scene.water not in ("lake", "sea")):
                land.paint_mist(canvas, ridge, layer, self.foot)
        if not self.ridges:
            return
        if scene.water not in ("lake", "sea"):
            land.paint_meadow(canvas, self.foot)
        if scene.water == "river":
            water.paint_river(canvas, self.foot)
        nearest_crest = self.ridges[-1].crest
        if scene.forest != "none":
            self._woods(nearest_crest, 7, 0.060, 0.14)
        if not scene.island:
            self._subject(np.minimum(nearest_crest + 0.035, self.foot - 0.004))
        if scene.forest != "none":
            self._front_woods(nearest_crest)

    def _woods(self, crest: Floats, layer: int, tall: float, haze: float) -> None:
        """Two staggered rows on and just below a crest."""
        kind = self.scene.forest
        for row in range(2):
            ground = np.minimum(crest + np.float32((0.004, 0.022)[row]), np.float32(self.foot - 0.002))
            plants.paint_row(self.canvas, kind, ground, tall * (0.85 + 0.25 * row), 50 + 4 * layer + row, haze, 0.92)

    def _front_woods(self, crest: Floats) -> None:
        """Larger trees nearer to the painter: along the shore, or at both sides of a meadow."""
        scene, canvas = self.scene, self.canvas
        if scene.water in ("lake", "sea"):
            ground = np.full_like(crest, self.foot - 0.001)
            open_middle = np.abs(canvas.xs - np.float32(canvas.x_of(scene.subject_x))) < 0.13
            if scene.subject in ("pagoda", "cabin") and not scene.island:
                ground = np.where(open_middle, np.float32(-1.0), ground).astype(np.float32)
            plants.paint_row(canvas, scene.forest, ground, 0.085, 44, 0.05, 0.8)
            return
        for row, (down, tall) in enumerate(((0.07, 0.13), (0.17, 0.20))):
            # The woods leave the middle open, and draw back towards the sides as they come nearer.
            aside = np.abs(canvas.xs) / np.float32(0.5 * canvas.aspect)
            opening = 0.42 + 0.22 * row
            free = aside > opening
            if scene.subject != "none":
                free &= np.abs(canvas.xs - np.float32(canvas.x_of(scene.subject_x))) > 0.13
            ground = np.where(free, np.float32(self.foot + down), np.float32(-1.0)).astype(np.float32)
            plants.paint_row(canvas, scene.forest, ground, tall, 45 + row, 0.03, 0.85)

    def _subject(self, ground: Floats) -> None:
        scene, canvas = self.scene, self.canvas
        for share in (*scene.more_subjects, scene.subject_x):
            x = canvas.x_of(share)
            place = subjects.standing_place(canvas, ground, x)
            if place < 0:
                place = self.foot  # beside the island that `ground` is the crest of
            if scene.subject == "pagoda":
                subjects.paint_pagoda(canvas, x, place + 0.006, 0.21)
                self._note("subject", x, place, aside=0.06, above=0.23, below=0.01)
            elif scene.subject == "cabin":
                subjects.paint_cabin(canvas, x, place + 0.012, 0.072)
                self._note("subject", x, place, aside=0.07, above=0.09, below=0.01)

    def _water(self) -> None:
        scene, canvas = self.scene, self.canvas
        if scene.water not in ("lake", "sea"):
            return
        water.paint_water(canvas, self.foot, self.light_x)
        rng = np.random.default_rng((scene.seed, 77))
        if scene.island:
            on_it = scene.subject in ("pagoda", "cabin")
            share = scene.subject_x if on_it else (0.30 if scene.subject_x > 0.5 else 0.70)
            middle = canvas.x_of(share)
            base = self.foot + (1 - self.foot) * float(rng.uniform(0.22, 0.38))
            half = float(rng.uniform(0.16, 0.24))
            crest = water.paint_island(canvas, middle, base, half, 0.055)
            self._note("island", middle, base, aside=half, above=0.07, below=0.02)
            if on_it:
                self._subject(crest + 0.004)
            else:
                kind = scene.forest if scene.forest != "none" else "pines"
                here = np.abs(canvas.xs - np.float32(middle)) < 0.10
                plants.paint_row(canvas, kind, np.where(here, crest, -1).astype(np.float32), 0.10, 48, 0.06, 0.9)
        if scene.subject == "boat":
            y = self.foot + (1 - self.foot) * float(rng.uniform(0.42, 0.66))
            for share in scene.more_subjects:
                near = self.foot + (1 - self.foot) * float(rng.uniform(0.36, 0.72))
                subjects.paint_boat(canvas, canvas.x_of(share), near, 0.105)
            x = canvas.x_of(scene.subject_x)
            subjects.paint_boat(canvas, x, y, 0.105)
            self._note("subject", x, y, aside=0.06, above=0.13, below=0.12)


def render(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """The scene painted, as [height, width, 3] bytes. The same scene and size always give the same bytes."""
    picture = _Painting(scene, width, height).paint()
    np.clip(picture, 0, 1, out=picture)
    picture *= 255
    picture += 0.5
    return picture.astype(np.uint8)


def places(scene: Scene, width: int, height: int) -> dict[str, Box]:
    """Where a picture of the scene has what of `PLACED` it has; only the ratio of width and height matters."""
    painting = _Painting(scene, round(64 * width / height), 64)
    if scene.subject != "none" or scene.island:
        painting.paint()
    return painting.places
