"""Workers as those who give out work see them: one that is ready, at work, done or lost. Wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from handscroll.errors import HandscrollError

MOST_FAILED_STARTS = 3  # one after another
# Errors after which a process is not to be trusted, and which another may not have.
SICK = ("out_of_memory", "unexpected")


class WorkerError(HandscrollError):
    """No worker can be started, or none can be reached."""

    code = "no_worker"


@dataclass(frozen=True)
class Ready:
    """A worker waits for a task."""

    worker: int


@dataclass(frozen=True)
class At:
    """Where a worker is with its task: `done` of `total` in a stage."""

    worker: int
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Said:
    """A line for the user about a worker's task."""

    worker: int
    line: str


@dataclass(frozen=True)
class Made:
    """A picture is whole. `content`: its bytes, where the worker's disk is not ours. `is_worn`: the process holds more
    than before, and there is a budget: the next picture wants a fresh one.
    """

    worker: int
    facts: Mapping[str, Any]
    content: bytes | None = None
    is_worn: bool = False


@dataclass(frozen=True)
class Failed:
    """A picture cannot be made; the error as `--json` prints it. The worker is ready for another, unless it is sick:
    what nobody expected may have broken it, and would keep it from making any.
    """

    worker: int
    error: Mapping[str, Any]

    @property
    def is_sick(self) -> bool:
        return self.error.get("code") in SICK


@dataclass(frozen=True)
class Lost:
    """A worker has ended; another takes its place. `why` tells of it, on one line."""

    worker: int
    why: str


Heard = Ready | At | Said | Made | Failed | Lost


class Pool(ABC):
    """Several workers, by numbers that are never used again. A context manager: with it they end."""

    @abstractmethod
    def start(self, worker: int, task: Mapping[str, Any]) -> None:
        """Gives a task to a worker that is ready."""

    @abstractmethod
    def replace(self, worker: int) -> None:
        """Ends a worker that has nothing to do, and starts another in its place."""

    @abstractmethod
    def heard(self, seconds: float) -> Sequence[Heard]:
        """What workers have to tell, after so many seconds at most. Raises WorkerError."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Starts:
    """Counts workers that ended before they were ready: several in a row mean that there will be no more."""

    def __init__(self) -> None:
        self._failed = 0

    def ready(self) -> None:
        self._failed = 0

    def failed(self, why: str, *, others: bool) -> bool:
        """Whether to start another. others: whether there are workers that are ready, which go on without it.

        Raises WorkerError where it has happened too often and there is nobody else.
        """
        self._failed += 1
        if self._failed < MOST_FAILED_STARTS:
            return True
        if not others:
            raise WorkerError(f"no worker can start: {why}")
        return False
