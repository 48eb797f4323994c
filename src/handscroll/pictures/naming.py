"""File names made from prompts, in any writing: whole words, whole characters, and as short as file systems want."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import count as numbers
from pathlib import Path

from handscroll.request import Request, indexed

# With a seed, a number, `-10000` of many pictures and `.png`, a name stays below what the strictest file systems in use
# hold: 143 bytes.
NAME_WORDS, NAME_CHARACTERS, NAME_BYTES = 6, 48, 100

ZERO_WIDTH_JOINER, ZERO_WIDTH_NON_JOINER = "\u200d", "\u200c"
# Hyphens that show at the end of a line alone, joiners of words and marks of the direction: no part of any name.
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u2060\ufeff\u200e\u200f\u061c\u202a\u202b\u202c\u2066\u2067\u2068\u2069"))
THAI_AND_LAO_AM = "\u0e33\u0eb3"  # vowels that are written around their consonant
HALF_WIDTH_VOICE_MARKS = "\uff9e\uff9f"  # of Katakana
VIRAMA = 9  # a combining class: the sign that ties the next consonant to the one before


def free_name(request: Request) -> Path:
    """A name of the prompt's first words and the seed, in the current folder, that no picture has yet."""
    name = f"{words_of(request.prompt) or 'picture'}-{request.seed}"
    names = (Path(f"{name}.png" if number == 1 else f"{name}-{number}.png") for number in numbers(1))
    return next(
        path
        for path in names
        if not any(indexed(path, index, request.count).exists() for index in range(request.count))
    )


def words_of(prompt: str) -> str:
    """`a red sun, setting` -> `a-red-sun-setting`: as many words as a name holds, the last cut between characters."""
    name, words = "", 0
    within_word = False
    for cluster in clusters(prompt.lower().translate(INVISIBLE)):
        if not _belongs_to_a_word(cluster):
            within_word = False
            continue
        if not within_word and words == NAME_WORDS:
            break
        longer = name + ("-" if name and not within_word else "") + cluster
        if len(longer) > NAME_CHARACTERS or len(longer.encode()) > NAME_BYTES:
            break
        words += not within_word
        name, within_word = longer, True
    return name


def clusters(text: str) -> Iterator[str]:
    """A text in what its readers see as characters: a letter with its marks, a syllable, an emoji of several.

    The rules of Unicode's annex 29, as far as words and emoji need them. A mark that follows nothing is left out.
    """
    cluster = ""
    for character in text:
        if cluster and _goes_on(cluster, character):
            cluster += character
            continue
        if cluster:
            yield cluster
        cluster = "" if _extends(character) else character
    if cluster:
        yield cluster


def _goes_on(cluster: str, character: str) -> bool:
    last = cluster[-1]
    if _extends(character):
        return True
    if last == ZERO_WIDTH_JOINER:
        return unicodedata.category(character)[0] in "LS"  # an emoji of several, or a script that ties letters
    if unicodedata.combining(last) == VIRAMA and unicodedata.category(character).startswith("L"):
        return True
    if _is_flag_letter(character) and _is_flag_letter(last):
        return len(cluster) % 2 == 1  # flags are pairs of letters
    return False


def _extends(character: str) -> bool:
    """Whether a character is part of the one before it, whatever that is."""
    return (
        unicodedata.category(character).startswith("M")
        or character in (ZERO_WIDTH_JOINER, ZERO_WIDTH_NON_JOINER)
        or character in THAI_AND_LAO_AM
        or character in HALF_WIDTH_VOICE_MARKS
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= character <= "\U000e007f"  # tags, of which some flags are made
        or "\u1160" <= character <= "\u11ff"  # vowels and finals of Hangul syllables
        or "\ud7b0" <= character <= "\ud7fb"
    )


def _belongs_to_a_word(cluster: str) -> bool:
    return unicodedata.category(cluster[0])[0] in "LN"  # emoji and signs stand between words


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
