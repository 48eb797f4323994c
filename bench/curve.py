"""What a pixel costs: seconds per megapixel and peak bytes per pixel over sizes, and how far they are from constant.

    python bench/curve.py bench/results/*-decode-*.json

A way whose cost is constant takes the same seconds for each megapixel of a large picture as of a small one. The spread
is the largest over the smallest. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MEGAPIXEL = 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what side_by_side.py --save wrote, of one stage")
    parser.add_argument("--modes", default="rows", help="comma-separated (default %(default)s)")
    arguments = parser.parse_args(argv)
    reports = [json.loads(path.read_text()) for path in arguments.results]
    if len(stages := {report.get("stage") for report in reports}) > 1:
        parser.error(f"results of several stages: {', '.join(sorted(map(str, stages)))}")
    sizes = [at_size for report in reports for at_size in report["sizes"]]
    found = {mode: curve for mode in arguments.modes.split(",") if (curve := curve_of(sizes, mode))}
    print("\n".join(lines(found)), file=sys.stderr)
    print(json.dumps(found))


def curve_of(sizes: Iterable[Mapping[str, Any]], mode: str) -> dict[str, Any] | None:
    """One way's cost at every size that it was measured at, from few pixels to many; None for fewer than two."""
    points = []
    for at_size in sorted((each for each in sizes if mode in each["modes"]), key=lambda each: each["pixels"] or 0):
        found, pixels = at_size["modes"][mode], at_size["pixels"]
        if pixels:
            peak_bytes = found["peak_bytes"]
            points.append(
                {
                    "size": at_size["size"],
                    "pixels": pixels,
                    "seconds_per_megapixel": found["seconds"] / (pixels / MEGAPIXEL),
                    "peak_bytes_per_pixel": None if peak_bytes is None else peak_bytes / pixels,
                }
            )
    if len(points) < 2:
        return None
    return {
        "points": points,
        "seconds_spread": _spread([point["seconds_per_megapixel"] for point in points]),
        "peak_bytes_spread": _spread([point["peak_bytes_per_pixel"] for point in points]),
    }


def _spread(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) / min(known) if known and min(known) > 0 else None


def lines(curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For people to read."""
    if not curves:
        return []
    out = [f"{'size':>12} {'mode':<10} {'s/megapixel':>12} {'bytes/pixel':>12}"]
    for mode, curve in curves.items():
        for point in curve["points"]:
            n_bytes = point["peak_bytes_per_pixel"]
            out.append(
                f"{point['size']:>12} {mode:<10} {point['seconds_per_megapixel']:>12.3f} "
                f"{'-' if n_bytes is None else format(n_bytes, '.1f'):>12}"
            )
        out.append(f"{'spread':>12} {mode:<10} {curve['seconds_spread']:>12.3f}")
    return out


if __name__ == "__main__":
    main()
