"""Many small pictures: one command for each, and `handscroll batch` with one, two and more workers, and on Ray.

    python bench/batch.py --pictures 24 --size 512 --steps 20 --ways each,1,2,ray --save
    python bench/batch.py --model /scratch/sana-1.6b --size 1024 --steps 2 --ways each,1

A way is `each`, a number of workers, or `ray` for two actors of a Ray that the batch starts. Every worker has one
thread, so that all files must be the same, byte for byte. Seconds are of the whole command, libraries and workers that
start included; `after the first` leaves out what comes before the first picture. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from handscroll.batch.lines import read_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-landscape")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--size", default="512")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", default="each,1,2,ray")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    options = {"size": arguments.size, "steps": arguments.steps, "model": arguments.model}
    runs, made = [], []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "prompts.txt")
        file.write_text("".join(f"a lake at noon, number {number}\n" for number in range(arguments.pictures)))
        for way in arguments.ways.split(","):
            folder = Path(scratch, f"by-{way}")
            folder.mkdir()
            run = (of_commands if way == "each" else of_batch)(way, file, folder, options)
            runs.append(run)
            made.append({path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))})
    same = all(pictures == made[0] for pictures in made) and len(made[0]) == arguments.pictures
    result = report.dated(threads=1) | {**options, "model": Path(arguments.model).name}
    result |= {"pictures": arguments.pictures, "same_files": same, "runs": runs}
    table = [*map(told, runs), "the same files" if same else "DIFFERENT FILES"]
    report.print_and_save(result, table, "batch" if arguments.save else None)
    sys.exit(not same)


def of_commands(way: str, file: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`handscroll generate` for every picture, one after the other."""
    began, at = time.perf_counter(), []
    for task in read_tasks(file, options):
        seed = str(task.request.seed)
        run("generate", task.request.prompt, "--seed", seed, "-o", str(folder / task.output), options=options)
        at.append(time.perf_counter() - began)
    return measured(way, at)


def of_batch(way: str, file: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    own = ["--workers", "2", "--ray", "local"] if way == "ray" else ["--workers", f"cpu:{way}"]
    began, at = time.perf_counter(), []
    with started("batch", str(file), "-o", str(folder), *own, options=options) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            at.append(time.perf_counter() - began)
    at[-1] = time.perf_counter() - began
    return measured(way, at)


def measured(way: str, at: list[float]) -> dict[str, Any]:
    rate = (at[-1] - at[0]) / (len(at) - 1)
    return {"way": way, "seconds": at[-1], "first_seconds": at[0], "seconds_a_picture_after_the_first": rate}


def started(*arguments: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    given = [f"--{name}={value}" for name, value in options.items()]
    line = [sys.executable, "-m", "handscroll", *arguments, *given, "--quiet"]
    return subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)


def run(*arguments: str, options: dict[str, Any]) -> None:
    with started(*arguments, options=options) as process:
        process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)


def told(run: dict[str, Any]) -> str:
    name = {"each": "a command each", "ray": "2 workers of Ray"}.get(run["way"], f"{run['way']} workers")
    after = run["seconds_a_picture_after_the_first"]
    return f"{name:<18}{run['seconds']:>7.1f} s, the first at {run['first_seconds']:.1f} s, then {after:.2f} s each"


if __name__ == "__main__":
    main()
