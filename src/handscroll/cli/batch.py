"""`handscroll batch`: many pictures from one file."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handscroll.batch.journal import JOURNAL
from handscroll.batch.lines import Task, read_tasks
from handscroll.batch.places import open_place
from handscroll.cli import work
from handscroll.cli.options import Json, Quality, Quiet, takes_options
from handscroll.cli.output import to_json
from handscroll.errors import UsageError
from handscroll.request import check_devices
from handscroll.units import duration, one_line, shown, visible

if TYPE_CHECKING:
    from handscroll.batch.pool import Pool
    from handscroll.batch.run import Summary
    from handscroll.events import OnEvent

EXISTING = ("refuse", "keep", "replace")

PromptFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="A .txt with a prompt on every line, or a .jsonl with a JSON object on every line."
    ),
]
Folder = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="FOLDER", help="Where the pictures go; also an address such as s3://bucket/lakes."
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N|cpu:N|cuda:A,cuda:B",
        help="Processes, each of which makes pictures. Left out, one for each GPU, or one where there is none.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of a Ray cluster whose machines make the pictures: host:6379, auto."),
]
Format = Annotated[str, typer.Option(metavar="png|jpg|webp|tif", help="Of pictures that their line gives no name.")]
Existing = Annotated[
    str, typer.Option(metavar="|".join(EXISTING), help="What to do with files in the way that no batch has made.")
]


@takes_options("batch")
def batch(
    file: PromptFile,
    output: Folder,
    *,
    workers: Workers = None,
    ray: RayAddress = None,
    format: Format = "png",
    existing: Existing = "refuse",
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Make a picture of every line of a file, on several devices or machines at once.

    \b
      handscroll batch prompts.txt -o lakes --size 2048
      handscroll batch prompts.jsonl -o lakes --ray 10.0.0.1:6379

    A line of a .jsonl is {"prompt": "a lake", "seed": 7, "output": "lake.webp"}, with any option below of a picture.
    The same command goes on after an interruption, and makes no picture twice. FOLDER/batch.jsonl tells what was made.
    """
    _check(workers, ray, existing)
    if os.path.exists(journal := os.path.join(output, JOURNAL)) and os.path.samefile(file, journal):
        raise UsageError(f"{file}: is the journal of that folder; give a file of prompts of your own")
    tasks = read_tasks(file, options, suffix=f".{format.lower().removeprefix('.')}", quality=quality)
    place = open_place(output)

    out = sys.stdout  # whatever libraries make of it meanwhile

    def on_picture(path: str) -> None:
        if not as_json:
            print(visible(path) if out.isatty() else path, file=out, flush=True)

    with work.watching(quiet) as on_event:
        from handscroll.batch.run import run_batch

        make_pool = functools.partial(_pool, workers, ray, options, on_event)
        summary = run_batch(tasks, place, make_pool, on_event, existing=existing, on_picture=on_picture)
    if as_json:
        print(to_json({"folder": output, **summary.as_dict()}), flush=True)
    if not quiet:
        print(_told(summary), file=sys.stderr)
    if summary.failed:
        print(f"error: {_told_failed(summary)}", file=sys.stderr)
        raise typer.Exit(1)


def _check(workers: str | None, ray: str | None, existing: str) -> None:
    """Raises UsageError for what cannot be meant, whatever the file holds."""
    if "RANK" in os.environ:
        raise UsageError("handscroll batch starts its own processes; call it without torchrun")
    if existing not in EXISTING:
        raise UsageError(f"existing {shown(existing)} is not known; use {', '.join(EXISTING)}")
    if workers is not None:
        check_devices("workers", workers)
        if ray is not None and not workers.isdigit():
            raise UsageError(f"--workers {workers} names devices of this machine; with --ray it is a number")


def _pool(
    workers: str | None,
    ray: str | None,
    options: Mapping[str, Any],
    on_event: OnEvent,
    folder: Path,
    tasks: Sequence[Task],
) -> Pool:
    """Who makes the pictures: actors of Ray, or processes of this machine, for which a model is fetched before."""
    device, devices = options["device"] or "auto", options["devices"]
    if ray is not None:
        from handscroll.batch.cluster import RayPool

        return RayPool(ray, folder, None if workers is None else int(workers), device, devices, len(tasks))
    from handscroll.batch.devices import devices_of_workers
    from handscroll.batch.local import LocalPool
    from handscroll.models.opening import on_fetch, open_checkpoint

    for model, revision in dict.fromkeys((task.request.model, task.request.revision) for task in tasks):
        open_checkpoint(model, revision, on_progress=on_fetch(on_event))
    found = devices_of_workers(workers, devices, device, _count_gpus())
    return LocalPool(found[: len(tasks)])


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _told(summary: Summary) -> str:
    """`38 pictures in 12.4 min, 2 were there, 1 failed, 3 tried again`."""
    parts = [f"{summary.made} picture{'s' * (summary.made != 1)} in {duration(summary.seconds)}"]
    parts += [f"{summary.kept} were there"] if summary.kept else []
    parts += [f"{len(summary.failed)} failed"] if summary.failed else []
    parts += [f"{len(summary.retried)} tried again"] if summary.retried else []
    return ", ".join(parts)


def _told_failed(summary: Summary) -> str:
    first = summary.failed[0]
    said = one_line(f"line {first['line']}: {first['error'].get('message')}")
    of_use = any(each["error"].get("code") not in ("bad_usage", "budget_too_small") for each in summary.failed)
    again = "; the same command tries again" if of_use else ""
    return f"{len(summary.failed)} of {summary.pictures} pictures were not made; {said}{again}"
