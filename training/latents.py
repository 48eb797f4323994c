"""Latents and captions on disk, so that the transformer never waits for a painter.

One bucket is one picture size. Each bucket is a memory-mapped file of latents that grows in the background, and a text
file with the captions of each picture, a line of tab-separated paraphrases each.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from numpy.typing import NDArray

from training.captions import training_caption
from training.world import Scene, render, sample_scene

DOWN = 32
PARAPHRASES = 6


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size; `tokens` is what one of them costs the transformer."""

    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def tokens(self) -> int:
        return self.width * self.height // DOWN**2


# (bucket, pictures): small sizes carry the learning, large ones keep a sun from becoming two.
PLAN = (
    (Bucket(256, 256), 24_000),
    (Bucket(512, 512), 5_000),
    (Bucket(512, 256), 1_200),
    (Bucket(256, 384), 1_000),
    (Bucket(1024, 1024), 1_400),
    (Bucket(1024, 512), 400),
    (Bucket(2048, 2048), 120),
    (Bucket(4096, 4096), 24),
)


def draw(bucket: Bucket, seed: int, key: int) -> tuple[Scene, np.random.Generator]:
    """A scene, and the generator that goes on to its captions. Trainings with another `key` see other scenes."""
    rng = np.random.default_rng((key, bucket.width, bucket.height, seed))
    return sample_scene(rng), rng


def paint(job: tuple[Bucket, int]) -> tuple[NDArray[np.uint8], str]:
    """One picture of a bucket as [3, H, W] bytes, and its captions."""
    bucket, seed = job
    scene, rng = draw(bucket, seed, LatentFiles.key)
    picture = render(scene, bucket.width, bucket.height)
    return picture.transpose(2, 0, 1), "\t".join(training_caption(scene, rng) for _ in range(PARAPHRASES))


class LatentFiles:
    """The files of one bucket. A reader sees only pictures whose latents and captions are both complete."""

    key = 4

    def __init__(self, folder: Path, bucket: Bucket) -> None:
        self.bucket = bucket
        self.latents_path = folder / f"latents-{bucket.name}.f16"
        self.captions_path = folder / f"captions-{bucket.name}.txt"
        self.shape: tuple[int, ...] = (32, bucket.height // DOWN, bucket.width // DOWN)

    def scene(self, index: int) -> Scene:
        """What is in a picture of these files."""
        return draw(self.bucket, index, self.key)[0]

    def count(self) -> int:
        if not self.captions_path.exists():
            return 0
        with self.captions_path.open("rb") as lines:
            return sum(1 for _ in lines)

    def append(self, latents: NDArray[np.float16], captions: list[str]) -> None:
        with self.latents_path.open("ab") as out:
            out.write(latents.tobytes())
        with self.captions_path.open("a") as out:
            out.write("".join(line + "\n" for line in captions))

    def trim(self) -> None:
        """Forget latents whose captions were never written, after an interruption."""
        if self.latents_path.exists():
            whole = self.count() * int(np.prod(self.shape)) * 2
            with self.latents_path.open("r+b") as out:
                out.truncate(whole)

    def read(self) -> tuple[NDArray[np.float16], list[list[str]]]:
        count = self.count()
        if count == 0:
            return np.zeros((0, *self.shape), np.float16), []
        lines = self.captions_path.read_text().splitlines()[:count]
        latents = np.memmap(self.latents_path, np.float16, mode="r", shape=(count, *self.shape))
        return latents, [line.split("\t") for line in lines]


@torch.no_grad()
def encode(model: AutoencoderDC, pictures: list[NDArray[np.uint8]], device: torch.device) -> NDArray[np.float16]:
    batch = torch.from_numpy(np.stack(pictures)).to(device).float() / 127.5 - 1
    return (model.encoder(batch) * model.config.scaling_factor).cpu().numpy().astype(np.float16)


def _rounds(buckets: list[LatentFiles], targets: list[int], rounds: int) -> Iterator[tuple[LatentFiles, range]]:
    """Work in slices, so that every size has some pictures early."""
    for r in range(rounds):
        for files, target in zip(buckets, targets, strict=True):
            start, end = files.count(), target * (r + 1) // rounds
            if start < end:
                yield files, range(start, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of pictures")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    model = AutoencoderDC.from_pretrained(options.work / "autoencoder-fixed-encoder").eval().to(device)
    buckets = [LatentFiles(options.work, bucket) for bucket, _ in PLAN]
    targets = [round(count * options.scale) for _, count in PLAN]
    for files in buckets:
        files.trim()
    # Spawned: a process forked from one that has used threads or a GPU may hang.
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for files, indices in _rounds(buckets, targets, rounds=12):
            side = max(1, 16 * 64 // files.bucket.tokens)
            for start in range(indices.start, indices.stop, side):
                jobs = [(files.bucket, i) for i in range(start, min(start + side, indices.stop))]
                painted = list(pool.map(paint, jobs))
                files.append(encode(model, [p for p, _ in painted], device), [c for _, c in painted])
            print(f"{files.bucket.name}: {indices.stop}", flush=True)


if __name__ == "__main__":
    main()
