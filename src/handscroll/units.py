"""Amounts, sizes and times as text, both ways, and one line out of any text."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from decimal import Decimal

from handscroll.errors import SizeError, UsageError, printable

MIN_SIDE_PX, MAX_SIDE_PX = 32, 131_072
MIN_COMPOSE_PX = 64
QUOTED_CHARACTERS = 60  # of what a user wrote, in a message about it


# What users write


def parse_size(text: str) -> tuple[int, int]:
    """`4096x2048` or `4096` -> (width, height) in pixels. Raises SizeError."""
    found = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX×*]\s*(\d{1,9}))?\s*", text)
    if found is None:
        raise SizeError(
            f"size {shown(text)} is not a size; write WIDTHxHEIGHT such as 4096x2048, or one number for a square"
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
    raise UsageError(f"compose {shown(text)} is not known; use auto, off or a side in pixels such as 1024")


def parse_bytes(text: str) -> int:
    """`6GiB`, `800MiB`, `1.5 GB`, `123456` -> bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(?:([kmgt]i?)?b)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"memory {shown(text)} is not an amount; write it as 6GiB or 800MiB")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(Decimal(found[1]) * base ** " kmgt".index(unit[:1] or " "))


def parse_rate(text: str) -> float:
    """`300GB/s`, `12.5 GiB/s`, `100Gbit/s` -> bytes a second. Raises UsageError."""
    amount, slash, per = text.strip().rpartition("/")
    in_bits = amount.lower().endswith("bit")
    try:
        if slash and per == "s":
            found = parse_bytes(f"{amount[:-3]}B") / 8 if in_bits else float(parse_bytes(amount))
            if found:
                return found
    except UsageError:
        pass
    raise UsageError(f"link {shown(text)} is not a rate; write it as 300GB/s or 100Gbit/s")


def parse_latency(text: str) -> float:
    """`5us`, `0.1ms` -> seconds. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([um]?)s\s*", text)
    if found is None:
        raise UsageError(f"latency {shown(text)} is not a time; write it as 5us or 0.1ms")
    return float(found[1]) * {"u": 1e-6, "m": 1e-3, "": 1.0}[found[2]]


def check_side(name: str, side_px: int) -> None:
    """Raises SizeError for a side that no picture has."""
    if not MIN_SIDE_PX <= side_px <= MAX_SIDE_PX:
        raise SizeError(f"{name} {shown(side_px)} is out of range; use {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels")


def check_range(name: str, value: float | None, least: float, most: float) -> None:
    """Raises UsageError for a number outside its range, NaN included."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{name} {shown(value)} is out of range; use {least} to {most}")


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


def allowance_text(n_bytes: int) -> str:
    """`767MiB`, `12KiB` or `96 bytes`: what was allowed, rounded down, so that it never reads as more than it is."""
    for unit, unit_bytes in (("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= unit_bytes:
            return f"{n_bytes // unit_bytes}{unit}"
    return f"{n_bytes} bytes"


def duration(seconds: float) -> str:
    """`4.2 s`, `250 s`, or from ten minutes on `12.4 min`."""
    amount, unit = (seconds / 60, "min") if seconds >= 600 else (seconds, "s")
    return f"{amount:.{int(amount < 100)}f} {unit}"


# Texts of others


def visible(text: str) -> str:
    """A text of several lines as a terminal may print it: as `printable`, but that ends of lines and tabs stay."""
    return re.sub(r"[^\n\t]+", lambda found: printable(found[0]), text)


def one_line(said: str | BaseException, most: int | None = None) -> str:
    """A text, or what an error says (its kind where that is nothing), on one line of at most `most` characters.

    Whatever would steer a terminal is written out.
    """
    line = printable(" ".join(str(said).split()))
    if not line and isinstance(said, BaseException):
        line = type(said).__name__
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def last_line(said: bytes, most: int | None = None) -> str:
    """The last line that a process has written, of at most `most` characters; empty where it wrote nothing."""
    lines = said.decode(errors="replace").strip().splitlines()
    return one_line(lines[-1], most) if lines else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for libraries that go on for many; its kind where it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def listed(names: Iterable[str], most: int = 5) -> str:
    """`a, b and c`, or `a, b, c, d, e and 3 more`."""
    shown = list(names)
    if len(shown) > most + 1:
        shown = [*shown[:most], f"{len(shown) - most} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def quoted(word: str) -> str:
    """A word as this system's shell takes it."""
    if os.name != "nt":
        return shlex.quote(word)
    import subprocess  # which nothing else needs at the start

    return subprocess.list2cmdline([word])


def shown(value: object, most: int = QUOTED_CHARACTERS) -> str:
    """What somebody gave, as Python writes it, on one line; its type where it cannot be written."""
    try:
        text = repr(value)
    except Exception:  # whatever a stranger's object raises, or a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return one_line(text, most)
