"""A batch, from its tasks to pictures in their place: what is left to do goes to whichever worker is ready."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handscroll.batch.journal import DONE, FAILED, Journal, WorkFolder
from handscroll.batch.lines import Task
from handscroll.batch.places import Place
from handscroll.batch.pool import SICK, At, Failed, Heard, Lost, Made, Pool, Said
from handscroll.batch.queue import TRIES, Queue
from handscroll.errors import BusyError, OutputError
from handscroll.events import OnEvent, Progress, notice
from handscroll.files import write_whole
from handscroll.plan.stages import BY_NAME
from handscroll.units import duration, listed

STAGE = "batch"
HEAR_S, SILENT_S = 0.5, 600.0
# Errors that another process, or a later time, may not have.
MAY_PASS = (*SICK, "rank_failed")

OnPicture = Callable[[str], None]
MakePool = Callable[[Path, Sequence[Task]], Pool]


@dataclass
class Summary:
    """What became of a batch. `failed` and `retried` tell of each such task: its line, its file and why."""

    pictures: int
    kept: int = 0
    made: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    retried: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "seconds": round(self.seconds, 3)}


def run_batch(
    tasks: Sequence[Task],
    place: Place,
    make_pool: MakePool,
    on_event: OnEvent,
    *,
    existing: str = "refuse",
    on_picture: OnPicture = lambda path: None,
) -> Summary:
    """Makes what is not there yet. on_picture: told of every picture in its place, those of earlier sessions first.

    make_pool: the workers for these tasks, which make pictures in the folder that it is given. existing: what becomes
    of files that no batch has made and a task wants to write. A task that fails does not keep others from being made.
    Raises OutputError where no picture can be put in its place, WorkerError where nobody can make one, BusyError.
    """
    began = time.monotonic()
    summary, done = Summary(len(tasks)), set[str]()
    if _is_all_there(tasks, place):  # nothing need be writable
        for task in tasks:
            on_picture(place.shown(task.output))
        summary.kept = len(tasks)
        return summary
    with _held(place, done) as work:
        journal, to_do = Journal(place.journal), []
        for task, is_done in _sorted_out(tasks, journal, place, work, existing):
            if is_done:
                summary.kept += 1
                done.add(task.digest)
                on_picture(place.shown(task.output))
            else:
                to_do.append(task)
        if to_do:
            with _told_what_is_there(summary), make_pool(work.folder, to_do) as pool:
                _Batch(Queue(_by_kind(to_do)), pool, place, journal, work, summary, on_event, on_picture, done).run()
    summary.seconds = time.monotonic() - began
    return summary


def _is_all_there(tasks: Sequence[Task], place: Place) -> bool:
    if place.work_folder.exists():
        return False
    journal = Journal(place.journal)
    if not all(journal.has_made(task.output, task.digest) for task in tasks):
        return False
    return len(place.present([task.output for task in tasks])) == len(tasks)


@contextmanager
def _held(place: Place, done: set[str]) -> Iterator[WorkFolder]:
    """The work folder, held, with the journal as all others know it. done: digests of what need not be kept there."""
    work = WorkFolder(place.work_folder)
    try:
        place.begin()
        yield work
    except BaseException:
        with contextlib.suppress(OutputError):  # what was wrong before is what the user has to know
            place.close()
        raise
    else:
        place.close()
    finally:
        work.close(done)


@contextmanager
def _told_what_is_there(summary: Summary) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        there = summary.kept + summary.made
        error.add_note(f"{there} of {summary.pictures} pictures are there; the same command goes on")
        raise


def _sorted_out(
    tasks: Sequence[Task], journal: Journal, place: Place, work: WorkFolder, existing: str
) -> Iterator[tuple[Task, bool]]:
    """Each task, and whether its picture is in its place. One that was on its way there arrives.

    Raises OutputError for files that no batch has made, which are left as they are.
    """
    there = place.present([task.output for task in tasks])
    foreign = [task for task in tasks if task.output in there and not journal.tells_of(task.output)]
    if foreign and existing == "refuse":
        names = listed(place.shown(task.output) for task in foreign)
        raise OutputError(
            f"{names}: there already, and not made by this batch; move them, or say --existing keep or replace"
        )
    kept = {task.digest for task in foreign if existing == "keep"}
    for task in tasks:
        has_made = journal.has_made(task.output, task.digest)
        finished = work.finished(task.digest, task.suffix)
        if has_made and finished.exists():
            place.put(finished, task.output)
            there.add(task.output)
        yield task, task.digest in kept or (has_made and task.output in there)


@dataclass
class _Batch:
    """The work itself: who is at what, and what is done about everything that is heard."""

    queue: Queue
    pool: Pool
    place: Place
    journal: Journal
    work: WorkFolder
    summary: Summary
    on_event: OnEvent
    on_picture: OnPicture
    done: set[str]  # digests
    idle: deque[int] = field(default_factory=deque)
    at_work: dict[int, Task] = field(default_factory=dict)
    kinds: dict[int, Any] = field(default_factory=dict)  # of pictures that a worker makes under a budget
    heard_at: dict[int, float] = field(default_factory=dict)
    last: At | None = None

    def run(self) -> None:
        """Until every task is done or has failed."""
        self._tell()
        while len(self.queue) or self.at_work:
            self._give_out()
            for heard in self.pool.heard(HEAR_S):
                self._answer(heard)
            self._tell_of_silence()
            self._tell()

    def _give_out(self) -> None:
        for _ in range(len(self.idle)):
            task = self.queue.next(time.monotonic())
            if task is None:
                return
            worker, kind = self.idle.popleft(), _kind_of(task)
            if self.kinds.setdefault(worker, kind) != kind:
                # What a process has left of other work would count against the budget of this.
                self.queue.put_back(task, time.monotonic())
                self.pool.replace(worker)
                continue
            self.at_work[worker] = task
            self.heard_at[worker] = time.monotonic()
            path = self.work.finished(task.digest, task.suffix)
            request = dataclasses.asdict(task.request)
            self.pool.start(worker, {"request": request, "path": str(path), "quality": task.quality})

    def _answer(self, heard: Heard) -> None:
        self.heard_at[heard.worker] = time.monotonic()
        match heard:
            case At():
                self.last = heard
                return
            case Said():
                task = self.at_work.get(heard.worker)
                self.on_event(notice(heard.line if task is None else f"line {task.line}: {heard.line}"))
                return
        task = self.at_work.pop(heard.worker, None)
        match heard:
            case Lost():
                self._lost(task, heard.why)
                return
            case Made() if task is not None:
                self._made(task, heard)
            case Failed() if task is not None:
                self._failed(task, heard.error)
        if (isinstance(heard, Made) and heard.is_worn) or (isinstance(heard, Failed) and heard.is_sick):
            self.pool.replace(heard.worker)
        else:
            self.idle.append(heard.worker)

    def _made(self, task: Task, heard: Made) -> None:
        """The picture is finished; it is told of, and then goes to its place."""
        finished = self.work.finished(task.digest, task.suffix)
        if heard.content is not None:
            try:
                write_whole(finished, [heard.content])
            except OSError as error:
                raise OutputError(f"cannot write {finished}: {error.strerror}") from error
        facts = {name: value for name, value in heard.facts.items() if name != "path"}
        self.journal.add({**self._told(task, DONE), **facts})
        self.place.tell()
        self.place.put(finished, task.output)
        self.done.add(task.digest)
        self.summary.made += 1
        self.on_picture(self.place.shown(task.output))

    def _failed(self, task: Task, error: Mapping[str, Any]) -> None:
        """A picture could not be made. What may go well another time is tried again."""
        code, message = error.get("code"), str(error.get("message"))
        if code == BusyError.code and self.queue.busy(task, time.monotonic()):
            return
        if code == OutputError.code:  # no other picture could be written either
            raise OutputError(f"line {task.line}: {message}")
        if code in MAY_PASS:
            self._lost(task, message, error)
        else:
            self._give_up(task, error)

    def _lost(self, task: Task | None, why: str, error: Mapping[str, Any] | None = None) -> None:
        if task is None:
            self.on_event(notice(why))
        elif self.queue.lost(task, time.monotonic()):
            self.summary.retried.append({"line": task.line, "output": task.output, "why": why})
            self.on_event(notice(f"line {task.line}: {why}; it is tried again"))
        else:
            lost = {"code": "worker_lost", "message": f"{TRIES} workers were lost at it, the last: {why}"}
            self._give_up(task, lost if error is None else error)

    def _give_up(self, task: Task, error: Mapping[str, Any]) -> None:
        self.summary.failed.append({"line": task.line, "output": task.output, "error": dict(error)})
        self.journal.add({**self._told(task, FAILED), "error": dict(error)})
        self.on_event(notice(f"line {task.line}: {error.get('message')}"))

    def _tell_of_silence(self) -> None:
        now = time.monotonic()
        for worker, task in self.at_work.items():
            if now - self.heard_at.get(worker, now) > SILENT_S:
                self.heard_at[worker] = now
                self.on_event(
                    notice(
                        f"line {task.line}: nothing was heard of its worker for {duration(SILENT_S)}; if its process "
                        "is ended, another takes the picture"
                    )
                )

    def _told(self, task: Task, status: str) -> dict[str, Any]:
        """What the journal says of every task."""
        own = {"output": task.output, "task": task.digest, "status": status, "line": task.line}
        return {**own, "prompt": task.request.prompt, "seed": task.request.seed, "tries": self.queue.tries(task)}

    def _tell(self) -> None:
        summary = self.summary
        told = [f"{len(self.at_work)} at work"]
        if self.last is not None and self.last.worker in self.at_work and self.last.stage in BY_NAME:
            told += [f"{BY_NAME[self.last.stage].title} {self.last.done}/{self.last.total}"]
        told += [f"{len(summary.failed)} failed"] if summary.failed else []
        done = summary.kept + summary.made + len(summary.failed)
        self.on_event(Progress(STAGE, done, summary.pictures, detail=", ".join(told)))


def _by_kind(tasks: Sequence[Task]) -> list[Task]:
    """In their order, but that those with a budget which take the same memory follow each other."""
    places: dict[Any, int] = {}
    return sorted(tasks, key=lambda task: places.setdefault(_kind_of(task), len(places)))


def _kind_of(task: Task) -> Any:
    """What two tasks have in common that take the same memory, where they have a budget."""
    return (
        None
        if task.request.memory_bytes is None
        else dataclasses.replace(task.request, prompt="any", negative="", seed=0)
    )
