"""The spec of a model that a user names, fetched first where it is not on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from handscroll.errors import CheckpointError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.hub import FetchProgress, fetch, find_local
from handscroll.models.registry import Entry, resolve


def open_checkpoint(
    model: str | Path, *, on_progress: Callable[[FetchProgress], None] | None = None, weights_too: bool = True
) -> CheckpointSpec:
    """The spec of a model given by short name, folder or hub id; fetched first where it is not on this machine.

    Without `weights_too` only the small files of such a model are fetched, and its spec names no weights.

    Raises UnknownModelError for a name that means nothing, FetchError if it cannot be fetched, CheckpointError if
    what is there is not a whole Sana checkpoint.
    """
    match resolve(model):
        case Entry(hub_id=None) as entry:
            folder = entry.builtin_folder
            if folder is None or not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: the built-in model is missing from this installation; install it again"
                )
            return dataclasses.replace(CheckpointSpec.from_folder(folder), name=entry.name)
        case Entry(hub_id=str(hub_id)) as entry:
            spec = _fetched(hub_id, on_progress, weights_too)
            return dataclasses.replace(spec, name=entry.name, licence=entry.licence, published=entry.precision)
        case Path() as folder:
            return CheckpointSpec.from_folder(folder)
        case hub_id:
            return dataclasses.replace(_fetched(str(hub_id), on_progress, weights_too), name=str(hub_id))


def _fetched(hub_id: str, on_progress: Callable[[FetchProgress], None] | None, weights_too: bool) -> CheckpointSpec:
    folder = fetch(hub_id, on_progress=on_progress, weights_too=weights_too)
    is_whole = weights_too or find_local(hub_id) is not None
    return CheckpointSpec.from_folder(folder) if is_whole else CheckpointSpec.from_configs(folder)
