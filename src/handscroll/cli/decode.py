"""`handscroll decode`: a picture from a kept latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handscroll.cli import work
from handscroll.cli.options import Decode, Device, Json, Memory, Output, Patches, Precision, Quality, Quiet, StripRows
from handscroll.cli.output import print_results
from handscroll.units import parse_bytes


def decode(
    latent: Annotated[Path, typer.Argument(metavar="LATENT.safetensors", help="What `--save-latent` kept.")],
    output: Output,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER|HUB_ID", help="Whose autoencoder to use. Left out, the one in the file."),
    ] = None,
    memory: Memory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    decode: Decode = "rows",
    patches: Patches = 32,
    strip_rows: StripRows = None,
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a kept latent into a picture.

    \b
      handscroll generate "a quiet lake" -o lake.png --save-latent lake.safetensors
      handscroll decode lake.safetensors -o lake.tif
    """
    work.refuse_early(model, output)
    with work.watching(quiet) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            result = pipeline.decode_latent(
                latent,
                output,
                model=model,
                precision=precision,
                device=device,
                decode=decode,
                patches=patches,
                strip_rows=strip_rows,
                memory_bytes=None if memory is None else parse_bytes(memory),
                on_event=on_event,
                quality=quality,
            )
    print_results([result], as_json, quiet)
