"""Around a job: refused early, watched, and with imports set aside."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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
    """Stages collect cycles before they give memory back: 0.2 s each if all that is imported is walked too.

    A program that has set aside its own objects is left as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def watching(quiet: bool, pictures: int = 1) -> Iterator[OnEvent]:
    """The job's listener: its notices on stderr, and how far it is."""
    from handscroll.events import ignore

    if quiet:
        yield ignore
        return
    with _showing(pictures) as show:

        def listen(event: Progress) -> None:
            print_notice(event)
            show(event)

        yield listen


def print_notice(event: Progress) -> None:
    if event.stage == "notice":
        print(f"note: {one_line(event.detail)}", file=sys.stderr)


def _showing(pictures: int) -> contextlib.AbstractContextManager[OnEvent]:
    """What shows progress: bars on a terminal, and else a line now and then."""
    if _is_terminal(sys.stderr):
        from handscroll.cli.progress import progress_bars

        return progress_bars(pictures)
    from handscroll.cli.log import Log

    return contextlib.nullcontext(Log(pictures))


def may_fetch(model: str, revision: str | None, named_by: Path, *, yes: bool, quiet: bool) -> bool:
    """Whether a model that only a file names may be fetched: with --yes, or where somebody can be asked and says so.

    False where it need not be. Raises UnconfirmedFetchError where the answer is no, or nobody can be asked.
    """
    from handscroll.errors import UnconfirmedFetchError
    from handscroll.models.opening import check_nothing_is_fetched

    if yes:
        return True
    try:
        check_nothing_is_fetched(model, revision, named_by)
    except UnconfirmedFetchError as error:
        if quiet or not (_is_terminal(sys.stdin) and _is_terminal(sys.stderr)):
            raise
        question = f"{named_by}: names the model {error.hub_id}, which is not on this machine. Fetch it? [y/N] "
        print(one_line(question), end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise
        return True
    return False


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
