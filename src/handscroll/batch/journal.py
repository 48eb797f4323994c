"""What a batch has made, kept on disk, so that the same command goes on wherever it ended.

    FOLDER/
        batch.jsonl              a line for every picture that was made, or could not be: what it is and what it took
        a-lake-7.png, ...        the pictures, each of which appears whole
        batch.run/               while there is work
            lock                 held by the process that gives out the work
            <digest>.png         a picture that is finished, before it goes to its place
            <digest>.png.run/    the run folder of one that is not

A picture is finished under a name that says what was asked for; then the journal tells of it; then it goes to its
place. Wherever a process ends between two of these, the next one knows what is left to do, and makes no picture twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from handscroll.errors import BusyError, OutputError, RunFolderError
from handscroll.files import Lock, discard, lock_file, sync_folder, write_all
from handscroll.weights.json_text import parse_json

JOURNAL, WORK, TOKEN = "batch.jsonl", "batch.run", "token"
MAX_ENTRY_BYTES = 2**20
DONE, FAILED = "done", "failed"


class Journal:
    """The file of what was made, and what could not be. Of several lines that say that a file was made the last counts.

    A line that is torn or no JSON, as after a power cut, is as good as none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._made: dict[str, Any] = {}  # by the names of files, the digests of what was last made there
        self._ends_whole = True
        data = _bytes_of(file)
        self._ends_whole = not data or data.endswith(b"\n")
        for line in data.split(b"\n"):
            try:
                entry = parse_json(line, MAX_ENTRY_BYTES) if line else None
            except ValueError:
                continue
            if entry is not None and not (isinstance(entry, dict) and {"output", "task", "status"} <= entry.keys()):
                raise OutputError(f"{file}: in the way, it is no journal of a batch; move it, or choose another folder")
            if entry is not None:
                self._note(entry)

    def tells_of(self, output: str) -> bool:
        """Whether a file of this name is, or was, one of this batch's pictures."""
        return output in self._made

    def has_made(self, output: str, digest: str) -> bool:
        """Whether the picture that was last made under this name is the one of this digest."""
        return self._made.get(output) == digest

    def add(self, entry: Mapping[str, Any]) -> None:
        """Writes a line that lasts through a power cut. Raises OutputError."""
        line = json.dumps(entry).encode() + b"\n"
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                write_all(descriptor, line if self._ends_whole else b"\n" + line)
                self._ends_whole = True
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"cannot write {self.file}: {error.strerror}") from error
        self._note(entry)

    def _note(self, entry: Mapping[str, Any]) -> None:
        if entry.get("status") == DONE and isinstance(output := entry.get("output"), str):
            self._made[output] = entry.get("task")


def _bytes_of(file: Path) -> bytes:
    """What is in a journal; nothing where there is none. Raises OutputError for what is no plain file."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise OutputError(f"{file}: in the way, it is no plain file; move it, or choose another folder")
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise OutputError(f"cannot read {file}: {error.strerror}") from error


class WorkFolder:
    """Where pictures are while they are made: held against other processes, until `close`."""

    def __init__(self, folder: Path) -> None:
        """Raises BusyError where another batch works here, RunFolderError for what is in the way, OutputError."""
        self.folder = folder.absolute()
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise RunFolderError(f"{folder}: in the way; move it or choose another folder for the pictures")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: Lock = lock_file(folder / "lock")
        except BlockingIOError:
            raise BusyError(f"{folder}: another batch is working here; wait for it, or choose another folder") from None
        except OSError as error:
            raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error

    def finished(self, digest: str, suffix: str) -> Path:
        """Where the picture of a task is when it is whole."""
        return self.folder / f"{digest}{suffix}"

    def close(self, done: Iterable[str] = ()) -> None:
        """Lets go. What is left of the tasks of these digests goes; and the folder, where nothing is left in it."""
        of_no_use = {TOKEN, *done}
        for path in list(self.folder.iterdir()):
            if path.name.partition(".")[0] in of_no_use:
                discard(path)
        left = [path for path in self.folder.iterdir() if path.name != "lock"]
        if not left:
            discard(self.folder / "lock")
        self._lock.release()
        if not left:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                sync_folder(self.folder.parent)
