"""The sizes through which a picture grows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handscroll.plan import growth
from handscroll.plan.growth import first_step, smaller_sizes


@pytest.mark.parametrize(
    ("width", "height", "compose_px", "sizes"),
    [
        (512, 512, 512, []),
        (256, 256, 512, []),
        (608, 608, 512, []),
        (768, 768, 512, [(512, 512)]),
        (1024, 1024, 512, [(512, 512)]),
        (2048, 2048, 512, [(512, 512), (1024, 1024)]),
        (4096, 4096, 512, [(512, 512), (1024, 1024), (2048, 2048)]),
        (4096, 1024, 512, [(1024, 256), (2048, 512)]),
        (4096, 4096, 1024, [(1024, 1024), (2048, 2048)]),
        (2048, 1024, 512, [(704, 352), (1216, 608)]),
        (16384, 1024, 512, [(4096, 256), (8192, 512)]),
        (131072, 32, 512, []),
    ],
)
def test_the_sizes_double(width: int, height: int, compose_px: int, sizes: list[tuple[int, int]]) -> None:
    assert smaller_sizes(width, height, compose_px, 32) == sizes


SIDES = st.integers(1, 1024).map(lambda rows: rows * 32)


@given(SIDES, SIDES, st.integers(64, 4096), st.sampled_from([32, 64, 128]))
def test_every_size_is_larger_than_the_one_before(width: int, height: int, compose_px: int, multiple: int) -> None:
    width, height = -(-width // multiple) * multiple, -(-height // multiple) * multiple
    sizes = [*smaller_sizes(width, height, compose_px, multiple), (width, height)]
    assert all(side % multiple == 0 for size in sizes for side in size)
    for (w0, h0), (w1, h1) in pairwise(sizes):
        assert w0 <= w1
        assert h0 <= h1
        assert w0 * h0 < w1 * h1
    if len(sizes) > 1 and min(sizes[0]) >= 8 * multiple:
        area, side = sizes[0][0] * sizes[0][1], min(sizes[0])
        assert 0.75 * compose_px**2 < area < 1.25 * compose_px**2 or 0.4 * compose_px < side < 0.6 * compose_px
        assert all(w1 * h1 < 5 * w0 * h0 for (w0, h0), (w1, h1) in pairwise(sizes))
        assert all(abs(w * height / (h * width) - 1) < 0.07 for w, h in sizes)


@given(st.integers(2, 1000), st.integers(0, 20))
def test_a_larger_size_has_the_last_part_of_the_schedule(steps: int, grown: int) -> None:
    assert 0 < first_step(steps, grown) < steps


def test_a_larger_size_has_six_steps_of_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_step(20) == first_step(20, 3) == 14
    monkeypatch.setattr(growth, "GROWTH_STRENGTHS", (0.2, 0.4))
    assert [first_step(20, grown) for grown in range(4)] == [16, 12, 12, 12]
