"""Amounts, sizes and times as text, both ways, and one line out of any text."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from handscroll.errors import SizeError, UsageError

MIN_SIDE_PX, MAX_SIDE_PX = 32, 131_072
MIN_COMPOSE_PX = 64
QUOTED_CHARACTERS = 60  # of what a user wrote, in a message about it


# What users write


def parse_size(text: str) -> tuple[int, int]:
    """`4096x2048` or `4096` -> (width, height) in pixels. Raises SizeError."""
    found = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX×*]\s*(\d{1,9}))?\s*", text)
    if found is None:
        raise SizeError(
            f"size {quoted(text)} is not a size; write WIDTHxHEIGHT such as 4096x2048, or one number for a square"
        )
    width, height = int(found[1]), int(found[2] or found[1])
    check_side("width", width)
    check_side("height", height)
    return width, height


def parse_compose(text: str) -> int | None:
    """`auto`, `off` or pixels -> None, 0 or the pixels. Raises UsageError."""
    match text.strip().lower():
        case "auto":
            return None
        case "off":
            return 0
        case digits if re.fullmatch(r"[0-9]{1,9}", digits):
            check_range("compose", int(digits), MIN_COMPOSE_PX, MAX_SIDE_PX)
            return int(digits)
    raise UsageError(f"compose {quoted(text)} is not known; use auto, off or a side in pixels such as 1024")


def parse_bytes(text: str) -> int:
    """`6GiB`, `800MiB`, `1.5 GB`, `123456` -> bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(?:([kmgt]i?)?b)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"memory {quoted(text)} is not an amount; write it as 6GiB or 800MiB")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(Decimal(found[1]) * base ** " kmgt".index(unit[:1] or " "))


def check_side(name: str, side_px: int) -> None:
    """Raises SizeError for a side that no picture has."""
    if not MIN_SIDE_PX <= side_px <= MAX_SIDE_PX:
        raise SizeError(f"{name} {_number(side_px)} is out of range; use {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels")


def check_range(name: str, value: float | None, least: float, most: float) -> None:
    """Raises UsageError for a number outside its range, NaN included."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{name} {_number(value)} is out of range; use {least} to {most}")


def quoted(text: object) -> str:
    """What a user wrote, in quotes, for a message about it: on one line, and not all of it where it is long."""
    return repr(one_line(str(text), QUOTED_CHARACTERS))


def _number(value: float) -> str:
    try:
        return one_line(str(value), QUOTED_CHARACTERS)
    except ValueError:  # Python writes whole numbers of thousands of digits only where it is told to
        return "of thousands of digits"


# What users read


def gibibytes(n_bytes: float, decimals: int = 1) -> str:
    """`2.9 GiB`, `85 MiB`, `1.5 MiB`, `12 KiB` or `96 bytes`: in the largest unit that is filled.

    `decimals` are those of GiB and TiB. A smaller unit shows one below 10, and else none.
    """
    for unit, unit_bytes in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= unit_bytes:
            amount = n_bytes / unit_bytes
            shown = decimals if unit_bytes >= 2**30 else int(amount < 10)
            return f"{amount:.{shown}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def budget_text(n_bytes: int) -> str:
    """`768MiB`: a budget as `--memory` takes it, whole MiB that hold so many bytes."""
    return f"{-(-n_bytes // 2**20)}MiB"


def duration(seconds: float) -> str:
    """`4.2 s`, `250 s`, or from ten minutes on `12.4 min`."""
    amount, unit = (seconds / 60, "min") if seconds >= 600 else (seconds, "s")
    return f"{amount:.{int(amount < 100)}f} {unit}"


# Texts of others


def visible(text: str) -> str:
    """A text as a terminal may print it: what would steer the terminal is shown as an escape, `\\x1b` and the like.

    That is every control character but the end of a line and the tab, and the marks that turn the direction of writing
    and so show letters in another order than they have.
    """
    return "".join(_escaped(character) if _steers(character) else character for character in text)


def _steers(character: str) -> bool:
    kind = unicodedata.category(character)
    if kind == "Cc":
        return character not in "\n\t"
    return kind in ("Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS


# Embeddings, overrides and isolates. The marks that only say which way a single place is written stay.
_TURNS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def one_line(said: str | BaseException, most: int | None = None) -> str:
    """A text, or what an error says (its kind where that is nothing), on one line of at most `most` characters.

    Whatever would steer a terminal is made `visible`.
    """
    line = visible(" ".join(str(said).split()))
    if not line and isinstance(said, BaseException):
        line = type(said).__name__
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for libraries that go on for many; its kind where it says nothing."""
    return visible((str(error).strip() or type(error).__name__).splitlines()[0])
