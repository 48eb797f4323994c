"""Where the pictures of a batch go: a folder, or an address that fsspec knows, such as s3://bucket/lakes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from handscroll.batch.journal import JOURNAL, WORK
from handscroll.errors import OutputError, UsageError
from handscroll.files import cache_folder, move_whole, sync_file, write_whole
from handscroll.units import one_line, shown

TRIES, PAUSE_S = 3, 2.0  # of what goes over a network
MAX_REASON = 200  # characters, of what a library says
# A journal is sent to an address before each picture while it is small, and else now and then.
TOLD_AT_ONCE_BYTES, TELL_EVERY_S = 2**20, 30.0


class Place(ABC):
    """`work_folder` and `journal` are on this machine. Names are relative, with `/`. What fails raises OutputError."""

    work_folder: Path
    journal: Path

    @abstractmethod
    def begin(self) -> None:
        """Once the work folder is held: what other machines have told in the journal is in it."""

    @abstractmethod
    def present(self, names: Sequence[str]) -> set[str]:
        """Which of these files are there. Raises OutputError too for one that can never be."""

    @abstractmethod
    def tell(self) -> None:
        """The journal has a new line: others may want to know of it."""

    @abstractmethod
    def put(self, finished: Path, name: str) -> None:
        """Moves a whole file to its place, where it appears whole, in place of an older one of that name."""

    @abstractmethod
    def shown(self, name: str) -> str:
        """The name with the place before it, as a user opens it."""

    @abstractmethod
    def close(self) -> None:
        """The batch ends here, for now."""


def open_place(address: str) -> Place:
    """The place that a user names. Raises UsageError, and OutputError where it cannot be reached or made."""
    if re.match(r"[A-Za-z][\w.+-]+(::|://)", address):
        return Address(address)
    if not address or re.match(r"[A-Za-z][\w.+-]+:/", address):
        raise UsageError(f"output {shown(address)} is no folder and no address; write ./lakes or s3://bucket/lakes")
    return Folder(Path(address))


class Folder(Place):
    """A folder of this machine, or one that several share. It is made if need be."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            what = "is a link to nowhere" if folder.is_symlink() and not folder.exists() else "is a file"
            raise OutputError(f"{folder}: {what}; name a folder for the pictures") from None
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot make the folder {folder}: {one_line(error, MAX_REASON)}") from error
        self.folder, self.work_folder, self.journal = folder, folder / WORK, folder / JOURNAL

    def begin(self) -> None:
        pass  # all who work here share the file

    def present(self, names: Sequence[str]) -> set[str]:
        found = {name for name in names if os.path.lexists(self.folder / name)}
        for name in found:
            if (path := self.folder / name).is_dir():
                raise OutputError(f"cannot write {path}: it is a folder; move it or choose another name")
        for parent in {parent for name in names for parent in PurePosixPath(name).parents}:
            if (path := self.folder / parent).exists() and not path.is_dir():
                raise OutputError(f"cannot write into {path}: it is no folder; move it or choose another name")
        return found

    def tell(self) -> None:
        pass

    def put(self, finished: Path, name: str) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_file(finished)
            move_whole(finished, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or one_line(error, MAX_REASON)}") from error

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def close(self) -> None:
        pass  # all is there


class Address(Place):
    """An address of fsspec. Pictures are made in a folder of the user's cache; the journal is here and there."""

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        try:
            self._system, self._root = url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{address}: {one_line(error, MAX_REASON)}") from error
        except Exception as error:  # each system has errors of its own
            raise OutputError(f"{address}: cannot be reached: {one_line(error, MAX_REASON)}") from error
        self._address = address if address.endswith("://") else address.rstrip("/") + "/"
        name = hashlib.sha256(f"{self._system.protocol} {self._root}".encode()).hexdigest()[:16]
        self.work_folder = cache_folder() / "batch" / name / WORK
        self.journal = self.work_folder.with_name(JOURNAL)
        self._told_at, self._is_told = -TELL_EVERY_S, True

    def begin(self) -> None:
        """Joins the journal there and the one here, without what is in both."""
        there: bytes = b""
        if self.present([JOURNAL]):
            there = self._try(JOURNAL, lambda: self._system.cat_file(self._path(JOURNAL)))
        here = self.journal.read_bytes() if self.journal.exists() else b""
        lines = dict.fromkeys(line for line in [*there.split(b"\n"), *here.split(b"\n")] if line)
        if lines:
            try:
                write_whole(self.journal, [line + b"\n" for line in lines])
            except OSError as error:
                raise OutputError(f"cannot write {self.journal}: {error.strerror}") from error

    def present(self, names: Sequence[str]) -> set[str]:
        found = self._try("", lambda: self._system.find(self._root) if self._system.exists(self._root) else [])
        there = {str(path).removeprefix(self._root).lstrip("/") for path in found}
        return there & set(names)

    def put(self, finished: Path, name: str) -> None:
        self._try(name, lambda: self._upload(finished, name))
        finished.unlink()

    def shown(self, name: str) -> str:
        return f"{self._address}{name}"

    def tell(self) -> None:
        self._is_told = False
        is_small = self.journal.stat().st_size <= TOLD_AT_ONCE_BYTES
        if is_small or time.monotonic() - self._told_at >= TELL_EVERY_S:
            self.close()

    def close(self) -> None:
        if not self._is_told:
            self._try(JOURNAL, lambda: self._upload(self.journal, JOURNAL))
            self._is_told, self._told_at = True, time.monotonic()

    def _upload(self, file: Path, name: str) -> None:
        path = self._path(name)
        self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        with file.open("rb") as source, self._system.transaction, self._system.open(path, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _try(self, name: str, do: Any) -> Any:
        for tried in range(1, TRIES + 1):
            try:
                return do()
            except Exception as error:  # each system has errors of its own
                self._system.invalidate_cache()
                if tried == TRIES or isinstance(error, PermissionError | IsADirectoryError):
                    said = one_line(error, MAX_REASON)
                    raise OutputError(f"cannot write {self.shown(name)}: {said}") from error
                time.sleep(PAUSE_S)
