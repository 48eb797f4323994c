"""`handscroll bench`: how fast is this machine?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from handscroll.cli import work
from handscroll.cli.options import Json, Quiet, takes_options
from handscroll.cli.output import print_text, to_json
from handscroll.models.registry import resolve
from handscroll.options import fields_of
from handscroll.request import Request

if TYPE_CHECKING:
    from handscroll.runtime.benchmark import Benchmark, Way


@takes_options("bench")
def bench(*, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
    """Measure this machine: text, one denoising step and decoding, beside the same modules run whole by diffusers.

    \b
      handscroll bench
      handscroll bench --size 2048 --json

    Needs the memory of the largest component, and leaves out what would not fit.
    """
    wanted = fields_of(Request, options, "bench")
    resolve(wanted["model"])
    with work.watching(quiet) as on_event:
        from handscroll.runtime.benchmark import measure

        found = measure(**wanted, on_event=on_event)
    if as_json:
        print(to_json(found.as_dict()))
    else:
        print_text(benchmark_text(found))


def benchmark_text(found: Benchmark) -> str:
    """What was measured, for people to read: the device's own rates, then a line a stage."""
    return "\n".join(_lines(found))


def _lines(found: Benchmark) -> Iterator[str]:
    yield f"{found.model}, {found.width}x{found.height}, {found.precision}; {found.processor}, torch {found.torch}"
    yield (
        f"this device: convolution {found.convolution_gflops:.0f} GFLOP/s, matrix product {found.matrix_gflops:.0f} "
        "GFLOP/s"
    )
    yield ""
    yield f"{'':<8} {'handscroll':^18} {'whole':^18} {'handscroll / whole':^18} {'largest':>11}"
    yield f"{'':<8}" + f" {'seconds':>9} {'MiB':>8}" * 2 + f" {'seconds':>9} {'MiB':>8} {'difference':>11}"
    for stage in found.stages:
        cells = [*_cells(stage.handscroll), *_cells(stage.whole)]
        cells += [_cell(stage.seconds_over_whole, "9.2f"), _cell(stage.peak_bytes_over_whole, "8.2f")]
        cells += [_cell(stage.max_difference, "11.1e")]
        yield f"{stage.stage:<8} {' '.join(cells)}{f'  {stage.note}' if stage.note else ''}".rstrip()
    if found.decode_seconds_per_megapixel is not None and found.decode_bytes_per_pixel is not None:
        yield ""
        yield (
            f"decoding takes {found.decode_seconds_per_megapixel:.2f} s per megapixel and "
            f"{found.decode_bytes_per_pixel:.0f} bytes per pixel"
        )
    yield "memory is what a way takes above the loaded model; seconds are medians"


def _cells(way: Way | None) -> tuple[str, str]:
    if way is None:
        return _cell(None, "9.3f"), _cell(None, "8.0f")
    return _cell(way.seconds, "9.3f"), _cell(way.peak_bytes / 2**20, "8.0f")


def _cell(value: float | None, layout: str) -> str:
    return format("-", f">{layout.partition('.')[0]}") if value is None else format(value, f">{layout}")
