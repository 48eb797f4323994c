"""What commands print: results on stdout, a summary on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from handscroll.units import duration, gibibytes, one_line, visible

if TYPE_CHECKING:
    from handscroll.jobs.result import Result


def print_results(results: Sequence[Result], as_json: bool, quiet: bool) -> None:
    if as_json:
        found = [result.as_dict() for result in results]
        print(to_json(found[0] if len(found) == 1 else {"pictures": found}))
        return
    for result in results:
        print(visible(str(result.path)) if sys.stdout.isatty() else result.path)
    if not quiet:
        sys.stdout.flush()
        for note in {result.note for result in results if result.note}:
            print(f"note: {one_line(note)}", file=sys.stderr)
        print(_summary(results), file=sys.stderr)


def _summary(results: Sequence[Result]) -> str:
    """`4096x4096, 12.4 min, peak 1.7 GiB (planned 1.8, budget 2.0 GiB), seed 7`; several pictures share a line.

    What was not measured or is not known is left out.
    """
    first, last = results[0], results[-1]
    pictures = f"{len(results)} pictures of " if len(results) > 1 else ""
    shared_seconds = first.seconds.get("text", 0.0)  # one prompt, encoded once, counted with each picture
    seconds = sum(result.seconds["total"] - shared_seconds for result in results) + shared_seconds
    parts = [f"{pictures}{first.width}x{first.height}", duration(seconds)]
    peaks_bytes = [result.memory["measured_peak_bytes"] for result in results if result.memory["measured_peak_bytes"]]
    if peaks_bytes:
        memory = f"peak {gibibytes(max(peaks_bytes))}"
        if first.memory["budget_bytes"] is not None:
            planned_bytes = max(result.memory["planned_peak_bytes"] or 0 for result in results)
            planned = f"planned {gibibytes(planned_bytes)}, " if planned_bytes else ""
            memory += f" ({planned}budget {gibibytes(first.memory['budget_bytes'])})"
        parts.append(memory)
    if first.seed is not None:
        parts.append(f"seed {first.seed}" if len(results) == 1 else f"seeds {first.seed} to {last.seed}")
    return ", ".join(parts)


def print_text(text: str) -> None:
    """Prints lines for people. What they quote of files and of others cannot steer a terminal."""
    print(visible(text))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which the cells of every column stand below each other, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def to_json(value: object) -> str:
    return json.dumps(value, indent=2)
