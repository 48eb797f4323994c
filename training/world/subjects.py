"""Small subjects: a sailing boat, a pagoda, a cabin with a lit window."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Points
from .noise import Floats
from .palettes import SNOW, array, mix


def _placed(points: Points, x: float, y: float, size: float) -> list[tuple[float, float]]:
    """Points drawn around (0, 0) with y upwards, at `size` and around (x, y)."""
    return [(x + size * px, y - size * py) for px, py in points]


def paint_boat(canvas: Canvas, x: float, y: float, size: float) -> None:
    """A hull with one full sail, and its reflection, on the water at `y`."""
    palette, scene = canvas.palette, canvas.scene
    rng = np.random.default_rng((scene.seed, 78))
    sail = ((0.98, 0.96, 0.90), (0.93, 0.40, 0.22), (0.97, 0.80, 0.42))[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]
    side = 1.0 if rng.random() < 0.5 else -1.0
    hull = [(-0.50, 0.10), (0.54, 0.14), (0.38, -0.10), (-0.36, -0.10)]
    main = [(0.03, 0.20), (0.03, 1.12), (0.12, 0.95), (0.28, 0.62), (0.42, 0.22)]
    jib = [(-0.04, 0.24), (-0.03, 1.02), (-0.44, 0.20)]
    parts = (
        (hull, palette.paint((0.42, 0.24, 0.15), 0.35)),
        ([(-0.015, 0.1), (-0.015, 1.18), (0.015, 1.18), (0.015, 0.1)], palette.paint((0.42, 0.24, 0.15), 0.35)),
        (main, palette.paint(sail, 0.95)),
        (jib, palette.paint(sail, 0.55)),
    )
    for shape, colour in parts:
        turned = [(side * px, py) for px, py in shape]
        below = [(px, -0.2 - 0.8 * py) for px, py in turned]
        canvas.polygon(_placed(below, x, y, size), mix(colour, palette.haze, 0.2), alpha=0.42)
    for shape, colour in parts:
        canvas.polygon(_placed([(side * px, py) for px, py in shape], x, y, size), colour)


def paint_pagoda(canvas: Canvas, x: float, y: float, tall: float) -> None:
    """Storeys that grow narrower, each under a roof with upturned eaves."""
    palette = canvas.palette
    wall = palette.paint((0.72, 0.22, 0.16), 0.75)
    shaded = palette.paint((0.72, 0.22, 0.16), 0.15)
    roof = palette.paint((0.22, 0.25, 0.30), 0.35)
    edge = palette.paint((0.62, 0.64, 0.66), 0.8)
    if canvas.scene.season == "winter":
        roof, edge = palette.paint(SNOW, 0.55), palette.paint(SNOW, 0.95)
    storeys = 4
    step = 0.88 / storeys
    lamps = canvas.scene.time in ("night", "dusk") and not palette.ink
    towards = 1.0 if canvas.scene.light_x > 0.5 else -1.0
    for n in range(storeys):
        low, half = n * step, 0.155 - 0.024 * n
        for share, colour in (((-1.0, 1.0), wall), ((0.25, 1.0) if towards < 0 else (-1.0, -0.25), shaded)):
            box = [
                (share[0] * half, low),
                (share[1] * half, low),
                (share[1] * half, low + step),
                (share[0] * half, low + step),
            ]
            canvas.polygon(_placed(box, x, y, tall), colour)
        if lamps:
            for px in (-0.45, 0.45):
                box = [((px + s * 0.22) * half, low + h) for s, h in ((-1, 0.03), (1, 0.03), (1, 0.10), (-1, 0.10))]
                canvas.polygon(_placed(box, x, y, tall), array((1.0, 0.80, 0.38)))
        eave, top = half + 0.13, low + step
        curve = [(-eave, top - 0.045), (-0.7 * eave, top - 0.062), (0.7 * eave, top - 0.062), (eave, top - 0.045)]
        over = [
            (0.72 * eave, top - 0.012),
            (0.78 * half, top + 0.05),
            (-0.78 * half, top + 0.05),
            (-0.72 * eave, top - 0.012),
        ]
        canvas.polygon(_placed([*curve, *over], x, y, tall), roof)
        canvas.polygon(_placed([*curve, (0.7 * eave, top - 0.048), (-0.7 * eave, top - 0.048)], x, y, tall), edge)
    canvas.stroke(x, y - 0.90 * tall, x, y - 1.08 * tall, 0.022 * tall, 0.006 * tall, roof)


def paint_cabin(canvas: Canvas, x: float, y: float, size: float) -> None:
    """A log cabin with a steep roof, a chimney and a warm window."""
    palette, scene = canvas.palette, canvas.scene
    wall = palette.paint((0.56, 0.36, 0.22), 0.70)
    side = palette.paint((0.56, 0.36, 0.22), 0.10)
    roof = palette.paint(SNOW if scene.season == "winter" else (0.50, 0.20, 0.16), 0.80)
    dim = scene.time in ("night", "dusk") or scene.weather != "clear"
    window = array((1.0, 0.82, 0.40)) if dim and not palette.ink else palette.paint((0.95, 0.88, 0.62), 0.9)
    canvas.polygon(_placed([(0.42, 0.75), (0.56, 0.75), (0.56, 1.12), (0.42, 1.12)], x, y, size), side)
    canvas.polygon(_placed([(-0.75, 0.0), (0.75, 0.0), (0.75, 0.52), (-0.75, 0.52)], x, y, size), wall)
    canvas.polygon(_placed([(-0.75, 0.0), (-0.20, 0.0), (-0.20, 0.52), (-0.475, 1.0), (-0.75, 0.52)], x, y, size), side)
    canvas.polygon(_placed([(-0.52, 1.04), (0.72, 1.04), (0.92, 0.44), (-0.14, 0.44)], x, y, size), roof)
    canvas.polygon(_placed([(-0.92, 0.44), (-0.52, 1.04), (-0.44, 0.94), (-0.78, 0.42)], x, y, size), roof)
    canvas.polygon(_placed([(0.12, 0.12), (0.42, 0.12), (0.42, 0.36), (0.12, 0.36)], x, y, size), window)
    if dim and not palette.ink:
        canvas.blob(x + 0.27 * size, y - 0.24 * size, 0.32 * size, window, 0.28)
    if scene.season == "winter" or dim:
        for n in range(5):
            puff = 0.10 + 0.035 * n
            canvas.blob(
                x + (0.50 + 0.10 * n) * size,
                y - (1.22 + 0.24 * n) * size,
                0.8 * puff * size,
                mix(palette.fog, palette.haze, 0.3),
                0.55 - 0.09 * n,
            )


def standing_place(canvas: Canvas, crest: Floats, x: float) -> float:
    """The y of the ground at `x`."""
    column = int(np.clip((x / canvas.aspect + 0.5) * canvas.width, 0, canvas.width - 1))
    return float(crest[column])
