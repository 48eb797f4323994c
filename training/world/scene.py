"""What is in a picture, in words that a caption can use, and how scenes are drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

STYLES = ("natural", "ink")
TIMES = ("dawn", "noon", "dusk", "night")
SEASONS = ("spring", "summer", "autumn", "winter", "none")  # "none" is the desert, which has no seasons
RELIEFS = ("alpine", "volcano", "karst", "hills", "mesa", "dunes", "none")  # "none" is the open sea
FORESTS = ("none", "pines", "leafy", "bare")
WATERS = ("none", "lake", "sea", "river")
WEATHERS = ("clear", "rain", "snowfall")
SUBJECTS = ("none", "boat", "pagoda", "cabin")

# The first sky of a time is the usual one; "grey" belongs to rain and snowfall, "paper" to ink.
SKIES: dict[str, tuple[str, ...]] = {
    "dawn": ("pink", "golden"),
    "noon": ("blue", "pale"),
    "dusk": ("orange", "purple"),
    "night": ("blue", "violet"),
}
SUNS: dict[str, tuple[str, ...]] = {
    "dawn": ("white", "golden", "orange"),
    "noon": ("white", "golden"),
    "dusk": ("golden", "orange", "red"),
}


@dataclass(frozen=True)
class Scene:
    """All that `render` draws from. `seed` settles only what has no name: the lie of ridges, clouds and stars."""

    style: str  # one of STYLES
    time: str  # one of TIMES
    season: str  # one of SEASONS
    sky: str  # one of SKIES[time], "grey" or "paper"
    light: str  # "sun", "moon" or "none"
    light_colour: str  # "white", "golden", "orange" or "red"; "" where there is no light
    light_x: float  # of the width
    light_y: float  # of the height; ridges in its way push it up
    light_radius: float  # of the height
    crescent: bool
    stars: bool
    aurora: bool
    clouds: str  # "none", "few" or "many"
    weather: str  # one of WEATHERS
    birds: bool
    relief: str  # one of RELIEFS
    layers: int  # ridges one behind another, 0 to 4
    snow_caps: bool
    forest: str  # one of FORESTS
    water: str  # one of WATERS
    island: bool
    mist: bool
    subject: str  # one of SUBJECTS
    subject_x: float  # of the width
    near_tree: str  # one of FORESTS: a single large tree that frames the picture
    near_tree_on_left: bool
    shore: float  # where water or the nearest meadow begins, of the height
    seed: int
    # What no sentence asks for: see `multiplied`. Shares of the width, and of width and height.
    more_subjects: tuple[float, ...] = ()
    more_lights: tuple[tuple[float, float], ...] = ()

    @property
    def light_side(self) -> str:
        """ "left", "centre" or "right"."""
        return side_of(self.light_x)

    @property
    def subject_side(self) -> str:
        """ "left", "centre" or "right"."""
        return side_of(self.subject_x)

    @property
    def light_is_low(self) -> bool:
        return self.light_y > 0.29

    @property
    def light_is_large(self) -> bool:
        return self.light_radius > 0.085

    @property
    def land(self) -> str:
        """The colour that the land is known by: "green", "golden", "red", "white" or "grey"; "" at open sea."""
        if self.relief == "none":
            return ""
        if self.season == "none":
            return "red" if self.relief == "mesa" else "golden"
        if self.season == "winter":
            return "white"
        if self.relief in ("alpine", "volcano"):
            return "grey"
        return "golden" if self.season == "autumn" else "green"


def multiplied(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with its light or its subject painted several times, as a generator may that has not learnt better.

    For the scorer, which could not learn from true scenes alone what several suns look like. Unchanged where there is
    nothing to multiply.
    """
    lights = scene.light != "none" and (scene.subject == "none" or rng.random() < 0.5)
    if lights:
        apart = 2.2 * scene.light_radius
        places = [(scene.light_x, scene.light_y)]
        for x, y in rng.uniform((0.08, 0.10), (0.92, 0.40), (int(rng.integers(3, 12)), 2)):
            if all((x - a) ** 2 + (y - b) ** 2 > apart**2 for a, b in places):
                places.append((float(x), float(y)))
        return replace(scene, more_lights=tuple(places[1 : int(rng.integers(2, 6))]))
    if scene.subject != "none":
        others = rng.uniform(0.06, 0.94, int(rng.integers(2, 7)))
        free = [float(x) for x in others if abs(x - scene.subject_x) > 0.1]
        return replace(scene, more_subjects=tuple(free))
    return scene


def side_of(x: float) -> str:
    """ "left", "centre" or "right" of a place given as a share of the width."""
    return "left" if x < 0.38 else "right" if x > 0.62 else "centre"


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn at random, such that its attributes do not contradict each other."""

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def pick(names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
        share = None if weights is None else np.asarray(weights) / sum(weights)
        return str(rng.choice(np.asarray(names), p=share))

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def beside(side: str) -> float:
        return {"left": 0.20, "centre": 0.50, "right": 0.80}[side] + between(-0.07, 0.07)

    ink = chance(0.18)
    time = pick(TIMES, (0.22, 0.30, 0.26, 0.22))
    relief = pick(RELIEFS, (0.27, 0.07, 0.14, 0.24, 0.09, 0.07, 0.12))
    desert = relief in ("mesa", "dunes")
    season = "none" if desert else pick(SEASONS[:4], (0.22, 0.33, 0.22, 0.23))
    if relief == "none":
        water = "sea"
    elif desert:
        water = pick(("none", "lake", "river"), (0.76, 0.08, 0.16))
    else:
        water = pick(WATERS, (0.34, 0.32, 0.14, 0.20))

    weather = "clear"
    if not desert:
        weather = pick(WEATHERS, (0.82, 0.0, 0.18) if season == "winter" else (0.89, 0.11, 0.0))
    dull = weather != "clear"
    sky = "paper" if ink else "grey" if dull else pick(SKIES[time], (0.62, 0.38))
    clouds = "many" if weather == "rain" else "none" if dull else pick(("none", "few", "many"), (0.38, 0.40, 0.22))

    light, light_colour = "none", ""
    if not dull and time == "night" and chance(0.65):
        light, light_colour = "moon", pick(("white", "golden"), (0.7, 0.3))
    elif not dull and time != "night" and chance(0.68):
        light, light_colour = "sun", "red" if ink else pick(SUNS[time])
    low = time in ("dawn", "dusk") and chance(0.6)

    mountainous = relief in ("alpine", "volcano")
    if desert or relief == "none":
        forest = "none"
    elif season == "winter":
        forest = pick(FORESTS, (0.45, 0.33, 0.0, 0.22))
    else:
        forest = pick(FORESTS, (0.46, 0.28, 0.26, 0.0))
    near_tree = "none"
    if not desert and relief != "none" and chance(0.22):
        near_tree = (
            pick(("pines", "bare"), (0.5, 0.5)) if season == "winter" else pick(("pines", "leafy"), (0.35, 0.65))
        )

    on_water = water in ("lake", "sea")
    subjects = (0.62, 0.38 if on_water else 0.0, 0.20 if relief != "none" and not desert else 0.0)
    subject = pick(("none", "boat", "pagoda", "cabin"), (*subjects, 0.16 if relief != "none" and not desert else 0.0))
    if subject != "none" and chance(0.25):
        subject = "none"
    near_tree_on_left = chance(0.5)
    sides: tuple[str, ...] = ("left", "centre", "right")
    if near_tree != "none":
        sides = ("centre", "right") if near_tree_on_left else ("left", "centre")
    subject_x = beside(pick(sides))
    # Nothing that a caption may name hides behind the large tree.
    light_x = beside(pick(sides))
    return Scene(
        style="ink" if ink else "natural",
        time=time,
        season=season,
        sky=sky,
        light=light,
        light_colour=light_colour,
        light_x=light_x,
        light_y=between(0.33, 0.42) if low else between(0.13, 0.24),
        light_radius=between(0.09, 0.125) if chance(0.25) else between(0.045, 0.075),
        crescent=light == "moon" and chance(0.3),
        stars=time == "night" and not dull and not ink and clouds != "many" and chance(0.75),
        aurora=time == "night" and not dull and not ink and clouds == "none" and chance(0.3),
        clouds=clouds,
        weather=weather,
        birds=time != "night" and not dull and chance(0.14),
        relief=relief,
        layers=0 if relief == "none" else int(rng.integers(2, 5)),
        snow_caps=mountainous and season != "winter" and chance(0.5),
        forest=forest,
        water=water,
        island=on_water and chance(0.22),
        mist=relief != "none" and not desert and chance(0.28),
        subject=subject,
        subject_x=subject_x,
        near_tree=near_tree,
        near_tree_on_left=near_tree_on_left,
        shore=between(0.54, 0.62) if relief == "none" else between(0.62, 0.72),
        seed=int(rng.integers(2**31)),
    )
