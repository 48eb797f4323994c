"""Whether `attach(memory=...)` is kept in a process that already works, and whether what was allowed is used.

    python bench/attach_memory.py --save
    python bench/attach_memory.py --small --draws 8 --only decode,bfloat16

Draws of size, batch, type, decode or encode, and of the memory that is allowed: from the least that would do to more
than is of use. All run in one process, after calls without a budget, so that its heap holds what they have freed. What
is taken is the peak of resident memory above what was held before the call, less the result (on a CUDA device what
PyTorch's allocator reserves above what tensors held). It must not be more than was allowed, and where more memory would
have been faster, by the plan's own seconds, not less than the allowed over 1.3. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor

import handscroll
import report
from handscroll.integrations.diffusers.budget import Job, route_within, spec_of
from handscroll.models.autoencoder import F32C32_SANA
from one_run import peak, reset_peak

AMPLE_BYTES = 2**40
SIDES_PX = (128, 256, 320, 512, 640)
MOST_PIXELS = 640 * 640
LEAST_USED = 1.3
SMALL = {
    "encoder_block_out_channels": (32, 64, 128, 128, 256, 256),
    "decoder_block_out_channels": (32, 64, 128, 128, 256, 256),
    "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1, 1),
}
HALVES = {"decode": "decoder", "encode": "encoder"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a quarter of the channels and fewer layers")
    parser.add_argument("--only", default="", help="such as decode,float32: what each draw must have of these words")
    parser.add_argument("--json", action="store_true", help="no table")
    parser.add_argument("--save", action="store_true", help="write DATE-attach-memory-MACHINE.json to results/")
    arguments = parser.parse_args(argv)
    drawing = random.Random(arguments.seed)
    only = [word for word in arguments.only.split(",") if word]
    draws = []
    with torch.no_grad():
        bench = Bench(arguments.device, arguments.small)
        for job in jobs(drawing, only, arguments.draws):
            draws.append(bench.draw(job, drawing))
            if not arguments.json:
                print(line_of(draws[-1]), file=sys.stderr, flush=True)
    over, unused = (sum(draw[name] for draw in draws) for name in ("over", "unused"))
    found = {"draws": draws, "over": over, "unused": unused}
    lines = [f"{len(draws)} draws: {over} took more than was allowed, {unused} left too much unused"]
    name = "attach-memory" if arguments.save else None
    report.print_and_save({**report.dated(), **found}, [] if arguments.json else lines, name)
    return 1 if over or unused else 0


def jobs(drawing: random.Random, only: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
    """Draws without end, those that have every word of `only`, the first `count` of them."""
    while count:
        way, dtype = drawing.choice(("decode", "encode")), drawing.choice(("float32", "bfloat16"))
        batch, width, height = drawing.choice((1, 1, 2, 3)), drawing.choice(SIDES_PX), drawing.choice(SIDES_PX)
        where = drawing.choice(("least", "between", "between", "ample"))
        if batch * width * height > MOST_PIXELS or not set(only) <= {way, dtype}:
            continue
        count -= 1
        yield {"way": way, "dtype": dtype, "batch": batch, "width": width, "height": height, "where": where}


class Bench:
    """The autoencoder in both types, in a process that has worked without a budget."""

    def __init__(self, device: str, small: bool) -> None:
        self.device = device
        config = dataclasses.asdict(F32C32_SANA) | (SMALL if small else {})
        torch.manual_seed(0)
        self.models = {
            name: AutoencoderDC(**config).eval().requires_grad_(False).to(device).to(getattr(torch, name))
            for name in ("float32", "bfloat16")
        }
        self.warm: set[str] = set()

    def warm_up(self, name: str) -> None:
        """Calls without a budget: kernels are compiled, and the heap holds what they have freed."""
        if name not in self.warm:
            model = handscroll.attach(self.models[name])
            for side in (128, 384):
                x = torch.randn(1, 3, side, side).to(self.device, getattr(torch, name))
                model.decode(model.encode(x).latent)
            self.warm.add(name)

    def draw(self, job: dict[str, Any], drawing: random.Random) -> dict[str, Any]:
        """One call within a memory that is drawn too."""
        model, dtype = self.models[job["dtype"]], getattr(torch, job["dtype"])
        self.warm_up(job["dtype"])
        sides = (job["height"], job["width"])
        if job["way"] == "decode":
            given = torch.randn(job["batch"], 32, *(side // 32 for side in sides)).to(self.device, dtype)
        else:
            given = torch.randn(job["batch"], 3, *sides).to(self.device, dtype)
        planned = Planned(model, job, given)
        allowed_bytes = {
            "least": planned.least_bytes,
            "between": int(planned.least_bytes + drawing.random() * (planned.most_bytes - planned.least_bytes)),
            "ample": int(planned.most_bytes * 1.5),
        }[job["where"]]
        stage = planned.stage(allowed_bytes)
        handscroll.attach(model, memory=allowed_bytes)
        taken_bytes, seconds = self.taken(lambda: getattr(model, job["way"])(given, return_dict=False)[0])
        faster = stage.seconds > planned.least_seconds * 1.001
        return {
            **job,
            "allowed_bytes": allowed_bytes,
            "planned_bytes": stage.peak_bytes,
            "taken_bytes": taken_bytes,
            "seconds": seconds,
            "more_is_faster": faster,
            "over": taken_bytes > allowed_bytes,
            "unused": faster and allowed_bytes > LEAST_USED * taken_bytes,
        }

    def taken(self, call: Any) -> tuple[int, float]:
        """Bytes above what was held, less the result, and the seconds."""
        gc.collect()
        before_bytes = reset_peak(self.device)
        if before_bytes is None:
            sys.exit("this system does not let a process's peak be measured anew")
        begun = time.perf_counter()
        result: Tensor = call()
        seconds = time.perf_counter() - begun
        return peak(self.device, of_process=True) - before_bytes - result.nbytes, seconds


class Planned:
    """What a draw would take at least, and what it can use at most."""

    def __init__(self, model: Any, job: dict[str, Any], given: Tensor) -> None:
        self.spec = spec_of(model.config)
        half = HALVES[job["way"]]
        rows, columns = job["height"] // 32, job["width"] // 32
        self.job = Job(half, job["batch"], rows, columns, job["width"], job["height"], given.dtype, given.device)
        ample = route_within(self.spec, self.job, AMPLE_BYTES)
        try:
            self.least_bytes = route_within(self.spec, self.job, 1).peak_bytes
        except handscroll.BudgetError as error:
            self.least_bytes = error.minimum_bytes
        # The least is counted as if no kernel had been compiled in this process yet.
        self.most_bytes, self.least_seconds = max(ample.peak_bytes, self.least_bytes), ample.seconds

    def stage(self, allowed_bytes: int) -> Any:
        return route_within(self.spec, self.job, allowed_bytes)


def line_of(draw: dict[str, Any]) -> str:
    allowed, planned, taken = (round(draw[f"{name}_bytes"] / 2**20) for name in ("allowed", "planned", "taken"))
    marks = " OVER" if draw["over"] else " UNUSED" if draw["unused"] else ""
    return (
        f"{draw['way']} {draw['batch']} of {draw['width']}x{draw['height']} in {draw['dtype']}: allowed {allowed} MiB, "
        f"planned {planned}, taken {taken}, {draw['seconds']:.1f} s"
        f"{', more would be faster' if draw['more_is_faster'] else ''}{marks}"
    )


if __name__ == "__main__":
    sys.exit(main())
