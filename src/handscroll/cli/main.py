"""The command line: options become a `Request`, the pipeline runs it, and what comes back is printed.

Results go to stdout, everything else to stderr. Importing this module loads nothing heavy, so that `--help` is instant:
what a command needs, it imports itself.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import count as numbers
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handscroll.errors import HandscrollError, PromptError, is_out_of_memory
from handscroll.models.registry import resolve
from handscroll.request import (
    DECODES,
    DEFAULT_MODEL,
    PRECISIONS,
    Request,
    check_choice,
    check_device,
    indexed,
    random_seed,
)
from handscroll.units import duration, gibibytes, one_line, parse_bytes, parse_compose, parse_size
from handscroll.version import __version__

if TYPE_CHECKING:
    from handscroll.events import OnEvent, Progress
    from handscroll.models.inventory import Model
    from handscroll.pipeline import Result

INTERRUPTED = 130
NAME_WORDS, NAME_CHARACTERS = 6, 48  # of a prompt, in the name of a file that was given none

# Options that commands share.

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

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"handscroll {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def handscroll(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to paint; `-` reads it from stdin.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The picture to write: .png, .jpg, .webp, .tif or .dzi. Left out, a new .png named after the prompt.",
        ),
    ] = None,
    model: ModelName = DEFAULT_MODEL,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels: 4096x2048, or 4096 for a square. Left out, the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps. Left out, the model's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="F", help="How closely to follow the prompt. Left out, the model's.")
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What the picture should not show.")] = "",
    seed: Annotated[int | None, typer.Option(metavar="N", help="Same seed, same picture. Left out, random.")] = None,
    compose: Compose = "auto",
    count: Annotated[int, typer.Option(metavar="N", help="Pictures of consecutive seeds: FILE-1, FILE-2, ...")] = 1,
    memory: Memory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    decode: Decode = "rows",
    patches: Patches = 32,
    strip_rows: StripRows = None,
    save_latent: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Keep the latent too, for `handscroll decode`.")
    ] = None,
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paint a picture from a prompt and print where it was written.

    \b
      handscroll generate "snowy mountains at dusk" -o dusk.png
      handscroll generate "a quiet lake" --size 8192x4096 --memory 2GiB --seed 7 --count 3 -o lake.tif
      handscroll generate - --json < prompt.txt
    """
    width, height = parse_size(size) if size is not None else (None, None)
    request = Request(
        prompt=_read_stdin() if prompt == "-" else prompt,
        negative=negative,
        model=model,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        # A name of the prompt's wants the seed now; for a given file, an unfinished run may remember the one it drew.
        seed=random_seed() if seed is None and output is None else seed,
        count=count,
        precision=precision,
        device=device,
        decode=decode,
        patches=patches,
        strip_rows=strip_rows,
        memory_bytes=_bytes(memory),
        compose_px=parse_compose(compose),
    )
    path = output or _free_name(request)
    _refuse_early(model, path, request.width, request.height, save_latent)
    with _watching(quiet, request.count) as on_event:
        from handscroll import pipeline

        with _imports_set_aside():
            results = pipeline.generate(request, path, save_latent=save_latent, on_event=on_event, quality=quality)
    _print_results(results, as_json, quiet)


@app.command()
def decode(
    latent: Annotated[Path, typer.Argument(metavar="LATENT.safetensors", help="What `--save-latent` kept.")],
    output: Output,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER|HUB_ID", help="Whose autoencoder to use. Left out, the one in the file."),
    ] = None,
    memory: Memory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    decode: Decode = "rows",
    patches: Patches = 32,
    strip_rows: StripRows = None,
    quality: Quality = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a kept latent into a picture.

    \b
      handscroll generate "a quiet lake" -o lake.png --save-latent lake.safetensors
      handscroll decode lake.safetensors -o lake.tif
    """
    _refuse_early(model, output)
    with _watching(quiet) as on_event:
        from handscroll import pipeline

        with _imports_set_aside():
            result = pipeline.decode_latent(
                latent,
                output,
                model=model,
                precision=precision,
                device=device,
                decode=decode,
                patches=patches,
                strip_rows=strip_rows,
                memory_bytes=_bytes(memory),
                on_event=on_event,
                quality=quality,
            )
    _print_results([result], as_json, quiet)


@app.command()
def plan(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="As for `generate`.")] = "a landscape",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Formats differ in what writing them takes. Left out, .png."
        ),
    ] = None,
    model: ModelName = DEFAULT_MODEL,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Left out, the model's.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps. Left out, the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="F", help="Above 1, each step takes two forwards.")] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What the picture should not show.")] = "",
    compose: Compose = "auto",
    memory: Memory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    strip_rows: StripRows = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what `generate` would run, where, and in how much memory. Reads no weights.

    \b
      handscroll plan --size 4096
      handscroll plan --model sana-1.6b-4k --size 16384 --memory 4GiB --json

    Seconds are estimates from a measurement of this machine.
    """
    width, height = parse_size(size) if size is not None else (None, None)
    request = Request(
        prompt=prompt,
        negative=negative,
        model=model,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        seed=0,
        precision=precision,
        device=device,
        strip_rows=strip_rows,
        memory_bytes=_bytes(memory),
        compose_px=parse_compose(compose),
    )
    resolve(model)
    with _watching(quiet) as on_event:
        from handscroll import pipeline
        from handscroll.plan.table import plan_dict, plan_table

        spec, found, minimum_bytes = pipeline.plan_of(request, output, on_event)
    print(_json(plan_dict(spec, found, minimum_bytes)) if as_json else plan_table(spec, found, minimum_bytes))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, such as dusk.png.run, or its picture.")],
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="What to compute on. Left out, as before.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Stay within it. Left out, as before.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was interrupted, to the same picture.

    \b
      handscroll resume dusk.png.run
      handscroll resume dusk.png --json

    While a picture is made, what is finished of it is kept beside it. `handscroll generate` with the same options goes
    on too. The folder goes once the picture is written.
    """
    from handscroll.jobs.job import find_run, read_job

    job = read_job(find_run(run))
    resolve(job.request.model)
    with _watching(quiet, job.request.count) as on_event:
        from handscroll import pipeline

        with _imports_set_aside():
            results = pipeline.resume(run, device=device, memory_bytes=_bytes(memory), on_event=on_event)
    _print_results(results, as_json, quiet)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models by name, and where they are.

    \b
      handscroll models
      handscroll models --json
    """
    from handscroll.models.inventory import inventory

    found = inventory()
    print(_json([model.as_dict() for model in found]) if as_json else _models_table(found))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine, and say what mends it.

    \b
      handscroll doctor
      handscroll doctor --json

    Shows versions, devices, memory and disk. Leaves with exit code 1 if something needed is broken.
    """
    from handscroll.runtime.health import examine

    health = examine()
    print(_json(health.as_dict()) if as_json else health.as_text())
    if not health.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    model: ModelName = DEFAULT_MODEL,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Left out, the model's.")] = None,
    precision: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine: text, one denoising step and decoding, beside the same modules run whole by diffusers.

    \b
      handscroll bench
      handscroll bench --size 2048 --json

    Needs the memory of the largest component, and leaves out what would not fit.
    """
    width, height = parse_size(size) if size is not None else (None, None)
    check_choice("precision", precision, PRECISIONS)
    check_device(device)
    resolve(model)
    with _watching(quiet) as on_event:
        from handscroll.runtime.benchmark import measure

        found = measure(model, width=width, height=height, precision=precision, device=device, on_event=on_event)
    print(_json(found.as_dict()) if as_json else found.as_text())


# Before a model is opened.


def _read_stdin() -> str:
    if sys.stdin is None:
        raise PromptError("there is no standard input to read the prompt from")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise PromptError("the prompt on standard input is not UTF-8 text") from error


def _bytes(memory: str | None) -> int | None:
    return None if memory is None else parse_bytes(memory)


def _free_name(request: Request) -> Path:
    """A name of the prompt's first words and the seed, in the current folder, that no picture has yet."""
    words = re.findall(r"[^\W_]+", request.prompt.lower())[:NAME_WORDS]
    name = f"{'-'.join(words)[:NAME_CHARACTERS].strip('-') or 'picture'}-{request.seed}"
    names = (Path(f"{name}.png" if number == 1 else f"{name}-{number}.png") for number in numbers(1))
    return next(
        path
        for path in names
        if not any(indexed(path, index, request.count).exists() for index in range(request.count))
    )


def _refuse_early(
    model: str | None, path: Path, width: int | None = None, height: int | None = None, latent: Path | None = None
) -> None:
    """Say no in a moment to what would fail anyway once the libraries are loaded, which takes seconds."""
    from handscroll.jobs.latent_file import check_latent_target
    from handscroll.pictures.targets import check_target

    check_target(path, width or 1, height or 1)
    if model is not None:
        resolve(model)
    if latent is not None:
        check_latent_target(latent)


@contextlib.contextmanager
def _imports_set_aside() -> Iterator[None]:
    """Stages collect cycles before they give memory back: 0.2 s each if all that is imported is walked too."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _watching(quiet: bool, pictures: int = 1) -> Iterator[OnEvent]:
    """The job's listener: its notices on stderr, and progress bars where somebody watches."""
    from handscroll.events import ignore

    if quiet:
        yield ignore
        return
    if not sys.stderr.isatty():
        yield _print_notice
        return
    from handscroll.cli.progress import progress_bars

    with progress_bars(pictures) as draw:

        def listen(event: Progress) -> None:
            _print_notice(event)
            draw(event)

        yield listen


def _print_notice(event: Progress) -> None:
    if event.stage == "notice":
        print(f"note: {one_line(event.detail)}", file=sys.stderr)


# What a command prints.


def _print_results(results: Sequence[Result], as_json: bool, quiet: bool) -> None:
    if as_json:
        found = [result.as_dict() for result in results]
        print(_json(found[0] if len(found) == 1 else {"pictures": found}))
        return
    for result in results:
        print(result.path)
    if not quiet:
        sys.stdout.flush()
        for note in {result.note for result in results if result.note}:
            print(f"note: {note}", file=sys.stderr)
        print(_summary(results), file=sys.stderr)


def _summary(results: Sequence[Result]) -> str:
    """`4096x4096, 12.4 min, peak 1.7 GiB (planned 1.8, budget 2.0 GiB), seed 7`; several pictures share a line."""
    first, last = results[0], results[-1]
    pictures = f"{len(results)} pictures of " if len(results) > 1 else ""
    shared_seconds = first.seconds.get("text", 0.0)  # one prompt, encoded once, counted with each picture
    seconds = sum(result.seconds["total"] - shared_seconds for result in results) + shared_seconds
    peak_bytes = max(result.memory["measured_peak_bytes"] or 0 for result in results)
    seeds = f"seed {first.seed}" if len(results) == 1 else f"seeds {first.seed} to {last.seed}"
    memory = f"peak {gibibytes(peak_bytes)}"
    if first.memory["budget_bytes"] is not None:
        planned_bytes = max(result.memory["planned_peak_bytes"] or 0 for result in results)
        memory += f" (planned {gibibytes(planned_bytes)}, budget {gibibytes(first.memory['budget_bytes'])})"
    return f"{pictures}{first.width}x{first.height}, {duration(seconds)}, {memory}, {seeds}"


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
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
    terms = dict.fromkeys(model.licence for model in found if ":" in model.licence)
    return "\n".join([*lines, "", *terms] if terms else lines)


def _json(value: object) -> str:
    return json.dumps(value, indent=2)


# Failing.

# Typer's own, or click's: that depends on the version.
_USAGE_FAULTS: tuple[Any, ...] = typer.BadParameter.__bases__


def main() -> None:
    """The `handscroll` command."""
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
    try:
        with command.make_context("handscroll", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        exit_code, line, facts = _told(error)
        print(line, file=sys.stderr)
        if "--json" in arguments:
            print(_json({"error": facts}))
        return exit_code
    return 0


def _told(error: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit code, the line for stderr, and the error as `--json` shows it. What can be gone on with is said last."""
    exit_code, opening, facts = _described(error)
    facts["message"] = "; ".join([facts["message"], *getattr(error, "__notes__", ())])
    return exit_code, opening + one_line(facts["message"]), facts


def _described(error: Any) -> tuple[int, str, dict[str, Any]]:
    if isinstance(error, HandscrollError):
        return error.exit_code, "error: ", error.as_dict()
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
        message = one_line(f"{type(error).__name__}: {error}; HANDSCROLL_TRACEBACK=1 shows where")
    return 1, "error: ", {"code": code, "message": message}
