"""Windows of 256x256 pixels cut from renders of several sizes: what the autoencoder learns from."""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.world import render, sample_scene

SIDE = 256
# (rows of the render, share of the windows, windows cut from one render)
MIXTURE = ((256, 0.22, 1), (512, 0.26, 3), (1024, 0.30, 8), (2048, 0.14, 20), (4096, 0.08, 40))
TRAINING_SEED, HELD_OUT_SEED = 1, 2


def _cut_windows(job: tuple[int, int, int]) -> list[NDArray[np.uint8]]:
    size, count, seed = job
    rng = np.random.default_rng((seed, size))
    picture = render(sample_scene(rng), size, size)
    # Most of a large picture is sky: of twice as many windows, the half with more detail is kept.
    corners = rng.integers(0, (size - SIDE) // 32 + 1, (2 * count if size >= 1024 else count, 2)) * 32
    windows = [picture[y : y + SIDE, x : x + SIDE] for y, x in corners]
    return sorted(windows, key=_detail)[-count:]


def _detail(window: NDArray[np.uint8]) -> float:
    rows = window[::2, ::2].astype(np.float32)
    return float(np.abs(np.diff(rows, axis=0)).mean() + np.abs(np.diff(rows, axis=1)).mean())


def window_jobs(count: int, seed: int) -> list[tuple[int, int, int]]:
    """(size, windows, seed) of each render needed for about `count` windows, in mixed order."""
    jobs = [
        (size, cuts, seed * 1_000_000 + index)
        for size, share, cuts in MIXTURE
        for index in range(max(1, round(count * share / cuts)))
    ]
    order = np.random.default_rng(seed).permutation(len(jobs))
    return [jobs[i] for i in order]


def make_windows(path: Path, count: int, seed: int, processes: int) -> None:
    """Render about `count` windows into `path` (.npy, [N, 3, 256, 256] bytes), unless it is there already."""
    if path.exists():
        return
    jobs = window_jobs(count, seed)
    total = sum(job[1] for job in jobs)
    part = path.with_suffix(".part")
    out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(total, 3, SIDE, SIDE))
    filled = 0
    with ProcessPoolExecutor(processes) as pool:
        for windows in pool.map(_cut_windows, jobs, chunksize=8):
            for window in windows:
                out[filled] = window.transpose(2, 0, 1)
                filled += 1
    # Windows of one render lie side by side; a batch should not.
    order = np.random.default_rng(seed).permutation(total)
    out[:] = out[order]
    out.flush()
    part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything on the way")
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    make_windows(options.work / "windows-held-out.npy", 128, HELD_OUT_SEED, options.processes)
    make_windows(options.work / "windows.npy", options.count, TRAINING_SEED, options.processes)


if __name__ == "__main__":
    main()
