"""`handscroll resume`: an unfinished run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from handscroll.cli import launch, work
from handscroll.cli.options import Json, Quiet, Yes, takes_options
from handscroll.cli.output import print_results
from handscroll.models.registry import resolve
from handscroll.options import fields_of
from handscroll.request import Request

SaveLatent = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.safetensors", help="Needed where the latent is kept in another folder than the picture."
    ),
]


@takes_options("resume")
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, such as dusk.png.run, or its picture.")],
    *,
    save_latent: SaveLatent = None,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Go on with a run that was interrupted, to the same picture.

    \b
      handscroll resume dusk.png.run
      handscroll resume dusk.png --json

    While a picture is made, what is finished of it is kept beside it. `handscroll generate` with the same options goes
    on too. The folder goes once the picture is written.
    """
    from handscroll.jobs.job import find_run, read_job

    wanted = fields_of(Request, options, "resume")
    folder = find_run(run)
    job = read_job(folder)
    model = wanted.get("model") or job.request.model
    resolve(model)
    if "model" not in wanted:
        quiet_now = quiet or launch.follows()
        yes = work.may_fetch(model, job.request.revision, folder / "job.json", yes=yes, quiet=quiet_now)
    if launch.follows():
        return launch.follow(job.resumed(wanted.get("device"), None, model, wanted.get("devices")))
    launch.start_ranks(wanted.get("devices"), job.request.height, ["--yes"] if yes else [])
    with work.watching(quiet, job.request.count) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            results = pipeline.resume(
                run, save_latent=save_latent, fetch=yes, on_event=on_event, on_failure=launch.end_of_rank, **wanted
            )
    print_results(results, as_json, quiet)
