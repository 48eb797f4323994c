"""Amounts and times as people read them, and one line out of any text."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handscroll.errors import UsageError
from handscroll.request import Request
from handscroll.units import (
    budget_text,
    check_range,
    duration,
    first_line,
    gibibytes,
    one_line,
    parse_bytes,
    parse_compose,
    parse_size,
    visible,
)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (80 * 2**20, "80 MiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (2.86 * 2**30, "2.9 GiB"),
        (2**42, "4.0 TiB"),
    ],
)
def test_bytes_are_in_the_largest_unit_that_is_filled(n_bytes: float, text: str) -> None:
    assert gibibytes(n_bytes) == text


def test_a_plan_shows_two_decimals_of_what_is_large() -> None:
    assert gibibytes(2.875 * 2**30, decimals=2) == "2.88 GiB"
    assert gibibytes(85 * 2**20, decimals=2) == "85 MiB"


@pytest.mark.parametrize("n_bytes", [1, 2**20, 2**20 + 1, 768 * 2**20, 5 * 2**30 - 1])
def test_a_budget_is_read_as_it_was_written_and_never_too_small(n_bytes: int) -> None:
    assert 0 <= parse_bytes(budget_text(n_bytes)) - n_bytes < 2**20


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (4.25, "4.2 s"), (250.4, "250 s"), (742, "12.4 min"), (36_000, "600 min")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_line() -> None:
    assert one_line(" a\n b\tc ") == "a b c"
    assert one_line(ValueError("a\nb")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("") == ""
    assert one_line("x" * 200, most=120) == "x" * 117 + "..."
    assert one_line("x" * 120, most=120) == "x" * 120


def test_the_first_line_of_an_error() -> None:
    assert first_line(OSError("no library\nlooked here\nand there")) == "no library"
    assert first_line(RuntimeError("\n")) == "RuntimeError"


# Whatever is written: a value or a UsageError


PARSERS: dict[str, Callable[[str], Any]] = {"size": parse_size, "bytes": parse_bytes, "compose": parse_compose}
LONG = (
    "9" * 400,
    "9" * 5000,
    f"{'9' * 400}GiB",
    f"1.{'9' * 5000}TiB",
    f"{'9' * 5000}x{'9' * 5000}",
    "1e400",
    "-1",
    "٣" * 400,
)


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", LONG, ids=lambda text: f"{text[:4]} of {len(text)}")
def test_long_numbers_are_refused_in_a_short_line(parser: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        PARSERS[parser](text)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("parser", PARSERS)
@given(text=st.one_of(st.text(), st.from_regex(r"\s*[0-9.xXeE+-]{1,40}\s*([kmgtKMGT]?i?[bB])?")))
def test_whatever_is_written_gives_a_value_or_a_usage_error(parser: str, text: str) -> None:
    with contextlib.suppress(UsageError):
        PARSERS[parser](text)


@pytest.mark.parametrize(
    "value", [10**5000, -(10**5000), float("nan"), float("inf"), 1e308], ids=lambda value: f"{type(value).__name__}"
)
def test_numbers_out_of_range_are_a_usage_error(value: float) -> None:
    with pytest.raises(UsageError, match="out of range"):
        check_range("steps", value, 1, 1000)


@pytest.mark.parametrize(
    "option", ["seed", "count", "steps", "patches", "strip_rows", "memory", "guidance", "size", "compose"]
)
@given(value=st.one_of(st.integers(), st.floats(), st.text(max_size=20), st.just(10**5000), st.just("9" * 5000)))
def test_whatever_an_option_is_given_is_a_request_or_a_usage_error(option: str, value: Any) -> None:
    with contextlib.suppress(UsageError):
        Request.of("a lake", **{option: value})


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("0.1GiB", 107_374_182), ("1.5 GB", 1_500_000_000), ("3", 3), ("0.9999999999999999999 TiB", 2**40 - 1)],
)
def test_amounts_are_exact(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


# What others wrote


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m\x07\x00\x7f", "\\x9b31m\\x07\\x00\\x7f"),
        ("a\u202eb\u2066c\u2069", "a\\u202eb\\u2066c\\u2069"),
        ("\ud800", "\\ud800"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("नमस्ते 👩‍👩‍👧 עברית e\u0301", "नमस्ते 👩‍👩‍👧 עברית e\u0301"),
    ],
)
def test_what_would_steer_a_terminal_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_one_line_is_one_line_that_steers_nothing(text: str) -> None:
    for line in (one_line(text), first_line(ValueError(text))):
        assert line.isprintable() or all(unicodedata.category(each) not in ("Cc", "Cs", "Zl", "Zp") for each in line)
        assert len(line.splitlines()) <= 1
