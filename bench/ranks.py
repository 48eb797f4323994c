"""One picture on one process and on several, a thread each: seconds and memory beside what was planned.

    python bench/ranks.py /scratch/sana-1.6b-4k --size 1024 --ranks 1,2 --save
    python bench/ranks.py tiny-landscape --size 1024 --steps 10

Every run is `handscroll generate --devices cpu:N` of the same seed, whose files must be the same, byte for byte.
Predicted seconds are those of one rank, divided by the number of ranks and by the efficiency that `handscroll plan
--devices cpu:N` prints; bytes are each rank's peak of resident memory beside the plan's. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

# Between two processes of this machine, by memory: measured with Gloo, 64 MiB and single bytes there and back.
LINK, LATENCY = "1.5GB/s", "200us"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--size", default="1024")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--memory", help="a budget for each rank")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    asked = ["a lake", "--model", arguments.model, "--size", arguments.size, "--steps", str(arguments.steps)]
    asked += ["--compose", "off", "--precision", arguments.precision]
    asked += ["--memory", arguments.memory] if arguments.memory else []
    runs: list[dict[str, Any]] = []
    files: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        for ranks in map(int, arguments.ranks.split(",")):
            path = Path(folder) / f"{ranks}.png"
            made = handscroll("generate", *asked, "--seed", "7", "-o", str(path), "--quiet", devices=ranks)
            runs.append(run_of(ranks, made, arguments.steps, shares(asked, ranks), runs))
            files.add(path.read_bytes())
    same = len(files) == 1
    result = report.dated(threads=1)
    result |= {"model": Path(arguments.model).name, "size": arguments.size, "steps": arguments.steps}
    result |= {"precision": runs[0]["precision"], "same_file": same, "runs": runs}
    table = [*map(told, runs), "the same file" if same else "DIFFERENT FILES"]
    report.print_and_save(result, table, "ranks" if arguments.save else None)
    sys.exit(not same)


def handscroll(*arguments: str, devices: int) -> dict[str, Any]:
    line = [sys.executable, "-m", "handscroll", *arguments, "--devices", f"cpu:{devices}", "--json"]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    return found[0] if isinstance(found, list) else found


def shares(asked: list[str], ranks: int) -> dict[str, float]:
    """The planned efficiency of a step and of decoding."""
    planned = handscroll("plan", *asked, "--quiet", "--link", LINK, "--latency", LATENCY, devices=ranks)
    return {share["name"]: share["efficiency"] for share in planned.get("shares", [])}


def run_of(
    ranks: int, made: dict[str, Any], steps: int, efficiency: dict[str, float], before: list[dict[str, Any]]
) -> dict[str, Any]:
    seconds = {"step": made["seconds"]["denoise"] / steps, "decode": made["seconds"]["decode"]}
    run: dict[str, Any] = {"ranks": ranks, "precision": made["precision"], "seconds": seconds}
    if before and before[0]["ranks"] == 1:
        alone = before[0]["seconds"]
        run["predicted_seconds"] = {name: alone[name] / ranks / efficiency[name] for name in seconds}
    stages = made["memory"]["stages"]
    run["planned_bytes"] = {name: stages[name]["planned_bytes"] for name in ("denoise", "decode")}
    measured = [each["measured_bytes"] for each in made.get("ranks", [])]
    measured = measured or [{name: stages[name]["measured_bytes"] for name in stages}]
    run["measured_bytes"] = {name: [each[name] for each in measured] for name in ("denoise", "decode")}
    return run


def told(run: dict[str, Any]) -> str:
    parts = [f"{run['ranks']} ranks:"]
    for name, seconds in run["seconds"].items():
        predicted = run.get("predicted_seconds", {}).get(name)
        parts.append(f"{name} {seconds:.2f} s" + (f" (predicted {predicted:.2f})" if predicted else ""))
    for name, planned in run["planned_bytes"].items():
        measured = ", ".join(f"{each / 2**20:.0f}" for each in run["measured_bytes"][name])
        parts.append(f"{name} {measured} MiB (planned {planned / 2**20:.0f})")
    return " ".join([parts[0], ", ".join(parts[1:])])


if __name__ == "__main__":
    main()
