"""The command line: one function a command, in a file of its own; here errors become exit codes.

Results go to stdout, everything else to stderr. Importing this module loads nothing heavy, so that `--help` is instant:
what a command needs, it imports itself.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from handscroll.cli.batch import batch
from handscroll.cli.bench import bench
from handscroll.cli.compare import compare
from handscroll.cli.dashes import prompts_apart, way_out
from handscroll.cli.decode import decode
from handscroll.cli.doctor import doctor
from handscroll.cli.generate import generate
from handscroll.cli.info import info
from handscroll.cli.launch import called_with, follows
from handscroll.cli.models import models
from handscroll.cli.output import to_json
from handscroll.cli.plan import plan
from handscroll.cli.quantize import quantize
from handscroll.cli.resume import resume
from handscroll.errors import Cancelled, HandscrollError, is_out_of_memory
from handscroll.units import one_line
from handscroll.version import __version__

MAX_REASON = 300  # characters, of what a library says of an error that nobody expected
INTERRUPTED = Cancelled.exit_code

app = typer.Typer(
    add_completion=False,
    add_help_option=False,  # the program's own below has a default, which typer need not convert: 0.1 s of `--help`
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"handscroll {__version__}")
        raise typer.Exit


def _print_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        print(context.get_help())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def handscroll(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    help: Annotated[
        bool,
        typer.Option("--help", "-h", callback=_print_help, is_eager=True, help="Show this message and exit."),
    ] = False,
) -> None:
    """Pictures of any size from text, row by row, exactly, in the memory you have.

    \b
      handscroll generate "snowy mountains at dusk" -o dusk.png
      handscroll generate "a bay in fog" --model sana-1.6b-4k --size 4096 -o bay.webp
      handscroll doctor

    Results are printed on stdout, everything else on stderr. Exit codes: 0 done, 1 failed, 2 bad usage,
    3 does not fit --memory, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


for command in (generate, batch, decode, plan, resume, quantize, compare, info, models, doctor, bench):
    app.command()(command)


# Typer's own, or click's: that depends on the version.
_USAGE_FAULTS: tuple[Any, ...] = typer.BadParameter.__bases__


def main() -> None:
    """The `handscroll` command."""
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its network code tells every try; we tell the last one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Whatever goes wrong becomes one line on stderr."""
    try:
        exit_code = _attempt(arguments)
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        # Whoever read stdout has left; nothing more may be written there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _attempt(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    called_with[:] = arguments
    try:
        with command.make_context("handscroll", prompts_apart(command, arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        exit_code, line, facts = _told(error, way_out(arguments))
        print(line, file=sys.stderr)
        if "--json" in arguments and not follows():
            print(to_json({"error": facts}))
        return exit_code
    return 0


def _told(error: Any, hint: str = "") -> tuple[int, str, dict[str, Any]]:
    """Exit code, the line for stderr, and the error as `--json` shows it. What can be gone on with is said last.

    hint: what is added to an error of how the command line was written.
    """
    exit_code, opening, facts = _described(error)
    if isinstance(error, _USAGE_FAULTS):
        facts["message"] += hint
    facts["message"] = "; ".join([facts["message"], *getattr(error, "__notes__", ())])
    return exit_code, opening + one_line(facts["message"]), facts


def _described(error: Any) -> tuple[int, str, dict[str, Any]]:
    if isinstance(error, HandscrollError):
        return error.exit_code, "" if isinstance(error, Cancelled) else "error: ", error.as_dict()
    if isinstance(error, _USAGE_FAULTS):
        message = one_line(error.format_message()).rstrip(".")
        return 2, "error: ", {"code": "bad_usage", "message": message}
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "", {"code": "interrupted", "message": "interrupted"}
    if os.environ.get("HANDSCROLL_TRACEBACK"):
        traceback.print_exception(error)
    if is_out_of_memory(error):
        code = "out_of_memory"
        message = "out of memory; try --decode rows, a smaller --strip-rows or --size, or --device cpu"
    else:
        code = "unexpected"
        said = one_line(f"{type(error).__name__}: {error}", MAX_REASON)
        message = f"{said}; this is a fault in handscroll itself, please report it: HANDSCROLL_TRACEBACK=1 shows where"
    return 1, "error: ", {"code": code, "message": message}
