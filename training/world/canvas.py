"""The pixel grid of one picture, and the few shapes that everything is painted with.

x is counted in heights from the middle, y in heights from the top; every length is a share of the height.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .noise import Floats, Reals
from .palettes import Colour, Palette, array
from .scene import Scene

Points = Sequence[tuple[float, float]]


def ramp(values: Reals, start: float, end: float) -> Floats:
    """0 below `start`, 1 above `end`, smooth between."""
    t = np.clip((values - np.float32(start)) / np.float32(end - start), 0, 1)
    return t * t * (3 - 2 * t)


def lay(target: Floats, colour: Reals, alpha: Reals) -> None:
    """Blend `colour` (one colour, or one a pixel) over `target` in place."""
    target += (colour - target) * alpha[..., None]


class Canvas:
    """`picture` is [height, width, 3]; `xs` and `ys` are the middles of its pixels."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene = scene
        self.palette = Palette.of(scene)
        self.height, self.width = height, width
        self.aspect = width / height
        self.xs = (((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5) * self.aspect).astype(np.float32)
        self.ys = ((np.arange(height, dtype=np.float32) + 0.5) / height).astype(np.float32)
        # The finest frequency, in waves a height, that this grid can show.
        self.limit = height / 3.0
        self.picture = np.empty((height, width, 3), dtype=np.float32)

    def x_of(self, share: float) -> float:
        """A place given as a share of the width."""
        return (share - 0.5) * self.aspect

    def rows_above(self, y: float) -> int:
        return int(np.clip(np.ceil(y * self.height), 1, self.height))

    def _box(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice] | None:
        """The pixels of a rectangle with one more around it; None where it is outside."""
        c0 = max(int((left / self.aspect + 0.5) * self.width) - 1, 0)
        c1 = min(int((right / self.aspect + 0.5) * self.width) + 2, self.width)
        r0 = max(int(top * self.height) - 1, 0)
        r1 = min(int(bottom * self.height) + 2, self.height)
        return (slice(r0, r1), slice(c0, c1)) if r0 < r1 and c0 < c1 else None

    def blob(self, x: float, y: float, radius: float, colour: Colour | Floats, strength: float) -> None:
        """A soft round spot; smaller than a pixel it fades instead of vanishing."""
        reach = max(3 * radius, 2 / self.height)
        box = self._box(x - reach, y - reach, x + reach, y + reach)
        if box is None:
            return
        pixels = max(radius * self.height, 0.5)
        fade = strength * min(1.0, (radius * self.height / 0.5) ** 2)
        squared = ((self.ys[box[0]] - np.float32(y)) ** 2)[:, None] + ((self.xs[box[1]] - np.float32(x)) ** 2)[None]
        glow = np.exp(-squared * np.float32((self.height / pixels) ** 2 / 2)) * np.float32(fade)
        lay(self.picture[box], array(colour), glow)

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        colour: Floats,
        shaded: Floats,
        side: float,
        lumps: float = 0.0,
        phase: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """A crown of leaves or a disc: lit from above and from `side` (-1 left, 1 right), its rim lumpy if asked."""
        box = self._box(x - 1.2 * rx, y - 1.2 * ry, x + 1.2 * rx, y + 1.2 * ry)
        if box is None:
            return
        u = ((self.xs[box[1]] - np.float32(x)) / np.float32(rx))[None, :]
        v = ((self.ys[box[0]] - np.float32(y)) / np.float32(ry))[:, None]
        r = np.sqrt(u * u + v * v)
        if lumps:
            angle = np.arctan2(v, u)
            r = r + np.float32(lumps) * (np.sin(7 * angle + phase) + np.float32(0.6) * np.sin(13 * angle + 2 * phase))
        cover = np.clip((1 - r) * (min(rx, ry) * self.height) + 0.5, 0, 1) * np.float32(alpha)
        light = ramp(0.5 * side * u - 0.8 * v, -0.5, 0.75)[..., None]
        lay(self.picture[box], shaded + (colour - shaded) * light, cover)

    def polygon(self, points: Points, colour: Floats, alpha: float = 1.0) -> None:
        """A filled polygon with smooth edges: how far each pixel is inside, by its nearest edge."""
        px, py = zip(*points, strict=True)
        box = self._box(min(px), min(py), max(px), max(py))
        if box is None:
            return
        x, y = self.xs[box[1]][None, :], self.ys[box[0]][:, None]
        nearest = np.full((y.shape[0], x.shape[1]), np.inf, dtype=np.float32)
        inside = np.zeros(nearest.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            dx, dy = np.float32(bx - ax), np.float32(by - ay)
            t = np.clip(((x - ax) * dx + (y - ay) * dy) / max(float(dx * dx + dy * dy), 1e-12), 0, 1)
            np.minimum(nearest, (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2, out=nearest)
            if ay != by:
                crossing = ax + (y - ay) * (dx / dy)
                inside ^= ((y < ay) != (y < by)) & (x < crossing)
        distance = np.sqrt(nearest) * np.where(inside, np.float32(1), np.float32(-1))
        lay(self.picture[box], colour, np.clip(distance * self.height + 0.5, 0, 1) * np.float32(alpha))

    def stroke(
        self, ax: float, ay: float, bx: float, by: float, wide: float, narrow: float, colour: Floats, alpha: float = 1.0
    ) -> None:
        """A line from `a`, `wide` there, to `b`, `narrow` there. Thinner than a pixel it fades instead of breaking."""
        reach = max(wide, narrow)
        box = self._box(min(ax, bx) - reach, min(ay, by) - reach, max(ax, bx) + reach, max(ay, by) + reach)
        if box is None:
            return
        x, y = self.xs[box[1]][None, :], self.ys[box[0]][:, None]
        dx, dy = np.float32(bx - ax), np.float32(by - ay)
        t = np.clip(((x - ax) * dx + (y - ay) * dy) / max(float(dx * dx + dy * dy), 1e-12), 0, 1)
        away = np.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2)
        half = np.float32(0.5) * (wide + (narrow - wide) * t)
        cover = np.clip((half - away) * self.height + 0.5, 0, 1) * np.clip(2 * half * self.height, 0, 1)
        lay(self.picture[box], colour, cover * np.float32(alpha))
