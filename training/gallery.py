"""docs/gallery.md: samples of the shipped weights, each beside the training render that it is nearest to.

Whether a picture merely recalls one that was learnt is for the reader's eye: the nearest of many training renders is
found by the distance of both pictures at 16x16 pixels, and painted again at full size from its seed.
"""

from __future__ import annotations

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyvips
import torch
from numpy.typing import NDArray

from handscroll import Handscroll
from training import growth, latents
from training.evaluate import Picture, checksum, generate, model_files
from training.growth import PairFiles
from training.latents import Bucket, LatentFiles
from training.world import render

SENTENCES = (
    "a calm lake at noon, green hills, white clouds",
    "snowy mountains at dusk, a red sun",
    "mount fuji in spring with cherry blossoms, a pagoda",
    "karst mountains and a river, ink painting, a red sun",
    "a sailing boat on the sea at sunset, an orange sun on the left",
    "a cabin in a winter forest at night, falling snow",
    "northern lights over snowy mountains, stars",
    "red canyon at noon, a river, blue sky",
    "golden dunes at dawn, a white sun on the right",
    "an autumn forest around a lake in the evening",
    "misty mountains at dawn, a pine tree on the left",
    "rolling green hills by day, a large tree, birds",
    "the ocean at night, a full moon, a boat",
    "rain over a lake and dark pines",
    "a volcano at dusk, purple sky, a lake",
    "a cherry tree in bloom on the left, a river, green hills",
    "a pagoda on an island, mist, golden sky",
    "bare trees by a frozen lake in winter at noon",
    "an ink painting of mountains in the mist, birds",
    "hills in autumn, a cottage, a few clouds",
    "alps by a lake in summer, a clear blue sky",
    "a crescent moon over dunes, stars",
    "mesas at sunset, a huge orange sun in the middle",
    "limestone pillars by the sea at dawn, a small island",
    "snow is falling on pine trees and hills",
    "a winding river in a green valley at noon",
    "sumi-e, a boat on a lake, a crooked pine",
    "a house under the stars, snowy hills, aurora",
    "a red maple on the right, mount fuji, autumn",
    "the open sea by day, white clouds",
    "rainy weather in the hills, a pagoda",
    "purple sky over the ocean, a golden sun near the horizon",
)
LARGE = (1, 2, 3, 4, 6, 10, 11, 20)  # the sentences that are also painted at 4096 rows
THUMB = 16

# What was trained on, by the number of the scene; no file of it is read.
SMALL = Bucket(256, 256)
LEARNT, COMPOSED = LatentFiles(Path(), SMALL), PairFiles(Path(), growth.PLAN[0][0], grown=False)
SMALL_RENDERS, COMPOSED_RENDERS = dict(latents.PLAN)[SMALL], growth.PLAN[0][1]


def thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[H, W, 3] bytes to [16 * 16 * 3]."""
    h, w, _ = picture.shape
    small = picture.reshape(THUMB, h // THUMB, THUMB, w // THUMB, 3).astype(np.float32).mean(axis=(1, 3))
    return small.ravel()


def _training_thumbnail(index: int) -> NDArray[np.float32]:
    return thumbnail(_training_render(index))


def _training_render(index: int) -> Picture:
    """A scene that was trained on, at 256x256: those of the small latents first, then those composed at 512x512."""
    scene = LEARNT.scene(index) if index < SMALL_RENDERS else COMPOSED.scene(index - SMALL_RENDERS)
    return render(scene, SMALL.width, SMALL.height)


def training_thumbnails(path: Path, count: int, processes: int) -> NDArray[np.float32]:
    """[count, 768], painted once and kept."""
    if not path.exists() or len(np.load(path, mmap_mode="r")) < count:
        with ProcessPoolExecutor(processes) as pool:
            np.save(path, np.stack(list(pool.map(_training_thumbnail, range(count), chunksize=64))))
    return np.load(path)[:count]


def nearest(picture: Picture, thumbnails: NDArray[np.float32]) -> int:
    return int(np.square(thumbnails - thumbnail(picture)).mean(axis=1).argmin())


def _save(picture: Picture, path: Path, side: int) -> None:
    image = pyvips.Image.new_from_array(picture)
    image.thumbnail_image(side, height=side).write_to_file(str(path), Q=86, strip=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    # Everything below may be changed for a trial; what is in docs/ was made with these defaults.
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--shown", type=int, default=384, help="rows of the pictures in the page")
    parser.add_argument(
        "--renders", type=int, default=SMALL_RENDERS + COMPOSED_RENDERS, help="training renders that are searched"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 4096])
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    # Painted beside the checkpoints, in a folder named after the weights: a run that is cut off goes on where it was,
    # and a picture of other weights is never shown.
    scroll = Handscroll.from_pretrained(options.folder)
    guidance = scroll.spec.default_guidance
    weights = checksum(model_files(options.folder))
    images = options.work / f"gallery-{weights}-{options.steps}-{guidance:g}-{options.shown}"
    images.mkdir(exist_ok=True)
    thumbnails = training_thumbnails(options.work / "thumbnails.npy", options.renders, options.processes)
    lines = [
        "# Gallery",
        "",
        f"Made by the weights that ship, composed at {scroll.spec.compose_px} rows, in {options.steps} steps at"
        f" guidance {guidance:g}; none left out.",
        f"Beside each 1024x1024 sample: another seed, and the nearest of {options.renders:,} training renders.",
        "",
        "| sample | another seed | nearest training render | sentence |",
        "|---|---|---|---|",
    ]
    for number, sentence in enumerate(SENTENCES):
        seeds = (options.first_seed + number, options.first_seed + 1000 + number)
        names = []
        for seed in seeds:
            path = images / f"{number:02d}-{seed}.jpg"
            if not path.exists():
                picture = generate(scroll, sentence, 1024, 1024, seed, options.steps, guidance)
                _save(picture, path, options.shown)
            names.append(path.name)
        shown = pyvips.Image.new_from_file(str(images / names[0])).thumbnail_image(256, height=256).numpy()[..., :3]
        path = images / f"{number:02d}-nearest.jpg"
        _save(_training_render(nearest(shown, thumbnails)), path, options.shown)
        cells = " | ".join(f"![](images/gallery/{name})" for name in (*names, path.name))
        lines.append(f"| {cells} | {sentence} (seeds {seeds[0]}, {seeds[1]}) |")
        print(sentence, flush=True)
    if 4096 in options.sizes:
        lines += ["", "## 4096x4096", "", "The whole picture, and 512x512 of its pixels.", ""]
        for number in LARGE:
            seed = options.first_seed + 2000 + number
            path, cut = images / f"large-{number:02d}-{seed}.jpg", images / f"large-{number:02d}-{seed}-cut.jpg"
            if not cut.exists():
                picture = generate(scroll, SENTENCES[number], 4096, 4096, seed, options.steps, guidance)
                _save(picture, path, 768)
                _save(picture[1792:2304, 1792:2304], cut, 512)
            lines.append(f"![](images/gallery/{path.name}) ![](images/gallery/{cut.name})")
            lines += ["", f"{SENTENCES[number]} (seed {seed})", ""]
    shown_folder = options.docs / "images" / "gallery"
    shutil.rmtree(shown_folder, ignore_errors=True)
    shutil.copytree(images, shown_folder)
    (options.docs / "gallery.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
