"""`handscroll doctor`: is this machine well?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from handscroll.cli.options import Json
from handscroll.cli.output import print_text, to_json
from handscroll.units import gibibytes

if TYPE_CHECKING:
    from handscroll.runtime.health import Health


def doctor(as_json: Json = False) -> None:
    """Check this machine, and say what mends it.

    \b
      handscroll doctor
      handscroll doctor --json

    Shows versions, devices, memory and disk. Leaves with exit code 1 if something needed is broken.
    """
    from handscroll.runtime.health import examine

    health = examine()
    if as_json:
        print(to_json(health.as_dict()))
    else:
        print_text(health_text(health))
    if not health.ok:
        raise typer.Exit(1)


def health_text(health: Health) -> str:
    """What was found, for people to read: a line for each thing, then what is broken and what mends it."""
    return "\n".join(_lines(health))


def _lines(health: Health) -> Iterator[str]:
    yield from (f"{name:<16} {version or 'missing'}" for name, version in health.versions.items())
    yield f"{'platform':<16} {health.platform}"
    yield ""
    for device in health.devices:
        bf16 = "with bf16" if device["bf16"] else "no bf16"
        if device["device"] == "cpu":
            yield f"{'cpu':<16} {device['name']}, {device['cores']} cores, {device['threads']} threads, {bf16}"
        else:
            room = f"{_amount(device['free_bytes'])} of {_amount(device['total_bytes'])} free"
            yield f"{device['device']:<16} {device['name']}, {room}, {bf16}"
    available, total = _amount(health.memory["available_bytes"]), _amount(health.memory["total_bytes"])
    yield f"{'memory':<16} {available} of {total} available"
    for name, place in health.disk.items():
        yield f"{'disk, ' + name:<16} {_amount(place['free_bytes'])} free at {place['path']}"
    yield f"{'hub cache':<16} {health.hub['cache']}{', offline: nothing is fetched' if health.hub['offline'] else ''}"
    yield ""
    for problem in health.problems:
        yield f"{'BROKEN' if problem.needed else 'missing'}: {problem.part}: {problem.message}"
        yield f"    {problem.mend}"
    if not health.problems:
        yield "nothing is missing"


def _amount(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else gibibytes(n_bytes)
