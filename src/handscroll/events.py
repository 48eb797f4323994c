"""What a running job tells whoever listens: progress bars, memory meters, servers, a user who cancels.

A listener is any function of one event; it runs on the job's thread between two pieces of work, and an exception that
it raises ends the job cleanly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from handscroll.errors import UsageError
from handscroll.units import shown


@dataclass(frozen=True)
class Progress:
    """`done` of `total` in one stage: bytes when fetching, steps when denoising, rows of the picture when decoding.

    `stage` is a name of the stage table (`plan/stages.py`), or `fetch` before the first and `write` after the last.
    `picture` counts the pictures of a request from 0. `detail` is a short remark, such as the name of a checkpoint.
    A `notice` is no stage: its `detail` is one line that the user should read.
    """

    stage: str
    done: int
    total: int
    picture: int = 0
    detail: str = ""


def notice(line: str, picture: int = 0) -> Progress:
    """One line that the user should read, such as that a run goes on from where it was."""
    return Progress("notice", 0, 0, picture, line)


OnEvent = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """The listener of those who do not listen."""


def warn_of_notices(event: Progress) -> None:
    """The listener of a program that gave none: lines that its user should read become Python's warnings."""
    if event.stage == "notice":
        warnings.warn(event.detail, stacklevel=3)


def listener(given: object, default: OnEvent = ignore) -> OnEvent:
    """What somebody gave to listen with, the default for None. Raises UsageError for what cannot be called."""
    if given is None:
        return default
    if not callable(given):
        raise UsageError(f"on_event {shown(given)} is not a function of one event")
    return given
