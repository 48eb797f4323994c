"""Measure whether --memory is kept on a CPU, at what price, and beside diffusers' tiling.

    python bench/memory.py generate FOLDER --size 4096 --steps 1 --budgets 4GiB,2GiB,least --save
    python bench/memory.py decode FOLDER --sizes 1024,2048,4096 --plan-sizes 8192,16384,32768 --save
    python bench/memory.py draws --count 200 --seed 0 --save

generate  the same picture under each budget, and how the files differ from the first
decode    a random latent without a budget, with the least, and by diffusers' tiles of 512 px every 448 px
draws     random models, sizes, budgets, precisions and sizes to compose at: planned over measured peak

`least` is the budget that a refusal of 1 MiB names, `none` is no budget. FOLDER is a checkpoint, such as
make_checkpoint.py writes. Every run is `python -m handscroll` in a process of its own, with an empty cache of prompts;
memory is that process's peak resident memory as /usr/bin/time -v prints it. Tables go to stderr; the last line of
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyvips
import torch

import child
import report
from handscroll.errors import HandscrollError
from handscroll.jobs.latent_file import save_latent
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import open_checkpoint
from handscroll.plan.search import make_plan, minimum_bytes
from handscroll.request import Request
from handscroll.runtime.probe import probe
from handscroll.units import parse_bytes, parse_size

PROMPT = "a quiet lake at dusk"
MODES = ("generate", "decode", "draws")
# What is asked for: seconds in the least budget over those without one; planned over measured peak; and of two files of
# the same picture, how many 8-bit samples may differ, and by how much.
TIME_BOUND = 1.35
PLANNED_LOW, PLANNED_HIGH = 1.0, 1.15
SAME_SHARE, SAME_STEP = 1e-3, 1
ROWS_COMPARED = 64

DRAWN_WIDTHS_PX, DRAWN_HEIGHTS_PX = (256, 512, 512, 1024, 1024, 2048), (256, 512, 1024, 1024, 2048)
DRAWN_PRECISIONS = ("fp32", "bf16")
# A picture composed small grows in the last steps of each size, of which one step has none.
DRAWN_WAYS = ((1, None), (1, None), (4, 0), (4, 128), (4, 256))
BUILT_IN = "tiny-landscape"


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.mode == "child":
        print(json.dumps(plan_jobs(json.loads(arguments.jobs.read_text()), arguments.jobs.parent)))
        return
    with tempfile.TemporaryDirectory(prefix="handscroll-bench-", dir=arguments.scratch) as folder:
        measure = {"generate": generate, "decode": decode, "draws": draws}[arguments.mode]
        found = report.dated(arguments.threads) | measure(arguments, Path(folder))
    report.print_and_save(found, table(arguments.mode, found), name_of(arguments) if arguments.save else None)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--threads", type=int, help="of every measured process; default: as many as cores")
    shared.add_argument("--scratch", type=Path, help="folder on a disk for pictures and spilled maps")
    shared.add_argument("--save", action="store_true", help="write bench/results/DATE-memory-...-MACHINE.json")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)

    mode = modes.add_parser("generate", parents=[shared], help="one picture under several budgets")
    mode.add_argument("folder", help="a checkpoint folder or a model's name")
    mode.add_argument("--size", type=size, default=(4096, 4096))
    mode.add_argument("--steps", type=int, default=1)
    mode.add_argument("--budgets", type=budgets, default=budgets("4GiB,2GiB,least"), help="4GiB,2GiB,least,none")
    mode.add_argument("--precision", default="auto", help="as `handscroll generate` takes it")
    mode.add_argument("--text-precision", default="auto")

    mode = modes.add_parser("decode", parents=[shared], help="decoding alone, beside diffusers' tiling")
    mode.add_argument("folder", type=Path, help="a checkpoint folder")
    mode.add_argument("--sizes", type=sizes, default=[1024, 2048, 4096], help="sides in pixels, comma-separated")
    mode.add_argument("--plan-sizes", type=sizes, default=[], help="sides that are planned alone")
    mode.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    mode.add_argument(
        "--no-tiling-time",
        action="store_true",
        help="decode only those of diffusers' tiles that its peak depends on; its seconds are left out",
    )

    mode = modes.add_parser("draws", parents=[shared], help="planned over measured peak of random jobs")
    mode.add_argument("--count", type=int, default=200)
    mode.add_argument("--seed", type=int, default=0)
    mode.add_argument("--largest", type=int, default=2048, help="side in pixels that no picture passes")

    mode = modes.add_parser("child", parents=[shared])
    mode.add_argument("jobs", type=Path)
    return parser.parse_args(argv)


def size(text: str) -> tuple[int, int]:
    try:
        return parse_size(text)
    except HandscrollError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sizes(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.isdigit()]
    if len(found) != len(text.split(",")) or any(side < 32 or side % 32 for side in found):
        raise argparse.ArgumentTypeError(f"{text}: expected multiples of 32, comma-separated")
    return found


def budgets(text: str) -> list[str]:
    found = text.split(",")
    for budget in found:
        if budget not in ("least", "none"):
            try:
                parse_bytes(budget)
            except HandscrollError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
    return found


def name_of(arguments: argparse.Namespace) -> str:
    if arguments.mode == "generate":
        return f"memory-generate-{arguments.size[0]}x{arguments.size[1]}px"
    if arguments.mode == "decode":
        return f"memory-decode-{'-'.join(map(str, arguments.sizes))}px-{arguments.precision}"
    return f"memory-draws-{arguments.count}"


# ---------------------------------------------------------------------------------------------------------------------
# One run


def fresh_cache(folder: Path) -> dict[str, str]:
    """The environment with a cache that knows how fast the machine is, if any before did, and no prompt."""
    known = next(iter(sorted(folder.glob("cache-*/devices.json"))), None)
    cache = Path(tempfile.mkdtemp(prefix="cache-", dir=folder))
    if known is not None:
        shutil.copy(known, cache)
    return {"HANDSCROLL_CACHE": str(cache)}


def measured(command: list[str | Path], budget_bytes: int | None, folder: Path) -> dict[str, Any]:
    """One handscroll run: what it planned and measured itself, and its process's peak. Raises child.ChildError."""
    memory = [] if budget_bytes is None else ["--memory", str(budget_bytes)]
    done = child.handscroll([*command, *memory], fresh_cache(folder))
    if done.exit_code:
        raise child.ChildError(done.why)
    answer = done.answer
    return {
        "budget_bytes": budget_bytes,
        "planned_bytes": answer["memory"]["planned_peak_bytes"],
        "peak_bytes": done.peak_bytes,
        "stages": answer["memory"]["stages"],
        "seconds": answer["seconds"],
        "process_seconds": done.seconds,
        "precision": answer["precision"],
        "kept": None if budget_bytes is None else done.peak_bytes <= budget_bytes,
    }


def row_blocks(path: Path) -> Iterator[np.ndarray]:
    """A picture from top to bottom, [rows, width, 3] uint8, read as it goes."""
    image = pyvips.Image.new_from_file(str(path), access="sequential")
    region = pyvips.Region.new(image)
    for top in range(0, image.height, ROWS_COMPARED):
        rows = min(ROWS_COMPARED, image.height - top)
        yield np.frombuffer(region.fetch(0, top, image.width, rows), np.uint8).reshape(rows, image.width, -1)


def difference(path: Path, reference: Path) -> dict[str, Any]:
    """How many of the 8-bit samples of two pictures of one size differ, and by how much."""
    differing = largest = total = samples = 0
    for ours, theirs in zip(row_blocks(path), row_blocks(reference), strict=True):
        apart = np.abs(ours.astype(np.int16) - theirs)
        differing += int(np.count_nonzero(apart))
        largest = max(largest, int(apart.max()))
        total += int(apart.sum())
        samples += apart.size
    share = differing / samples
    same = share < SAME_SHARE and largest <= SAME_STEP
    return {"differing": share, "largest": largest, "mean": total / samples, "same": same}


# ---------------------------------------------------------------------------------------------------------------------
# One picture under several budgets


def generate(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    width, height = arguments.size
    base = ["generate", PROMPT, "--model", arguments.folder, "--size", f"{width}x{height}"]
    base += ["--steps", str(arguments.steps), "--seed", "1", "--device", "cpu", "--precision", arguments.precision]
    base += ["--text-precision", arguments.text_precision]
    base += ["--compose", "off"]
    say(f"{width}x{height}, refused")
    least_bytes = child.least_bytes([*base, "-o", folder / "refused.png"], fresh_cache(folder))
    runs: list[dict[str, Any]] = []
    reference: Path | None = None
    for number, budget in enumerate(arguments.budgets):
        say(f"{width}x{height}, {budget}")
        named = {"least": least_bytes, "none": None}
        budget_bytes = named[budget] if budget in named else parse_bytes(budget)
        picture = folder / f"{number}.png"
        try:
            run = measured([*base, "-o", picture], budget_bytes, folder)
        except child.ChildError as error:
            runs.append({"budget": budget, "budget_bytes": budget_bytes, "failed": str(error)})
            continue
        reference = reference or picture
        runs.append({"budget": budget, **run, "difference": difference(picture, reference)})
        if picture != reference:
            picture.unlink()
    return {
        "model": Path(arguments.folder).name,
        "size_px": [width, height],
        "steps": arguments.steps,
        "minimum_bytes": least_bytes,
        "runs": runs,
        "kept": all(run.get("kept") is not False and "failed" not in run for run in runs),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Decoding alone


def decode(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    spec = CheckpointSpec.from_folder(arguments.folder)
    found = [decode_at(side, arguments, spec, folder) for side in arguments.sizes]
    planned = plan_decodes(arguments, folder) if arguments.plan_sizes else []
    return {"model": spec.name, "precision": arguments.precision, "sizes": found, "planned": planned}


def decode_at(side: int, arguments: argparse.Namespace, spec: CheckpointSpec, folder: Path) -> dict[str, Any]:
    channels, factor = spec.autoencoder.latent_channels, spec.autoencoder.spatial_compression_ratio
    noise = torch.randn(1, channels, side // factor, side // factor, generator=torch.Generator().manual_seed(1))
    latent, pictures = folder / f"{side}.safetensors", [folder / f"{side}-{name}.png" for name in ("none", "least")]
    save_latent(latent, noise, {"model": str(arguments.folder), "width": str(side), "height": str(side)})
    base: list[str | Path] = ["decode", latent, "--model", arguments.folder, "--precision", arguments.precision]
    base += ["--device", "cpu"]
    result: dict[str, Any] = {"size_px": side}
    try:
        say(f"{side} px, refused")
        least_bytes = child.least_bytes([*base, "-o", folder / "refused.png"], fresh_cache(folder))
        for name, budget_bytes, picture in zip(("unlimited", "least"), (None, least_bytes), pictures, strict=True):
            say(f"{side} px, {name}")
            result[name] = measured([*base, "-o", picture], budget_bytes, folder)
        ratio = result["least"]["seconds"]["decode"] / result["unlimited"]["seconds"]["decode"]
        result["difference"] = difference(pictures[1], pictures[0])
        result["seconds_over_unlimited"], result["in_time"] = ratio, ratio <= TIME_BOUND
        say(f"{side} px, diffusers' tiling")
        result["tiled"] = tiled(arguments, latent)
        tiled_bytes = result["tiled"]["decode_peak_bytes"] or result["tiled"]["peak_bytes"]
        result["below_tiled"] = least_bytes < tiled_bytes
    except child.ChildError as error:
        result["failed"] = str(error)
    for path in (latent, *pictures):
        path.unlink(missing_ok=True)
    return result


def tiled(arguments: argparse.Namespace, latent: Path) -> dict[str, Any]:
    """diffusers' own decode. `peak_bytes` is the process's, with loading; `decode_peak_bytes` that while it decodes."""
    script = Path(__file__).with_name("tiled_decode.py")
    options = ["--no-tiling-time"] if arguments.no_tiling_time else []
    done = child.run([sys.executable, script, arguments.folder / "vae", latent, *options])
    if done.exit_code:
        raise child.ChildError(f"diffusers' tiling: {done.why}")
    answer = done.answer
    return {
        "peak_bytes": done.peak_bytes,
        "decode_peak_bytes": answer["decode_peak_bytes"],
        "seconds": answer["seconds"],
    }


def plan_decodes(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    jobs = [
        {"model": str(arguments.folder), "width": side, "height": side, "precision": arguments.precision, "decode": 1}
        for side in arguments.plan_sizes
    ]
    return planned_jobs(jobs, folder)


def planned_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What is planned for jobs without a budget and with the least, in a process of its own."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    done = child.run([sys.executable, __file__, "child", listed], fresh_cache(folder))
    if done.exit_code:
        raise child.ChildError(done.why)
    return json.loads(done.stdout.splitlines()[-1])


def plan_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The child of `planned_jobs`. With `decode` in a job, only decoding is planned; pictures go to `folder`."""
    found = []
    for job in jobs:
        spec = open_checkpoint(job["model"])
        request = Request(
            PROMPT,
            model=job["model"],
            width=job["width"],
            height=job["height"],
            steps=job.get("steps", 1),
            seed=1,
            precision=job["precision"],
            device="cpu",
            compose_px=job.get("compose_px"),
        )
        inputs = probe(spec, request, folder / "planned.png", prompts="decode" not in job)
        free = make_plan(spec, request, inputs, 1)
        least = minimum_bytes(free, spec, inputs)
        answer: dict[str, Any] = {"size_px": [job["width"], job["height"]], "minimum_bytes": least}
        for name, budget_bytes in (("unlimited", None), ("least", least)):
            plan = make_plan(spec, report.with_budget(request, budget_bytes), inputs, 1)
            answer[name] = {
                "planned_bytes": plan.planned_peak_bytes,
                "seconds": report.seconds_of(plan),
                "spilled": plan.decoding.spilled if plan.decoding else None,
                "recomputed": plan.decoding.recomputed if plan.decoding else None,
            }
        found.append(answer)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Random jobs


def draws(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    miniatures = load_miniatures()
    rng = random.Random(arguments.seed)
    jobs = [draw(rng, list(miniatures.ROWS), arguments.largest) for _ in range(arguments.count)]
    folders = {BUILT_IN: BUILT_IN}
    for row in sorted({job["model"] for job in jobs} - {BUILT_IN}):
        folders[row] = str(miniatures.make_checkpoint(folder / row, row=row))
    say(f"{len(jobs)} draws, planned")
    plans = planned_jobs([{**job, "model": folders[job["model"]]} for job in jobs], folder)
    runs = []
    with contextlib.suppress(KeyboardInterrupt):  # what was measured until then is reported
        for number, (job, planned) in enumerate(zip(jobs, plans, strict=True)):
            say(f"{number + 1} of {len(jobs)}: {job['model']}, {job['width']}x{job['height']}, {job['precision']}")
            wanted_bytes = job["budget_bytes"] or int(planned["minimum_bytes"] * job["over_minimum"])
            runs.append({**job, **run_draw(job, folders[job["model"]], wanted_bytes, folder)})
    return {"seed": arguments.seed, "count": len(runs), **summary(runs), "draws": runs}


def draw(rng: random.Random, rows: list[str], largest_px: int) -> dict[str, Any]:
    """A job. Its budget is given in bytes, or as a multiple of the least that would do."""
    kind = rng.choice(("least", "more", "ample"))
    model = rng.choice([rng.choice(rows), rng.choice(rows), BUILT_IN])
    steps, compose_px = (1, None) if model.startswith("sprint") else rng.choice(DRAWN_WAYS)
    return {
        "model": model,
        "width": min(largest_px, rng.choice(DRAWN_WIDTHS_PX)),
        "height": min(largest_px, rng.choice(DRAWN_HEIGHTS_PX)),
        "precision": rng.choice(DRAWN_PRECISIONS),
        "steps": steps,
        "compose_px": compose_px,
        "over_minimum": {"least": 1.0, "more": rng.uniform(1, 1.6), "ample": 1.0}[kind],
        "budget_bytes": 2**31 if kind == "ample" else None,
        "prompt": f"{PROMPT} {rng.random()}",
    }


def run_draw(job: dict[str, Any], model: str, budget_bytes: int, folder: Path) -> dict[str, Any]:
    """A run of a job. Where the process takes a little more than when it was planned, the stated minimum is taken."""
    picture = folder / "draw.png"
    size_px = f"{job['width']}x{job['height']}"
    command: list[str | Path] = ["generate", job["prompt"], "-o", picture, "--model", model, "--size", size_px]
    command += ["--steps", str(job["steps"]), "--seed", "1", "--device", "cpu", "--precision", job["precision"]]
    command += ["--compose", {None: "auto", 0: "off"}.get(job["compose_px"], str(job["compose_px"]))]
    try:
        done = child.handscroll([*command, "--memory", str(budget_bytes)], fresh_cache(folder))
        if done.exit_code == child.BUDGET_TOO_SMALL:
            budget_bytes = done.answer["error"]["minimum_bytes"]
            done = child.handscroll([*command, "--memory", str(budget_bytes)], fresh_cache(folder))
        if done.exit_code:
            return {"budget_bytes": budget_bytes, "failed": done.why}
    finally:
        picture.unlink(missing_ok=True)
    memory = done.answer["memory"]
    return {
        "budget_bytes": budget_bytes,
        "planned_bytes": memory["planned_peak_bytes"],
        "peak_bytes": done.peak_bytes,
        "planned_over_measured": memory["planned_peak_bytes"] / done.peak_bytes,
        "kept": done.peak_bytes <= budget_bytes,
        "stages": memory["stages"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Planned over measured peak: it should lie between 1 and 1.15."""
    ratios = sorted(run["planned_over_measured"] for run in runs if "failed" not in run)
    return {
        "lowest": ratios[0] if ratios else None,
        "median": statistics.median(ratios) if ratios else None,
        "highest": ratios[-1] if ratios else None,
        "below_1": sum(ratio < PLANNED_LOW for ratio in ratios),
        "above_1_15": sum(ratio > PLANNED_HIGH for ratio in ratios),
        "over_budget": sum(run.get("kept") is False for run in runs),
        "failed": sum("failed" in run for run in runs),
    }


def load_miniatures() -> ModuleType:
    """tests/miniatures.py, which is no part of any package."""
    path = Path(__file__).parents[1] / "tests" / "miniatures.py"
    spec = importlib.util.spec_from_file_location("miniatures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(mode: str, found: dict[str, Any]) -> list[str]:
    return {"generate": generate_table, "decode": decode_table, "draws": draws_table}[mode](found)


def generate_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['model']}, {'x'.join(map(str, found['size_px']))}, {found['steps']} steps, at least "
        f"{mib(found['minimum_bytes'])} MiB",
        f"{'budget':>8} {'MiB':>7} {'planned':>8} {'peak':>7} {'kept':>5} {'text':>7} {'denoise':>8} {'decode':>8} "
        f"{'differing':>10} {'largest':>8} {'same':>5}",
    ]
    for run in found["runs"]:
        if "failed" in run:
            lines.append(f"{run['budget']:>8} failed: {run['failed']}")
            continue
        seconds, apart = run["seconds"], run["difference"]
        lines.append(
            f"{run['budget']:>8} {mib(run['budget_bytes']):>7} {mib(run['planned_bytes']):>8} "
            f"{mib(run['peak_bytes']):>7} {yes(run['kept']):>5} {seconds.get('text', 0):>7.1f} "
            f"{seconds.get('denoise', 0):>8.1f} {seconds['decode']:>8.1f} {apart['differing']:>10.4%} "
            f"{apart['largest']:>8} {yes(apart['same']):>5}"
        )
        for name, stage in run["stages"].items():
            peak = f"planned {mib(stage['planned_bytes'])} MiB, measured {mib(stage['measured_bytes'])} MiB"
            lines.append(f"{'':>8} {name}: {peak}")
    return lines


def decode_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['model']}, {found['precision']}; peaks in MiB, seconds of the decode alone",
        f"{'size':>6} {'unlimited':>10} {'seconds':>8} {'least':>7} {'peak':>7} {'kept':>5} {'seconds':>8} "
        f"{'ratio':>6} {'tiled':>7} {'seconds':>8} {'below':>6}",
    ]
    for at in found["sizes"]:
        if "failed" in at:
            lines.append(f"{at['size_px']:>6} failed: {at['failed']}")
            continue
        free, least, tiles = at["unlimited"], at["least"], at["tiled"]
        tiled_seconds = "-" if tiles["seconds"] is None else f"{tiles['seconds']:.1f}"
        lines.append(
            f"{at['size_px']:>6} {mib(free['peak_bytes']):>10} {free['seconds']['decode']:>8.1f} "
            f"{mib(least['budget_bytes']):>7} {mib(least['peak_bytes']):>7} {yes(least['kept']):>5} "
            f"{least['seconds']['decode']:>8.1f} {at['seconds_over_unlimited']:>6.2f} "
            f"{mib(tiles['decode_peak_bytes'] or tiles['peak_bytes']):>7} {tiled_seconds:>8} "
            f"{yes(at['below_tiled']):>6}"
        )
    for at in found["planned"]:
        free, least = at["unlimited"], at["least"]
        ratio = least["seconds"] / free["seconds"]
        lines.append(
            f"{at['size_px'][0]:>6} {mib(free['planned_bytes']):>10} {free['seconds']:>8.1f} "
            f"{mib(at['minimum_bytes']):>7} {mib(least['planned_bytes']):>7} {'':>5} {least['seconds']:>8.1f} "
            f"{ratio:>6.2f} planned alone"
        )
    return lines


def draws_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{run['model']}, {run['width']}x{run['height']}, {run['precision']}: failed: {run['failed']}"
        for run in found["draws"]
        if "failed" in run
    ]
    if found["median"] is not None:
        lines.append(
            f"planned over measured peak of {found['count']} draws: lowest {found['lowest']:.3f}, median "
            f"{found['median']:.3f}, highest {found['highest']:.3f}; {found['below_1']} below 1, "
            f"{found['above_1_15']} above 1.15, {found['over_budget']} over budget, {found['failed']} failed"
        )
    return lines


def mib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else str(round(n_bytes / 2**20))


def yes(kept: bool | None) -> str:
    return "-" if kept is None else "yes" if kept else "NO"


if __name__ == "__main__":
    main()
