"""Measure the ways to run a stage, side by side: time, memory, the share of the device's limit, difference from whole.

    python bench/side_by_side.py decode --sizes 1024,2048 --modes whole,tiled,rows --repeats 3 --save
    python bench/side_by_side.py decode --sizes 1024,2048,4096,16384x1024 --modes rows
    python bench/side_by_side.py denoise --sizes 2048 --model sana-1.6b --precision bf16
    python bench/side_by_side.py text
    python bench/side_by_side.py generate --sizes 4096 --model tiny-landscape --modes tiled,rows

bench/stages/ says what the ways of each stage are. Shapes are the official models', weights random, but for `generate`.
Each run is a process of its own, the first to be killed where memory runs out; the ways take turns, so that neither
memory nor a busy spell of the machine is carried from one to the next. What would not fit is not tried. Seconds and
bytes are medians; ratios are taken within each round, then their median. GFLOP/s are the whole way's work over the
seconds, whatever work a way found around it or did twice. Tables go to stderr; the last line of stdout is one JSON
object, which --save writes to results/. Leaves with exit code 1 where handscroll's own way failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

import child
import curve
import machine
import one_run
import report
import stages
from handscroll.errors import HandscrollError
from handscroll.system import available_bytes
from handscroll.units import parse_size
from stages import DTYPES, MODES, Settings, Size, Stage

DEFAULT_MODELS = {"generate": "tiny-landscape"}
# Ways that the others are held to, by ratios of each round.
BASES = ("whole", "compiled", "tiled", "tiled-1024")
OURS = ("rows", "untuned", "int8", "int8-weights", "int4", "fp8")
RATE_SIDES = {"convolution": {"cpu": 256, "cuda": 1024}, "matrix": {"cpu": 2048, "cuda": 8192}}
# What a process holds beside its tensors: libraries, code, memory that its allocator has not given back.
PROCESS_BYTES = 2**29


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run in progress ends too
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.set_num_threads(arguments.threads)
    if arguments.results:
        report.RESULTS = arguments.results
    settings = settings_of(arguments)
    with tempfile.TemporaryDirectory(prefix="handscroll-bench-", dir=arguments.scratch) as folder:
        found = head(settings, arguments) | compared(settings, arguments, Path(folder))
    report.print_and_save(found, table(found), name_of(found) if arguments.save else None)
    return 1 if any(mode in at["failed"] for at in found["sizes"] for mode in OURS) else 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages.NAMES)
    parser.add_argument("--sizes", type=sizes, default=[(1024, 1024)], help="1024,2048x2048,16384x1024")
    parser.add_argument("--modes", type=mode_names, help="comma-separated; default: all that the stage knows")
    parser.add_argument("--repeats", type=count, default=1)
    parser.add_argument("--precision", choices=DTYPES, help="default: fp32, on a CUDA device bf16")
    parser.add_argument("--model", help="denoise: a row of make_checkpoint.py; generate: a folder or a model's name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=count, help="of every measured process; default: as many as cores")
    parser.add_argument("--strip-rows", type=count, help="height of row blocks; default: by size")
    parser.add_argument("--layers", type=count, help="denoise and text: so many layers instead of all")
    parser.add_argument("--steps", type=count, help="generate: default: the model's")
    parser.add_argument(
        "--seconds", type=count, help="since it was started: end what is running then, start nothing more"
    )
    parser.add_argument(
        "--here", action="store_true", help="all runs in this process, to try the benchmark itself: peaks mean little"
    )
    parser.add_argument("--miniature", action="store_true", help="a few channels, to try the benchmark itself")
    parser.add_argument("--scratch", type=Path, help="folder on a disk for pictures, checkpoints and maps")
    parser.add_argument("--results", type=Path, help="folder to save to; default: bench/results")
    parser.add_argument("--save", action="store_true", help="write DATE-STAGE-...-MACHINE.json there")
    arguments = parser.parse_args(argv)
    stage = stages.open_stage(settings_of(arguments))
    if arguments.modes is None:
        arguments.modes = [mode for mode in stage.modes if mode not in ("untuned", "fp8") or arguments.device == "cuda"]
    if unknown := [mode for mode in arguments.modes if mode not in stage.modes]:
        parser.error(f"{arguments.stage} knows no {', '.join(unknown)}; choose from {', '.join(stage.modes)}")
    if not stage.has_size:
        arguments.sizes = [(0, 0)]
    elif odd := [size for size in arguments.sizes if size[0] % stage.multiple_px or size[1] % stage.multiple_px]:
        parser.error(f"{label(odd[0])}: sides must be multiples of {stage.multiple_px}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    return arguments


def sizes(text: str) -> list[Size]:
    try:
        return [parse_size(part) for part in text.split(",")]
    except HandscrollError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def mode_names(text: str) -> list[str]:
    """In the order of MODES, so that the whole way, which the others are held against, is first."""
    names = text.split(",")
    if unknown := set(names) - set(MODES):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MODES)}")
    return [mode for mode in MODES if mode in names]


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        stage=arguments.stage,
        model=arguments.model or DEFAULT_MODELS.get(arguments.stage, Settings.model),
        precision=arguments.precision or ("fp32" if arguments.device == "cpu" else "bf16"),
        device=arguments.device,
        miniature=arguments.miniature,
        strip_rows=arguments.strip_rows,
        layers=arguments.layers,
        steps=arguments.steps,
    )


def label(size: Size) -> str:
    return f"{size[0]}x{size[1]}" if size[0] else "a prompt"


def head(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the report begins with: all that must be the same for its numbers to be comparable with another's."""
    dated = report.dated(arguments.threads)
    if settings.device == "cpu":
        dated["machine"].pop("gpu", None)
    kept = ("precision", "device", "miniature", "strip_rows", "layers")
    stage = stages.open_stage(settings)
    found = {
        **dated,
        "stage": settings.stage,
        "model": stage.model_name,
        **{key: getattr(settings, key) for key in kept},
    }
    return {**found, "steps": getattr(stage, "steps", None), "repeats": arguments.repeats}


def name_of(found: dict[str, Any]) -> str:
    model = "" if found["stage"] in ("decode", "encode", "text") else f"-{found['model'].replace(', ', '-')}"
    of_size = "" if found["sizes"][0]["pixels"] is None else "-" + "-".join(at["size"] for at in found["sizes"]) + "px"
    return f"{found['stage']}{model}{of_size}-{found['precision']}"


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def compared(settings: Settings, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    stages.open_stage(settings).write_files(checkpoint)
    settings = replace(settings, folder=str(checkpoint))
    stage = stages.open_stage(settings)
    before = rate_of(stage)
    ends = float("inf") if arguments.seconds is None else begun() + arguments.seconds
    measured = [compare(stage, size, arguments, folder, ends) for size in arguments.sizes]
    after = rate_of(stage) if time.monotonic() < ends else before
    limit = None
    if before is not None and after is not None:
        limit = {"kind": stage.limit, "gflops": max(before, after), "before": before, "after": after}
    reported = [at_size(*each, limit) for each in measured]
    curves = {mode: each for mode in arguments.modes if (each := curve.curve_of(reported, mode))}
    return {"limit": limit, "sizes": reported, "curves": curves}


def begun() -> float:
    """When this process began, on the monotonic clock: importing libraries from a cold disk can take half a minute."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


def rate_of(stage: Stage) -> float | None:
    """The device's own rate in the stage's precision, GFLOP/s; measured before and after the runs."""
    settings = stage.settings
    if stage.limit is None:
        return None
    measure = {"convolution": machine.convolution_gflops, "matrix": machine.matmul_gflops}[stage.limit]
    side, seconds = RATE_SIDES[stage.limit][settings.device], machine.RATE_SECONDS
    if settings.miniature:
        side, seconds = 64, 0.05
    rate = measure(side, seconds, settings.dtype, settings.device)
    if settings.device != "cpu":
        torch.cuda.empty_cache()
    return rate


Runs = dict[str, list[dict[str, Any] | None]]  # of each mode, round by round; None where one failed
Measured = tuple[Size, int | None, Runs, dict[str, str]]


def compare(stage: Stage, size: Size, arguments: argparse.Namespace, folder: Path, ends: float) -> Measured:
    """All ways at one size: the work, their runs, and why some have none."""
    flop = stage.flop(size)
    runs: Runs = {mode: [] for mode in arguments.modes}
    failed: dict[str, str] = {}
    for mode in arguments.modes:
        if why := stage.pointless(own(mode), size) or too_large(stage, own(mode), size):
            failed[mode] = why
    environment = {
        "HANDSCROLL_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for repeat in range(arguments.repeats):
        for mode in arguments.modes:
            if mode in failed:
                continue
            print(f"{label(size)}, {mode}, {repeat + 1} of {arguments.repeats}: ", end="", file=sys.stderr, flush=True)
            started = time.monotonic()
            environment["HANDSCROLL_TRITON"] = str(int(mode != "untuned"))
            if arguments.here:
                outcome = run_here(stage, own(mode), size, folder, environment)
            else:
                outcome = run_child(stage.settings, own(mode), size, folder, environment, ends)
            if isinstance(outcome, str):
                failed[mode] = outcome
                told = outcome
            else:
                told = f"{outcome['seconds']:.3f} s"
            print(f"{told} (in all {time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
            runs[mode].append(None if isinstance(outcome, str) else outcome)
    one_run.reference_of(size, folder).unlink(missing_ok=True)
    return size, flop, runs, failed


def own(mode: str) -> str:
    """What a stage calls this way: without its Triton kernels too it is handscroll's."""
    return "rows" if mode == "untuned" else mode


def too_large(stage: Stage, mode: str, size: Size) -> str | None:
    """Why a way is not tried: it would take more memory than there is."""
    needed_bytes = stage.needed_bytes(mode, size)
    there_bytes = available_bytes() if stage.settings.device == "cpu" else torch.cuda.mem_get_info()[0]
    if needed_bytes is None or there_bytes is None or needed_bytes + PROCESS_BYTES <= there_bytes:
        return None
    return f"needs about {needed_bytes / 2**30:.0f} GiB of memory"


def run_child(
    settings: Settings, mode: str, size: Size, folder: Path, environment: dict[str, str], ends: float
) -> dict[str, Any] | str:
    """A run's measurement, or why there is none."""
    left_seconds = ends - time.monotonic()
    if left_seconds <= 0:
        return "no time left"
    request = json.dumps({"mode": mode, "size": size, "settings": asdict(settings), "folder": str(folder)})
    command: list[str | Path] = [sys.executable, Path(__file__).with_name("one_run.py"), request]
    try:
        done = child.run(command, environment, None if left_seconds == float("inf") else left_seconds)
    except child.ChildError as error:
        return str(error)
    return json.loads(done.stdout.splitlines()[-1]) if done.exit_code == 0 else done.why[:200]


def run_here(stage: Stage, mode: str, size: Size, folder: Path, environment: dict[str, str]) -> dict[str, Any] | str:
    """The same in this process."""
    os.environ.update(environment)
    try:
        return one_run.measure(stage, mode, size, folder, one_run.reference_of(size, folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def at_size(
    size: Size, flop: int | None, runs: Runs, failed: dict[str, str], limit: dict[str, Any] | None
) -> dict[str, Any]:
    """The report of one size."""
    modes = {}
    for mode, of_mode in runs.items():
        if any(of_mode):
            ratios = {f"{key}_over_{base}": ratio(runs, mode, base, key) for base in BASES for key in MEASURES}
            known = {name: value for name, value in ratios.items() if value is not None}
            modes[mode] = {**summary([run for run in of_mode if run], flop, limit), **known}
    pixels = size[0] * size[1] or None
    return {"size": label(size), "pixels": pixels, "flop": flop, "modes": modes, "failed": failed}


MEASURES = ("seconds", "peak_bytes")


def ratio(runs: Runs, mode: str, base: str, key: str) -> float | None:
    """The median, over the rounds in which both ran, of one way over another."""
    rounds = [
        ours[key] / theirs[key]
        for ours, theirs in zip(runs[mode], runs.get(base, []), strict=False)
        if ours and theirs and ours[key] is not None and theirs[key]
    ]
    return statistics.median(rounds) if rounds else None


def summary(runs: list[dict[str, Any]], flop: int | None, limit: dict[str, Any] | None) -> dict[str, Any]:
    """Medians of a way's runs, and their rate."""
    seconds = statistics.median(run["seconds"] for run in runs)
    gflops = None if flop is None else flop / seconds / 1e9
    differences = [run["max_difference"] for run in runs if run["max_difference"] is not None]
    found = {
        "seconds": seconds,
        "seconds_each": [run["seconds"] for run in runs],
        "peak_bytes": median(run["peak_bytes"] for run in runs),
        "max_difference": max(differences) if differences else None,
        "gflops": gflops,
        "of_limit": gflops / limit["gflops"] if gflops is not None and limit is not None else None,
    }
    if first_seconds := [run["first_seconds"] for run in runs if run.get("first_seconds") is not None]:
        found["first_seconds"] = max(first_seconds)
    if compile_seconds := [run["compile_seconds"] for run in runs if run.get("compile_seconds") is not None]:
        found["compile_seconds"] = max(compile_seconds)  # the later ones find what the first has compiled
    return found


def median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def table(found: dict[str, Any]) -> list[str]:
    limit = found["limit"]
    lines = [
        f"{found['stage']} of {found['model']}, {found['precision']}, {found['device']}, {found['repeats']} rounds"
        + (f"; measured {limit['kind']} rate {limit['gflops']:.0f} GFLOP/s" if limit else ""),
        f"{'size':>12} {'mode':<10} {'seconds':>9} {'/whole':>7} {'/tiled':>7} {'GiB':>7} {'/whole':>7} {'GFLOP/s':>8} "
        f"{'of limit':>8} {'difference':>11}",
    ]
    for at in found["sizes"]:
        for mode, each in at["modes"].items():
            gib = None if each["peak_bytes"] is None else each["peak_bytes"] / 2**30
            first = f"  at first {each['first_seconds']:.1f} s" if "first_seconds" in each else ""
            columns = (
                f"{at['size']:>12}",
                f"{mode:<10}",
                number(each["seconds"], ">9.3f"),
                number(each.get("seconds_over_whole"), ">7.2f"),
                number(each.get("seconds_over_tiled"), ">7.2f"),
                number(gib, ">7.2f"),
                number(each.get("peak_bytes_over_whole"), ">7.2f"),
                number(each["gflops"], ">8.1f"),
                number(each["of_limit"], ">8.0%"),
                number(each["max_difference"], ">11.1e"),
            )
            lines.append(" ".join(columns) + first)
        lines += [f"{at['size']:>12} {mode:<10} {why}" for mode, why in at["failed"].items()]
    return lines + curve.lines({mode: each for mode, each in found["curves"].items() if mode == "rows"})


def number(value: float | None, layout: str) -> str:
    return format("-", layout.partition(".")[0]) if value is None else format(value, layout)


if __name__ == "__main__":
    sys.exit(main())
