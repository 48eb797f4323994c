"""`handscroll decode`: a picture from a kept latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from handscroll.cli import work
from handscroll.cli.options import Json, Quality, Quiet, output_option, takes_options
from handscroll.cli.output import print_results
from handscroll.options import fields_of
from handscroll.request import Request


@takes_options("decode")
def decode(
    latent: Annotated[Path, typer.Argument(metavar="LATENT.safetensors", help="What `--save-latent` kept.")],
    output: Annotated[Path, output_option("The picture to write.")],
    *,
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Turn a kept latent into a picture.

    \b
      handscroll generate "a quiet lake" -o lake.png --save-latent lake.safetensors
      handscroll decode lake.safetensors -o lake.tif
    """
    wanted = fields_of(Request, options, "decode")
    work.refuse_early(wanted.get("model"), output)
    with work.watching(quiet) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            result = pipeline.decode_latent(latent, output, quality=quality, on_event=on_event, **wanted)
    print_results([result], as_json, quiet)
