"""`handscroll compare`: how far two pictures are from each other, or one request under two settings."""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handscroll.cli import work
from handscroll.cli.options import Json, Quiet, output_option, takes_options
from handscroll.cli.output import print_text, to_json
from handscroll.errors import FormatError, OutputError, UsageError
from handscroll.options import options_of
from handscroll.pictures.naming import words_of
from handscroll.request import RANDOM_SEED, Request, random_seed
from handscroll.units import first_line, shown

if TYPE_CHECKING:
    from handscroll.pictures.comparing import Comparison
    from handscroll.plan.plan import Plan

# Of a file's name: what file systems hold less a seed, settings and a suffix.
MOST_NAME_BYTES, MOST_LABEL = 70, 40
SETTINGS = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME=VALUE,...",
        help="Twice: paint the prompt under these options, as precision=int8, and compare what comes out.",
    ),
]


@takes_options("compare")
def compare(
    one: Annotated[str, typer.Argument(metavar="PICTURE|PROMPT", help="The one to compare with.")],
    other: Annotated[Path | None, typer.Argument(metavar="PICTURE", help="Another of the same size.")] = None,
    *,
    settings: SETTINGS = None,
    output: Annotated[Path | None, output_option("A page with both under a slider: FILE.html.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Say how far two pictures of one size are from each other, or one prompt under two settings.

    \b
      handscroll compare lake.png lake-int8.png -o lake.html
      handscroll compare "a quiet lake" --with precision=fp32 --with precision=int8,steps=10 --size 1024 -o lake.html

    What is painted is kept, in files named after the prompt and the settings.
    """
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise FormatError(f"{output}: a comparison is a page; give a name that ends in .html")
    if settings is None:
        if other is None:
            raise UsageError("compare takes two pictures, or a prompt and --with twice")
        given, plain = Request.of("a", **options), Request("a")
        for each in options_of(Request):
            if any(getattr(given, field) != getattr(plain, field) for field in each.fields):
                raise UsageError(f"{each.flag} is for what is painted: two pictures are compared as they are")
        pictures = Path(one), other
    else:
        if other is not None:
            raise UsageError(f"{other}: with --with there is a prompt and no second picture")
        requests = _requests(one, settings, options)
        pictures = _painted(requests, settings, output, quiet)
    _told(*pictures, output, as_json, settings)


def _requests(prompt: str, settings: list[str], options: dict[str, Any]) -> list[Request]:
    """The prompt's request under each of two settings, of one seed and size. Raises UsageError."""
    if len(settings) != 2:
        raise UsageError(f"--with is given twice, once for each picture; here it is given {len(settings)} times")
    seed = options.get("seed")
    if seed is None or seed == RANDOM_SEED:
        options = {**options, "seed": random_seed()}
    requests = [Request.of(prompt, **{**options, **_values(each)}) for each in settings]
    if requests[0] == requests[1]:
        raise UsageError(f"both --with ask for the same, {shown(settings[0])}")
    return requests


def _values(settings: str) -> dict[str, str]:
    """`precision=int8, steps=10` -> a value for each name. Raises UsageError."""
    found: dict[str, str] = {}
    for each in settings.split(","):
        name, equals, value = each.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name or not value.strip():
            raise UsageError(
                f"--with {shown(settings)} is not understood; use NAME=VALUE,..., as precision=int8,steps=10"
            )
        if not any(each.is_for("compare") and name in (each.name, *each.fields) for each in options_of(Request)):
            raise UsageError(f"--with {shown(settings)}: {shown(name)} is no option of compare")
        if name == "seed":
            raise UsageError("both pictures have one seed: say it outside --with, as --seed 7")
        if name in found:
            raise UsageError(f"--with {shown(settings)} says {name} twice")
        found[name] = value.strip()
    return found


def _painted(requests: list[Request], settings: list[str], output: Path | None, quiet: bool) -> tuple[Path, Path]:
    """Both pictures, beside the page or in the current folder, in files that were not there."""
    if output is not None and output.is_dir():
        raise OutputError(f"{output}: is a folder; give the name of a page")
    folder = Path() if output is None else output.parent
    for request in requests:
        work.refuse_early(request.model, folder / "p.png", request.width, request.height)
    with work.watching(quiet) as on_event:
        from handscroll import pipeline

        with work.imports_set_aside():
            # What either would be refused for is said before the first is painted.
            plans = [pipeline.plan_of(request)[1] for request in requests]
    sizes = [f"{plan.width}x{plan.height}" for plan in plans]
    if sizes[0] != sizes[1]:
        raise UsageError(f"both pictures must be of one size, not {' and '.join(sizes)}; add --size")
    names = _names(folder, requests[0], plans[0], settings)
    for request, path in zip(requests, names, strict=True):
        if path.exists():  # of a run that was interrupted in the second
            continue
        with work.watching(quiet) as on_event, work.imports_set_aside():
            pipeline.generate(request, path, on_event=on_event)
    return names


def _names(folder: Path, request: Request, plan: Plan, settings: list[str]) -> tuple[Path, Path]:
    """`a-quiet-lake-7-precision-int8.png`: names that no picture has yet, or those of a run to go on with."""
    words = words_of(request.prompt)
    if len(words.encode()) > MOST_NAME_BYTES:  # settings and seed come behind them
        words = ""
    stem = f"{words or 'picture'}-{request.seed}"
    labels = [re.sub(r"[^a-z0-9.]+", "-", each.lower()).strip("-.")[:MOST_LABEL] for each in settings]
    if labels[0] == labels[1]:
        labels = [f"{label}-{letter}" for label, letter in zip(labels, "ab", strict=True)]
    for number in itertools.count(1):
        suffix = f"-{number}.png" if number > 1 else ".png"
        first, second = (folder / f"{stem}-{label}{suffix}" for label in labels)
        if not second.exists() and (not first.exists() or _is_of(first, request, plan)):
            return first, second
    raise AssertionError


def _is_of(picture: Path, request: Request, plan: Plan) -> bool:
    """Whether a picture that is there was painted by this request: by what its file says."""
    from handscroll.pictures.metadata import read_parameters

    try:
        told = read_parameters(picture)
    except (FormatError, OSError):
        return False
    facts = (f"Seed: {request.seed}", f"Size: {plan.width}x{plan.height}", f"Steps: {plan.steps}", str(plan.precision))
    return told.startswith(request.prompt.strip()) and all(fact in told for fact in facts)


def _told(one: Path, other: Path, output: Path | None, as_json: bool, settings: list[str] | None) -> None:
    from handscroll.pictures.comparing import compare_pictures, write_page

    if output is not None and output.exists() and any(os.path.samefile(output, each) for each in (one, other)):
        raise OutputError(f"{output}: is one of the pictures")
    found = compare_pictures(one, other)
    if output is not None:
        try:
            write_page(one, other, found, output)
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror or first_line(error)}") from error
    if as_json:
        told = found.as_dict() | {"pictures": [str(one), str(other)], "page": None if output is None else str(output)}
        print(to_json(told | {"with": settings}))
        return
    painted = "" if settings is None else f"{one}\n{other}\n"
    print_text(painted + _line(found))


def _line(found: Comparison) -> str:
    psnr = "equal in every sample" if math.isinf(found.psnr) else f"PSNR {found.psnr:.2f} dB"
    return (
        f"{psnr}, SSIM {found.ssim:.4f}, largest difference {found.largest} of 255, "
        f"{found.differing:.1%} of samples differ"
    )
