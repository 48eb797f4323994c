"""Where nobody watches a bar, a line on stderr now and then: how far a job is."""

from __future__ import annotations

import sys
import time

from handscroll import events
from handscroll.plan.stages import BY_NAME, Stage
from handscroll.units import duration, gibibytes, one_line

# Before the first stage of the table.
FETCH = Stage("fetch", "fetching", (), "bytes", per_picture=False)
QUANTIZE = Stage("quantize", "making weights smaller", (), "tensors", per_picture=True)
BATCH = Stage("batch", "painting", (), "pictures", per_picture=True)
SHOWN = {FETCH.name: FETCH, QUANTIZE.name: QUANTIZE, BATCH.name: BATCH, **BY_NAME}

EVERY_SECONDS = 30.0


class Log:
    """A listener that prints: of a short job nothing, of a long one that it goes on, and where it is.

    A line comes after half a minute and then every half minute, later every tenth of the time that has passed.
    """

    def __init__(self, pictures: int = 1) -> None:
        self.pictures = pictures
        self.started = self.told = time.monotonic()
        self.last: events.Progress | None = None

    def __call__(self, event: events.Progress) -> None:
        if event.stage in SHOWN:
            self.last = event
        now = time.monotonic()
        if self.last is not None and now - self.told >= seconds_between_lines(now - self.started):
            self.told = now
            stage = SHOWN[self.last.stage]
            line = f"{title_of(stage, self.last, self.pictures)} {amount_of(stage, self.last)}".rstrip()
            print(f"{line}, {duration(now - self.started)} so far", file=sys.stderr, flush=True)


def seconds_between_lines(passed_seconds: float) -> float:
    """How long a job that runs for so long is silent between two lines."""
    return max(EVERY_SECONDS, passed_seconds / 10)


def title_of(stage: Stage, event: events.Progress, pictures: int) -> str:
    """`denoising 2/3`: what is done, and to which of several pictures."""
    of_one = pictures > 1 and stage.per_picture
    which = f" {event.picture + 1}/{pictures}" if of_one else ""
    return f"{stage.title}{which}{f' ({one_line(event.detail)})' if event.detail else ''}"


def amount_of(stage: Stage, event: events.Progress) -> str:
    """`3/20 steps`: how much of it; nothing where there is nothing to count."""
    if stage is FETCH:
        return f"{gibibytes(event.done)} of {gibibytes(event.total)}"
    return f"{event.done:,}/{event.total:,} {stage.unit}" if stage.per_picture else ""
