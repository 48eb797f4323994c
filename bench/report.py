"""What measurements of handscroll share: the report's head, its file, and plans without a run."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import machine
from handscroll.plan.plan import Plan
from handscroll.request import Request

RESULTS = Path(__file__).parent / "results"


def dated(threads: int | None = None) -> dict[str, Any]:
    """The date and the machine. `threads`: of the measured processes, where it is not this one's number."""
    described = machine.describe()
    if threads:
        described["threads"] = threads
    now = datetime.datetime.now()
    return {"date": now.date().isoformat(), "time": now.strftime("%H:%M"), "machine": described}


def print_and_save(report: dict[str, Any], table: list[str], name: str | None = None) -> None:
    """The table to stderr, the report to stdout, and, with a name, to a dated file that names the machine too."""
    described = report["machine"]
    device = described.get("gpu") or f"{described['processor']}, {described['threads']} threads"
    print("\n".join([f"{device}, torch {described['torch']}", *table]), file=sys.stderr)
    if name is not None:
        RESULTS.mkdir(exist_ok=True)
        free_path(f"{report['date']}-{name}-{machine.slug(described)}").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def free_path(name: str) -> Path:
    """A file in the results that is not there yet: a second one of a day gets a number."""
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(path for each in names if not (path := RESULTS / f"{each}.json").exists())


def with_budget(request: Request, budget_bytes: int | None) -> Request:
    return dataclasses.replace(request, memory_bytes=budget_bytes)


def seconds_of(plan: Plan) -> float:
    """A plan's own estimate, of the stages that it plans."""
    return sum(plan.planned_seconds.values())
