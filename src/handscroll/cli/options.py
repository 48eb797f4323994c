"""The options that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handscroll.request import DECODES, PRECISIONS

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The picture to write.")]
ModelName = Annotated[str, typer.Option("--model", metavar="NAME|FOLDER|HUB_ID", help="What `models` lists, or yours.")]
Precision = Annotated[str, typer.Option(metavar="|".join(PRECISIONS), help="What to compute in.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="What to compute on.")]
Decode = Annotated[
    str,
    typer.Option(
        metavar="|".join(DECODES),
        help="From latent to pixels: by rows, exact in little memory; or as others do it, to compare: whole, exact; "
        "in blended tiles, inexact; with each convolution cut in patches, exact.",
    ),
]
Patches = Annotated[int, typer.Option(metavar="N", help="Patches of --decode patch.")]
StripRows = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Height of the strips of --decode rows: fewer take less memory. Left out, the size decides."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Stay within 6GiB, 800MiB, ...: the whole process on a CPU, what PyTorch reserves on a GPU. Left out, as "
        "is fastest on this machine.",
    ),
]
Compose = Annotated[
    str,
    typer.Option(
        metavar="auto|off|PIXELS",
        help="Lay a much larger picture out at about this size squared, and let it grow from there: fewer things "
        "multiply, and it takes less time. auto: as the model does, off: at full size from the first step.",
    ),
]
Quality = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=100, help="Of JPEG, WebP and Deep Zoom; others are lossless.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
