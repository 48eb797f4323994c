"""A run's folder beside its picture: what is finished so far, so that no crash, Ctrl-C or power cut loses it.

    dusk.png.run/
        job.json                       what is being made, its seed, and which pictures are done
        state-1.safetensors            picture 1 between two steps; state-1.previous.safetensors is the one before
        latent-1.safetensors           picture 1 denoised; `handscroll decode` takes it as it is
        lock                           held by the process that works here
        *.part, *.rows                 unfinished files

Every file appears whole or not at all, and names the run that wrote it, so that states of two jobs never mix. The
folder goes when all pictures are written, or when there is nothing in it worth keeping.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from handscroll.errors import BudgetError, CheckpointError, NumericsError, OutputError, RunFolderError
from handscroll.events import OnEvent, ignore, notice
from handscroll.files import Lock, discard, write_whole
from handscroll.jobs.latent_file import describe_latent, load_latent, save_latent
from handscroll.jobs.state_file import read_state, write_state
from handscroll.units import quoted
from handscroll.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from handscroll.runtime.sampling.state import SamplerState
from handscroll.jobs.folder import (
    clear_folder,
    latent_path,
    leave_folder,
    state_paths,
    take_folder,
    tidy_folder,
)
from handscroll.jobs.job import FORMAT, FORMAT_VERSION, Job, job_of, place_of, read_facts, run_folder_of
from handscroll.jobs.status import id_and_done, where_it_goes_on, written


class RunFolder:
    """The work of one job, on disk. A context manager, which holds the folder against other processes.

    Pictures are counted from 0 here, from 1 in file names. Where saving fails, for want of disk or permission, the
    user is told once and the run goes on: latents are then kept in memory.
    """

    def __init__(self, folder: Path, job: Job, run_id: str, done: set[int], lock: Lock, on_event: OnEvent) -> None:
        self.folder, self.job = folder, job
        self.count = job.request.count
        self._id, self._done, self._lock, self._on_event = run_id, done, lock, on_event
        self._held: dict[int, tuple[Tensor, dict[str, str]]] = {}
        self._latents = {index for index in range(self.count) if self._holds_latent(index)}
        self._resumed = dict.fromkeys(done | self._latents, job.steps)
        self._ours: set[int] = set()  # pictures of which this session has saved a state
        self._cannot_save = False

    @classmethod
    def open(cls, job: Job, on_event: OnEvent = ignore, *, must_go_on: bool = False) -> Self:
        """The folder of `job.output`, made if need be. The same job goes on; another starts over, and says so.

        `must_go_on` refuses to start over. Raises BusyError where another process works on it, RunFolderError for
        what is not a run folder, OutputError where there can be none.
        """
        folder = run_folder_of(job.output)
        lock = take_folder(folder)
        try:
            with _told_of_files(folder):
                tidy_folder(folder)
                older, reason = _older_run(folder, job)
            if older is None and reason and must_go_on:
                raise RunFolderError(f"{folder}: cannot go on: {reason}; `handscroll generate` starts over")
            if older is None:
                if reason:
                    on_event(notice(f"starting over in {folder}: {reason}"))
                clear_folder(folder)
            run = cls._gone_on_with(folder, job, older, lock, on_event)
            if older is not None and run._is_worth_keeping():
                on_event(notice(f"{folder} goes on {run._where()}"))
            with _told_of_files(folder):
                run._write_job()
        except BaseException:
            leave_folder(folder, lock)
            raise
        return run

    @classmethod
    def _gone_on_with(
        cls, folder: Path, job: Job, older: tuple[Job, str, set[int]] | None, lock: Lock, on_event: OnEvent
    ) -> Self:
        """The run of a job by the name of an older one, with what that has done; by a new name where there is none."""
        if older is None:
            return cls(folder, job, secrets.token_hex(8), set(), lock, on_event)
        older_job, run_id, done = older
        request = dataclasses.replace(job.request, seed=older_job.request.seed)
        job = dataclasses.replace(job, request=request, first_seed=older_job.first_seed)
        if older_job.pictures != job.pictures:
            done = set()
        return cls(folder, job, run_id, done & written(job), lock, on_event)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The pictures' seeds: the job's, or those that the same job drew when it began."""
        return tuple(self.job.first_seed + index for index in range(self.count))

    # What is there

    def to_denoise(self) -> list[int]:
        """The pictures that have no latent yet and need one."""
        return [index for index in range(self.count) if index not in self._done | self._latents]

    def to_decode(self) -> list[int]:
        """The pictures that are not written yet."""
        return [index for index in range(self.count) if index not in self._done]

    def state(self, index: int, precision: str | None = None) -> SamplerState | None:
        """Where denoising of a picture goes on in a precision of the transformer, the job's own if None.

        None for its beginning. A torn state, or one that was made in another precision, is as good as none.
        """
        for path in self._state_paths(index):
            state = self._read_state(path, precision)
            if state is not None:
                if index not in self._ours:
                    self._resumed[index] = state.total_done
                return state
        return None

    def states(self, index: int) -> PictureStates:
        """Where the sampler of a picture is kept between two steps."""
        return PictureStates(self, index)

    def latent(self, index: int) -> Tensor:
        """The finished latent [1, C, h, w] fp32 of a picture. Raises CheckpointError."""
        return self.latent_and_facts(index)[0]

    def latent_and_facts(self, index: int) -> tuple[Tensor, dict[str, str]]:
        """The finished latent of a picture, and the facts it was kept with. Raises CheckpointError."""
        return self._held.get(index) or load_latent(self._latent_path(index))

    def resumed_from(self, index: int) -> int | None:
        """How many steps of a picture were done in an earlier session; None if none were."""
        return self._resumed.get(index)

    # What is new

    def keep_state(self, index: int, state: SamplerState, precision: str | None = None) -> None:
        """Saves a picture between two steps; the state before stays until this one is whole.

        precision: of the transformer that made it, the job's own if None.
        """
        newest, previous = self._state_paths(index)
        facts = {"run": self._id, "precision": precision or self._precision}

        def save() -> None:
            if newest.exists():
                os.replace(newest, previous)
            write_state(newest, state, facts, self._part("state"))

        if self._try(save):
            self._ours.add(index)

    def keep_latent(self, index: int, latent: Tensor, facts: Mapping[str, str]) -> None:
        """Saves a finished latent, with the facts that `handscroll decode` needs; its states have done their work."""
        path = self._latent_path(index)
        self._latents.add(index)
        if self._try(lambda: save_latent(path, latent, {**facts, "run": self._id}, part=self._part("latent"))):
            for state in self._state_paths(index):
                discard(state)
        else:
            self._held[index] = latent, dict(facts)

    def mark_done(self, index: int) -> None:
        """The picture is written."""
        self._held.pop(index, None)
        self._done.add(index)
        self._try(self._write_job)

    def part_for(self, final: Path) -> Path:
        """The name of a file until it is whole: in this folder, or hidden beside it if that is on another disk."""
        with contextlib.suppress(OSError):
            if final.parent.stat().st_dev == self.folder.stat().st_dev:
                return self._part("picture")
        return final.with_name(f".{final.name[:40]}.{self._id}.part")

    def keep_copy(self, index: int, path: Path) -> None:
        """Copies a latent to where the user wants one too. Raises OutputError."""
        if index not in self._latents:
            return  # a run that was killed while it cleaned up: latents are copied before pictures are made
        latent, facts = self._held.get(index) or load_latent(self._latent_path(index))
        save_latent(path, latent, {k: v for k, v in facts.items() if k != "run"}, part=self.part_for(path.absolute()))

    # The end

    def release(self) -> None:
        """Lets go of the folder and leaves it as it is, for another process to go on with."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._is_worth_keeping():
            with contextlib.suppress(MemoryError):  # it may be what has just happened
                # The same steps give the same numbers, unless there is more memory for fp32 the next time.
                if not isinstance(error, NumericsError) or isinstance(error.__cause__, BudgetError):
                    error.add_note(f"`handscroll resume {quoted(str(self.folder))}` goes on {self._where()}")
            self.release()
            return
        clear_folder(self.folder)
        discard(self.folder / "job.json")
        leave_folder(self.folder, self._lock)

    def _is_worth_keeping(self) -> bool:
        return any(
            index in self._done or self._latent_path(index).exists() or any(map(Path.exists, self._state_paths(index)))
            for index in range(self.count)
        )

    def _where(self) -> str:
        """`from step 12 of 20`, and for which picture where there are several."""

        def steps_done(index: int) -> int:
            states = (self._read_state(path) for path in self._state_paths(index))
            return next((state.total_done for state in states if state is not None), 0)

        return where_it_goes_on(self.job, self.to_denoise(), self.to_decode(), steps_done)

    # Files

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def _latent_path(self, index: int) -> Path:
        return latent_path(self.folder, index)

    def _state_paths(self, index: int) -> tuple[Path, Path]:
        """The newest state, and the one before."""
        return state_paths(self.folder, index)

    def _holds_latent(self, index: int) -> bool:
        path = self._latent_path(index)
        if not path.exists():
            return False
        shapes = self.job.latent_shapes
        try:
            described = describe_latent(path)
            if described is None or (shapes and described[0] != shapes[max(shapes)]):
                return False
            return load_latent(path)[1].get("run") == self._id
        except CheckpointError:
            return False

    @property
    def _precision(self) -> str:
        return str(self.job.latents.get("transformer's precision"))

    def _read_state(self, path: Path, precision: str | None = None) -> SamplerState | None:
        try:
            state, facts = read_state(path, self.job.latent_shapes)
        except CheckpointError:
            return None
        is_ours = facts.get("run") == self._id and facts.get("precision") == (precision or self._precision)
        return state if is_ours else None

    def _write_job(self) -> None:
        facts = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "handscroll": __version__,
            "id": self._id,
            "output": str(place_of(self.job.output).absolute()),
            "save_latent": None if self.job.save_latent is None else str(self.job.save_latent.absolute()),
            "quality": self.job.quality,
            "first_seed": self.job.first_seed,
            "steps": self.job.steps,
            "request": dataclasses.asdict(self.job.request),
            "latents": dict(self.job.latents),
            "pictures": dict(self.job.pictures),
            "done": sorted(index + 1 for index in self._done),
        }
        write_whole(self.folder / "job.json", [json.dumps(facts, indent=1).encode()], part=self._part("job"))

    def _try(self, save: Callable[[], None]) -> bool:
        """Saves; says so once where that fails, since a run that cannot be resumed is better than none."""
        try:
            save()
        except (OSError, OutputError) as error:
            if not self._cannot_save:
                self._on_event(notice(f"cannot save progress in {self.folder}, the run goes on without: {error}"))
            self._cannot_save = True
            return False
        return True


@dataclass(frozen=True)
class PictureStates:
    """The saved states of one picture of a run, as `runtime.denoise.SavedStates`."""

    run: RunFolder
    index: int

    def load(self, precision: str) -> SamplerState | None:
        return self.run.state(self.index, precision)

    def save(self, state: SamplerState, precision: str) -> None:
        self.run.keep_state(self.index, state, precision)


@contextlib.contextmanager
def _told_of_files(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write the run folder {folder}: {error.strerror}") from error


# Reading what an earlier run left


def _older_run(folder: Path, job: Job) -> tuple[tuple[Job, str, set[int]] | None, str]:
    """The run that was here, its id and what it has done, if `job` may go on with it; else the reason why not."""
    if not (folder / "job.json").exists():
        return None, ""
    try:
        facts = read_facts(folder)
        older = job_of(folder, facts)
        run_id, done = id_and_done(folder, facts)
    except RunFolderError as error:
        return None, str(error).partition(": ")[2]
    difference = job.difference(older)
    return (None, difference) if difference else ((older, run_id, done), "")
