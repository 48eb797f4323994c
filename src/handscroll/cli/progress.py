"""Progress bars on stderr for whoever watches a job: one a stage, gone when the job is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from handscroll import events
from handscroll.cli.log import SHOWN, amount_of, title_of


@contextmanager
def progress_bars(pictures: int = 1, console: Console | None = None) -> Iterator[events.OnEvent]:
    """A listener that draws. `pictures` is how many the job will make."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )
    with progress:
        yield _Bars(progress, pictures)


class _Bars:
    """Until the first event, which comes after seconds of importing, one bar says that something goes on."""

    def __init__(self, progress: Progress, pictures: int) -> None:
        self._progress = progress
        self._pictures = pictures
        self._loading = progress.add_task("loading", total=None, amount="")
        self._shown: dict[str, tuple[TaskID, int]] = {}  # stage -> its bar, and the picture it is at

    def __call__(self, event: events.Progress) -> None:
        if event.stage not in SHOWN:
            return
        self._progress.update(self._loading, visible=False)
        bar, picture = self._shown.get(event.stage) or (self._progress.add_task("", amount=""), event.picture)
        if picture != event.picture:
            self._progress.reset(bar)
        self._shown[event.stage] = bar, event.picture
        stage = SHOWN[event.stage]
        unknown = stage.unit == "prompts" and event.done == 0
        self._progress.update(
            bar,
            description=title_of(stage, event, self._pictures),
            completed=event.done,
            total=None if unknown else event.total,
            amount=amount_of(stage, event),
        )
