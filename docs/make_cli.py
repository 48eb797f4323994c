"""Write docs/cli.md from the help texts of the command line: python docs/make_cli.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from handscroll.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
OPENING = """\
# The command line

Results are printed on stdout, everything else on stderr. `--json` prints one JSON value on stdout instead, a failure
as `{"error": {"code": ..., "message": ...}}`.

This page is what `--help` prints: it is written by `docs/make_cli.py`.
"""


def page() -> str:
    """The whole page, as it should be."""
    return "\n".join([OPENING, *(f"## `{name}`\n\n```text\n{text}\n```\n" for name, text in helps())])


def helps() -> Iterator[tuple[str, str]]:
    """Each command and its help, without colour, the program itself first."""
    program = typer.main.get_command(app)
    top = typer.Context(program, info_name="handscroll", terminal_width=WIDTH)
    yield "handscroll", program.get_help(top)
    for name in program.list_commands(top):
        command = program.get_command(top, name)
        context = typer.Context(command, parent=top, info_name=name, terminal_width=WIDTH)
        yield f"handscroll {name}", command.get_help(context)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
