"""Say whether handscroll has become slower or larger, by two results of side_by_side.py.

    python bench/guard.py OLD.json NEW.json --tolerance 0.1
    python bench/guard.py NEW.json            # against the newest older result of the same kind in results/

What is compared are ratios that one run measured side by side: handscroll's seconds and bytes over those of the other
ways, its share of the device's limit, and how constant its cost per pixel is. They move little with how busy a machine
is. Prints every ratio; leaves with exit code 1 if any is worse by more than the tolerance, with 2 if the results cannot
be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "rows"
WORSE, NOT_COMPARABLE = 1, 2
# What two results must have in common.
SAME = ("stage", "model", "precision", "device", "miniature", "layers", "steps")
SAME_MACHINE = ("processor", "gpu", "cores", "threads")

Result = dict[str, Any]


class NotComparable(Exception):
    """The message says why, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        new = read(arguments.results[-1])
        old_path = arguments.results[0] if len(arguments.results) == 2 else newest_before(arguments.results[0], new)
        old = read(old_path)
        if differs := difference_of_kind(old, new):
            raise NotComparable(f"{old_path.name} and {arguments.results[-1].name} differ in {differs}")
        ratios = list(compared(old, new))
        if not ratios:
            raise NotComparable(f"{old_path.name} and {arguments.results[-1].name} have no ratio in common")
    except NotComparable as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_COMPARABLE
    print(f"{new['stage']} of {new['model']}: {old['date']} {old_path.name} -> {new['date']}")
    worse = 0
    for name, before, after, worse_by in ratios:
        is_worse = worse_by > arguments.tolerance
        worse += is_worse
        change = f"{worse_by:+.1%} worse" if worse_by > 0 else f"{-worse_by:.1%} better" if worse_by < 0 else "the same"
        print(f"{'WORSE' if is_worse else 'ok':<6}{name:<44} {before:>8.3f} -> {after:>8.3f}  {change}")
    return WORSE if worse else 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="the old one and the new one")
    parser.add_argument("--tolerance", type=float, default=0.1, help="share that is still the same (default 0.1)")
    arguments = parser.parse_args(argv)
    if len(arguments.results) > 2:
        parser.error("two results are compared, or one with the newest older one")
    return arguments


def read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise NotComparable(f"{path}: {error.strerror}") from error
    except ValueError:
        raise NotComparable(f"{path}: is no JSON") from None
    if not isinstance(found, dict) or not {"stage", "sizes", "machine", "date"} <= set(found):
        raise NotComparable(f"{path}: is no result of side_by_side.py")
    return found


def newest_before(path: Path, new: Result) -> Path:
    """The newest result of the same kind that is older, beside all others in results/."""
    older = []
    for candidate in RESULTS.glob("*.json"):
        try:
            old = read(candidate)
        except NotComparable:
            continue  # the results of other benchmarks
        if candidate.resolve() != path.resolve() and not difference_of_kind(old, new) and _when(old) <= _when(new):
            older.append((_when(old), candidate))
    if not older:
        raise NotComparable(f"{RESULTS.name}/ has no older result of {new['stage']} on such a machine")
    return max(older)[1]


def _when(found: Result) -> tuple[str, str]:
    return found["date"], found.get("time", "")


def difference_of_kind(old: Result, new: Result) -> str:
    """What keeps two results from being compared; an empty string if nothing does."""
    machines = old["machine"], new["machine"]
    apart = [key for key in SAME if old.get(key) != new.get(key)]
    apart += [key for key in SAME_MACHINE if machines[0].get(key) != machines[1].get(key)]
    return ", ".join(apart)


def compared(old: Result, new: Result) -> Iterator[tuple[str, float, float, float]]:
    """Each ratio of both results: its name, before, after, and by what share it is worse."""
    after_by_size = {at_size["size"]: at_size for at_size in new["sizes"]}
    for at_size in old["sizes"]:
        size, before = at_size["size"], at_size["modes"].get(OURS)
        if before is None or size not in after_by_size:
            continue
        after = after_by_size[size]["modes"].get(OURS)
        if after is None:
            if OURS in after_by_size[size]["failed"]:
                yield f"{size} {after_by_size[size]['failed'][OURS]}", 1.0, 0.0, float("inf")
            continue
        for key in before:
            if "_over_" in key and key in after:
                yield f"{size} {key}", before[key], after[key], after[key] / before[key] - 1
        if before.get("of_limit") and after.get("of_limit"):
            yield f"{size} of_limit", before["of_limit"], after["of_limit"], before["of_limit"] / after["of_limit"] - 1
    curves = [result.get("curves", {}).get(OURS) for result in (old, new)]
    if all(curves) and len({tuple(point["size"] for point in curve["points"]) for curve in curves}) == 1:
        spreads = [curve["seconds_spread"] for curve in curves]
        yield "spread of seconds per megapixel", *spreads, spreads[1] / spreads[0] - 1


if __name__ == "__main__":
    sys.exit(main())
