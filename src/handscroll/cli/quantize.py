"""`handscroll quantize`: a checkpoint folder with its matrices in 8 or 4 bits."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from handscroll.cli import work
from handscroll.cli.options import Json, Quiet
from handscroll.cli.output import columns, print_text, to_json
from handscroll.errors import UsageError
from handscroll.models.quantisation import STORAGES
from handscroll.request import TextPrecisionName
from handscroll.units import gibibytes, shown

if TYPE_CHECKING:
    from handscroll.runtime.quantising import Report

TEXT_STORED = tuple(each for each in get_args(TextPrecisionName) if each != "auto")


def quantize(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER|HUB_ID", help="What `models` lists, or yours.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")],
    *,
    precision: Annotated[
        str, typer.Option(metavar="|".join(STORAGES), help="What to keep the transformer's weights in.")
    ] = "",
    text_precision: Annotated[
        str, typer.Option(metavar="|".join(TEXT_STORED), help="What to keep the text encoder's weights in.")
    ] = "",
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the hub's.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model with smaller weights. Its pictures are close to the original's, and not the same.

    \b
      handscroll quantize sana-1.6b-4k --precision int8 --text-precision int4 -o sana-int8
      handscroll generate "a quiet lake" --model ./sana-int8

    The folder appears when it is whole; after an interruption the same command goes on. `quantisation.json` in it says
    by how much every matrix errs.
    """
    storages = {"transformer": precision, "text_encoder": text_precision}
    storages = {component: storage for component, storage in storages.items() if storage}
    if not storages:
        raise UsageError(f"say what to make smaller: --precision {', '.join(STORAGES)}, or --text-precision")
    for component, storage in storages.items():
        known = STORAGES if component == "transformer" else TEXT_STORED
        if storage not in known:
            name = "precision" if component == "transformer" else "text precision"
            raise UsageError(f"{name} {shown(storage)} is not known; use {', '.join(known)}")
    with work.watching(quiet) as on_event:
        from handscroll.models.opening import on_fetch, open_checkpoint
        from handscroll.runtime.quantising import quantise_folder

        spec = open_checkpoint(model, revision, on_progress=on_fetch(on_event))
        report = quantise_folder(spec, storages, output, on_event)
    print_text(to_json(report.as_dict()) if as_json else _table(report))


def _table(report: Report) -> str:
    """A line for every kind of matrix: how many, in what form, by how much they err, their bytes before and after."""
    kinds = defaultdict(list)
    for matrix in report.matrices:
        component, _, name = matrix.name.partition(": ")
        kind = ".".join(
            part for part in name.removesuffix(".weight").split(".")[1:] if not part.isdigit() or part == "0"
        )
        kinds[component, kind.removeprefix("0.").removeprefix("layers."), str(matrix.form)].append(matrix)
    rows = [("MATRICES", "", "KEPT IN", "ERROR", "LARGEST", "BEFORE", "AFTER")]
    for (component, kind, form), found in kinds.items():
        errors = [matrix.error for matrix in found]
        before, after = (sum(getattr(each, f"bytes_{when}") for each in found) for when in ("before", "after"))
        name = f"{component.replace('_', ' ')}: {kind}"
        mean = sum(errors) / len(errors)
        rows.append(
            (name, str(len(found)), form, f"{mean:.2%}", f"{max(errors):.2%}", gibibytes(before), gibibytes(after))
        )
    total = f"{report.folder}: {gibibytes(report.bytes_before)} before, {gibibytes(report.bytes_after)} after"
    return "\n".join([*columns(rows), "", total])
