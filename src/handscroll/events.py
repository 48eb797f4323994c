"""What a running job tells whoever listens: progress bars, memory meters, servers, a user who cancels.

A listener is any function of one event. It runs on the thread that the job was started on, between two pieces of work.
What it raises ends the job cleanly and comes out of it unchanged; `handscroll.errors.Cancelled` is there for those who
only want it to end. Where nothing is to be told for a while, as within a step of minutes, a `pulse` gives it the
chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from handscroll.errors import UsageError
from handscroll.units import one_line, shown

MAX_NOTICE = 2000  # characters; names in it may come from a file of somebody else


@dataclass(frozen=True)
class Progress:
    """`done` of `total` in one stage: bytes when fetching, steps when denoising, rows of the picture when decoding.

    `stage` is a name of the stage table (`plan/stages.py`), or `fetch` before the first and `write` after the last.
    `picture` counts the pictures of a request from 0. `detail` is a short remark, such as the name of a checkpoint.

    A decoder passes over the picture many times before its first row is made. `done` counts all of that work, as the
    share of the picture's rows that it comes to, so that it rises evenly; `rows` is how many rows are made and written,
    from the top.

    Two are no stages: the `detail` of a `notice` is one line that the user should read, and a `pulse` says only that
    the job is at work, and in its `detail` at which stage. One comes between two blocks of a network, and every tenth
    of a second while a file is encoded.
    """

    stage: str
    done: int
    total: int
    picture: int = 0
    detail: str = ""
    rows: int = 0


def notice(line: str, picture: int = 0) -> Progress:
    """One line that the user should read, such as that a run goes on from where it was."""
    return Progress("notice", 0, 0, picture, one_line(line, MAX_NOTICE))


def pulse(stage: str, picture: int = 0) -> Progress:
    """Nothing to tell, but a moment in which a listener may end the job."""
    return Progress("pulse", 0, 0, picture, stage)


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
