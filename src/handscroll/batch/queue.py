"""Which task is next, and what becomes of one that was not finished. Decisions alone: time is handed in."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from handscroll.batch.lines import Task

TRIES = 3  # a task whose worker was lost so often is left: it may be what ends them
BUSY_PAUSE_S, MOST_BUSY_S = 2.0, 600.0


class Queue:
    """The tasks that are not begun, in their order, and those that wait for another try, which come first."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._new = deque(tasks)
        self._again: list[tuple[float, Task]] = []
        self._lost: Counter[str] = Counter()
        self._busy_since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._again)

    def next(self, now: float) -> Task | None:
        """The task to begin now; None where there is none, or each waits still."""
        ready = [each for each in self._again if each[0] <= now]
        if ready:
            first = min(ready, key=lambda each: each[0])
            self._again.remove(first)
            return first[1]
        return self._new.popleft() if self._new else None

    def put_back(self, task: Task, now: float) -> None:
        """The task was not begun after all; it comes first."""
        self._again.append((now, task))

    def lost(self, task: Task, now: float) -> bool:
        """The task's worker ended. Whether it gets another try."""
        self._lost[task.digest] += 1
        if self._lost[task.digest] >= TRIES:
            return False
        self._again.append((now, task))
        return True

    def busy(self, task: Task, now: float) -> bool:
        """Another process holds the task's folder: one that was taken for lost, or is about to end. Whether to wait."""
        since = self._busy_since.setdefault(task.digest, now)
        if now - since > MOST_BUSY_S:
            return False
        self._again.append((now + BUSY_PAUSE_S, task))
        return True

    def tries(self, task: Task) -> int:
        """How often the task was begun, the last time included."""
        return self._lost[task.digest] + 1
