"""Draw results of side_by_side.py: time and memory over size, both logarithmic, a line for every way.

    python bench/chart.py bench/results/*-decode-*.json bench/results/*-generate-*.json -o docs/images/bench.svg

A row of charts for every stage and model, of square pictures; where several results have the same size and way, the
newest counts. Sizes that a way could not do for want of memory are crosses: beside the memory that it would need, and
above the seconds, which nobody knows. Needs matplotlib: pip install "handscroll[bench]".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Way -> what the legend calls it, its colour and marker. Colours that tell apart with any kind of sight (Okabe, Ito).
WAYS = {
    "whole": ("diffusers", "#56606b", "o"),
    "compiled": ("diffusers, torch.compile", "#0072b2", "^"),
    "tiled": ("diffusers, tiles of 512", "#e69f00", "s"),
    "tiled-1024": ("diffusers, tiles of 1024", "#cc79a7", "D"),
    "patch": ("patch convolution", "#8c6bb1", "v"),
    "rows": ("handscroll", "#009e73", "o"),
    "int8": ("handscroll, int8", "#d55e00", "X"),
    "int8-weights": ("handscroll, weights in int8", "#f0e442", "<"),
    "int4": ("handscroll, weights in int4", "#117733", ">"),
    "fp8": ("handscroll, fp8", "#882255", "*"),
    "untuned": ("handscroll without Triton", "#56b4e9", "P"),
}
TITLES = {
    "decode": "decode",
    "encode": "encode",
    "denoise": "one denoising step",
    "text": "text encoding",
    "generate": "whole picture",
}
INK, PAPER, GRID = "#24292f", "#ffffff", "#d8dee4"
NEEDS = re.compile(r"needs about (\d+(?:\.\d+)?) GiB")

CROSS_HEIGHT = 0.07  # of a chart, for one way's crosses

Charts = dict[tuple[str, str, str], dict[str, dict[int, dict[str, Any]]]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".svg or .png")
    parser.add_argument("--modes", default=",".join(WAYS), help="comma-separated; default: all")
    arguments = parser.parse_args(argv)
    reports = [json.loads(path.read_text()) for path in arguments.results]
    reports = [found for found in reports if "stage" in found and any(map(is_square, found["sizes"]))]
    if not reports:
        parser.error("none of these is a result of side_by_side.py with a square picture")
    machines = {machine_of(found) for found in reports}
    if len(machines) > 1:
        parser.error(f"results of several machines: {'; '.join(sorted(machines))}")
    draw(gathered(reports, arguments.modes.split(",")), caption(reports), arguments.output)
    print(arguments.output, file=sys.stderr)


def is_square(at_size: Mapping[str, Any]) -> bool:
    width, _, height = at_size["size"].partition("x")
    return width == height


def machine_of(found: Mapping[str, Any]) -> str:
    described = found["machine"]
    return described.get("gpu") or f"{described['processor']}, {described['threads']} threads"


def caption(reports: Sequence[Mapping[str, Any]]) -> str:
    newest = max(reports, key=lambda found: found["date"])
    dates = sorted({found["date"] for found in reports})
    between = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = f"torch {newest['machine']['torch']}, diffusers {newest['machine']['diffusers']}"
    return f"{machine_of(newest)}; {versions}; {between}"


def gathered(reports: Iterable[Mapping[str, Any]], modes: Sequence[str]) -> Charts:
    """(stage, model, precision) -> way -> pixels -> `seconds` and `peak_bytes`, or `needed_bytes` where it failed."""
    charts: Charts = {}
    for found in sorted(reports, key=lambda found: (found["date"], found.get("time", ""))):
        ways = charts.setdefault((found["stage"], found["model"], found["precision"]), {})
        for at_size in filter(is_square, found["sizes"]):
            for mode in filter(modes.__contains__, WAYS):
                if mode in at_size["modes"]:
                    point = at_size["modes"][mode]
                elif needs := NEEDS.match(at_size["failed"].get(mode, "")):
                    point = {"needed_bytes": float(needs[1]) * 2**30}
                else:
                    continue
                ways.setdefault(mode, {})[at_size["pixels"]] = point
    return charts


def draw(charts: Charts, caption: str, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.family": "sans-serif",
        "font.size": 10,
        "svg.hashsalt": "handscroll",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        figure, rows = pyplot.subplots(
            len(charts), 2, figsize=(9.6, 3.4 * len(charts) + 0.9), squeeze=False, layout="constrained"
        )
        figure.set_facecolor(PAPER)
        for (chart, ways), (of_time, of_memory) in zip(charts.items(), rows, strict=True):
            stage, model, precision = chart
            title = f"{TITLES[stage]}, {model}, {precision}"
            of_time.set_title(title, loc="left", fontsize=11, fontweight="bold")
            of_time.set_ylabel("seconds")
            of_memory.set_ylabel("peak memory, GiB")
            for mode, points in ways.items():
                draw_done(of_time, of_memory, mode, points)
            draw_failed(of_time, of_memory, ways)
            sizes = sorted({pixels for points in ways.values() for pixels in points})
            failing = sum(any("needed_bytes" in point for point in points.values()) for points in ways.values())
            finish(of_time, sizes, failing * CROSS_HEIGHT)
            finish(of_memory, sizes)
        legend(figure, charts)
        figure.supxlabel(caption, fontsize=8, color=INK)
        output.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if output.suffix == ".svg" else None
        figure.savefig(output, facecolor=PAPER, dpi=144, metadata=metadata)
        pyplot.close(figure)


def draw_done(of_time: Any, of_memory: Any, mode: str, points: Mapping[int, Mapping[str, Any]]) -> None:
    """One way's lines."""
    _, colour, marker = WAYS[mode]
    ours = mode == "rows"
    line = {"color": colour, "marker": marker, "linewidth": 2.6 if ours else 1.4, "zorder": 3 if ours else 2}
    done = sorted((pixels, point) for pixels, point in points.items() if "seconds" in point)
    sizes = [pixels for pixels, _ in done]
    of_time.plot(sizes, [point["seconds"] for _, point in done], markersize=5, **line)
    gib = [(pixels, point["peak_bytes"] / 2**30) for pixels, point in done if point["peak_bytes"]]
    of_memory.plot(*zip(*gib, strict=True) if gib else ([], []), markersize=5, **line)


def draw_failed(of_time: Any, of_memory: Any, ways: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """A cross for every size that a way could not do, and how much the largest need of each size is."""
    most: dict[int, float] = {}
    height = 0.97  # of the chart, for the crosses of the first such way
    for mode, points in ways.items():
        needed = sorted((size, each["needed_bytes"] / 2**30) for size, each in points.items() if "needed_bytes" in each)
        if not needed:
            continue
        colour = WAYS[mode][1]
        cross = {"color": colour, "marker": "x", "markersize": 7, "linestyle": "none", "zorder": 4}
        done = sorted((size, each["peak_bytes"] / 2**30) for size, each in points.items() if each.get("peak_bytes"))
        of_memory.plot(*zip(*[*done[-1:], *needed], strict=True), color=colour, linewidth=1, linestyle=":", zorder=1)
        of_memory.plot(*zip(*needed, strict=True), **cross)
        above = [height] * len(needed)
        of_time.plot([size for size, _ in needed], above, transform=of_time.get_xaxis_transform(), **cross)
        height -= CROSS_HEIGHT
        for size, n_gib in needed:
            most[size] = max(most.get(size, 0), n_gib)
    for size, n_gib in most.items():
        offset = {"xytext": (-9, 3), "textcoords": "offset points", "ha": "right", "va": "center"}
        of_memory.annotate(f"{n_gib:.0f} GiB", (size, n_gib), color=INK, fontsize=8, **offset)


def finish(axes: Any, sizes: Sequence[int], room: float = 0.0) -> None:
    """Scales and ticks. room: the share of the height above the lines that is kept free."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_facecolor(PAPER)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.set_xticks(sizes, [side(pixels) for pixels in sizes])
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axes.set_xlabel("size, pixels")
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    high *= (high / low) ** (room / (1 - room))
    axes.set_ylim(low, high)
    ticks = [step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def side(pixels: int) -> str:
    """`1024²`"""
    return f"{round(pixels**0.5)}²"


def legend(figure: Any, charts: Charts) -> None:
    from matplotlib.lines import Line2D

    shown = [mode for mode in WAYS if any(mode in ways for ways in charts.values())]
    handles = [
        Line2D(
            [], [], color=WAYS[mode][1], marker=WAYS[mode][2], markersize=5, linewidth=2.6 if mode == "rows" else 1.4
        )
        for mode in shown
    ]
    labels = [WAYS[mode][0] for mode in shown]
    if any(
        "needed_bytes" in point for ways in charts.values() for points in ways.values() for point in points.values()
    ):
        handles.append(Line2D([], [], color=INK, marker="x", markersize=8, linestyle=":", linewidth=1))
        labels.append("out of memory: would need")
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
