"""The spec of a model that a user names, fetched first where it is not on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from handscroll.errors import CheckpointError, UnconfirmedFetchError, UsageError
from handscroll.events import OnEvent, Progress, notice
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.download import FetchProgress
from handscroll.models.hub import COMMIT, fetch, find_local
from handscroll.models.registry import Entry, resolve, split_revision
from handscroll.units import gibibytes

OnProgress = Callable[[FetchProgress], None]


def open_checkpoint(
    model: str | Path,
    revision: str | None = None,
    *,
    on_progress: OnProgress | None = None,
    weights_too: bool = True,
) -> CheckpointSpec:
    """The spec of a model given by short name, folder or hub id; fetched first where it is not on this machine.

    revision: a branch, tag or commit of a hub repository, also as `owner/name@REVISION`. Without `weights_too` only the
    small files of such a model are fetched, and its spec names no weights.

    Raises UnknownModelError for a name that means nothing, UsageError for a revision of what has none, FetchError if it
    cannot be fetched, CheckpointError if what is there is not a whole Sana checkpoint.
    """
    model, revision = split_revision(model, revision)
    found = resolve(model)
    if revision is not None and (isinstance(found, Path) or (isinstance(found, Entry) and found.hub_id is None)):
        raise UsageError(f"{model} is not fetched from the hub and has no revisions; leave --revision {revision} out")
    match found:
        case Entry(hub_id=None) as entry:
            folder = entry.builtin_folder
            if folder is None or not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: the built-in model is missing from this installation; install it again"
                )
            return dataclasses.replace(CheckpointSpec.from_folder(folder), name=entry.name)
        case Entry(hub_id=str(hub_id)) as entry:
            spec = _fetched(hub_id, revision, on_progress, weights_too)
            return dataclasses.replace(spec, name=entry.name, licence=entry.licence, published=entry.precision)
        case Path() as folder:
            return CheckpointSpec.from_folder(folder)
        case hub_id:
            spec = _fetched(str(hub_id), revision, on_progress, weights_too)
            return dataclasses.replace(spec, name=str(hub_id))


def check_nothing_is_fetched(model: str | Path, revision: str | None, named_by: Path) -> None:
    """Raises UnconfirmedFetchError where opening a model that a file names would fetch it. Reaches for no network."""
    model, revision = split_revision(model, revision)
    found = resolve(model)
    hub_id = found.hub_id if isinstance(found, Entry) else found if isinstance(found, str) else None
    if hub_id is None or find_local(hub_id, revision) is not None:
        return
    of = "" if revision is None else f" at revision {revision}"
    raise UnconfirmedFetchError(
        f"{named_by}: names the model {hub_id}{of}, which is not on this machine and would be fetched from the hub; "
        f"name it yourself with --model {model}, or allow that with --yes (in Python: fetch=True)",
        hub_id,
    )


def _fetched(hub_id: str, revision: str | None, on_progress: OnProgress | None, weights_too: bool) -> CheckpointSpec:
    folder = fetch(hub_id, revision, on_progress=on_progress, weights_too=weights_too)
    is_whole = weights_too or find_local(hub_id, revision) is not None
    spec = CheckpointSpec.from_folder(folder) if is_whole else CheckpointSpec.from_configs(folder)
    return dataclasses.replace(spec, commit=folder.name if COMMIT.fullmatch(folder.name) else None)


def on_fetch(on_event: OnEvent) -> OnProgress:
    """Tells a listener of a checkpoint that is fetched: first that it is, and how much."""
    announced: set[str] = set()

    def tell(progress: FetchProgress) -> None:
        if progress.hub_id not in announced:
            announced.add(progress.hub_id)
            amount = gibibytes(progress.total_bytes - progress.done_bytes)
            on_event(notice(f"fetching {progress.hub_id} from the hub, {amount}"))
        on_event(Progress("fetch", progress.done_bytes, progress.total_bytes, detail=progress.hub_id))

    return tell
