"""`handscroll decode`: a picture from a kept latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from handscroll.cli import work
from handscroll.cli.options import Json, Quality, Quiet, Yes, output_option, takes_options
from handscroll.cli.output import print_results
from handscroll.options import fields_of
from handscroll.request import Request


@takes_options("decode")
def decode(
    latent: Annotated[Path, typer.Argument(metavar="LATENT.safetensors", help="What `--save-latent` kept.")],
    output: Annotated[Path, output_option("The picture to write.")],
    *,
    quality: Quality = None,
    yes: Yes = False,
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
    if "model" not in wanted:
        yes = _may_fetch(latent, wanted.get("revision"), yes=yes, quiet=quiet)
    with work.watching(quiet) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            result = pipeline.decode_latent(latent, output, quality=quality, fetch=yes, on_event=on_event, **wanted)
    print_results([result], as_json, quiet)


def _may_fetch(latent: Path, revision: str | None, *, yes: bool, quiet: bool) -> bool:
    """Whether the model that a latent's file names may be fetched. What else is wrong with the file, decoding says."""
    from handscroll.errors import CheckpointError
    from handscroll.jobs.latent_file import describe_latent

    try:
        described = describe_latent(latent)
    except CheckpointError:
        return yes
    named = described[1] if described else {}
    if not named.get("model"):
        return yes
    return work.may_fetch(named["model"], revision or named.get("revision") or None, latent, yes=yes, quiet=quiet)
