"""Value noise that gains octaves with resolution, so that one scene has one composition at every size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Reals = NDArray[np.floating]  # of whatever precision a formula came out in
LATTICE = 256


@lru_cache(maxsize=16)
def lattice(seed: int, salt: int) -> Floats:
    """Random numbers from 0 to 1, [LATTICE, LATTICE]."""
    return np.random.default_rng((seed, salt)).random((LATTICE, LATTICE), dtype=np.float32)


def cell(positions: Floats, frequency: float, offset: float, smooth: bool) -> tuple[NDArray[np.int64], Floats]:
    """Which cell each position is in, and how far into it, 0 to 1."""
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


def noise_line(
    positions: Floats,
    seed: int,
    salt: int,
    frequency: float,
    gain: float,
    limit: float,
    ridged: bool = False,
    most: int = 10,
) -> Floats:
    """Fractal noise along a line, about 0 to 1; ridged noise has sharp crests and straight flanks."""
    grid = lattice(seed, salt)
    total, amplitude = np.zeros_like(positions), 1.0
    for octave, (f, presence) in enumerate(_octaves(frequency, limit, most)):
        index, t = cell(positions, f, 37.3 + 11.7 * octave, smooth=not ridged)
        row = grid[octave]
        value = row[index % LATTICE] * (1 - t) + row[(index + 1) % LATTICE] * t
        if ridged:
            value = 1 - np.abs(2 * value - 1)
        total += np.float32(amplitude * presence) * (value - 0.5)
        amplitude *= gain
    return 0.5 + total / np.float32(0.75 * _weight(gain, most))


def noise_field(
    xs: Floats, ys: Floats, seed: int, salt: int, frequency: tuple[float, float], gain: float, limit: float, most: int
) -> Floats:
    """Fractal noise over a grid, [len(ys), len(xs)], about 0 to 1. `limit` is the finest frequency along x to draw."""
    grid = lattice(seed, salt)
    total = np.zeros((len(ys), len(xs)), dtype=np.float32)
    amplitude = 1.0
    stretch = frequency[1] / frequency[0]
    for octave, (f, presence) in enumerate(_octaves(frequency[0], limit, most)):
        ix, tx = cell(xs, f, 53.1 + 17.9 * octave, smooth=True)
        iy, ty = cell(ys, f * stretch, 91.7 + 23.3 * octave, smooth=True)
        rows = grid[iy % LATTICE] * (1 - ty)[:, None] + grid[(iy + 1) % LATTICE] * ty[:, None]
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
