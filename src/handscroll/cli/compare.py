"""`handscroll compare`: how far two pictures are from each other."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from handscroll.cli.options import Json, output_option
from handscroll.cli.output import print_text, to_json
from handscroll.errors import FormatError, OutputError
from handscroll.units import first_line


def compare(
    one: Annotated[Path, typer.Argument(metavar="PICTURE", help="The one to compare with.")],
    other: Annotated[Path, typer.Argument(metavar="PICTURE", help="Another of the same size.")],
    *,
    output: Annotated[Path | None, output_option("A page with both under a slider: FILE.html.")] = None,
    as_json: Json = False,
) -> None:
    """Say how far two pictures of one size are from each other.

    \b
      handscroll compare lake.png lake-int8.png
      handscroll compare lake.png lake-int8.png -o lake.html
    """
    from handscroll.pictures.comparing import compare_pictures, write_page

    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise FormatError(f"{output}: a comparison is a page; give a name that ends in .html")
    if output is not None and output.exists() and any(os.path.samefile(output, each) for each in (one, other)):
        raise OutputError(f"{output}: is one of the pictures")
    found = compare_pictures(one, other)
    if output is not None:
        try:
            write_page(one, other, found, output)
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror or first_line(error)}") from error
    if as_json:
        print(to_json(found.as_dict() | {"page": None if output is None else str(output)}))
        return
    psnr = "equal in every sample" if math.isinf(found.psnr) else f"PSNR {found.psnr:.2f} dB"
    print_text(
        f"{psnr}, SSIM {found.ssim:.4f}, largest difference {found.largest} of 255, "
        f"{found.differing:.1%} of samples differ"
    )
