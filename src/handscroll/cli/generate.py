"""`handscroll generate`: a picture from a prompt."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from handscroll.cli import launch, work
from handscroll.cli.options import Json, Quality, Quiet, SaveLatent, output_option, takes_options
from handscroll.cli.output import print_results
from handscroll.errors import PromptError
from handscroll.pictures.naming import free_name
from handscroll.request import Request, random_seed


@takes_options("generate")
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="What to paint; `-` reads it from stdin. One that begins with - goes last, after --."
        ),
    ],
    output: Annotated[
        Path | None,
        output_option(
            "The picture to write: .png, .jpg, .webp, .tif or .dzi. Left out, a new .png named after the prompt."
        ),
    ] = None,
    *,
    save_latent: SaveLatent = None,
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Paint a picture from a prompt and print where it was written.

    \b
      handscroll generate "snowy mountains at dusk" -o dusk.png
      handscroll generate "a quiet lake" --size 8192x4096 --memory 2GiB --seed 7 --count 3 -o lake.tif
      handscroll generate - --json < prompt.txt
    """
    if prompt == "-" and launch.reads_nothing(options["devices"]):
        prompt = "what the first rank reads"
    request = Request.of(_read_stdin() if prompt == "-" else prompt, **options)
    if launch.follows():
        return launch.follow(request)
    if request.seed is None and output is None:
        # A name of the prompt's wants the seed now; for a given file, an unfinished run may remember the one it drew.
        request = dataclasses.replace(request, seed=random_seed())
    path = output or free_name(request)
    work.refuse_early(request.model, path, request.width, request.height, save_latent)
    launch.start_ranks(request.devices, request.height)
    with work.watching(quiet, request.count) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            results = pipeline.generate(
                request,
                path,
                save_latent=save_latent,
                on_event=on_event,
                quality=quality,
                on_failure=launch.end_of_rank,
            )
    print_results(results, as_json, quiet)


def _read_stdin() -> str:
    if sys.stdin is None:
        raise PromptError("there is no standard input to read the prompt from")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise PromptError("the prompt on standard input is not UTF-8 text") from error
