"""`handscroll generate`: a picture from a prompt."""

from __future__ import annotations

import re
import sys
from itertools import count as numbers
from pathlib import Path
from typing import Annotated

import typer

from handscroll.cli import work
from handscroll.cli.options import (
    Compose,
    Decode,
    Device,
    Json,
    Memory,
    ModelName,
    Patches,
    Precision,
    Quality,
    Quiet,
    StripRows,
)
from handscroll.cli.output import print_results
from handscroll.errors import PromptError
from handscroll.request import DEFAULT_MODEL, Request, indexed, random_seed
from handscroll.units import parse_bytes, parse_compose, parse_size

NAME_WORDS, NAME_CHARACTERS = 6, 48  # of a prompt, in the name of a file that was given none


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to paint; `-` reads it from stdin.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The picture to write: .png, .jpg, .webp, .tif or .dzi. Left out, a new .png named after the prompt.",
        ),
    ] = None,
    model: ModelName = DEFAULT_MODEL,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels: 4096x2048, or 4096 for a square. Left out, the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps. Left out, the model's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="F", help="How closely to follow the prompt. Left out, the model's.")
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What the picture should not show.")] = "",
    seed: Annotated[int | None, typer.Option(metavar="N", help="Same seed, same picture. Left out, random.")] = None,
    compose: Compose = "auto",
    count: Annotated[int, typer.Option(metavar="N", help="Pictures of consecutive seeds: FILE-1, FILE-2, ...")] = 1,
    memory: Memory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    decode: Decode = "rows",
    patches: Patches = 32,
    strip_rows: StripRows = None,
    save_latent: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Keep the latent too, for `handscroll decode`.")
    ] = None,
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paint a picture from a prompt and print where it was written.

    \b
      handscroll generate "snowy mountains at dusk" -o dusk.png
      handscroll generate "a quiet lake" --size 8192x4096 --memory 2GiB --seed 7 --count 3 -o lake.tif
      handscroll generate - --json < prompt.txt
    """
    width, height = parse_size(size) if size is not None else (None, None)
    request = Request(
        prompt=_read_stdin() if prompt == "-" else prompt,
        negative=negative,
        model=model,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        # A name of the prompt's wants the seed now; for a given file, an unfinished run may remember the one it drew.
        seed=random_seed() if seed is None and output is None else seed,
        count=count,
        precision=precision,
        device=device,
        decode=decode,
        patches=patches,
        strip_rows=strip_rows,
        memory_bytes=None if memory is None else parse_bytes(memory),
        compose_px=parse_compose(compose),
    )
    path = output or _free_name(request)
    work.refuse_early(model, path, request.width, request.height, save_latent)
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
