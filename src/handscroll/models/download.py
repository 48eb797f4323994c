"""Files of one commit of a hub repository come to this machine, by name, on threads of their own."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, hf_hub_download
from tqdm.std import tqdm

TIMEOUT_SECONDS = 20.0
THREADS = 4
_TAKES_A_BAR = "tqdm_class" in inspect.signature(hf_hub_download).parameters


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is, over all its files together."""

    hub_id: str
    done_bytes: int
    total_bytes: int


class StoppedError(Exception):
    """Ends a download from within; nobody sees it."""


class Download:
    """The files of one commit that are wanted, and how far each of them is. `sizes` in bytes, 0 where not known.

    `here`: the files that are on this machine already. Any thread may ask for `progress`, and may `stop` it.
    """

    def __init__(self, hub_id: str, commit: str, sizes: Mapping[str, int], here: Iterable[str]) -> None:
        self.hub_id, self.commit, self.sizes = hub_id, commit, sizes
        self._done_bytes = dict.fromkeys(sizes, 0)
        self._stopped = threading.Event()
        for name in here:
            self._is_here(name)
        self.at_first = self.progress()

    def progress(self) -> FetchProgress:
        done_bytes = sum(min(done, self.sizes[name]) for name, done in list(self._done_bytes.items()))
        return FetchProgress(self.hub_id, done_bytes, sum(self.sizes.values()))

    def fetch(self, names: Iterable[str]) -> None:
        """Fetches files, several at a time. After a failure no other is begun, and the first one is raised."""
        waiting, failed = deque(names), list[BaseException]()

        def work() -> None:
            with contextlib.suppress(IndexError):
                while not failed and not self._stopped.is_set():
                    name = waiting.popleft()
                    try:
                        self._fetch(name)
                    except BaseException as error:
                        failed.append(error)

        threads = [threading.Thread(target=work, name="fetch", daemon=True) for _ in range(min(THREADS, len(waiting)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._stopped.is_set():
            raise StoppedError
        if failed:
            raise failed[0]

    def stop(self) -> None:
        """Ends each file at the next piece of it that arrives. What is there only in part is thrown away."""
        self._stopped.set()
        if "hf_xet" in sys.modules:  # which would go on to the end of the file
            with contextlib.suppress(ImportError):
                from huggingface_hub.utils._xet import abort_xet_session

                abort_xet_session()

    def _fetch(self, name: str) -> None:
        bar: dict[str, Any] = {"tqdm_class": self._bar_class(name)} if _TAKES_A_BAR else {}
        hf_hub_download(
            self.hub_id,
            name,
            revision=self.commit,
            cache_dir=constants.HF_HUB_CACHE,
            endpoint=constants.ENDPOINT,
            etag_timeout=TIMEOUT_SECONDS,
            **bar,
        )
        self._is_here(name)

    def _is_here(self, name: str) -> None:
        self._done_bytes[name] = self.sizes[name]

    def _bar_class(self, name: str) -> type[tqdm]:
        """A progress bar of one file that shows nothing. The library makes one or two for it, and starts them again."""
        download = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

            def display(self, *args: Any, **kwargs: Any) -> bool:
                return True

            def update(self, n: float | None = 1) -> bool | None:
                if download._stopped.is_set():
                    raise StoppedError
                self.n += n or 0
                download._done_bytes[name] = max(download._done_bytes[name], int(self.n))
                return None

        return Bar
