"""Amounts and times as people read them, and one line out of any text."""

from __future__ import annotations

import pytest

from handscroll.units import budget_text, duration, first_line, gibibytes, one_line, parse_bytes


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
