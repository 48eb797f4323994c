"""Everything above the land: the hour's gradient, stars, northern lights, clouds, birds, and one sun or moon."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, lay, ramp
from .noise import noise_field, noise_line
from .palettes import INK, LIGHT_COLOURS, array, mix


def paint_sky(canvas: Canvas, horizon: float) -> None:
    sky = canvas.palette.sky
    stops = np.stack([array(sky.zenith), array(sky.middle), array(sky.horizon)])
    at = np.array([0.0, 0.6 * horizon, horizon], dtype=np.float32)
    column = np.stack([np.interp(canvas.ys, at, stops[:, c]) for c in range(3)], axis=-1).astype(np.float32)
    canvas.picture[:] = column[:, None, :]


def paint_stars(canvas: Canvas) -> None:
    """Few and large, so that they are seen: spots, and some with four rays."""
    rng = np.random.default_rng((canvas.scene.seed, 70))
    colour = array((0.97, 0.97, 1.0))
    # Drawn for a wide strip and cut to the picture, so that a wider picture only adds stars at its sides.
    for u, v, size, glow in rng.random((300, 4)):
        x, y = (u - 0.5) * 3.0, 0.02 + v * 0.56
        if abs(x) > 0.5 * canvas.aspect:
            continue
        radius = 0.0016 + 0.0026 * size**4
        canvas.blob(x, y, radius, colour, 0.45 + 0.55 * glow)
        if size > 0.86:
            for dx, dy in ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)):
                canvas.stroke(x, y, x + 4.5 * radius * dx, y + 4.5 * radius * dy, 0.9 * radius, 0.0, colour, 0.9)


def paint_aurora(canvas: Canvas) -> None:
    rows = canvas.rows_above(0.55)
    seed, ys = canvas.scene.seed, canvas.ys[:rows]
    for band, colour in enumerate(((0.20, 0.95, 0.60), (0.55, 0.50, 0.98))):
        bend = noise_line(canvas.xs, seed, 80 + band, 1.1, 0.4, canvas.limit / 8, most=3)
        curve = 0.36 - 0.07 * band + 0.30 * (bend - 0.5)
        rays = noise_line(canvas.xs, seed, 84 + band, 5.0, 0.6, canvas.limit / 6, most=3)
        above = curve[None, :] - ys[:, None]
        veil = np.where(above > 0, np.exp(-np.abs(above) * 6.0), np.exp(-np.abs(above) * 45.0))
        strength = np.clip(0.25 + 0.75 * rays, 0, 1) * (0.85 - 0.3 * band)
        lay(canvas.picture[:rows], array(colour), (veil * strength[None]).astype(np.float32))


def paint_clouds(canvas: Canvas, horizon: float, light_x: float, light_y: float) -> None:
    """Billows at noon, streaks at the ends of the day; lit on the side of the light."""
    scene, sky = canvas.scene, canvas.palette.sky
    rows = canvas.rows_above(min(horizon, 0.62))
    ys = canvas.ys[:rows]
    streaks = scene.time in ("dawn", "dusk") and scene.weather == "clear"
    # Clouds flatten towards the horizon, so the field is read along a bent y.
    depth = (ys * np.float32(1.0) + 2.0 * ys * ys).astype(np.float32)
    frequency = (1.0, 4.6) if streaks else (1.5, 3.0)
    field = noise_field(canvas.xs, depth, scene.seed, 60, frequency, 0.46, canvas.limit / 2, most=7)
    start = 0.57 if scene.clouds == "few" else 0.43
    if scene.weather == "rain":
        start = 0.20
    body = ramp(field, start, start + 0.13)
    fade = ramp(ys, -0.06, 0.04) * (1 - 0.75 * ramp(ys, 0.34, 0.58))
    body *= fade[:, None] * np.float32(0.72 if canvas.palette.ink else 0.94)
    # The field a little way towards the light tells which side of a billow is turned to it.
    step = max(1, round(0.016 * canvas.height))
    above = np.empty_like(field)
    above[step:] = field[:-step]
    above[:step] = field[:1]
    lit = np.clip(0.5 + (field - above) * np.float32(5.0), 0, 1) * (1 - 0.45 * ramp(field, start + 0.12, start + 0.45))
    cloud, under = array(sky.cloud), array(sky.under)
    if scene.light != "none":
        away = (ys[:, None] - np.float32(light_y)) ** 2 + (canvas.xs - np.float32(light_x)) ** 2
        near = np.exp(-away * np.float32(14.0))
        body *= 1 - 0.55 * near * ramp(near, 0.75, 0.98)
        lit = np.clip(lit + 0.45 * near, 0, 1)
    lay(canvas.picture[:rows], under + (cloud - under) * lit[..., None], body)


def paint_light(canvas: Canvas, horizon: float, x: float, y: float) -> None:
    scene = canvas.scene
    colour = array(LIGHT_COLOURS[scene.light, scene.light_colour])
    rows = canvas.rows_above(horizon)
    ys = canvas.ys[:rows]
    distance = np.sqrt((ys - np.float32(y))[:, None] ** 2 + (canvas.xs - np.float32(x)) ** 2)
    beyond = np.maximum(distance - scene.light_radius, 0)
    if canvas.palette.ink and scene.light == "sun":
        halo, reach = 0.12, 12.0
    else:
        halo, reach = (0.62, 7.0) if scene.light == "sun" else (0.42, 8.0)
    glow = np.exp(-beyond * np.float32(reach)) * np.float32(halo)
    # By day the glow is nearly white: yellow over blue would be a green ring.
    blend = 0.15 if scene.light == "moon" else 0.8 if scene.time == "noon" else 0.35
    tint = mix(colour, canvas.palette.sky.horizon, blend)
    lay(canvas.picture[:rows], tint, glow)
    disc = np.clip((scene.light_radius - distance) * canvas.height + 0.5, 0, 1)
    if scene.crescent:
        aside = np.sqrt(
            (ys - np.float32(y - 0.25 * scene.light_radius))[:, None] ** 2
            + (canvas.xs - np.float32(x + 0.55 * scene.light_radius)) ** 2
        )
        disc *= 1 - np.clip((0.92 * scene.light_radius - aside) * canvas.height + 0.5, 0, 1)
    lay(canvas.picture[:rows], colour, disc.astype(np.float32))


def paint_birds(canvas: Canvas) -> None:
    """A loose flock of bent wings, large enough to be seen."""
    rng = np.random.default_rng((canvas.scene.seed, 72))
    middle = canvas.x_of(0.28 if canvas.scene.light_x > 0.5 else 0.72)
    high = rng.uniform(0.14, 0.26)
    colour = mix(INK, canvas.palette.sky.middle, 0.22)
    for _ in range(int(rng.integers(5, 9))):
        x, y = middle + rng.normal(0, 0.075), high + rng.normal(0, 0.045)
        span, lift = rng.uniform(0.026, 0.042), rng.uniform(0.25, 0.6)
        for side in (-1.0, 1.0):
            ex, ey = x + side * 0.5 * span, y - lift * 0.5 * span
            canvas.stroke(x, y, ex, ey, 0.0066, 0.0052, colour)
            canvas.stroke(ex, ey, x + side * span, ey + 0.16 * span, 0.0052, 0.0014, colour)
