"""Which of the models with a short name are on this machine. Reaches for no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.models.checksums import damaged_files
from handscroll.models.hub import find_local
from handscroll.models.registry import ENTRIES, Entry


@dataclass(frozen=True, slots=True)
class Model:
    """A registry entry and where it is: `folder` and `n_bytes`, its size on disk, are None where it is not here.

    `damaged`: its files that do not match their checksums; None where that was not looked at.
    """

    name: str
    hub_id: str | None
    native_px: int
    precision: str
    licence: str
    folder: Path | None
    n_bytes: int | None
    damaged: tuple[Path, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The object of `handscroll models --json`."""
        facts = {
            "name": self.name,
            "hub_id": self.hub_id,
            "folder": str(self.folder) if self.folder else None,
            "native_px": self.native_px,
            "precision": self.precision,
            "bytes": self.n_bytes,
            "licence": self.licence,
        }
        return facts if self.damaged is None else {**facts, "damaged": [str(blob) for blob in self.damaged]}


def inventory(*, check: bool = False) -> list[Model]:
    """Every model with a short name, in the registry's order. With `check`, all that was fetched is read."""
    return [_found(entry, check) for entry in ENTRIES]


def _found(entry: Entry, check: bool) -> Model:
    folder = find_local(entry.hub_id) if entry.hub_id else entry.builtin_folder
    if folder is not None and not (folder / "model_index.json").is_file():
        folder = None
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder else None
    damaged = tuple(damaged_files(folder) if folder and entry.hub_id else ()) if check else None
    return Model(entry.name, entry.hub_id, entry.native_px, entry.precision, entry.licence, folder, n_bytes, damaged)
