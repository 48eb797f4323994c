"""Around a job: refused early, watched, and with imports set aside."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from handscroll.models.registry import resolve
from handscroll.units import one_line

if TYPE_CHECKING:
    from handscroll.events import OnEvent, Progress


def refuse_early(
    model: str | None, path: Path, width: int | None = None, height: int | None = None, latent: Path | None = None
) -> None:
    """Say no in a moment to what would fail anyway once the libraries are loaded, which takes seconds."""
    from handscroll.jobs.latent_file import check_latent_target
    from handscroll.pictures.targets import check_target

    check_target(path, width or 1, height or 1)
    if model is not None:
        resolve(model)
    if latent is not None:
        check_latent_target(latent)


@contextlib.contextmanager
def imports_set_aside() -> Iterator[None]:
    """Stages collect cycles before they give memory back: 0.2 s each if all that is imported is walked too."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def watching(quiet: bool, pictures: int = 1) -> Iterator[OnEvent]:
    """The job's listener: its notices on stderr, and progress bars where somebody watches."""
    from handscroll.events import ignore

    if quiet:
        yield ignore
        return
    if not sys.stderr.isatty():
        yield print_notice
        return
    from handscroll.cli.progress import progress_bars

    with progress_bars(pictures) as draw:

        def listen(event: Progress) -> None:
            print_notice(event)
            draw(event)

        yield listen


def print_notice(event: Progress) -> None:
    if event.stage == "notice":
        print(f"note: {one_line(event.detail)}", file=sys.stderr)
