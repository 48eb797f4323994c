"""Rows of pines, broad-leaved and bare trees, and the single large tree that frames a picture."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, lay, ramp
from .noise import LATTICE, Floats, cell, lattice
from .palettes import BARK, LEAF_COLOURS, PINE_COLOURS, SNOW, array, mix

# A tree's height over its spacing, by kind.
SPACING = {"pines": 0.42, "leafy": 0.72, "bare": 0.75}


def paint_row(canvas: Canvas, kind: str, ground: Floats, tall: float, salt: int, haze: float, share: float) -> None:
    """Trees about `tall` high that stand on `ground` (y at every column), a `share` of all places taken."""
    scene = canvas.scene
    spacing = tall * SPACING[kind]
    grid = lattice(scene.seed, salt)[0]
    index, t = cell(canvas.xs, 1 / spacing, 64.0 + salt / 7, smooth=False)
    size, aside = grid[index % LATTICE], grid[(index + 97) % LATTICE]
    standing = grid[(index + 41) % LATTICE] < share
    height = np.where(standing, tall * (0.55 + 0.45 * size), np.float32(1e-6)).astype(np.float32)
    across = ((t - 0.5 - 0.22 * (aside - 0.5)) * np.float32(spacing)).astype(np.float32)  # from the tree's middle
    column = np.clip(((canvas.xs - across) / canvas.aspect + 0.5) * canvas.width, 0, canvas.width - 1).astype(np.int32)
    foot = ground[column] + np.float32(0.004)
    top = max(int(float((foot - height).min()) * canvas.height) - 1, 0)
    bottom = canvas.rows_above(float(foot.max()) + 0.005)
    if top >= bottom:
        return
    rows = canvas.ys[top:bottom]
    down = (rows[:, None] - (foot - height)[None, :]) / height[None, :]  # 0 at the tip, 1 at the foot
    paint = {"pines": _pines, "leafy": _leafy, "bare": _bare}[kind]
    paint(canvas, top, down, across, height, aside, haze)


def _cover(canvas: Canvas, inside: Floats, down: Floats) -> Floats:
    return (np.clip(inside * canvas.height + 0.5, 0, 1) * (down >= 0) * (down <= 1)).astype(np.float32)


def _pines(canvas: Canvas, top: int, down: Floats, across: Floats, height: Floats, aside: Floats, haze: float) -> None:
    scene, palette = canvas.scene, canvas.palette
    tiers = down * np.float32(4.6)
    within = tiers - np.floor(tiers)
    half = height[None, :] * np.float32(0.235) * down * (0.62 + 0.38 * within)
    cover = _cover(canvas, half - np.abs(across)[None, :], down)
    bright = mix(palette.paint(PINE_COLOURS[scene.season], 0.85), palette.haze, haze)
    dark = mix(palette.paint(PINE_COLOURS[scene.season], 0.10), palette.haze, haze)
    towards = np.float32(1.0 if scene.light_x > 0.5 else -1.0)
    lit = ramp(towards * across[None, :] / np.maximum(half, 1e-6), -0.25, 0.65)[..., None] * np.float32(0.8)
    colour = dark + (bright - dark) * lit
    if scene.season == "winter":
        white = mix(palette.paint(SNOW, 0.75), palette.haze, haze)
        colour = colour + (white - colour) * (0.72 * (1 - ramp(within, 0.15, 0.45)))[..., None]
    lay(canvas.picture[top : top + len(down)], colour, cover)


def _leafy(canvas: Canvas, top: int, down: Floats, across: Floats, height: Floats, aside: Floats, haze: float) -> None:
    scene, palette = canvas.scene, canvas.palette
    view = canvas.picture[top : top + len(down)]
    trunk = 0.035 * height[None, :] - np.abs(across)[None, :] + np.where(down > 0.6, np.float32(0), np.float32(-1))
    lay(view, mix(palette.paint(BARK, 0.3), palette.haze, haze), _cover(canvas, trunk, down))
    u = across[None, :] / (height[None, :] * np.float32(0.36))
    v = (down - np.float32(0.42)) / np.float32(0.42)
    phase = aside[None, :] * np.float32(40.0)
    lumps = np.sin(4.2 * u + phase) * np.sin(4.6 * v + phase)
    r = np.sqrt(u * u + v * v) + np.float32(0.10) * lumps
    cover = _cover(canvas, (1 - r) * height[None, :] * np.float32(0.36), down)
    first, second = (array(c) for c in LEAF_COLOURS[scene.season])
    towards = np.float32(1.0 if scene.light_x > 0.5 else -1.0)
    lit = ramp(0.5 * towards * u - 0.7 * v + 0.35 * lumps, -0.7, 0.7)[..., None]
    kind = (aside[None, :, None] > 0.5).astype(np.float32)
    bright = palette.paint(first, 0.95) + (palette.paint(second, 0.95) - palette.paint(first, 0.95)) * kind
    dark = palette.paint(first, 0.15) + (palette.paint(second, 0.15) - palette.paint(first, 0.15)) * kind
    colour = dark + (bright - dark) * lit
    lay(view, colour + (palette.haze - colour) * np.float32(haze), cover)


def _bare(canvas: Canvas, top: int, down: Floats, across: Floats, height: Floats, aside: Floats, haze: float) -> None:
    """A trunk and a fan of branches."""
    palette = canvas.palette
    view = canvas.picture[top : top + len(down)]
    tall = height[None, :]
    bark = mix(palette.paint(BARK, 0.25), palette.haze, haze)
    twigs = mix(bark, palette.haze, 0.45)
    from_fork = (np.float32(0.62) - down) * tall
    far = np.sqrt(across[None, :] ** 2 + np.maximum(from_fork, 0) ** 2)
    angle = np.arctan2(np.broadcast_to(across[None, :], far.shape), np.maximum(from_fork, 1e-6)) + aside[None, :] * 0.3
    inner = (0.46 + 0.10 * np.cos(angle * 3)) * tall - far
    veil = _cover(canvas, inner, down) * (from_fork > 0)
    lay(view, twigs, (veil * np.float32(0.30)).astype(np.float32))
    rays = np.abs((angle * np.float32(2.6)) % 1.0 - np.float32(0.5)) / np.float32(2.6) * far
    branch = 0.016 * tall * (1 - far / (0.56 * tall)) - rays
    lay(view, bark, (_cover(canvas, np.minimum(branch, inner), down) * (from_fork > 0)).astype(np.float32))
    trunk = 0.022 * tall * (0.5 + 0.7 * down) - np.abs(across)[None, :]
    lay(view, bark, (_cover(canvas, trunk, down) * (down > 0.5)).astype(np.float32))


def paint_near_tree(canvas: Canvas, foot: float) -> None:
    """One large tree at the left or right edge: its trunk leaves the frame below, its crown reaches into the sky."""
    scene, palette = canvas.scene, canvas.palette
    rng = np.random.default_rng((scene.seed, 76))
    lean = 1.0 if scene.near_tree_on_left else -1.0
    x = canvas.x_of(0.0 if scene.near_tree_on_left else 1.0) + lean * rng.uniform(0.07, 0.13)
    bark = palette.paint(BARK, 0.12)
    towards = 1.0 if scene.light_x > 0.5 else -1.0
    tips: list[tuple[float, float, float]] = []

    def grow(ax: float, ay: float, angle: float, length: float, width: float, level: int) -> None:
        """A bough from (ax, ay), its angle counted from straight up, then those that spring from it."""
        bend = float(rng.normal(0, 0.16))
        bx, by = ax + length * np.sin(angle), ay - length * np.cos(angle)
        canvas.stroke(ax, ay, bx, by, width, 0.68 * width, bark)
        if level == 0:
            tips.append((bx, by, length))
            return
        for side in (-1.0, 1.0):
            spread = side * float(rng.uniform(0.32, 0.62)) + bend
            grow(bx, by, angle + spread, length * float(rng.uniform(0.66, 0.82)), 0.64 * width, level - 1)
        if level < 4:
            tips.append((bx, by, length))

    if scene.near_tree == "pines":
        _near_pine(canvas, rng, x, foot, lean)
        return
    grow(x, foot, lean * 0.10, 0.23, 0.046, 5 if scene.near_tree == "bare" else 4)
    if scene.near_tree != "leafy":
        return
    first, second = (array(c) for c in LEAF_COLOURS[scene.season])
    order = rng.permutation(len(tips))
    for n, i in enumerate(order):
        tx, ty, length = tips[i]
        own = first if n % 3 else second
        radius = 0.034 + 0.28 * length
        canvas.ellipse(
            tx + float(rng.normal(0, 0.015)),
            ty + float(rng.normal(0, 0.012)),
            radius,
            0.78 * radius,
            palette.paint(own, 0.95),
            palette.paint(own, 0.12),
            towards,
            lumps=0.06,
            phase=float(rng.uniform(0, 6.28)),
        )


def _near_pine(canvas: Canvas, rng: np.random.Generator, x: float, foot: float, lean: float) -> None:
    """An old leaning pine: a crooked trunk and flat pads of needles."""
    scene, palette = canvas.scene, canvas.palette
    bark = palette.paint(BARK, 0.15)
    towards = 1.0 if scene.light_x > 0.5 else -1.0
    needles = PINE_COLOURS[scene.season]
    bright, dark = palette.paint(needles, 0.9), palette.paint(needles, 0.05)
    ax, ay, width, angle = x, foot, 0.046, lean * 0.05
    pads: list[tuple[float, float, float]] = []
    for step in range(6):
        angle = lean * (0.10 + 0.09 * step) + float(rng.normal(0, 0.18))
        length = 0.125
        bx, by = ax + length * np.sin(angle), ay - length * np.cos(angle)
        canvas.stroke(ax, ay, bx, by, width, 0.84 * width, bark)
        if step >= 2:
            side = lean if step % 2 == 0 else -0.7 * lean
            reach = float(rng.uniform(0.10, 0.19)) * (1.15 - 0.08 * step)
            ex, ey = bx + side * reach, by - 0.03
            canvas.stroke(bx, by, ex, ey, 0.45 * width, 0.2 * width, bark)
            pads += [(ex, ey - 0.012, 0.105), (bx + 0.45 * side * reach, by - 0.035, 0.085)]
        ax, ay, width = bx, by, 0.84 * width
    pads.append((ax, ay - 0.02, 0.12))
    for px, py, size in pads:
        for shift, lift, scale in ((-0.45, 0.010, 0.62), (0.45, 0.008, 0.62), (0.0, -0.012, 0.9)):
            top, low = bright, dark
            if scene.season == "winter":
                top = palette.paint(SNOW, 0.85)
            canvas.ellipse(
                px + shift * size, py + lift, scale * size, 0.30 * size, top, low, 0.5 * towards, 0.05, px * 50
            )
