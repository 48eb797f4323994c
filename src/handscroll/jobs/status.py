"""What a run folder holds: what is made in it, what is done, and where it would go on. Headers are read alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError, RunFolderError
from handscroll.jobs.folder import check_plain, latent_path, state_paths
from handscroll.jobs.job import Job, read_facts, read_job
from handscroll.request import indexed
from handscroll.weights.header import read_header, read_metadata

_RUN_ID = re.compile(r"[0-9a-f]{16}")  # it becomes part of a file's name


@dataclass(frozen=True)
class PictureStatus:
    """One picture of a run: its file, whether that is written, whether its latent is finished, and its steps done."""

    path: Path
    seed: int
    is_written: bool
    has_latent: bool
    steps_done: int


@dataclass(frozen=True)
class RunStatus:
    """A run folder as it stands. `goes_on` is in words, such as `from step 12 of 20`."""

    folder: Path
    job: Job
    pictures: tuple[PictureStatus, ...]
    goes_on: str


def read_status(folder: Path) -> RunStatus:
    """Looks at a run folder and changes nothing, so that it may be looked at while it is worked in.

    Raises RunFolderError where it is broken, foreign or of another version.
    """
    check_plain(folder)
    job = read_job(folder)
    run_id, done = id_and_done(folder, read_facts(folder))
    done &= written(job)
    count = job.request.count
    latents = {index for index in range(count) if _facts_of(latent_path(folder, index)).get("run") == run_id}

    def steps_done(index: int) -> int:
        return job.steps if index in done | latents else _steps_done(folder, index, job, run_id)

    pictures = tuple(
        PictureStatus(
            path=indexed(job.output, index, count),
            seed=job.first_seed + index,
            is_written=index in done,
            has_latent=index in latents,
            steps_done=steps_done(index),
        )
        for index in range(count)
    )
    to_decode = [index for index in range(count) if index not in done]
    to_denoise = [index for index in to_decode if index not in latents]
    return RunStatus(folder, job, pictures, where_it_goes_on(job, to_denoise, to_decode, steps_done))


def where_it_goes_on(
    job: Job, to_denoise: Sequence[int], to_decode: Sequence[int], steps_done: Callable[[int], int]
) -> str:
    """`from step 12 of 20`, and for which picture where there are several. Pictures are counted from 0."""
    if not to_decode:
        return "and finds all done"
    index = (to_denoise or to_decode)[0]
    which = f"with picture {index + 1} of {job.request.count}, " if job.request.count > 1 else ""
    if not to_denoise:
        return f"{which}from the finished latent"
    return f"{which}from step {steps_done(index)} of {job.steps}"


def id_and_done(folder: Path, facts: dict[str, Any]) -> tuple[str, set[int]]:
    """The name of the run that a job.json tells of, and the pictures that it has finished. Raises RunFolderError."""
    try:
        run_id, done = facts["id"], facts["done"]
        if not (isinstance(run_id, str) and _RUN_ID.fullmatch(run_id) and all(type(number) is int for number in done)):
            raise ValueError
        return run_id, {number - 1 for number in done}
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{folder}: its job.json is broken") from error


def written(job: Job) -> set[int]:
    """The pictures whose files are there."""
    count = job.request.count
    return {index for index in range(count) if indexed(job.output, index, count).exists()}


def _steps_done(folder: Path, index: int, job: Job, run_id: str) -> int:
    """From the newest state that this run can go on from; 0 where there is none."""
    for path in state_paths(folder, index):
        facts = _facts_of(path)
        if facts.get("run") == run_id and facts.get("precision") == str(job.latents.get("transformer's precision")):
            with contextlib.suppress(ValueError):
                steps = int(facts.get("steps_done", "0")) + int(facts.get("steps_before", "0"))
                return max(0, min(steps, job.steps))
    return 0


def _facts_of(path: Path) -> dict[str, str]:
    """What a file of the run says about itself; nothing where it is not there or not whole."""
    try:
        read_header(path)
        return read_metadata(path)
    except CheckpointError:
        return {}
