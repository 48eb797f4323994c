"""bench/decode_peak.py: the peak of a decode from its first rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import decode_peak

    monkeypatch.setattr(decode_peak, "return_large_blocks", lambda: None)  # it would hold for the rest of the tests
    monkeypatch.setattr(decode_peak, "reset_peak", lambda _: 100)
    monkeypatch.setattr(decode_peak, "peak", lambda *_: 8292)
    return decode_peak


def test_the_largest_map_is_weighed(bench: Any) -> None:
    settings = bench.Settings("decode", miniature=True)
    found = bench.measure(settings, (128, 96), rows=32)
    assert found["map_bytes"] == 8 * (128 // 8) * (96 // 8) * 4  # channels at 1/8, fp32
    assert found["peak_over_map"] == 8192 / found["map_bytes"]
    assert found["peak_bytes_per_pixel"] == 8192 / (128 * 96)
    assert "128x96" in bench.table([found])[1]
