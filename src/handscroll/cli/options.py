"""What commands take: a table's options as typer knows them, and those that say nothing about the picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from handscroll.options import Option, options_of
from handscroll.request import Request

Command = TypeVar("Command", bound=Callable[..., None])

# Options of several commands that are not in the table, since they say where results go and not what they are.


def output_option(help: str) -> Any:
    """`--output FILE`, or `-o`; each command says what it writes, and where without it."""
    return typer.Option("--output", "-o", metavar="FILE", help=help)


SaveLatent = Annotated[
    Path | None, typer.Option(metavar="FILE.safetensors", help="Keep the latent too, for `handscroll decode`.")
]
Quality = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=100, help="Of JPEG, WebP and Deep Zoom; others are lossless.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, for programs.")]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Fetch the model that the file names, if it is not here, and ask nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]


def takes_options(command: str, table: type = Request) -> Callable[[Command], Command]:
    """A decorator: `**options` of a function become the options of a table that `command` takes.

    They come after its positional parameters and before its keywords, in the table's order. What was left out is handed
    over as the default; `fields_of` makes the table's fields of them.
    """
    taken = [_parameter(each, command) for each in options_of(table) if each.is_for(command)]

    def decorate(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        parameters = [*(each for each in own if each not in keywords), *taken, *keywords]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def _parameter(each: Option, command: str) -> inspect.Parameter:
    left_to = each.left_to.get(command)
    kind: Any = str if each.parse is not None else each.kind
    found = typer.Option(each.flag, metavar=each.metavar or None, help=left_to or each.help)
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if left_to else each.default,
        annotation=Annotated[kind if kind is bool else kind | None, found],
    )
