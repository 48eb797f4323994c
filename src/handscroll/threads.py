"""Work on a thread of its own, while the thread that asked for it stays free to listen and to be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

POLL_SECONDS = 0.1

Found = TypeVar("Found")


def run_watched(
    work: Callable[[], Found], look: Callable[[], None], stop: Callable[[], None], *, stop_seconds: float | None = None
) -> Found:
    """What `work` gives or raises. It runs on a thread, while this one calls `look` every tenth of a second.

    What `look` raises, and Ctrl-C, ends the wait and passes through unchanged: `stop` asks the work to end, which it
    is given `stop_seconds` for, or as long as it takes. `look` is called once more when the work is done.
    """
    found: list[Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="watched work", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if thread.is_alive():
                look()
        if not failed:
            look()
    except BaseException:
        stop()
        thread.join(stop_seconds)
        raise
    if failed:
        try:
            raise failed[0]
        finally:
            failed.clear()  # or this frame and the error would hold each other
    return found[0]
