"""`handscroll models`: the models and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from handscroll.cli.options import Json
from handscroll.cli.output import columns, to_json
from handscroll.units import gibibytes

if TYPE_CHECKING:
    from handscroll.models.inventory import Model


def models(as_json: Json = False) -> None:
    """List the models by name, and where they are.

    \b
      handscroll models
      handscroll models --json
    """
    from handscroll.models.inventory import inventory

    found = inventory()
    print(to_json([model.as_dict() for model in found]) if as_json else _models_table(found))


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
    terms = dict.fromkeys(model.licence for model in found if ":" in model.licence)
    return "\n".join([*lines, "", *terms] if terms else lines)
