"""Every colour of the world, by hour, season and style."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .noise import Floats
from .scene import Scene

Colour = tuple[float, float, float]


def array(colour: Colour | Floats) -> Floats:
    return np.asarray(colour, dtype=np.float32)


def mix(a: Colour | Floats, b: Colour | Floats, share: float) -> Floats:
    return array(a) * np.float32(1 - share) + array(b) * np.float32(share)


@dataclass(frozen=True)
class Sky:
    """From the zenith down to the horizon, and the clouds' light and shaded sides."""

    zenith: Colour
    middle: Colour
    horizon: Colour
    cloud: Colour
    under: Colour


SKY_COLOURS: dict[tuple[str, str], Sky] = {
    ("dawn", "pink"): Sky(
        (0.42, 0.54, 0.82), (0.88, 0.71, 0.81), (1.00, 0.87, 0.75), (1.00, 0.90, 0.87), (0.80, 0.62, 0.76)
    ),
    ("dawn", "golden"): Sky(
        (0.47, 0.68, 0.84), (0.95, 0.86, 0.68), (1.00, 0.88, 0.58), (1.00, 0.96, 0.82), (0.90, 0.72, 0.52)
    ),
    ("dawn", "grey"): Sky(
        (0.58, 0.60, 0.68), (0.72, 0.70, 0.74), (0.86, 0.80, 0.78), (0.74, 0.72, 0.76), (0.52, 0.52, 0.58)
    ),
    ("noon", "blue"): Sky(
        (0.12, 0.42, 0.82), (0.40, 0.69, 0.94), (0.82, 0.93, 0.97), (1.00, 1.00, 1.00), (0.72, 0.82, 0.92)
    ),
    ("noon", "pale"): Sky(
        (0.50, 0.70, 0.80), (0.72, 0.84, 0.87), (0.95, 0.95, 0.90), (1.00, 1.00, 0.98), (0.80, 0.85, 0.86)
    ),
    ("noon", "grey"): Sky(
        (0.56, 0.61, 0.66), (0.68, 0.72, 0.75), (0.82, 0.84, 0.84), (0.70, 0.73, 0.76), (0.46, 0.51, 0.57)
    ),
    ("dusk", "orange"): Sky(
        (0.22, 0.25, 0.50), (0.88, 0.46, 0.36), (1.00, 0.76, 0.40), (1.00, 0.64, 0.42), (0.62, 0.32, 0.42)
    ),
    ("dusk", "purple"): Sky(
        (0.20, 0.16, 0.46), (0.60, 0.31, 0.60), (0.99, 0.60, 0.56), (0.95, 0.56, 0.66), (0.42, 0.25, 0.52)
    ),
    ("dusk", "grey"): Sky(
        (0.34, 0.34, 0.44), (0.50, 0.45, 0.52), (0.72, 0.58, 0.54), (0.50, 0.46, 0.54), (0.30, 0.29, 0.38)
    ),
    ("night", "blue"): Sky(
        (0.04, 0.08, 0.23), (0.09, 0.17, 0.39), (0.27, 0.40, 0.62), (0.30, 0.38, 0.58), (0.13, 0.19, 0.38)
    ),
    ("night", "violet"): Sky(
        (0.08, 0.05, 0.22), (0.19, 0.12, 0.40), (0.45, 0.31, 0.60), (0.42, 0.34, 0.58), (0.20, 0.14, 0.36)
    ),
    ("night", "grey"): Sky(
        (0.13, 0.16, 0.24), (0.20, 0.24, 0.33), (0.34, 0.38, 0.46), (0.28, 0.32, 0.41), (0.14, 0.17, 0.25)
    ),
    ("dawn", "paper"): Sky(
        (0.90, 0.85, 0.79), (0.95, 0.89, 0.82), (0.98, 0.92, 0.86), (0.99, 0.96, 0.93), (0.84, 0.78, 0.74)
    ),
    ("noon", "paper"): Sky(
        (0.93, 0.90, 0.82), (0.95, 0.92, 0.85), (0.97, 0.94, 0.88), (0.99, 0.97, 0.93), (0.82, 0.80, 0.75)
    ),
    ("dusk", "paper"): Sky(
        (0.80, 0.72, 0.66), (0.92, 0.79, 0.67), (0.97, 0.85, 0.70), (0.97, 0.88, 0.78), (0.72, 0.62, 0.58)
    ),
    ("night", "paper"): Sky(
        (0.40, 0.41, 0.43), (0.55, 0.55, 0.54), (0.76, 0.74, 0.69), (0.72, 0.71, 0.68), (0.44, 0.44, 0.45)
    ),
}

LIGHT_COLOURS: dict[tuple[str, str], Colour] = {
    ("sun", "white"): (1.00, 0.99, 0.93),
    ("sun", "golden"): (1.00, 0.86, 0.36),
    ("sun", "orange"): (1.00, 0.56, 0.16),
    ("sun", "red"): (0.92, 0.19, 0.12),
    ("moon", "white"): (0.96, 0.97, 1.00),
    ("moon", "golden"): (1.00, 0.88, 0.58),
}

# What the light of the hour does to a colour: on the lit side, and in the shade.
LIT: dict[str, Colour] = {
    "dawn": (1.06, 0.93, 0.86),
    "noon": (1.08, 1.06, 1.00),
    "dusk": (0.98, 0.68, 0.56),
    "night": (0.40, 0.50, 0.74),
}
SHADE: dict[str, Colour] = {
    "dawn": (0.58, 0.58, 0.74),
    "noon": (0.56, 0.65, 0.79),
    "dusk": (0.38, 0.31, 0.47),
    "night": (0.18, 0.25, 0.45),
}

MEADOWS: dict[str, Colour] = {
    "spring": (0.50, 0.69, 0.30),
    "summer": (0.27, 0.52, 0.22),
    "autumn": (0.78, 0.57, 0.24),
    "winter": (0.92, 0.95, 1.00),
    "none": (0.86, 0.66, 0.38),
}
ROCKS: dict[str, Colour] = {
    "alpine": (0.38, 0.40, 0.47),
    "volcano": (0.34, 0.36, 0.47),
    "karst": (0.36, 0.50, 0.40),
    "mesa": (0.80, 0.40, 0.24),
    "dunes": (0.94, 0.72, 0.42),
}
PINE_COLOURS: dict[str, Colour] = {
    "spring": (0.14, 0.36, 0.24),
    "summer": (0.09, 0.29, 0.18),
    "autumn": (0.16, 0.30, 0.18),
    "winter": (0.20, 0.36, 0.36),
    "none": (0.16, 0.30, 0.18),
}
LEAF_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "spring": ((0.98, 0.70, 0.78), (0.94, 0.56, 0.70)),
    "summer": ((0.30, 0.56, 0.20), (0.20, 0.44, 0.18)),
    "autumn": ((0.92, 0.46, 0.12), (0.80, 0.24, 0.12)),
    "winter": ((0.60, 0.56, 0.54), (0.50, 0.46, 0.46)),
    "none": ((0.50, 0.56, 0.28), (0.42, 0.48, 0.24)),
}
BARK: Colour = (0.30, 0.22, 0.18)
WATER_COLOURS: dict[str, Colour] = {"lake": (0.20, 0.42, 0.52), "sea": (0.08, 0.34, 0.52), "river": (0.24, 0.46, 0.56)}
SNOW: Colour = (0.97, 0.98, 1.00)
INK: Colour = (0.13, 0.14, 0.16)
SEAL: Colour = (0.80, 0.16, 0.12)


@dataclass(frozen=True)
class Palette:
    """The colours of one scene. `lit` and `shade` multiply a colour; `haze` is what distance turns everything into."""

    sky: Sky
    haze: Floats
    fog: Floats
    lit: Floats
    shade: Floats
    ink: bool

    @classmethod
    def of(cls, scene: Scene) -> Palette:
        sky = SKY_COLOURS[scene.time, scene.sky]
        night, ink = scene.time == "night", scene.style == "ink"
        lit, shade = array(LIT[scene.time]), array(SHADE[scene.time])
        if scene.weather != "clear":
            flat = lit.mean() * np.float32(0.86)
            lit, shade = mix(lit, (flat, flat, flat), 0.6), mix(shade, lit * 0.72, 0.5)
        return cls(
            sky=sky,
            haze=mix(sky.horizon, sky.middle, 0.35),
            fog=mix(sky.horizon, (1.0, 1.0, 1.0), 0.0 if ink else 0.12 if night else 0.4),
            lit=lit,
            shade=shade,
            ink=ink,
        )

    def paint(self, colour: Colour | Floats, light: float) -> Floats:
        """A thing's own colour as it looks with that much light, 0 to 1; in ink, grey with a trace of the colour."""
        own = array(colour)
        if self.ink:
            grey = np.float32(own @ array((0.3, 0.59, 0.11)))
            vivid = own.max() - own.min() > 0.35 and own[0] > 0.85
            tone = mix(INK, self.haze, float(np.clip(grey * (0.45 + 0.55 * light), 0, 1)) * 0.8)
            return mix(tone, own, 0.62 if vivid else 0.05)
        return own * (self.shade + (self.lit - self.shade) * np.float32(light))
