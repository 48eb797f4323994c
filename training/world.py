"""The world that the built-in model learns: landscapes painted from a handful of named attributes.

A `Scene` says what is in the picture, in words a caption can use. `render` paints it at any size: places are relative
to the picture, lengths to its height, and texture is value noise that gains octaves with resolution, so the same scene
is the same composition at 256 and at 4096 rows, only sharper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class SkyPalette:
    """Sky colours from the zenith down to the horizon, and the colour of clouds lit by them."""

    zenith: Colour
    middle: Colour
    horizon: Colour
    cloud: Colour


TIMES = ("dawn", "noon", "dusk", "night")

# The first palette of a time is the usual one.
SKIES: dict[str, dict[str, SkyPalette]] = {
    "dawn": {
        "pink": SkyPalette((0.46, 0.52, 0.76), (0.87, 0.68, 0.76), (1.00, 0.84, 0.76), (1.00, 0.86, 0.86)),
        "golden": SkyPalette((0.50, 0.66, 0.80), (0.93, 0.84, 0.66), (1.00, 0.87, 0.58), (1.00, 0.94, 0.78)),
    },
    "noon": {
        "blue": SkyPalette((0.16, 0.42, 0.80), (0.42, 0.67, 0.93), (0.80, 0.90, 0.97), (0.99, 0.99, 1.00)),
        "pale": SkyPalette((0.52, 0.66, 0.76), (0.70, 0.80, 0.85), (0.90, 0.93, 0.93), (0.97, 0.98, 0.98)),
    },
    "dusk": {
        "orange": SkyPalette((0.25, 0.25, 0.46), (0.86, 0.45, 0.34), (1.00, 0.71, 0.36), (0.98, 0.62, 0.46)),
        "purple": SkyPalette((0.20, 0.15, 0.42), (0.55, 0.28, 0.56), (0.96, 0.53, 0.52), (0.80, 0.44, 0.62)),
    },
    "night": {
        "blue": SkyPalette((0.02, 0.03, 0.11), (0.05, 0.09, 0.24), (0.15, 0.23, 0.42), (0.18, 0.23, 0.36)),
        "black": SkyPalette((0.01, 0.01, 0.03), (0.03, 0.04, 0.08), (0.10, 0.12, 0.17), (0.15, 0.16, 0.20)),
    },
}

SUN_COLOURS: dict[str, Colour] = {
    "white": (1.00, 0.99, 0.95),
    "golden": (1.00, 0.87, 0.42),
    "orange": (1.00, 0.58, 0.18),
    "red": (0.93, 0.20, 0.12),
}
SUNS_BY_TIME: dict[str, tuple[str, ...]] = {
    "dawn": ("white", "golden", "orange"),
    "noon": ("white", "golden"),
    "dusk": ("golden", "orange", "red"),
}
MOON_COLOURS: dict[str, Colour] = {"white": (0.95, 0.96, 1.00), "golden": (1.00, 0.88, 0.60)}

LANDS: dict[str, Colour] = {
    "green": (0.27, 0.47, 0.20),
    "grey": (0.40, 0.42, 0.46),
    "red": (0.66, 0.32, 0.20),
    "golden": (0.78, 0.58, 0.28),
    "white": (0.90, 0.93, 0.97),
}
FORESTS: dict[str, Colour] = {
    "green": (0.10, 0.25, 0.14),
    "grey": (0.12, 0.24, 0.18),
    "red": (0.24, 0.25, 0.12),
    "golden": (0.62, 0.30, 0.10),
    "white": (0.30, 0.38, 0.40),
}
WATERS: dict[str, Colour] = {"lake": (0.20, 0.38, 0.46), "sea": (0.10, 0.32, 0.48)}
DAYLIGHT: dict[str, Colour] = {
    "dawn": (0.90, 0.80, 0.80),
    "noon": (1.00, 1.00, 0.98),
    "dusk": (0.62, 0.47, 0.52),
    "night": (0.15, 0.19, 0.32),
}
SNOW: Colour = (0.96, 0.97, 1.00)


@dataclass(frozen=True)
class Scene:
    """All that `render` draws from. `seed` settles only what has no name: the lie of ridges, clouds and stars."""

    time: str  # one of TIMES
    sky: str  # a key of SKIES[time]
    light: str  # "sun", "moon" or "none"
    light_colour: str  # a key of SUN_COLOURS or MOON_COLOURS; "" where there is no light
    light_x: float  # of the width
    light_y: float  # of the height; ridges in its way push it up
    light_radius: float  # of the height
    crescent: bool
    stars: bool
    aurora: bool
    clouds: str  # "none", "few" or "many"
    relief: str  # "mountains", "hills" or "none" (the open sea)
    layers: int  # ridges one behind another, 0 to 4
    land: str  # a key of LANDS
    snow_caps: bool
    forest: bool
    water: str  # "none", "lake" or "sea"
    mist: bool
    shore: float  # where the water begins, of the height
    seed: int

    @property
    def light_side(self) -> str:
        """ "left", "centre" or "right"."""
        return "left" if self.light_x < 0.38 else "right" if self.light_x > 0.62 else "centre"

    @property
    def light_is_low(self) -> bool:
        return self.light_y > 0.29

    @property
    def light_is_large(self) -> bool:
        return self.light_radius > 0.085


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn at random, such that its attributes do not contradict each other."""

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def pick(names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
        share = None if weights is None else np.asarray(weights) / sum(weights)
        return str(rng.choice(np.asarray(names), p=share))

    time = pick(TIMES, (0.22, 0.30, 0.26, 0.22))
    sky = pick(tuple(SKIES[time]), (0.65, 0.35))
    clouds = pick(("none", "few", "many"), (0.40, 0.38, 0.22))

    light, light_colour = "none", ""
    if time == "night" and chance(0.65):
        light, light_colour = "moon", pick(tuple(MOON_COLOURS), (0.7, 0.3))
    elif time != "night" and chance(0.72):
        light, light_colour = "sun", pick(SUNS_BY_TIME[time])
    side = pick(("left", "centre", "right"))
    light_x = {"left": 0.20, "centre": 0.50, "right": 0.80}[side] + float(rng.uniform(-0.07, 0.07))
    low = time in ("dawn", "dusk") and chance(0.6)
    light_y = float(rng.uniform(0.33, 0.42) if low else rng.uniform(0.13, 0.24))
    light_radius = float(rng.uniform(0.09, 0.125) if chance(0.25) else rng.uniform(0.042, 0.075))

    water = pick(("none", "lake", "sea"), (0.48, 0.32, 0.20))
    relief = pick(("mountains", "hills"), (0.66, 0.34))
    if water == "sea" and chance(0.5):
        relief = "none"
    land = pick(tuple(LANDS), (0.36, 0.20, 0.13, 0.14, 0.17))
    night = time == "night"
    return Scene(
        time=time,
        sky=sky,
        light=light,
        light_colour=light_colour,
        light_x=light_x,
        light_y=light_y,
        light_radius=light_radius,
        crescent=light == "moon" and chance(0.3),
        stars=night and clouds != "many" and chance(0.75),
        aurora=night and clouds == "none" and chance(0.3),
        clouds=clouds,
        relief=relief,
        layers=0 if relief == "none" else int(rng.integers(2, 5)),
        land=land,
        snow_caps=relief == "mountains" and land not in ("white", "golden") and chance(0.5),
        forest=relief != "none" and chance(0.4),
        water=water,
        mist=relief != "none" and chance(0.28),
        shore=float(rng.uniform(0.56, 0.64) if relief == "none" else rng.uniform(0.62, 0.74)),
        seed=int(rng.integers(2**31)),
    )


# --- noise -----------------------------------------------------------------------------------------------------------

LATTICE = 256


@lru_cache(maxsize=8)
def _lattice(seed: int, salt: int) -> Floats:
    return np.random.default_rng((seed, salt)).random((LATTICE, LATTICE), dtype=np.float32)


def _cell(positions: Floats, frequency: float, offset: float, smooth: bool) -> tuple[NDArray[np.int64], Floats]:
    scaled = positions * np.float32(frequency) + np.float32(offset)
    index = np.floor(scaled).astype(np.int64)
    t = (scaled - index).astype(np.float32)
    return index, t * t * (3 - 2 * t) if smooth else t


def _octaves(frequency: float, limit: float, most: int) -> list[tuple[float, float]]:
    """(frequency, presence) of each octave below `limit`; the last one fades in, so that no size is a jump."""
    found: list[tuple[float, float]] = []
    while frequency < limit and len(found) < most:
        found.append((frequency, float(np.clip(np.log2(limit / frequency), 0.0, 1.0))))
        frequency *= 2
    return found


def _weight(gain: float, most: int) -> float:
    """The sum of all octaves' amplitudes, drawn or not: a size must not change how tall a ridge is."""
    return (1 - gain**most) / (1 - gain)


def _noise_line(
    positions: Floats, seed: int, salt: int, frequency: float, gain: float, limit: float, ridged: bool, most: int = 12
) -> Floats:
    """Fractal noise along a line, about 0 to 1; ridged noise has sharp crests and straight flanks."""
    lattice = _lattice(seed, salt)
    total, amplitude = np.zeros_like(positions), 1.0
    for octave, (f, presence) in enumerate(_octaves(frequency, limit, most)):
        index, t = _cell(positions, f, 37.3 + 11.7 * octave, smooth=not ridged)
        row = lattice[octave]
        value = row[index % LATTICE] * (1 - t) + row[(index + 1) % LATTICE] * t
        if ridged:
            value = 1 - np.abs(2 * value - 1)
        total += np.float32(amplitude * presence) * (value - 0.5)
        amplitude *= gain
    return 0.5 + total / np.float32(0.75 * _weight(gain, most))


def _noise_field(
    xs: Floats, ys: Floats, seed: int, salt: int, frequency: tuple[float, float], gain: float, limit: float, most: int
) -> Floats:
    """Fractal noise over a grid, about 0 to 1. `limit` is the finest frequency along x worth drawing."""
    lattice = _lattice(seed, salt)
    total = np.zeros((len(ys), len(xs)), dtype=np.float32)
    amplitude = 1.0
    stretch = frequency[1] / frequency[0]
    for octave, (f, presence) in enumerate(_octaves(frequency[0], limit, most)):
        ix, tx = _cell(xs, f, 53.1 + 17.9 * octave, smooth=True)
        iy, ty = _cell(ys, f * stretch, 91.7 + 23.3 * octave, smooth=True)
        rows = lattice[iy % LATTICE] * (1 - ty)[:, None] + lattice[(iy + 1) % LATTICE] * ty[:, None]
        rows *= np.float32(amplitude * presence)
        left = rows.take(ix % LATTICE, axis=1)
        right = rows.take((ix + 1) % LATTICE, axis=1)
        right -= left
        right *= tx
        total += left
        total += right
        total -= np.float32(0.5 * amplitude * presence)
        amplitude *= gain
    total /= np.float32(0.7 * _weight(gain, most))
    total += np.float32(0.5)
    return total


# --- painting --------------------------------------------------------------------------------------------------------


def _array(colour: Colour) -> Floats:
    return np.asarray(colour, dtype=np.float32)


def _mix(a: Colour | Floats, b: Colour | Floats, share: float) -> Floats:
    return np.asarray(a, dtype=np.float32) * np.float32(1 - share) + np.asarray(b, dtype=np.float32) * np.float32(share)


def _ramp(values: Floats, start: float, end: float) -> Floats:
    """0 below `start`, 1 above `end`, smooth between."""
    t = np.clip((values - np.float32(start)) / np.float32(end - start), 0, 1)
    return t * t * (3 - 2 * t)


def _lay(target: Floats, colour: Floats, alpha: Floats) -> None:
    """Blend `colour` (one colour, or one a pixel) over `target` in place."""
    target += (colour - target) * alpha[..., None]


class _Canvas:
    """One picture being painted: the scene, the pixel grid and the colours that every part shares."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene = scene
        self.height = height
        self.aspect = width / height
        # x is counted in heights from the middle, y in heights from the top.
        self.xs = (((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5) * self.aspect).astype(np.float32)
        self.ys = ((np.arange(height, dtype=np.float32) + 0.5) / height).astype(np.float32)
        self.limit = height / 3.0
        self.palette = SKIES[scene.time][scene.sky]
        self.daylight = _array(DAYLIGHT[scene.time])
        self.shore = scene.shore if scene.water != "none" else 1.0
        self.ridges = [self._ridge(i) for i in range(scene.layers)]
        self.light_x = (scene.light_x - 0.5) * self.aspect
        self.light_y = self._clear_of_ridges()
        self.picture = np.empty((height, width, 3), dtype=np.float32)

    def _ridge(self, layer: int) -> Floats:
        """Height of a ridge's crest, as y, at every column; layer 0 is the farthest."""
        scene = self.scene
        nearness = layer / max(scene.layers - 1, 1)
        foot = self.shore if scene.water != "none" else 0.97
        if scene.relief == "mountains":
            crest = _noise_line(self.xs, scene.seed, 10 + layer, 1.7 + 0.5 * layer, 0.47, self.limit, ridged=True)
            base, reach = 0.62, 0.34
        else:
            crest = _noise_line(self.xs, scene.seed, 10 + layer, 1.3 + 0.5 * layer, 0.30, self.limit, False, most=6)
            base, reach = 0.64, 0.20
        base = base + (foot - 0.05 - base) * nearness
        reach = reach * (1 - 0.55 * nearness) * (0.75 if scene.water != "none" else 1.0)
        return (base - reach * (crest - 0.2)).astype(np.float32)

    def _clear_of_ridges(self) -> float:
        scene = self.scene
        lowest = scene.light_y
        near = np.abs(self.xs - self.light_x) < scene.light_radius * 0.8
        for ridge in self.ridges:
            lowest = min(lowest, float(np.median(ridge[near])) - 0.25 * scene.light_radius) if near.any() else lowest
        return max(lowest, 0.09)

    def sky(self) -> None:
        palette = self.palette
        stops = np.stack([_array(palette.zenith), _array(palette.middle), _array(palette.horizon)])
        horizon = min(self.shore, 0.62)
        at = np.array([0.0, 0.55 * horizon, horizon], dtype=np.float32)
        column = np.stack([np.interp(self.ys, at, stops[:, c]) for c in range(3)], axis=-1).astype(np.float32)
        self.picture[:] = column[:, None, :]

    def _rows_above(self, y: float) -> int:
        return int(np.clip(np.ceil(y * self.height), 1, self.height))

    def stars(self) -> None:
        rng = np.random.default_rng((self.scene.seed, 70))
        # Drawn for a wide strip and cut to the picture, so that a wider picture only adds stars at its sides.
        places = rng.random((240, 4))
        for u, v, size, glow in places:
            x, y, radius = (u - 0.5) * 3.0, v * 0.62, 0.0016 + 0.0022 * size**3
            if abs(x) < 0.5 * self.aspect:
                self._blob(x, y, radius, (0.92, 0.94, 1.0), 0.35 + 0.65 * glow)

    def _blob(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        column = (x / self.aspect + 0.5) * len(self.xs)
        row, reach = y * self.height, max(radius * self.height * 3, 2.0)
        r0, r1 = max(int(row - reach), 0), min(int(row + reach) + 1, self.height)
        c0, c1 = max(int(column - reach), 0), min(int(column + reach) + 1, len(self.xs))
        if r0 >= r1 or c0 >= c1:
            return
        pixels = max(radius * self.height, 0.5)
        fade = strength * min(1.0, (radius * self.height / 0.5) ** 2)
        squared = ((self.ys[r0:r1] - np.float32(y)) ** 2)[:, None] + ((self.xs[c0:c1] - np.float32(x)) ** 2)[None]
        glow = np.exp(-squared * np.float32((self.height / pixels) ** 2 / 2)) * np.float32(fade)
        _lay(self.picture[r0:r1, c0:c1], _array(colour), glow)

    def aurora(self) -> None:
        rows = self._rows_above(0.55)
        for band, colour in enumerate(((0.25, 0.95, 0.55), (0.40, 0.60, 0.95))):
            curve = (
                0.34
                - 0.06 * band
                + 0.28
                * (_noise_line(self.xs, self.scene.seed, 80 + band, 1.1, 0.4, self.limit / 8, False, most=3) - 0.5)
            )
            rays = _noise_line(self.xs, self.scene.seed, 84 + band, 5.0, 0.6, self.limit / 6, False, most=4)
            above = curve[None, :] - self.ys[:rows, None]
            veil = np.where(above > 0, np.exp(-np.abs(above) * 7.0), np.exp(-np.abs(above) * 40.0))
            strength = np.clip(0.15 + 0.75 * rays, 0, 1) * (0.75 - 0.3 * band)
            _lay(self.picture[:rows], _array(colour), (veil * strength[None]).astype(np.float32))

    def light(self) -> None:
        scene = self.scene
        table = SUN_COLOURS if scene.light == "sun" else MOON_COLOURS
        colour = _array(table[scene.light_colour])
        rows = self._rows_above(self.shore)
        squared = (self.ys[:rows] - np.float32(self.light_y))[:, None] ** 2 + (self.xs - np.float32(self.light_x)) ** 2
        distance = np.sqrt(squared)
        halo = 0.55 if scene.light == "sun" else 0.30
        glow = np.exp(-np.maximum(distance - scene.light_radius, 0) * np.float32(9.0)) * np.float32(halo)
        tint = _mix(colour, self.palette.horizon, 0.35 if scene.light == "sun" else 0.0)
        _lay(self.picture[:rows], tint, glow)
        disc = np.clip((scene.light_radius - distance) * self.height + 0.5, 0, 1)
        if scene.crescent:
            aside = np.sqrt(
                (self.ys[:rows] - np.float32(self.light_y - 0.25 * scene.light_radius))[:, None] ** 2
                + (self.xs - np.float32(self.light_x + 0.55 * scene.light_radius)) ** 2
            )
            disc *= 1 - np.clip((0.92 * scene.light_radius - aside) * self.height + 0.5, 0, 1)
        _lay(self.picture[:rows], colour, disc.astype(np.float32))

    def clouds(self) -> None:
        scene = self.scene
        rows = self._rows_above(min(self.shore, 0.62))
        ys = self.ys[:rows]
        # Clouds flatten towards the horizon, so the field is read along a bent y.
        depth = (1.6 * ys + 1.8 * ys * ys).astype(np.float32)
        field = _noise_field(self.xs, depth, scene.seed, 60, (1.5, 2.6), 0.50, self.limit / 2, most=8)
        start = 0.56 if scene.clouds == "few" else 0.40
        body = _ramp(field, start, start + 0.26)
        fade = _ramp(ys, 0.0, 0.05) * (1 - 0.6 * _ramp(ys, 0.40, 0.60))
        body *= fade[:, None] * np.float32(0.92 if scene.time != "night" else 0.7)
        under = _mix(self.palette.cloud, self.palette.middle, 0.55)
        shade = _ramp(field, start + 0.12, start + 0.42)[..., None]
        colour = _array(self.palette.cloud) + (under - _array(self.palette.cloud)) * shade * np.float32(0.8)
        _lay(self.picture[:rows], colour, body)

    def land(self) -> None:
        for layer in range(self.scene.layers):
            self._paint_ridge(layer)
            if self.scene.mist:
                self._mist_behind(layer)

    def _paint_ridge(self, layer: int) -> None:
        scene = self.scene
        crest = self.ridges[layer]
        nearest = layer == scene.layers - 1
        nearness = (layer + 1) / scene.layers
        top = max(int(float(crest.min()) * self.height) - 1, 0)
        bottom = self._rows_above(self.shore)
        if top >= bottom:
            return
        ys = self.ys[top:bottom]
        depth = ys[:, None] - crest[None, :]
        cover = np.clip(depth * self.height + 0.5, 0, 1)

        ground = _array(LANDS[scene.land])
        if scene.forest and not nearest and scene.relief == "hills":
            ground = _mix(ground, FORESTS[scene.land], 0.5)
        lit = self._lit_faces(layer, depth)
        bright = ground * self.daylight * np.float32(1.12)
        dark = ground * self.daylight * _array((0.62, 0.66, 0.78))
        colour = dark + (bright - dark) * lit[..., None]
        if scene.snow_caps:
            self._cap_with_snow(colour, depth, lit, layer)

        haze = _mix(self.palette.horizon, self.palette.middle, 0.25)
        far = (0.66 if scene.time != "night" else 0.45) * (1 - nearness) ** 0.8 + 0.04
        low = (0.45 if scene.mist else 0.16) * _ramp(depth, 0.02, 0.34) * (1.0 if not nearest else 0.35)
        colour += (haze - colour) * (np.float32(far) + low * np.float32(1 - far))[..., None]
        _lay(self.picture[top:bottom], colour, cover)
        if nearest and scene.forest:
            self._trees()

    def _lit_faces(self, layer: int, depth: Floats) -> Floats:
        """How much of the light each flank catches, 0 to 1: the crest's slope, carried down along its flanks."""
        scene = self.scene
        wide = np.linspace(-0.5 * self.aspect - 0.5, 0.5 * self.aspect + 0.5, 1536, dtype=np.float32)
        rough = scene.relief == "mountains"
        profile = _noise_line(
            wide,
            scene.seed,
            10 + layer,
            (1.7 if rough else 1.3) + 0.5 * layer,
            0.47,
            self.limit,
            rough,
            most=2 if rough else 3,
        )
        slope = np.gradient(profile, wide).astype(np.float32)
        towards = -1.0 if scene.light_x > 0.5 else 1.0
        facing = 0.5 + 0.5 * np.tanh(towards * slope * np.float32(0.7 if rough else 0.35))
        spacing = float(wide[1] - wide[0])
        xs = self.xs
        fold = _noise_field(
            xs, depth[:, len(xs) // 2] + 2.0, scene.seed, 30 + layer, (3.0, 4.0), 0.55, self.limit, 9 if rough else 5
        )
        along = xs[None, :] + (fold - 0.5) * np.clip(depth, 0, 0.3) * np.float32(2.2)
        index = np.clip((along - wide[0]) / np.float32(spacing), 0, len(wide) - 1).astype(np.int32)
        lit = facing[index]
        lit += (fold - 0.5) * np.float32(0.7 if rough else 0.35)
        return np.clip(lit, 0, 1)

    def _cap_with_snow(self, colour: Floats, depth: Floats, lit: Floats, layer: int) -> None:
        reach = (0.15 if self.scene.water == "none" else 0.09) * (1 - 0.18 * layer)
        line = _noise_line(self.xs, self.scene.seed, 40 + layer, 9.0, 0.6, self.limit, False, most=7)
        edge = np.float32(reach) * (0.35 + 1.0 * line)[None, :] - (0.5 - lit) * np.float32(0.05)
        snow = 1 - _ramp(depth - edge, -0.018, 0.018)
        white = _array(SNOW) * self.daylight
        shaded = white * _array((0.70, 0.77, 0.90))
        _lay(colour, shaded + (white - shaded) * lit[..., None], snow)

    def _trees(self) -> None:
        """Two rows of conifers on the nearest crest."""
        scene = self.scene
        ground = self.ridges[-1]
        foot = self.shore
        for row, (frequency, tall, dim) in enumerate(((26.0, 0.050, 1.25), (15.0, 0.085, 0.9))):
            lattice = _lattice(scene.seed, 50 + row)[0]
            index, t = _cell(self.xs, frequency, 64.0, smooth=False)
            height = lattice[index % LATTICE]
            middle = 0.35 + 0.3 * lattice[(index + 97) % LATTICE]
            spire = 1 - np.abs(t - middle) / np.where(t < middle, middle, 1 - middle)
            crown = (0.25 + 0.75 * spire) * (0.45 + 0.55 * height) * np.float32(tall)
            base = ground + np.float32(0.02 + 0.055 * row)
            base = np.minimum(base, np.float32(foot - 0.012))
            top = (base - crown).astype(np.float32)
            start = max(int(float(top.min()) * self.height) - 1, 0)
            end = self._rows_above(foot)
            depth = self.ys[start:end, None] - top[None, :]
            green = _array(FORESTS[scene.land]) * self.daylight * np.float32(dim)
            haze = _mix(self.palette.horizon, self.palette.middle, 0.25)
            green = _mix(green, haze, 0.12 if row == 0 else 0.03)
            solid = np.clip(depth * self.height + 0.5, 0, 1)
            # Towards the bottom of a dry picture the wood opens into the meadow it stands on.
            if scene.water == "none":
                solid *= 1 - 0.75 * _ramp(depth, 0.09, 0.22)
            _lay(self.picture[start:end], green, solid)

    def _mist_behind(self, layer: int) -> None:
        """A bank of mist lying in the valley in front of a ridge."""
        scene = self.scene
        if layer == scene.layers - 1 and scene.water == "none":
            return
        crest = float(np.mean(self.ridges[layer])) + 0.10
        top, bottom = self._rows_above(crest - 0.16), self._rows_above(min(crest + 0.16, self.shore))
        if top >= bottom:
            return
        ys = self.ys[top:bottom]
        bank = np.exp(-(((ys - np.float32(crest + 0.02)) / np.float32(0.065)) ** 2))
        drift = _noise_field(self.xs, ys, scene.seed, 90 + layer, (1.6, 6.0), 0.5, self.limit / 8, most=4)
        veil = bank[:, None] * np.clip(0.45 + 0.8 * drift, 0, 1) * np.float32(0.75)
        fog = _mix(self.palette.horizon, (1.0, 1.0, 1.0), 0.35 if scene.time != "night" else 0.08)
        _lay(self.picture[top:bottom], fog, veil.astype(np.float32))

    def water(self) -> None:
        scene = self.scene
        start = self._rows_above(self.shore)
        rows = self.height - start
        if rows < 1:
            return
        ys = self.ys[start:]
        away = (ys - np.float32(self.shore)) / np.float32(1 - self.shore)
        rough = 0.012 if scene.water == "lake" else 0.045
        # Waves look longer and taller the nearer they are.
        perspective = (np.log1p(9 * away) * 1.1).astype(np.float32)
        waves = _noise_field(self.xs, perspective, scene.seed, 65, (2.5, 16.0), 0.55, self.limit / 2, most=6)
        source = np.float32(self.shore) - (ys - np.float32(self.shore)) * np.float32(
            min(1.0, self.shore / (1 - self.shore))
        )
        rows_from = (source[:, None] + (waves - 0.5) * (rough * (0.3 + away))[:, None]) * np.float32(self.height)
        rows_from = np.clip(rows_from, 0, start - 1).astype(np.int32)
        flat = self.picture.reshape(-1, 3)
        mirror = flat.take(rows_from * np.int32(len(self.xs)) + np.arange(len(self.xs), dtype=np.int32), axis=0)
        depth_colour = _array(WATERS[scene.water]) * self.daylight
        keep = (0.16 if scene.water == "lake" else 0.38) + (0.22 if scene.water == "lake" else 0.30) * away
        self.picture[start:] = mirror + (depth_colour - mirror) * keep[:, None, None].astype(np.float32)
        crest_light = _ramp(waves, 0.58, 0.85) * (0.10 if scene.water == "lake" else 0.22)
        _lay(self.picture[start:], _mix(self.palette.horizon, self.palette.middle, 0.3), crest_light)
        if scene.light != "none":
            self._glitter(start, away, waves)

    def _glitter(self, start: int, away: Floats, waves: Floats) -> None:
        """The path of light that a sun or moon lays on water."""
        scene = self.scene
        table = SUN_COLOURS if scene.light == "sun" else MOON_COLOURS
        width = scene.light_radius * (0.7 + 1.3 * away)[:, None]
        aside = (self.xs[None, :] - np.float32(self.light_x)) / width
        path = np.exp(-(aside**2)) * np.clip(0.25 + 1.3 * (waves - 0.35), 0, 1) * np.float32(0.7)
        _lay(self.picture[start:], _array(table[scene.light_colour]), path.astype(np.float32))


def render(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """The scene painted, as [height, width, 3] bytes. The same scene and size always give the same bytes."""
    canvas = _Canvas(scene, width, height)
    canvas.sky()
    if scene.stars:
        canvas.stars()
    if scene.aurora:
        canvas.aurora()
    if scene.clouds != "none":
        canvas.clouds()
    if scene.light != "none":
        canvas.light()
    canvas.land()
    if scene.water != "none":
        canvas.water()
    return (np.clip(canvas.picture, 0, 1) * 255 + 0.5).astype(np.uint8)
