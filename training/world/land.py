"""Ridges one behind another, each hazier the farther it is, in the manner of its kind of land."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, lay, ramp
from .noise import Floats, lattice, noise_field, noise_line
from .palettes import INK, MEADOWS, ROCKS, SNOW, array, mix
from .scene import Scene

# How far crests rise above their base, of the height, by kind: (farthest, nearest).
REACH = {
    "alpine": (0.36, 0.15),
    "volcano": (0.15, 0.09),
    "karst": (0.36, 0.26),
    "hills": (0.20, 0.10),
    "mesa": (0.27, 0.10),
    "dunes": (0.27, 0.17),
}


@dataclass(frozen=True)
class Ridge:
    """One ridge: `crest` is its y at every column. `turned` says which way the flank below each x looks.

    `turned` lies on `wide`, a line wider than the picture, so that flanks can be read aside of their column.
    """

    kind: str
    crest: Floats  # [W]
    wide: Floats  # [K]
    turned: Floats  # [K], -1 to the left, 1 to the right
    distance: float  # 0 is nearest, 1 farthest


def _peaks(xs: Floats, seed: int, salt: int, spacing: float, width: float, power: float) -> tuple[Floats, Floats]:
    """The highest of a row of separate mountains at each x (0 to 1), and which flank of it that is (-1 to 1)."""
    grid = lattice(seed, salt)
    best, flank = np.full_like(xs, -1.0), np.zeros_like(xs)
    first = int(np.floor(xs[0] / spacing)) - 2
    last = int(np.ceil(xs[-1] / spacing)) + 2
    for i in range(first, last + 1):
        shift, tall, broad = grid[1, i % 256], grid[2, i % 256], grid[3, i % 256]
        middle = (i + 0.15 + 0.7 * shift) * spacing
        u = (xs - np.float32(middle)) / np.float32(width * (0.7 + 0.6 * broad))
        tall = 0.35 + 0.65 * tall
        shape = (tall * (1 - np.abs(u) ** power)).astype(np.float32)
        higher = shape > best
        best = np.where(higher, shape, best)
        flank = np.where(higher, np.clip(u, -1, 1), flank)
    return np.maximum(best, 0), flank


def _profile(kind: str, xs: Floats, scene: Scene, layer: int, limit: float) -> Floats:
    """The crest, 0 to about 1."""
    seed, salt = scene.seed, 10 + layer
    if kind == "alpine":
        tall, _ = _peaks(xs, seed, salt, 0.36 - 0.03 * layer, 0.42, 1.0)
        rough = noise_line(xs, seed, 20 + layer, 5.0, 0.46, limit, ridged=True)
        return (0.78 * tall + 0.30 * (rough - 0.25)).astype(np.float32)
    if kind == "karst":
        tall, _ = _peaks(xs, seed, salt, 0.21, 0.10, 3.2)
        rough = noise_line(xs, seed, 20 + layer, 7.0, 0.42, limit, most=6)
        return (tall + 0.10 * (rough - 0.5)).astype(np.float32)
    if kind == "mesa":
        # Tables, and on or beside them narrower towers; at the foot of both a skirt of scree.
        broad, _ = _peaks(xs, seed, salt, 0.62 - 0.08 * layer, 0.24, 14.0)
        towers, _ = _peaks(xs, seed, salt + 5, 0.40, 0.055, 9.0)
        skirt, _ = _peaks(xs, seed, salt, 0.62 - 0.08 * layer, 0.36, 1.0)
        rough = noise_line(xs, seed, 20 + layer, 11.0, 0.5, limit, most=7)
        tall = np.maximum(0.85 * broad, 0.95 * towers * (layer == 0))
        return (np.maximum(tall, 0.42 * skirt) + 0.04 * rough).astype(np.float32)
    if kind == "dunes":
        wave = noise_line(xs, seed, salt, 1.1, 0.30, limit, ridged=True, most=3)
        return (0.25 + 0.75 * wave).astype(np.float32)
    return noise_line(xs, seed, salt, 1.2 + 0.4 * layer, 0.30, limit, most=6)


def _cone(xs: Floats, scene: Scene, limit: float, aspect: float) -> Floats:
    """One volcano with hollow flanks and a flat, broken top, as a share of the height."""
    rng = np.random.default_rng((scene.seed, 25))
    middle = (float(rng.uniform(0.3, 0.7)) - 0.5) * aspect
    away = np.abs(xs - np.float32(middle))
    rough = noise_line(xs, scene.seed, 26, 9.0, 0.5, limit, most=7)
    cone = 0.46 * np.exp(-away / np.float32(0.27)) - 0.035
    return (np.minimum(cone, 0.335) + 0.012 * (rough - 0.5)).astype(np.float32)


def lay_ridges(canvas: Canvas, foot: float) -> list[Ridge]:
    """All ridges of a scene, the farthest first. `foot` is where the land meets water or the nearest meadow."""
    scene = canvas.scene
    wide = np.linspace(-0.5 * canvas.aspect - 0.6, 0.5 * canvas.aspect + 0.6, 2048, dtype=np.float32)
    ridges: list[Ridge] = []
    for layer in range(scene.layers):
        nearness = layer / max(scene.layers - 1, 1)
        kind = scene.relief
        if kind in ("alpine", "karst") and layer == scene.layers - 1 and scene.layers > 2:
            kind = "hills"  # great mountains stand behind a gentler foreground
        if kind == "volcano":
            kind = "cone" if layer == 0 else "hills"
        if kind == "cone":
            base = foot - 0.06
            crest = base - _cone(canvas.xs, scene, canvas.limit, canvas.aspect)
            turned = np.gradient(_cone(wide, scene, canvas.limit, canvas.aspect), wide) * 1.5
        else:
            far, near = REACH[scene.relief]
            reach = far + (near - far) * nearness
            if kind == "hills" and scene.relief != "hills":
                reach = 0.10
            base = 0.56 + (foot - 0.03 - 0.56) * nearness
            crest = base - reach * (_profile(kind, canvas.xs, scene, layer, canvas.limit) - 0.12)
            smooth = _profile(kind, wide, scene, layer, 40.0 if kind in ("alpine", "karst") else 12.0)
            turned = np.gradient(smooth, wide) * (0.35 if kind in ("alpine", "dunes") else 0.28)
        ridges.append(
            Ridge(
                kind=kind,
                crest=np.minimum(crest, foot - 0.012).astype(np.float32),
                wide=wide,
                turned=np.tanh(-turned).astype(np.float32),
                distance=1 - (layer + 1) / scene.layers,
            )
        )
    return ridges


def paint_ridge(canvas: Canvas, ridge: Ridge, layer: int, until: float) -> None:
    """`until` is the y below which something nearer hides the ridge."""
    palette = canvas.palette
    top = max(int(float(ridge.crest.min()) * canvas.height) - 1, 0)
    bottom = canvas.rows_above(until)
    if top >= bottom:
        return
    ys = canvas.ys[top:bottom]
    depth = ys[:, None] - ridge.crest[None, :]
    cover = np.clip(depth * canvas.height + 0.5, 0, 1)
    lit, fold = _lit_faces(canvas, ridge, layer, depth)
    colour = _ground(canvas, ridge, depth, lit, fold)
    haze = _haze(canvas, ridge, depth)
    shown = palette.fog if palette.ink else palette.haze
    colour += (shown - colour) * haze[..., None]
    lay(canvas.picture[top:bottom], colour, cover)


def _haze(canvas: Canvas, ridge: Ridge, depth: Floats) -> Floats:
    """How much of the air's colour lies over each point: more with distance, and more towards the foot."""
    scene, ink = canvas.scene, canvas.palette.ink
    night = scene.time == "night"
    dull = 0.14 if scene.weather != "clear" else 0.0
    far = (0.60 if night else 0.72) * ridge.distance**0.75 + 0.03 + dull * (0.4 + ridge.distance)
    if ink:
        low = 0.97 * ramp(depth, 0.0, 0.24) if ridge.distance > 0 or scene.mist else 0.55 * ramp(depth, 0.04, 0.4)
        return (far + low * np.float32(1 - far)).astype(np.float32)
    most = 0.85 if scene.mist else 0.5
    low = np.float32(most if ridge.distance > 0 else 0.10) * ramp(depth, 0.03, 0.26)
    return np.minimum(far + low * np.float32(1 - far), 1).astype(np.float32)


def _lit_faces(canvas: Canvas, ridge: Ridge, layer: int, depth: Floats) -> tuple[Floats, Floats]:
    """How much light each flank catches, 0 to 1: the crest's slope, carried down along winding spurs."""
    scene = canvas.scene
    rocky = ridge.kind in ("alpine", "cone", "karst", "mesa")
    down = depth[:, depth.shape[1] // 2] + np.float32(2.0)
    fold = noise_field(
        canvas.xs,
        down.astype(np.float32),
        scene.seed,
        30 + layer,
        (3.2, 6.0) if rocky else (1.2, 3.0),
        0.5,
        canvas.limit,
        7 if rocky else 3,
    )
    sway = {"alpine": 1.5, "cone": 0.9, "karst": 0.25, "mesa": 0.5, "dunes": 1.2}.get(ridge.kind, 0.8)
    along = canvas.xs[None, :] + (fold - np.float32(0.5)) * np.clip(depth, 0, 0.25) * np.float32(sway)
    spacing = float(ridge.wide[1] - ridge.wide[0])
    index = ((along - ridge.wide[0]) * np.float32(1 / spacing)).astype(np.int32)
    towards = np.float32(1.0 if scene.light_x > 0.5 else -1.0)
    facing = ridge.turned.take(np.clip(index, 0, len(ridge.wide) - 1))
    lit = np.float32(0.5) + np.float32(0.5) * towards * facing
    lit += (fold - np.float32(0.5)) * np.float32(0.5 if rocky else 0.12)
    return np.clip(lit, 0, 1), fold


def _ground(canvas: Canvas, ridge: Ridge, depth: Floats, lit: Floats, fold: Floats) -> Floats:
    """Each point's colour before the air in front of it, [rows, W, 3]."""
    scene, palette = canvas.scene, canvas.palette
    if palette.ink:
        # A wash: darkest at the crest and on the shaded flank, where the brush was full.
        tone = mix(INK, palette.haze, 0.10 + 0.30 * ridge.distance)
        if scene.season == "winter" or (scene.snow_caps and ridge.kind in ("alpine", "cone")):
            wash = np.clip(0.55 - 0.75 * lit, 0, 1) + 0.30 * np.exp(-np.maximum(depth, 0) * 90.0)
        else:
            wash = 0.95 - 0.55 * lit
        return array(palette.fog) + (tone - array(palette.fog)) * np.clip(wash, 0, 1)[..., None]
    meadow = MEADOWS[scene.season]
    if ridge.kind == "hills":
        own = np.broadcast_to(array(meadow), (*depth.shape, 3))
    elif ridge.kind == "mesa":
        bands = ramp(np.sin((depth + 0.03 * fold) * np.float32(150.0)), -0.5, 0.5)[..., None]
        rock = array(ROCKS["mesa"])
        own = rock + (mix(rock, (0.96, 0.72, 0.48), 0.55) - rock) * bands
        own = own + (array(MEADOWS["none"]) - own) * ramp(depth, 0.16, 0.24)[..., None]
    else:
        rock = array(ROCKS["volcano" if ridge.kind == "cone" else ridge.kind])
        green = array(meadow) if ridge.kind != "dunes" else rock
        if scene.season == "winter" and ridge.kind != "dunes":
            rock = mix(rock, SNOW, 0.30)
        low = ramp(depth, 0.02, 0.10) if ridge.kind == "karst" else ramp(depth + 0.10 * (fold - 0.5), 0.10, 0.24)
        own = rock + (green - rock) * (low * np.float32(0.75))[..., None]
    if ridge.kind in ("hills", "dunes"):
        # A light rim at the crest, darker folds below: what makes a soft hill look round.
        lit = np.clip(0.42 + 0.9 * (lit - 0.5) + 0.55 * np.exp(-np.maximum(depth, 0) * 28.0), 0, 1)
    colour = own * (palette.shade + (palette.lit - palette.shade) * lit[..., None])
    capped = scene.snow_caps and ridge.kind in ("alpine", "cone")
    if capped or (scene.season == "winter" and ridge.kind in ("alpine", "cone", "karst")):
        _snow(canvas, ridge, depth, lit, fold, colour, deep=not capped)
    return colour


def _snow(canvas: Canvas, ridge: Ridge, depth: Floats, lit: Floats, fold: Floats, colour: Floats, deep: bool) -> None:
    """White above a ragged line, blue in the shade. `deep` is winter, when only steep rock stays bare."""
    palette = canvas.palette
    if ridge.kind == "cone":
        depth = depth + (ridge.crest - ridge.crest.min())  # its snow line is level
    teeth = np.abs(noise_line(canvas.xs, canvas.scene.seed, 40, 12.0, 0.6, canvas.limit, ridged=True, most=6))
    reach = 0.26 if deep else 0.075 if ridge.kind == "alpine" else 0.13
    edge = np.float32(reach) * (0.45 + 0.8 * teeth)[None, :] + (lit - 0.5) * np.float32(0.07)
    snow = 1 - ramp(depth - edge + 0.05 * (fold - 0.5), -0.008, 0.008)
    white = array(SNOW) * palette.lit
    shaded = array(SNOW) * mix(palette.shade, palette.lit, 0.28)
    lay(colour, shaded + (white - shaded) * lit[..., None], snow)


def paint_mist(canvas: Canvas, ridge: Ridge, layer: int, foot: float) -> None:
    """A bank of mist lying in the valley in front of a ridge."""
    middle = min(float(np.mean(ridge.crest)) + 0.12, foot - 0.02)
    top, bottom = canvas.rows_above(middle - 0.16), canvas.rows_above(min(middle + 0.16, foot))
    if top >= bottom:
        return
    ys = canvas.ys[top:bottom]
    bank = np.exp(-(((ys - np.float32(middle)) / np.float32(0.06)) ** 2))
    drift = noise_field(canvas.xs, ys, canvas.scene.seed, 90 + layer, (1.3, 6.0), 0.45, canvas.limit / 8, most=3)
    veil = bank[:, None] * np.clip(0.45 + 0.8 * drift, 0, 1) * np.float32(0.85)
    lay(canvas.picture[top:bottom], canvas.palette.fog, veil.astype(np.float32))


def paint_meadow(canvas: Canvas, start: float, depth: float = 1.0) -> None:
    """The plain at the painter's feet, from `start` down: broad bands of light, darker towards the frame."""
    scene, palette = canvas.scene, canvas.palette
    top = canvas.rows_above(start)
    ys = canvas.ys[top:]
    if not len(ys):
        return
    near = (ys - np.float32(start)) / np.float32(max(1 - start, 1e-3))
    bands = noise_field(
        canvas.xs, np.log1p(5 * near).astype(np.float32), scene.seed, 95, (1.0, 4.0), 0.4, canvas.limit, 4
    )
    light = np.clip(0.85 - 0.5 * near[:, None] + 0.6 * (bands - 0.5), 0, 1)
    if palette.ink:
        wash = np.clip(0.30 + 0.5 * (0.6 - light) - 0.35 * (1 - near)[:, None], 0, 0.5)
        lay(canvas.picture[top:], mix(INK, palette.haze, 0.3), 0 * wash + 1)
        canvas.picture[top:] += (array(palette.fog) - canvas.picture[top:]) * (1 - wash)[..., None]
        return
    own = array(MEADOWS[scene.season])
    colour = own * (palette.shade + (palette.lit - palette.shade) * light[..., None])
    colour += (palette.haze - colour) * (0.30 * (1 - ramp(near, 0.0, 0.5)) * depth)[:, None, None]
    canvas.picture[top:] = colour
