"""Lakes, seas, rivers and islands: what they mirror, their waves, and the path of light on them."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, lay, ramp
from .noise import Floats, noise_field, noise_line
from .palettes import LIGHT_COLOURS, MEADOWS, PINE_COLOURS, ROCKS, WATER_COLOURS, array, mix


def paint_water(canvas: Canvas, shore: float, light_x: float) -> None:
    """A lake or the sea: the picture above `shore`, mirrored, rippled and darkened towards the viewer."""
    scene, palette = canvas.scene, canvas.palette
    start = canvas.rows_above(shore)
    if start >= canvas.height:
        return
    ys = canvas.ys[start:]
    away = (ys - np.float32(shore)) / np.float32(1 - shore)
    calm = scene.water == "lake"
    # Waves look longer and taller the nearer they are.
    perspective = (np.log1p(9 * away) * 1.1).astype(np.float32)
    waves = noise_field(canvas.xs, perspective, scene.seed, 65, (1.8, 13.0), 0.5, canvas.limit / 2, most=5)
    source = np.float32(shore) - (ys - np.float32(shore)) * np.float32(min(1.0, shore / (1 - shore)))
    rough = 0.012 if calm else 0.05
    rows_from = (source[:, None] + (waves - 0.5) * (rough * (0.3 + away))[:, None]) * np.float32(canvas.height)
    rows_from = np.clip(rows_from, 0, start - 1).astype(np.int32)
    columns = np.arange(canvas.width, dtype=np.int32)
    mirror = canvas.picture.reshape(-1, 3).take(rows_from * np.int32(canvas.width) + columns, axis=0)
    if palette.ink:
        keep = np.float32(0.66) + 0.2 * away
        deep = palette.fog
    else:
        deep = array(WATER_COLOURS[scene.water]) * palette.lit
        keep = (0.14 if calm else 0.36) + (0.20 if calm else 0.30) * away
    canvas.picture[start:] = mirror + (deep - mirror) * np.asarray(keep, np.float32)[:, None, None]
    crests = ramp(waves, 0.60, 0.72) * np.float32(0.10 if calm else 0.30) * (0.35 + 0.65 * away)[:, None]
    colour = palette.sky.under if palette.ink else mix(palette.sky.horizon, palette.sky.middle, 0.2)
    lay(canvas.picture[start:], array(colour), crests)
    # A thin light line where the water begins keeps the far shore apart.
    line = np.exp(-(((ys - np.float32(shore)) / np.float32(0.004)) ** 2)) * np.float32(0.35)
    lay(canvas.picture[start:], palette.haze, np.broadcast_to(line[:, None], waves.shape))
    if scene.light != "none":
        _glitter(canvas, start, away, waves, light_x)


def _glitter(canvas: Canvas, start: int, away: Floats, waves: Floats, light_x: float) -> None:
    """The path of light that a sun or moon lays on water."""
    scene = canvas.scene
    width = scene.light_radius * (0.65 + 1.2 * away)[:, None]
    aside = (canvas.xs[None, :] - np.float32(light_x)) / width
    path = np.exp(-(aside**2)) * ramp(waves, 0.34, 0.60) * np.float32(0.30 if canvas.palette.ink else 0.75)
    lay(canvas.picture[start:], array(LIGHT_COLOURS[scene.light, scene.light_colour]), path.astype(np.float32))


def paint_river(canvas: Canvas, start: float) -> None:
    """A river that winds over the meadow from `start` to the frame, wider the nearer it is."""
    scene, palette = canvas.scene, canvas.palette
    top = canvas.rows_above(start)
    ys = canvas.ys[top:]
    if not len(ys):
        return
    rng = np.random.default_rng((scene.seed, 66))
    near = ((ys - np.float32(start)) / np.float32(1 - start)).astype(np.float32)
    source, phase, turns = rng.uniform(-0.22, 0.22), rng.uniform(0, 6.28), rng.uniform(2.0, 2.9)
    # Bends follow one another faster in the distance, as perspective has it.
    bends = np.sin(phase + turns * np.log1p(7 * near) * 2.0)
    middle = source * canvas.aspect * (1 - near) + bends * (0.035 + 0.21 * near)
    half = 0.006 + 0.15 * near**1.35
    edge = noise_line((near * 1.0).astype(np.float32), scene.seed, 67, 9.0, 0.5, canvas.limit, most=4)
    half = half * (0.85 + 0.3 * edge)
    inside = half[:, None] - np.abs(canvas.xs[None, :] - middle[:, None].astype(np.float32))
    cover = np.clip(inside * canvas.height + 0.5, 0, 1).astype(np.float32)
    bank = np.clip((inside + 0.010 + 0.012 * near[:, None]) * canvas.height + 0.5, 0, 1).astype(np.float32)
    sky = palette.sky
    mirrored = array(sky.middle)[None] + (array(sky.zenith) - array(sky.middle))[None] * ramp(near, 0, 1.0)[:, None]
    blue = array(WATER_COLOURS["river"]) * mix(palette.lit, (1.0, 1.0, 1.0), 0.3 if scene.time != "night" else 0.0)
    own = palette.fog[None] if palette.ink else mirrored + (blue - mirrored) * np.float32(0.55)
    shore = palette.paint((0.62, 0.54, 0.40) if scene.season != "winter" else (0.74, 0.78, 0.86), 0.45)
    lay(canvas.picture[top:], shore, bank * np.float32(0.7))
    lay(canvas.picture[top:], own[:, None, :].astype(np.float32), cover)
    waves = noise_field(
        canvas.xs, np.log1p(9 * near).astype(np.float32), scene.seed, 68, (2.0, 12.0), 0.5, canvas.limit / 2, 4
    )
    lay(
        canvas.picture[top:],
        array(sky.under if palette.ink else sky.horizon),
        cover * ramp(waves, 0.58, 0.70) * np.float32(0.4),
    )


def paint_island(canvas: Canvas, middle: float, base: float, half: float, tall: float) -> Floats:
    """A small island whose foot lies at `base`, with its reflection. Returns its crest as y at every column."""
    scene, palette = canvas.scene, canvas.palette
    u = np.abs((canvas.xs - np.float32(middle)) / np.float32(half))
    rough = noise_line(canvas.xs, scene.seed, 69, 8.0, 0.48, canvas.limit, most=7)
    height = np.float32(tall) * np.maximum(1 - u**2.2, 0) * (0.7 + 0.6 * rough)
    top = max(int((base - 1.4 * tall) * canvas.height), 0)
    bottom = canvas.rows_above(min(base + 1.1 * tall, 1.0))
    c0, c1 = (int(((middle + s * half) / canvas.aspect + 0.5) * canvas.width) for s in (-1, 1))
    c0, c1 = max(c0 - 1, 0), min(c1 + 2, canvas.width)
    crest = (base - height).astype(np.float32)
    if c0 >= c1 or top >= bottom:
        return crest
    ys, h = canvas.ys[top:bottom, None], height[None, c0:c1]
    view = canvas.picture[top:bottom, c0:c1]
    inside = (h > 1e-4).astype(np.float32)
    green = scene.relief == "none" or palette.ink
    rock = mix(ROCKS["alpine"], PINE_COLOURS[scene.season], 0.45) if green else mix(MEADOWS[scene.season], BROWN, 0.35)
    if scene.season == "winter":
        rock = array(MEADOWS["winter"])
    light = ramp(h - np.maximum(base - ys, 0), 0.0, 0.03) * 0.5
    bright, dark = palette.paint(rock, 0.75), palette.paint(rock, 0.20)
    colour = bright + (dark - bright) * light[..., None]
    reflected = np.clip((base + 0.75 * h - ys) * canvas.height + 0.5, 0, 1) * (ys >= base) * inside
    lay(view, mix(dark, palette.haze, 0.25), (reflected * np.float32(0.55)).astype(np.float32))
    body = np.clip((ys - (base - h)) * canvas.height + 0.5, 0, 1) * np.clip((base - ys) * canvas.height + 0.5, 0, 1)
    lay(view, colour.astype(np.float32), (body * inside).astype(np.float32))
    return crest


BROWN = (0.38, 0.34, 0.28)
