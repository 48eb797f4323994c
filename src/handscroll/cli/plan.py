"""`handscroll plan`: what `generate` would run, and in how much memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handscroll.cli import work
from handscroll.cli.options import Json, Quiet, output_option, takes_options
from handscroll.cli.output import columns, print_text, to_json
from handscroll.errors import UsageError
from handscroll.models.registry import resolve
from handscroll.request import Request, count_devices, device_of_rank
from handscroll.units import budget_text, duration, gibibytes, parse_latency, parse_rate

if TYPE_CHECKING:
    from handscroll.models.checkpoint import CheckpointSpec
    from handscroll.plan.communication import RankPart, Share
    from handscroll.plan.plan import PartPlan, Plan
    from handscroll.plan.search import SmallerWeights

# A CPU's budget counts what is loaded. Triton is for development there, and diffusers imports it where it is.
TRITON_COUNTS = ", of which some 70 MiB are Triton's, which a plain installation on a CPU does not load"
PLACES = {"memory": "in memory", "host": "in the host's memory", "disk": "on disk"}


@takes_options("plan")
def plan(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="As for `generate`.")] = "a landscape",
    output: Annotated[Path | None, output_option("Formats differ in what writing them takes. Left out, .png.")] = None,
    *,
    link: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Between two of --devices: 300GB/s, 100Gbit/s, ... Left out, 100Gbit/s."),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of a message between two of --devices. Left out, 20us.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Show what `generate` would run, where, and in how much memory. Reads no weights.

    \b
      handscroll plan --size 4096
      handscroll plan --model sana-1.6b-4k --size 16384 --memory 4GiB --json
      handscroll plan --model sana-1.6b-4k --devices 8 --link 450GB/s --latency 10us

    Seconds are estimates from a measurement of this machine.
    """
    request = Request.of(prompt, seed=0, **options)
    resolve(request.model)
    between = {} if link is None else {"bytes_a_second": parse_rate(link)}
    between |= {} if latency is None else {"latency_s": parse_latency(latency)}
    if between and (request.devices is None or count_devices(request.devices) == 1):
        raise UsageError("--link and --latency are between devices; say how many with --devices")
    with work.watching(quiet) as on_event:
        from handscroll import pipeline
        from handscroll.plan.communication import Link
        from handscroll.plan.table import plan_dict

        spec, found, minimum_bytes, smaller, shared = pipeline.plans_of(request, output, on_event, Link(**between))
    if as_json:
        print(to_json(plan_dict(spec, found, minimum_bytes, smaller, shared)))
        return
    counts_triton = minimum_bytes is not None and found.device == "cpu" and "triton" in sys.modules
    print_text(plan_table(spec, found, minimum_bytes) + (TRITON_COUNTS if counts_triton else ""))
    for share in shared.shares:
        print_text(_shared(share, found.ranks))
    if shared.parts:
        print_text(_parts(shared.parts, request.devices or ""))
    for each in smaller:
        print_text(_offer(each))


def plan_table(spec: CheckpointSpec, plan: Plan, minimum_bytes: int | None) -> str:
    """A heading, a line a stage, and what it comes to."""
    from handscroll.plan.unused import guidance_used

    budget = "no budget" if plan.budget_bytes is None else f"budget {gibibytes(plan.budget_bytes, decimals=2)}"
    used = guidance_used(spec, plan)
    guidance = "no guidance" if used is None else f"guidance {used:g}"
    devices = plan.device if plan.ranks == 1 else f"each of {plan.ranks} devices ({plan.device})"
    heading = (
        f"{spec.name}, {plan.width}x{plan.height}, {_steps(plan)}, {guidance}, {plan.precision} on {devices}, {budget}"
    )
    rows = [("STAGE", "PEAK", "ABOUT", "HOW")]
    for name, stage in plan.own_parts.items():
        if name == "encode":
            rows += [_row_on_the_way(size) for size in plan.sizes[:-1]]
        rows.append((name, gibibytes(stage.peak_bytes, decimals=2), duration(stage.seconds), _how(stage, spec)))
    total_seconds = sum(plan.planned_seconds.values())
    peak = "" if plan.planned_peak_bytes is None else f"peak {gibibytes(plan.planned_peak_bytes, decimals=2)}, "
    least = "" if minimum_bytes is None else f"; the least that would do is --memory {budget_text(minimum_bytes)}"
    return "\n".join([heading, "", *columns(rows), "", f"{peak}about {duration(total_seconds)} a picture{least}"])


def _shared(share: Share, ranks: int) -> str:
    """What one of several devices does of a step or of decoding."""
    from handscroll.plan.stages import BY_NAME

    what = f"a {share.name}" if share.name not in BY_NAME else BY_NAME[share.name].title
    sent = f"{share.traffic.bytes / 1e6:.1f} MB in {share.traffic.messages} messages"
    return (
        f"each of {ranks} devices: {what} about {duration(share.seconds)}, sends {sent}, "
        f"efficiency {share.efficiency:.0%}"
    )


def _parts(parts: Sequence[RankPart], devices: str) -> str:
    """A line for every device."""
    rows: list[tuple[str, ...]] = [("RANK", "DEVICE", "ROWS", "OF A STEP", "SENDS", "DECODING SENDS")]
    for each in parts:
        sent = [f"{n_bytes / 1e6:.1f} MB" for n_bytes in (each.step_sent_bytes, each.decode_sent_bytes)]
        device = device_of_rank(devices, each.rank)
        rows.append((str(each.rank), device, f"{each.first_row} to {each.stop_row}", f"{each.step_part:.1%}", *sent))
    return "\n".join(["", *columns(rows), ""])


def _offer(smaller: SmallerWeights) -> str:
    """What it would take with smaller weights."""
    peak = "" if smaller.planned_peak_bytes is None else f"peak {gibibytes(smaller.planned_peak_bytes, decimals=2)}, "
    least = "" if smaller.minimum_bytes is None else f"; at least --memory {budget_text(smaller.minimum_bytes)}"
    about = f"about {duration(smaller.seconds)} a picture"
    return f"with --precision {smaller.precision}, close to this picture: {peak}{about}{least}"


def _steps(plan: Plan) -> str:
    return f"{plan.steps} steps" if plan.smaller is None else f"{plan.steps_here} of {plan.steps} steps"


def _row_on_the_way(size: Plan) -> tuple[str, str, str, str]:
    """One line for all parts of a smaller picture."""
    parts = size.own_parts.values()
    peak_bytes, seconds = max(part.peak_bytes for part in parts), sum(part.seconds for part in parts)
    name, what = ("compose", "composed") if size.smaller is None else ("grow", "grown")
    steps = f"{size.steps_here} step{'s' * (size.steps_here != 1)}"
    how = f"{what} at {size.width}x{size.height} in {steps}, decoded and enlarged"
    return name, gibibytes(peak_bytes, decimals=2), duration(seconds), how


def _how(stage: PartPlan, spec: CheckpointSpec) -> str:
    from handscroll.plan.decode import DecodeStage
    from handscroll.plan.denoise import DenoiseStage
    from handscroll.plan.text import TextStage

    match stage:
        case TextStage():
            return f"{stage.tokens} tokens, layers read one at a time"
        case DenoiseStage():
            layers = spec.transformer.num_layers
            streamed = layers - stage.resident_layers
            weights = f"{layers} layers in memory" if not streamed else f"{streamed} of {layers} layers read every step"
            residual = "" if stage.residual == "memory" else f", token maps {PLACES[stage.residual]}"
            weights += " and laid out one at a time" if stage.lay_out else ""
            residual += "" if stage.together else ", one forward after the other"
            return f"row blocks of {_rows(stage.band_rows)}, {weights}{residual}"
        case DecodeStage():
            heights = [sweep.strip_rows for sweep in stage.sweeps]
            spilled = {sweep.store for sweep in stage.sweeps[1:] if sweep.store in ("host", "disk")}
            remarks = [f"{sum(s.store == where for s in stage.sweeps)} maps {PLACES[where]}" for where in spilled]
            if stage.recomputed:
                remarks.append(f"{sum(sweep.store is None for sweep in stage.sweeps)} maps recomputed")
            span = f"{min(heights)} to {max(heights)} rows" if len(set(heights)) > 1 else _rows(heights[0])
            return ", ".join([f"{len(heights)} sweeps in row blocks of {span}", *(remarks or ["maps in memory"])])


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
