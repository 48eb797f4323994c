"""A worker: a process that makes pictures one after the other, as it is told. Here, what it does with a task.

A task is a table of JSON values: `request`, as the fields of `Request`; `path`, where the picture is when it is whole;
`quality`; and `processes`, how many workers share this machine's memory. What becomes of it is a table too: `made`, the
facts of the picture, or `failed`, an error as `--json` prints it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

from handscroll.errors import HandscrollError, is_out_of_memory
from handscroll.events import OnEvent, Progress
from handscroll.files import write_all
from handscroll.request import Request
from handscroll.system import PARENT, resident_bytes
from handscroll.units import last_line, one_line
from handscroll.version import __version__

if TYPE_CHECKING:
    from handscroll.runtime.keeping import Keeping

TOLD_EVERY_S, ALIVE_EVERY_S = 0.5, 30.0
MAX_REASON = 300  # characters, of what a library says of an error that nobody expected
WORN_BYTES = 16 * 2**20
ORPHANED = 1  # the exit code of a worker that nobody hears any more


class Maker:
    """Makes pictures, and keeps modules in memory from one to the next."""

    def __init__(self) -> None:
        self._keeping: Keeping | None = None
        self._first_bytes: int | None = None  # what the process held after its first picture

    def make(self, task: Mapping[str, Any], on_event: OnEvent) -> dict[str, Any]:
        """Makes the picture of a task, or says why not."""
        path = Path(task["path"])
        if path.exists():
            return {"made": {}}  # by a worker that was lost before it could say so
        try:
            request = Request(**task["request"])
            if request.devices is not None:
                return _by_ranks(request, path, task["quality"])
            return self._made(request, path, task["quality"], task["processes"], on_event)
        except HandscrollError as error:
            return {"failed": error.as_dict()}  # without notes: how to go on is the batch's concern
        except Exception as error:
            code = "out_of_memory" if is_out_of_memory(error) else "unexpected"
            return {"failed": {"code": code, "message": one_line(f"{type(error).__name__}: {error}", MAX_REASON)}}

    def _made(
        self, request: Request, path: Path, quality: int | None, processes: int, on_event: OnEvent
    ) -> dict[str, Any]:
        from handscroll import pipeline
        from handscroll.runtime.keeping import Keeping

        if self._keeping is None:
            self._keeping = Keeping()
            gc.freeze()  # what is imported need not be walked between two stages
        options: dict[str, Any] = {"quality": quality, "processes": processes, "keeping": self._keeping}
        (result,) = pipeline.generate(request, path, on_event=on_event, **options)
        return {"made": result.as_dict(), "worn": request.memory_bytes is not None and self._is_worn()}

    def _is_worn(self) -> bool:
        """Whether the process holds more than after its first picture, which would count against the next's budget."""
        now_bytes = resident_bytes()
        if self._first_bytes is None:
            self._first_bytes = now_bytes
        return now_bytes is not None and self._first_bytes is not None and now_bytes - self._first_bytes > WORN_BYTES


def _by_ranks(request: Request, path: Path, quality: int | None) -> dict[str, Any]:
    """By several processes for one picture, which the command line starts and watches."""
    own = [] if quality is None else ["--quality", str(quality)]
    command = [sys.executable, "-P", "-m", "handscroll", "generate", "--json", "--quiet", "-o", str(path), *own]
    command += [*request.as_arguments(), "--", request.prompt]
    environ = {**os.environ, PARENT: str(os.getpid())}
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        message = f"the ranks ended with exit code {done.returncode}: {last_line(done.stderr, MAX_REASON)}"
        return {"failed": {"code": "rank_failed", "message": message}}
    return {"failed": found["error"]} if "error" in found else {"made": found}


def described() -> dict[str, Any]:
    """This process, as it introduces itself."""
    return {"version": __version__, "process": os.getpid()}


# As a process of this machine: tasks come on standard input and go out on standard output, a line of JSON each.


def serve(tasks: BinaryIO, said: int) -> None:
    """Works until standard input ends. That it ends in the middle of a task is noticed at once."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(tasks, waiting), daemon=True).start()
    maker = Maker()
    _say(said, {"ready": described()})
    while True:
        _say(said, maker.make(json.loads(waiting.get()), _Teller(said)))


def _read(tasks: BinaryIO, waiting: SimpleQueue[bytes]) -> None:
    for line in tasks:
        waiting.put(line)
    os._exit(ORPHANED)  # whatever is half done goes on from its run folder


def _say(said: int, facts: Mapping[str, Any]) -> None:
    try:
        write_all(said, json.dumps(facts).encode() + b"\n")
    except OSError:
        os._exit(ORPHANED)


class _Teller:
    """A listener that passes on where the job is, now and then."""

    def __init__(self, said: int) -> None:
        self._said, self._told = said, 0.0
        self._at: list[Any] = []

    def __call__(self, event: Progress) -> None:
        if event.stage == "notice":
            _say(self._said, {"notice": event.detail})
            return
        if event.stage != "pulse":
            self._at = [event.stage, event.done, event.total]
        every = TOLD_EVERY_S if event.stage != "pulse" else ALIVE_EVERY_S
        if self._at and time.monotonic() - self._told >= every:
            self._told = time.monotonic()
            _say(self._said, {"at": self._at})


def main() -> None:
    """The worker's process. What libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives out the work
    said = os.dup(1)
    os.dup2(2, 1)
    serve(sys.stdin.buffer, said)


if __name__ == "__main__":
    main()
