"""`handscroll generate`: a picture from a prompt."""

from __future__ import annotations

import dataclasses
import re
import sys
from itertools import count as numbers
from pathlib import Path
from typing import Annotated, Any

import typer

from handscroll.cli import work
from handscroll.cli.options import Json, Quality, Quiet, SaveLatent, output_option, takes_options
from handscroll.cli.output import print_results
from handscroll.errors import PromptError
from handscroll.request import Request, indexed, random_seed

NAME_WORDS, NAME_CHARACTERS = 6, 48  # of a prompt, in the name of a file that was given none


@takes_options("generate")
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to paint; `-` reads it from stdin.")],
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
    request = Request.of(_read_stdin() if prompt == "-" else prompt, **options)
    if request.seed is None and output is None:
        # A name of the prompt's wants the seed now; for a given file, an unfinished run may remember the one it drew.
        request = dataclasses.replace(request, seed=random_seed())
    path = output or _free_name(request)
    work.refuse_early(request.model, path, request.width, request.height, save_latent)
    with work.watching(quiet, request.count) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            results = pipeline.generate(request, path, save_latent=save_latent, on_event=on_event, quality=quality)
    print_results(results, as_json, quiet)


def _read_stdin() -> str:
    if sys.stdin is None:
        raise PromptError("there is no standard input to read the prompt from")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise PromptError("the prompt on standard input is not UTF-8 text") from error


def _free_name(request: Request) -> Path:
    """A name of the prompt's first words and the seed, in the current folder, that no picture has yet."""
    words = re.findall(r"[^\W_]+", request.prompt.lower())[:NAME_WORDS]
    name = f"{'-'.join(words)[:NAME_CHARACTERS].strip('-') or 'picture'}-{request.seed}"
    names = (Path(f"{name}.png" if number == 1 else f"{name}-{number}.png") for number in numbers(1))
    return next(
        path
        for path in names
        if not any(indexed(path, index, request.count).exists() for index in range(request.count))
    )
