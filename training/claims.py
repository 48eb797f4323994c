"""What can be asked of a picture: its attributes, what a scene answers, and what a sentence claims.

The scorer learns to read the answers from pixels; the evaluation asks of a picture what its prompt claims.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from training.world import Scene
from training.world.scene import FORESTS, RELIEFS, STYLES, SUBJECTS, TIMES, WATERS, WEATHERS

YES_NO = ("no", "yes")
SIDES = ("left", "centre", "right")


@dataclass(frozen=True)
class Attribute:
    """One question. `of` gives a scene's answer, None where its picture could not show one."""

    name: str
    labels: tuple[str, ...]
    of: Callable[[Scene], str | None]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _number(more: tuple[object, ...]) -> str:
    return "several" if more else "one"


def _season(scene: Scene) -> str | None:
    """Ink shows only winter, and the seasons of broad-leaved trees; the open sea shows none."""
    if scene.season == "none" or scene.relief == "none":
        return None
    leaves = "leafy" in (scene.forest, scene.near_tree)
    return scene.season if scene.style == "natural" or leaves or scene.season == "winter" else None


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("style", STYLES, lambda s: s.style),
    Attribute("time", TIMES, lambda s: s.time),
    Attribute("season", ("spring", "summer", "autumn", "winter"), _season),
    Attribute(
        "sky",
        ("pink", "golden", "blue", "pale", "orange", "purple", "grey", "paper"),
        lambda s: "purple" if s.sky == "violet" else s.sky,
    ),
    Attribute("light", ("none", "sun", "moon"), lambda s: s.light),
    Attribute("light colour", ("white", "golden", "orange", "red"), lambda s: s.light_colour or None),
    Attribute("light side", SIDES, lambda s: s.light_side if s.light != "none" and not s.more_lights else None),
    Attribute("large light", YES_NO, lambda s: _yes(s.light_is_large) if s.light != "none" else None),
    Attribute("crescent", YES_NO, lambda s: _yes(s.crescent) if s.light == "moon" else None),
    Attribute("stars", YES_NO, lambda s: _yes(s.stars)),
    Attribute("aurora", YES_NO, lambda s: _yes(s.aurora)),
    Attribute("clouds", YES_NO, lambda s: _yes(s.clouds != "none") if s.weather == "clear" else None),
    Attribute("weather", WEATHERS, lambda s: s.weather),
    Attribute("birds", YES_NO, lambda s: _yes(s.birds)),
    Attribute("relief", RELIEFS, lambda s: s.relief),
    Attribute(
        "land",
        ("green", "grey", "red", "golden", "white"),
        lambda s: s.land if s.land and s.style == "natural" else None,
    ),
    Attribute(
        "snow",
        YES_NO,
        lambda s: _yes(s.snow_caps or s.season == "winter") if s.relief != "none" else None,
    ),
    Attribute("forest", FORESTS, lambda s: s.forest),
    Attribute("water", WATERS, lambda s: s.water),
    Attribute("island", YES_NO, lambda s: _yes(s.island)),
    Attribute("mist", YES_NO, lambda s: _yes(s.mist)),
    Attribute("subject", SUBJECTS, lambda s: s.subject),
    Attribute(
        "subject side",
        SIDES,
        lambda s: s.subject_side if s.subject != "none" and not s.more_subjects else None,
    ),
    Attribute("near tree", FORESTS, lambda s: s.near_tree),
    Attribute(
        "near tree side",
        ("left", "right"),
        lambda s: None if s.near_tree == "none" else "left" if s.near_tree_on_left else "right",
    ),
)
BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}
# How many there are of what a true scene has once. Only the scorer is asked.
COUNTS: tuple[Attribute, ...] = (
    Attribute("lights", ("one", "several"), lambda s: _number(s.more_lights) if s.light != "none" else None),
    Attribute("subjects", ("one", "several"), lambda s: _number(s.more_subjects) if s.subject != "none" else None),
)

_LIGHT = r"(?: (?:rising|setting))? (?:sun|moon|full moon|crescent)\b"
_AT_LEFT, _AT_CENTRE, _AT_RIGHT = r" (?:to|on|at) the left", r" in the (?:middle|cent)", r" (?:to|on|at) the right"
_THING = r"(?:boat|sailboat|pagoda|temple|cabin|house|cottage|hut)"
_TREE = r"\b(?:tree|pine|oak|maple|tree in bloom)"

# (pattern, attribute, the answers that it allows)
CLAIMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"\bink\b|sumi-e|brush painting", "style", ("ink",)),
    (r"\bdawn\b|sunrise|daybreak|morning", "time", ("dawn",)),
    (r"\bnoon\b|midday|\bday\b|daylight|daytime", "time", ("noon",)),
    (r"\bdusk\b|sunset|twilight|evening", "time", ("dusk",)),
    (r"\bnight\b|after dark|midnight", "time", ("night",)),
    (r"\bin (?:spring|april)", "season", ("spring",)),
    (r"\bin (?:summer|july)", "season", ("summer",)),
    (r"\bin (?:autumn|fall\b|october)", "season", ("autumn",)),
    (r"\bin (?:winter|january)|wintry", "season", ("winter",)),
    (r"(?:pink|rosy) sky", "sky", ("pink",)),
    (r"(?:golden|yellow) sky", "sky", ("golden",)),
    (r"(?<!pale )blue sky", "sky", ("blue",)),
    (r"pale(?: blue)? sky", "sky", ("pale",)),
    (r"orange sky", "sky", ("orange",)),
    (r"(?:purple|violet) sky", "sky", ("purple",)),
    (r"\bsun\b", "light", ("sun",)),
    (r"\bmoon\b|crescent", "light", ("moon",)),
    (r"\b(?:white|pale)" + _LIGHT, "light colour", ("white",)),
    (r"\b(?:golden|yellow)" + _LIGHT, "light colour", ("golden",)),
    (r"\borange" + _LIGHT, "light colour", ("orange",)),
    (r"\b(?:red|crimson)" + _LIGHT, "light colour", ("red",)),
    (r"(?:sun|moon|crescent)" + _AT_LEFT, "light side", ("left",)),
    (r"(?:sun|moon|crescent)" + _AT_CENTRE, "light side", ("centre",)),
    (r"(?:sun|moon|crescent)" + _AT_RIGHT, "light side", ("right",)),
    (r"\b(?:big|large|huge)(?: \w+)?" + _LIGHT, "large light", ("yes",)),
    (r"\bsmall(?: \w+)?" + _LIGHT, "large light", ("no",)),
    (r"crescent", "crescent", ("yes",)),
    (r"full moon", "crescent", ("no",)),
    (r"\bstars\b|starry", "stars", ("yes",)),
    (r"northern lights|aurora", "aurora", ("yes",)),
    (r"no clouds|cloudless|clear sky", "clouds", ("no",)),
    (r"(?<!no )\bclouds\b|cloudy|overcast", "clouds", ("yes",)),
    (r"\brain", "weather", ("rain",)),
    (r"snowfall|falling snow|snow is falling|snowflakes|in the snow", "weather", ("snowfall",)),
    (r"\bbirds\b", "birds", ("yes",)),
    (
        r"(?<!karst )(?<!table )(?<!guilin )\bmountains\b|(?<!snowy )\bpeaks\b|mountain range|\balps\b",
        "relief",
        ("alpine",),
    ),
    (r"volcano|mount fuji|lone mountain", "relief", ("volcano",)),
    (r"karst|limestone|guilin|stone pillars", "relief", ("karst",)),
    (r"\bhills\b", "relief", ("hills",)),
    (r"\bmesas\b|buttes|table mountains|canyon", "relief", ("mesa",)),
    (r"\bdunes\b|sandy desert", "relief", ("dunes",)),
    (r"snowy|snow-|snow on top|with snow\b|wintry", "snow", ("yes",)),
    (r"\b(?:green|grassy) (?:low |rolling |gentle |forested |wooded |forest )*hills", "land", ("green",)),
    (r"\b(?:golden|yellow) (?:low |rolling |gentle |forested |wooded |forest )*hills", "land", ("golden",)),
    (
        r"\bforest\b|forested|wooded|\bwoods\b|\btrees\b|\bpines\b|evergreens|blossoms",
        "forest",
        ("pines", "leafy", "bare"),
    ),
    (r"\bpine (?:trees|forest)|\bpines\b|fir trees|evergreens", "forest", ("pines",)),
    (
        r"blossoms|blossoming trees|cherry trees|pink trees|trees in bloom|leafy trees|orange trees",
        "forest",
        ("leafy",),
    ),
    (r"bare trees|leafless trees|bare woods", "forest", ("bare",)),
    (r"\blake\b|calm water", "water", ("lake",)),
    (r"\bsea\b|\bocean\b", "water", ("sea",)),
    (r"\briver\b|\bstream\b", "water", ("river",)),
    (r"\bisland\b", "island", ("yes",)),
    (r"\bmist\b|misty|\bfog\b|foggy|hazy", "mist", ("yes",)),
    (r"\bboat\b|sailboat", "subject", ("boat",)),
    (r"pagoda|temple", "subject", ("pagoda",)),
    (r"cabin|cottage|\bhut\b|\bhouse\b", "subject", ("cabin",)),
    (_THING + _AT_LEFT, "subject side", ("left",)),
    (_THING + _AT_CENTRE, "subject side", ("centre",)),
    (_THING + _AT_RIGHT, "subject side", ("right",)),
    (r"\b(?:old pine|pine tree|crooked pine|leaning pine)\b", "near tree", ("pines",)),
    (
        r"\b(?:cherry tree|blossoming tree|pink tree|large tree|green tree|old oak|leafy tree)\b",
        "near tree",
        ("leafy",),
    ),
    (r"\b(?:orange tree|maple tree|autumn tree|red maple)\b", "near tree", ("leafy",)),
    (r"\b(?:bare tree|leafless tree|bare old tree)\b", "near tree", ("bare",)),
    (_TREE + _AT_LEFT, "near tree side", ("left",)),
    (_TREE + _AT_RIGHT, "near tree side", ("right",)),
)
_COMPILED = tuple((re.compile(pattern), name, frozenset(labels)) for pattern, name, labels in CLAIMS)


def claims(text: str) -> dict[str, frozenset[str]]:
    """The answers that a sentence allows, for each attribute that it speaks of."""
    found: dict[str, frozenset[str]] = {}
    # "an island with trees" speaks of the island's trees only.
    text = text.lower().replace("island with trees", "island")
    for pattern, name, labels in _COMPILED:
        if pattern.search(text):
            both = found.get(name, labels) & labels
            found[name] = both or labels
    return found


def is_held_out(text: str) -> bool:
    """One sentence in 32 is kept from training, so that prompts can be tried that were never learnt."""
    return zlib.crc32(text.encode()) % 32 == 0
