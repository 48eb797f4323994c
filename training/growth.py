"""Teach the transformer what a larger size begins from: the smaller picture enlarged, with noise laid over it.

`pairs` paints the same scenes at a size and at half of it. `train` goes on from what `training.transformer` left, or
from a checkpoint folder with new readers. At the sizes that pictures grow to it learns the straight way from an
enlarged smaller picture E under noise to the latent z of a sharp one,

    x_sigma = sigma * noise + sigma * (1 - START) / START * E + (1 - sigma / START) * z,   0 < sigma <= START

which at START is what the sampler begins from (`handscroll.plan.growth`) and at 0 is z. The model predicts the way's
slope, (x_sigma - z) / sigma, so to a sampler nothing is new: x_sigma - sigma * prediction is the clean latent. Left as
it was the model takes an enlarged picture's smoothness for the scene's, for a smooth latent under noise is all that it
can be told from. At the sizes where pictures are composed it goes on learning what it knew, by plain flow matching.

Generated smaller pictures are softer than renders, so E is made softer too, by a different amount each time: the
picture before it is encoded, and its latent whenever it is drawn.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from handscroll.pictures import resizing
from handscroll.plan.growth import GROWTH_STRENGTHS
from training.captions import training_caption
from training.latents import PARAPHRASES, Bucket, LatentFiles, draw, encode
from training.schedule import add_step_options, prepare_process, shifted
from training.transformer import (
    FLOW_SHIFT,
    CaptionedLatents,
    Noised,
    Painter,
    TransformerTraining,
    Way,
    begin_from,
    from_noise,
    load_average,
)
from training.world import render

STRENGTH = max(GROWTH_STRENGTHS)
# The highest sigma that growth begins at: 0.72. The weights that ship learnt from 0.8.
START = shifted(STRENGTH, FLOW_SHIFT)
PLAIN = 0.25  # the share of the batches at large sizes that are plain flow matching over all sigmas
SOFTEST = (0.7, 0.45, 0.25)  # of the amplitude of the three finest octaves of a smaller picture, what may be missing
SOFTEST_LATENT = 0.5  # the same of what varies within a latent's token or from it to its neighbours
COARSE = 8  # channels, those of the most variance, that hold a token's place among its neighbours

# (bucket, pictures, share of the steps, whether pictures grow to it)
PLAN = (
    (Bucket(512, 512), 8_000, 0.74, False),
    (Bucket(1024, 1024), 200, 0.18, True),
    (Bucket(2048, 2048), 48, 0.06, True),
    (Bucket(4096, 4096), 16, 0.02, True),
)


class PairFiles(LatentFiles):
    """The files of one bucket: for each picture its latent and, where pictures grow to it, its enlarged half's."""

    key = 9

    def __init__(self, folder: Path, bucket: Bucket, grown: bool) -> None:
        super().__init__(folder, bucket)
        self.grown = grown
        self.latents_path = folder / f"pairs-{bucket.name}.f16"
        self.captions_path = folder / f"pairs-{bucket.name}.txt"
        self.shape = (2 if grown else 1, *self.shape)


def softened(picture: NDArray[np.uint8], amount: float) -> NDArray[np.uint8]:
    """[H, W, 3] bytes with less of the finest octaves, by `amount` from 0 to 1 of what `SOFTEST` says."""
    finer, details = torch.from_numpy(picture).permute(2, 0, 1)[None].float(), []
    for missing in SOFTEST:
        coarser = F.avg_pool2d(finer, 2)
        details.append((1 - missing * amount) * (finer - _twice(coarser)))
        finer = coarser
    for detail in reversed(details):
        finer = _twice(finer) + detail
    return finer[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _twice(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures, scale_factor=2.0, mode="bicubic", antialias=True)  # so it is Pillow's


def enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] bytes at twice the size, as the sampler enlarges."""
    height, width = 2 * picture.shape[0], 2 * picture.shape[1]
    (strip,) = resizing.enlarged(picture, height, width, height, torch.float32)
    return ((strip[0] + 1) * 127.5).round().byte().numpy()


def paint_pair(job: tuple[Bucket, int, bool, Path]) -> tuple[NDArray[np.float16], str]:
    """Latents [1 or 2, 32, h, w] of a new scene, and its captions."""
    bucket, seed, grown, vae = job
    torch.set_num_threads(1)
    model = _autoencoder(vae)
    scene, rng = draw(bucket, seed, PairFiles.key)
    pictures = [render(scene, bucket.width, bucket.height)]
    if grown:
        small = render(scene, bucket.width // 2, bucket.height // 2)
        pictures.append(enlarged(softened(small, rng.random())))
    latents = [encode(model, [picture.transpose(2, 0, 1)], torch.device("cpu"))[0] for picture in pictures]
    return np.stack(latents), "\t".join(training_caption(scene, rng) for _ in range(PARAPHRASES))


@cache
def _autoencoder(folder: Path) -> AutoencoderDC:
    return AutoencoderDC.from_pretrained(folder).eval().float()


def make_pairs(options: argparse.Namespace) -> None:
    """Every size in slices, so that a training sees some of each early. Goes on where it was cut off."""
    buckets = [PairFiles(options.work, bucket, grown) for bucket, _, _, grown in PLAN]
    targets = [round(count * options.scale) for _, count, _, _ in PLAN]
    for files in buckets:
        files.trim()
    # Spawned: a process forked from one that has used threads may hang.
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part in range(1, 9):
            for files, target in zip(buckets, targets, strict=True):
                indices = range(files.count(), math.ceil(target * part / 8))
                jobs = [(files.bucket, i, files.grown, options.folder / "vae") for i in indices]
                for latents, captions in pool.map(paint_pair, jobs):
                    files.append(latents[None], [captions])
                print(f"{files.bucket.name}: {files.count()}", flush=True)


def growth_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Sigmas as the steps of a larger size meet them: even over the schedule's last part, before its shift.

    A quarter are even in sigma itself, for the fewer steps at little noise, where the finest detail is settled.
    """
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    share = (strata / count).clamp(0.01, 1)
    met = shifted(STRENGTH * share, FLOW_SHIFT)
    return torch.where(torch.rand(count, generator=generator) < 0.25, START * share, met)


def on_the_way(latents: Tensor, begun: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_sigma of the module's formula; latents z, begun E, noise [N, 32, h, w], sigma [N] of at most START."""
    share = sigma.view(-1, 1, 1, 1)
    return share * (noise + (1 - START) / START * begun) + (1 - share / START) * latents


def soften_latents(begun: Tensor, fine: Tensor, amounts: Tensor) -> Tensor:
    """Latents E [N, 32, h, w] with less detail, by amounts [N] from 0 to 1 of `SOFTEST_LATENT`.

    The channels `fine` (bool [32]) hold what varies within a token, and shrink; of the others each token moves towards
    the mean of its neighbours. Measured on latents of generated pictures: a half to a quarter of the energy of renders'
    in the former, two thirds in the latter.
    """
    missing = SOFTEST_LATENT * amounts.view(-1, 1, 1, 1)
    around = F.avg_pool2d(F.pad(begun, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    means = begun.mean(dim=(2, 3), keepdim=True)
    return torch.lerp(begun, torch.where(fine.view(1, -1, 1, 1), means, around), missing)


class GrowthTraining(TransformerTraining):
    """The training of the transformer, taken up from what it has made, with the ways that pictures grow."""

    checkpoint_name = "growth.pt"
    seed = 10

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        spread = torch.from_numpy(self.sets[0].latents[:64, 0].astype(np.float32)).var(dim=(0, 2, 3))
        self.fine = spread < spread.sort(descending=True).values[COARSE - 1]

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.options.folder / "tokenizer")

    def load_sets(self) -> list[CaptionedLatents]:
        files = [PairFiles(self.options.work, bucket, grown) for bucket, _, _, grown in PLAN]
        return [CaptionedLatents(pairs, self.tokenizer) for pairs in files]

    def begin(self) -> Painter:
        learnt = self.options.work / TransformerTraining.checkpoint_name
        if learnt.exists():
            return load_average(learnt, self.tokenizer)
        return begin_from(self.options.folder, self.tokenizer)

    def share(self, files: CaptionedLatents) -> float:
        return next(share for bucket, _, share, _ in PLAN if bucket == files.bucket)

    def ways(self, files: CaptionedLatents) -> dict[str, tuple[float, Way]]:
        if next(grown for bucket, _, _, grown in PLAN if bucket == files.bucket):
            return {"": (PLAIN, self._from_noise), " grown": (1 - PLAIN, self._grown)}
        return {"": (1.0, self._from_noise)}

    def _from_noise(self, pairs: Tensor, generator: torch.Generator) -> Noised:
        return from_noise(pairs[:, 0], generator)

    def _grown(self, pairs: Tensor, generator: torch.Generator) -> Noised:
        z, e = pairs.unbind(1)
        sigma = growth_sigma(len(z), generator)
        e = soften_latents(e, self.fine, torch.rand(len(e), generator=generator))
        noise = torch.randn(z.shape, generator=generator)
        return Noised(on_the_way(z, e, sigma, noise), sigma, noise + (1 - START) / START * e - z / START)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "train"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the pairs and of the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of pictures")
    parser.add_argument("--processes", type=int, default=1, help="that paint pairs")
    tokens = "of latent, in one worker's batch of small pictures"
    add_step_options(parser, steps=7000, rate=2e-3, decay=0.45, horizon=400, tokens=tokens)
    options = parser.parse_args()
    if options.what == "pairs":
        make_pairs(options)
        return
    prepare_process(options)
    GrowthTraining(options).run()


if __name__ == "__main__":
    main()
