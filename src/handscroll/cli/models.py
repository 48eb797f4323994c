"""`handscroll models`: the models and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from handscroll.cli.options import Json
from handscroll.cli.output import columns, print_text, to_json
from handscroll.units import gibibytes

if TYPE_CHECKING:
    from handscroll.models.inventory import Model

Check = Annotated[
    bool,
    typer.Option("--check", help="Read all that was fetched and compare it with its checksums, which takes a while."),
]


def models(check: Check = False, as_json: Json = False) -> None:
    """List the models by name, and where they are.

    \b
      handscroll models
      handscroll models --check
      handscroll models --json

    With --check, leaves with exit code 1 if a file is damaged, and says which to delete: it is then fetched anew.
    """
    from handscroll.models.inventory import inventory

    found = inventory(check=check)
    if as_json:
        print(to_json([model.as_dict() for model in found]))
    else:
        print_text(_models_table(found))
    if any(model.damaged for model in found):
        raise typer.Exit(1)


def _models_table(found: Sequence[Model]) -> str:
    header = ("NAME", "PIXELS", "PRECISION", "SIZE", "LICENCE", "ON THIS MACHINE")
    rows = [
        (
            model.name,
            str(model.native_px),
            model.precision,
            gibibytes(model.n_bytes) if model.n_bytes is not None else "",
            model.licence.partition(":")[0],
            str(model.folder or ("not fetched" if model.hub_id else "not installed")),
        )
        for model in found
    ]
    lines = columns([header, *rows])
    terms = list(dict.fromkeys(model.licence for model in found if ":" in model.licence))
    damaged = [
        f"{model.name} is damaged: delete {blob}, and it is fetched anew"
        for model in found
        for blob in model.damaged or ()
    ]
    return "\n".join([*lines, *(["", *terms] if terms else []), *(["", *damaged] if damaged else [])])
