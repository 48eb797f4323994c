"""The spec of a model that a user names, fetched first where it is not on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from handscroll.errors import CheckpointError, FetchError, UnconfirmedFetchError, UsageError
from handscroll.events import OnEvent, Progress, notice
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.download import FetchProgress
from handscroll.models.hub import COMMIT, DEFAULT_REVISION, fetch, find_local, find_small_files
from handscroll.models.known import as_official, known_spec
from handscroll.models.listing import stored_in
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
    small files of such a model are fetched, if they are not here, and its spec names no weights; of an official one
    that is not here nothing is fetched, and its spec is what is known of it.

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
            here = None if weights_too else find_small_files(hub_id, revision)
            if here is not None:
                spec = _of_folder(here)
            elif weights_too or revision not in (None, DEFAULT_REVISION):
                spec = _fetched(hub_id, revision, on_progress, weights_too, half=entry.precision)
            else:
                return known_spec(entry)
            return as_official(spec, entry)
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


def _fetched(
    hub_id: str, revision: str | None, on_progress: OnProgress | None, weights_too: bool, half: str = "bf16"
) -> CheckpointSpec:
    """The spec of what is on the hub, or without its weights of what is here where the hub cannot be asked.

    half: the precision of weights of two bytes whose file names say none.
    """
    listing: dict[str, int] = {}
    try:
        folder = fetch(hub_id, revision, on_progress=on_progress, weights_too=weights_too, on_listing=listing.update)
    except FetchError:
        here = None if weights_too else find_small_files(hub_id, revision)
        if here is None:
            raise
        folder = here
    spec = _of_folder(folder)
    if weights_too and not spec.n_bytes:
        spec = CheckpointSpec.from_folder(folder)  # says what is wrong with them
    return spec if spec.n_bytes else dataclasses.replace(spec, stored_in=stored_in(listing, spec, half))


def _of_folder(folder: Path) -> CheckpointSpec:
    """The spec of a snapshot, whose weights may not be there."""
    try:
        spec = CheckpointSpec.from_folder(folder)
    except CheckpointError:
        spec = CheckpointSpec.from_configs(folder)
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
