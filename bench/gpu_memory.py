"""Measure whether --memory is kept on a CUDA device, and what it costs.

    python bench/make_checkpoint.py /scratch/sana-1.6b-4k --model sana-1.6b-4k
    python bench/gpu_memory.py /scratch/sana-1.6b-4k --scratch /scratch --save
    python bench/gpu_memory.py --miniature        # the same on a CPU with a tiny model, to try the benchmark itself

A picture of 4096x4096 in 20 steps without a budget and in 2 GiB, in turns: seconds, what PyTorch reserved, and how the
two files differ. Then one of 16384x16384 in 8 GiB, one step. bf16. Every run is `python -m handscroll` in a process of
its own, with an empty cache of prompts, after one small picture that reads the files and times the device.

Without a CUDA device the plans for one like an H100 are shown and nothing is measured. Tables go to stderr; the last
line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import child
import report
from handscroll.cli.plan import plan_table
from handscroll.errors import BudgetError, HandscrollError
from handscroll.models.opening import open_checkpoint
from handscroll.plan.inputs import Hardware, PlanInputs, Rates
from handscroll.plan.search import make_plan, minimum_bytes
from handscroll.plan.table import plan_dict
from handscroll.request import Request
from handscroll.runtime.modules import load_tokenizer
from handscroll.runtime.text import count_tokens, instruction_of
from handscroll.units import parse_bytes
from memory import PROMPT, difference, fresh_cache, load_miniatures, mib, say, size, yes

TIME_BOUND = 1.15
QUICK_STEPS = 4
WARM_UP_SIZE_PX = 128, 128
H100 = Hardware(
    "cuda:0",
    free_bytes=79 * 2**30,
    host_bytes=64 * 2**30,
    scratch_bytes=2**40,
    rates=Rates(fp32_flops=4e13, bf16_flops=4e14, fp16_flops=4e14, weight_bytes=2.5e10, host_bytes=2.5e10),
)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="handscroll-bench-", dir=arguments.scratch) as folder:
        if arguments.miniature:
            arguments.folder = str(load_miniatures().make_checkpoint(Path(folder) / "1.6b-4k", row="1.6b-4k"))
        found = report.dated() | {"model": Path(arguments.folder).name, "measured": True}
        if arguments.miniature or torch.cuda.is_available():
            found |= measure(arguments, Path(folder))
            lines = table(found)
        else:
            planned, lines = plans(arguments)
            found |= {"measured": False, "plans": planned}
    name = f"gpu-memory-{arguments.size[0]}x{arguments.size[1]}px" if arguments.save and found["measured"] else None
    report.print_and_save(found, lines, name)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a checkpoint folder or a model's name")
    parser.add_argument("--size", type=size, default=(4096, 4096))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=amount, default=2 * 2**30, help="default: 2GiB")
    parser.add_argument("--large-size", type=size, default=(16384, 16384))
    parser.add_argument("--large-steps", type=int, default=1)
    parser.add_argument("--large-budget", type=amount, default=8 * 2**30, help="default: 8GiB")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, and no large picture")
    parser.add_argument("--miniature", action="store_true", help="a tiny model on the CPU, in the least budgets")
    parser.add_argument("--scratch", type=Path, help="folder on a disk for pictures and spilled maps")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-gpu-memory-SIZE-MACHINE.json")
    arguments = parser.parse_args(argv)
    if arguments.folder is None and not arguments.miniature:
        parser.error("name a checkpoint folder, or --miniature")
    if arguments.miniature:
        arguments.size, arguments.large_size, arguments.steps, arguments.precision = (128, 128), (256, 128), 2, "fp32"
    arguments.device = "cpu" if arguments.miniature else "cuda"
    if arguments.quick:
        arguments.steps = min(arguments.steps, QUICK_STEPS)
    return arguments


def amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except HandscrollError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# On a device


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    say("warming up")
    command = job(arguments, WARM_UP_SIZE_PX, 1, folder / "small.png")
    warm = child.handscroll(command, fresh_cache(folder))
    if warm.exit_code:
        raise child.ChildError(f"no picture at all: {warm.why}")
    found: dict[str, Any] = {"precision": arguments.precision, "picture": compare(arguments, folder)}
    if not arguments.quick:
        found["large"] = paint_large(arguments, folder)
    return found


def job(arguments: argparse.Namespace, size_px: tuple[int, int], steps: int, picture: Path) -> list[str | Path]:
    return [
        *("generate", PROMPT, "-o", picture, "--model", arguments.folder, "--size", f"{size_px[0]}x{size_px[1]}"),
        *("--steps", str(steps), "--seed", "1", "--device", arguments.device, "--precision", arguments.precision),
        *("--compose", "off"),
    ]


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """With and without the budget, in turns."""
    pictures = {name: folder / f"{name}.png" for name in ("unlimited", "limited")}
    budgets = {"unlimited": None, "limited": budget_of(arguments, arguments.size, arguments.budget, folder)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in budgets}
    found: dict[str, Any] = {"size_px": list(arguments.size), "steps": arguments.steps}
    for repeat in range(arguments.repeats):
        for name, budget_bytes in budgets.items():
            say(f"{arguments.size[0]}x{arguments.size[1]}, {name}, {repeat + 1} of {arguments.repeats}")
            command = job(arguments, arguments.size, arguments.steps, pictures[name])
            run = painted(arguments, command, budget_bytes, folder)
            if "failed" in run:
                return {**found, name: run}
            runs[name].append(run)
    for name, of_name in runs.items():
        found[name] = {**of_name[-1], "seconds": medians(of_name), "seconds_each": [run["seconds"] for run in of_name]}
    unlimited, limited = found["unlimited"]["seconds"], found["limited"]["seconds"]
    apart = difference(pictures["limited"], pictures["unlimited"])
    ratio = limited["total"] / unlimited["total"]
    return {
        **found,
        "seconds_over_unlimited": ratio,
        "stages_over_unlimited": {name: limited[name] / unlimited[name] for name in limited if unlimited.get(name)},
        "in_time": ratio <= TIME_BOUND,
        "difference": apart,
    }


def paint_large(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    budget_bytes = budget_of(arguments, arguments.large_size, arguments.large_budget, folder)
    say(f"{arguments.large_size[0]}x{arguments.large_size[1]} in {mib(budget_bytes)} MiB")
    command = job(arguments, arguments.large_size, arguments.large_steps, folder / "large.tif")
    run = painted(arguments, command, budget_bytes, folder)
    return {"size_px": list(arguments.large_size), "steps": arguments.large_steps, "limited": run}


def budget_of(arguments: argparse.Namespace, size_px: tuple[int, int], budget_bytes: int, folder: Path) -> int:
    """The budget asked for; a miniature's is the least that would do."""
    if not arguments.miniature:
        return budget_bytes
    command = job(arguments, size_px, arguments.steps, folder / "refused.png")
    return child.least_bytes(command, fresh_cache(folder))


def painted(
    arguments: argparse.Namespace, command: Sequence[str | Path], budget_bytes: int | None, folder: Path
) -> dict[str, Any]:
    """One run. Its peak is what PyTorch reserved on a CUDA device, the process's resident memory on a CPU."""
    memory = [] if budget_bytes is None else ["--memory", str(budget_bytes)]
    done = child.handscroll([*command, *memory], fresh_cache(folder))
    if done.exit_code:
        return {"budget_bytes": budget_bytes, "failed": done.why}
    answer = done.answer
    peak_bytes = done.peak_bytes if arguments.device == "cpu" else answer["memory"]["measured_peak_bytes"]
    return {
        "budget_bytes": budget_bytes,
        "planned_bytes": answer["memory"]["planned_peak_bytes"],
        "peak_bytes": peak_bytes,
        "host_peak_bytes": done.peak_bytes,
        "kept": None if budget_bytes is None else peak_bytes <= budget_bytes,
        "stages": answer["memory"]["stages"],
        "seconds": answer["seconds"],
        "process_seconds": done.seconds,
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(run["seconds"][name] for run in runs) for name in runs[0]["seconds"]}


# ---------------------------------------------------------------------------------------------------------------------
# Without a device


def plans(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """What would run on a device like an H100, as JSON values and as lines to read."""
    spec = open_checkpoint(arguments.folder)
    tokens = count_tokens(spec, load_tokenizer(spec), PROMPT, instruction_of(spec))
    inputs = PlanInputs(H100, tokens)
    sizes = [
        (arguments.size, arguments.steps, None),
        (arguments.size, arguments.steps, arguments.budget),
        (arguments.large_size, arguments.large_steps, arguments.large_budget),
    ]
    found, lines = [], []
    for (width, height), steps, budget_bytes in sizes[: 2 if arguments.quick else 3]:
        request = Request(
            PROMPT,
            model=arguments.folder,
            width=width,
            height=height,
            steps=steps,
            seed=1,
            precision=arguments.precision,
            memory_bytes=budget_bytes,
            compose_px=0,
        )
        try:
            plan = make_plan(spec, request, inputs, 1)
        except BudgetError as error:
            found.append({"size_px": [width, height], "budget_bytes": budget_bytes, "failed": str(error)})
            lines += [str(error), ""]
            continue
        least_bytes = minimum_bytes(plan, spec, inputs)
        found.append(plan_dict(spec, plan, least_bytes))
        lines += [plan_table(spec, plan, least_bytes), ""]
    return found, [*lines, "nothing was measured: there is no CUDA device here; these are plans for one like an H100"]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['model']}, {found['precision']}; peaks in MiB",
        f"{'size':>12} {'steps':>5} {'budget':>7} {'planned':>8} {'peak':>7} {'kept':>5} {'host':>7} {'text':>7} "
        f"{'denoise':>8} {'decode':>8} {'total':>8}",
    ]
    for picture in filter(None, (found["picture"], found.get("large"))):
        for name in ("unlimited", "limited"):
            if name in picture:
                lines.append(run_line(picture, picture[name]))
    picture = found["picture"]
    if "difference" in picture:
        apart = picture["difference"]
        lines.append(
            f"in the budget {picture['seconds_over_unlimited']:.2f} times as long (at most {TIME_BOUND}: "
            f"{yes(picture['in_time'])}); {apart['differing']:.4%} of samples differ, by at most "
            f"{apart['largest']} (same picture: {yes(apart['same'])})"
        )
    return lines


def run_line(picture: dict[str, Any], run: dict[str, Any]) -> str:
    start = f"{'x'.join(map(str, picture['size_px'])):>12} {picture['steps']:>5} {mib(run['budget_bytes']):>7}"
    if "failed" in run:
        return f"{start} failed: {run['failed']}"
    seconds = run["seconds"]
    return (
        f"{start} {mib(run['planned_bytes']):>8} {mib(run['peak_bytes']):>7} {yes(run['kept']):>5} "
        f"{mib(run['host_peak_bytes']):>7} {seconds.get('text', 0):>7.1f} {seconds.get('denoise', 0):>8.1f} "
        f"{seconds['decode']:>8.1f} {seconds['total']:>8.1f}"
    )


if __name__ == "__main__":
    main()
