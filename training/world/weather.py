"""What falls between the painter and the picture, and the paper that ink is painted on."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, lay, ramp
from .noise import noise_field
from .palettes import SEAL, array, mix


def paint_rain(canvas: Canvas) -> None:
    """Slanting curtains, which even a small picture shows, and streaks."""
    palette, seed = canvas.palette, canvas.scene.seed
    slant = np.float32(0.35)
    rows = canvas.ys
    skewed = canvas.xs[None, :] + slant * rows[:, None]
    index = np.clip((skewed + 3.0) * np.float32(256), 0, 2047).astype(np.int32)
    line = np.linspace(-3, 5, 2048, dtype=np.float32)
    curtain = ramp(noise_field(line, np.zeros(1, np.float32), seed, 97, (3.0, 1.0), 0.5, 60.0, 4)[0], 0.45, 0.75)
    veil = curtain.take(index) * (0.30 * ramp(rows, 0.12, 0.45))[:, None]
    lay(canvas.picture, mix(palette.haze, palette.sky.under, 0.35), veil.astype(np.float32))
    rng = np.random.default_rng((seed, 98))
    drop = mix(palette.sky.horizon, (1.0, 1.0, 1.0), 0.45)
    for u, v, long in rng.random((420, 3)):
        x, y, length = (u - 0.5) * 3.0, v * 1.1 - 0.05, 0.035 + 0.045 * long
        if abs(x) < 0.5 * canvas.aspect + 0.05:
            canvas.stroke(x, y, x - slant * length, y + length, 0.0022, 0.0022, drop, 0.5)


def paint_snowfall(canvas: Canvas) -> None:
    """Soft flakes, a few of them near."""
    rng = np.random.default_rng((canvas.scene.seed, 99))
    white = mix((1.0, 1.0, 1.0), canvas.palette.lit, 0.25 if canvas.scene.time != "night" else 0.15)
    for u, v, size in rng.random((380, 3)):
        x, y = (u - 0.5) * 3.0, v
        if abs(x) < 0.5 * canvas.aspect:
            canvas.blob(x, y, 0.0022 + 0.0050 * size**3, white, 0.9)


def finish_paper(canvas: Canvas) -> None:
    """A lighter middle, a faint grain, and the painter's red seal in a lower corner."""
    scene = canvas.scene
    across = (canvas.xs / np.float32(0.5 * canvas.aspect)) ** 2
    rim = (0.10 * ramp(across[None, :] + ((canvas.ys - 0.5) * 2)[:, None] ** 2, 0.9, 2.0)).astype(np.float32)
    lay(canvas.picture, array((0.72, 0.62, 0.48)), rim)
    side = -1.0 if scene.subject_x > 0.5 else 1.0
    x, y, half = side * (0.5 * canvas.aspect - 0.075), 0.915, 0.026
    canvas.polygon(
        [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)], array(SEAL)
    )
    paper = array((0.96, 0.92, 0.86))
    for a, b, c, d in ((-0.6, -0.5, 0.6, -0.5), (0.0, -0.5, 0.0, 0.6), (-0.6, 0.15, 0.6, 0.15), (-0.5, 0.6, 0.5, 0.6)):
        canvas.stroke(x + a * half, y + b * half, x + c * half, y + d * half, 0.16 * half, 0.16 * half, paper, 0.9)
