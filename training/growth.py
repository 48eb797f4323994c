"""Teach the transformer what a larger size begins from: the smaller picture enlarged, with noise laid over it.

`pairs` paints the same scenes at a size and at half of it. `train` goes on from a checkpoint folder. At the sizes that
pictures grow to it learns the straight way from an enlarged smaller picture E under noise to the latent z of a sharp
one,

    x_sigma = sigma * noise + sigma * (1 - START) / START * E + (1 - sigma / START) * z,   0 < sigma <= START

which at START is what the sampler begins from (`handscroll.plan.growth`) and at 0 is z. The model predicts the way's
slope, (x_sigma - z) / sigma, so to a sampler nothing is new: x_sigma - sigma * prediction is the clean latent. Left as
it was the model takes an enlarged picture's smoothness for the scene's, for a smooth latent under noise is all that it
can be told from. At the sizes where pictures are composed it goes on learning what it knew, by plain flow matching.

Generated smaller pictures are softer than renders, so E is made softer too, by a different amount each time: the
picture before it is encoded, and its latent whenever it is drawn. Text encoder and caption projection stay as they
are: a loss that is mostly of texture would let words fade (`training.transformer`).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Gemma2Model, PreTrainedTokenizerFast

from handscroll.plan.growth import GROWTH_STRENGTH
from training.captions import training_caption
from training.latents import PARAPHRASES, Bucket, LatentFiles, encode
from training.schedule import (
    Average,
    add_step_options,
    autocast,
    load_checkpoint,
    pick_device,
    plateau,
    prepare_process,
    save_checkpoint,
    set_gradients,
    shifted,
)
from training.transformer import EMPTY_CAPTIONS, FLOW_SHIFT, sample_sigma
from training.world import render, sample_scene

START = shifted(GROWTH_STRENGTH, FLOW_SHIFT)  # the sigma that growth begins at: 0.8
PLAIN = 0.25  # the share of the batches at large sizes that are plain flow matching over all sigmas
SOFTEST = (0.7, 0.45, 0.25)  # of the amplitude of the three finest octaves of a smaller picture, what may be missing
SOFTEST_LATENT = 0.5  # the same of what varies within a latent's token or from it to its neighbours
COARSE = 8  # channels, those of the most variance, that hold a token's place among its neighbours

# (bucket, pictures, share of the steps, whether pictures grow to it)
PLAN = (
    (Bucket(512, 512), 1_000, 0.30, False),
    (Bucket(1024, 1024), 300, 0.34, True),
    (Bucket(2048, 2048), 72, 0.22, True),
    (Bucket(4096, 4096), 32, 0.14, True),
)


class PairFiles(LatentFiles):
    """The files of one bucket: for each picture its latent and, where pictures grow to it, its enlarged half's."""

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
    """[H, W, 3] bytes at twice the size, as the sampler enlarges: cubic convolution with a = -0.5."""
    floats = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    return _twice(floats)[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def paint_pair(job: tuple[Bucket, int, bool, Path]) -> tuple[NDArray[np.float16], str]:
    """Latents [1 or 2, 32, h, w] of a new scene, and its captions."""
    bucket, seed, grown, vae = job
    torch.set_num_threads(1)
    model = _autoencoder(vae)
    rng = np.random.default_rng((9, bucket.width, bucket.height, seed))
    scene = sample_scene(rng)
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
    met = shifted(GROWTH_STRENGTH * share, FLOW_SHIFT)
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


class GrowthTraining:
    """The transformer, its average and optimiser, saved and resumed together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        folder = options.folder
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.text_encoder = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.text_encoder.to(self.device).requires_grad_(False).eval()
        self.model = SanaTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
        self.model.to(self.device, torch.float32).train()
        self.model.caption_projection.requires_grad_(False)
        self.model.caption_norm.requires_grad_(False)
        self.files = [PairFiles(options.work, bucket, grown) for bucket, _, _, grown in PLAN]
        self.average = Average(self.model, horizon=options.horizon)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.checkpoint = options.work / "growth.pt"
        self.step = 0
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.device, self.model, self.average, self.optimiser)
        self.rng = np.random.default_rng((10, self.step))
        self.pool = ThreadPoolExecutor(options.workers)
        self.stopping = False
        self.sets = [files.read() for files in self.files]
        if any(len(captions) < 2 for _, captions in self.sets):
            raise SystemExit(f"{options.work} holds too few pairs; run `python -m training.growth pairs` first")
        spread = torch.from_numpy(self.sets[0][0][:64, 0].astype(np.float32)).var(dim=(0, 2, 3))
        self.fine = spread < spread.sort(descending=True).values[COARSE - 1]

    def stop(self, *_: object) -> None:
        self.stopping = True

    def save(self) -> None:
        save_checkpoint(self.checkpoint, self.step, self.model, self.average, self.optimiser)

    def kept_back(self, which: int) -> int:
        """How many of a bucket's pictures, the first, are never trained on."""
        return max(1, min(16, len(self.sets[which][1]) // 8))

    def loss(
        self, model: SanaTransformer2DModel, which: int, picked: NDArray[np.int64], seed: int, plain: bool
    ) -> Tensor:
        """Mean square error of the slope, of some pictures of one bucket: by plain flow matching, or on the way."""
        latents, captions = self.sets[which]
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        texts = ["" if rng.random() < EMPTY_CAPTIONS else captions[i][rng.integers(len(captions[i]))] for i in picked]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
        both = torch.from_numpy(latents[picked].astype(np.float32))
        noise = torch.randn(both[:, 0].shape, generator=generator)
        z, e = both[:, 0], both[:, -1]
        if plain:
            sigma = sample_sigma(len(z), z[0, 0].numel(), generator)
            share = sigma.view(-1, 1, 1, 1)
            noisy, slope = z + share * (noise - z), noise - z
        else:
            sigma = growth_sigma(len(z), generator)
            e = soften_latents(e, self.fine, torch.rand(len(e), generator=generator))
            noisy, slope = on_the_way(z, e, sigma, noise), noise + (1 - START) / START * e - z / START
        mask = encoded.attention_mask.to(self.device)
        with autocast(self.device, self.options.precision):
            with torch.no_grad():
                text = self.text_encoder(encoded.input_ids.to(self.device), attention_mask=mask).last_hidden_state
            made = model(
                noisy.to(self.device),
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                timestep=sigma.to(self.device) * 1000,
                return_dict=False,
            )[0]
        return (made.float() - slope.to(self.device)).square().mean()

    @torch.no_grad()
    def report(self) -> None:
        told = []
        for which, files in enumerate(self.files):
            count = min(self.kept_back(which), max(2, 8 * 1024 // files.bucket.tokens))
            for plain in (False, True) if files.grown else (True,):
                made = [self.loss(self.average.model, which, np.array([i]), 77 + i, plain) for i in range(count)]
                kind = "plain" if plain else "grown"
                told.append(f"{files.bucket.name} {kind} {float(torch.stack(made).mean()):.4f}")
        print(f"step {self.step:6d}  held-out {', '.join(told)}", flush=True)

    def _gradients(self, which: int, seed: int, plain: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        count = max(1, self.options.tokens // self.files[which].bucket.tokens)
        rng = np.random.default_rng(seed)
        picked = np.sort(rng.integers(self.kept_back(which), len(self.sets[which][1]), count))
        loss = self.loss(self.model, which, picked, seed, plain)
        return loss.detach(), torch.autograd.grad(loss, self.parameters, materialize_grads=True)

    def _step(self) -> tuple[str, float]:
        options = self.options
        rate = plateau(self.step, options.steps, options.rate, warmup=40, decay=options.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        shares = np.array([share for _, _, share, _ in PLAN])
        which = int(self.rng.choice(len(shares), p=shares / shares.sum()))
        plain = not self.files[which].grown or self.rng.random() < PLAIN
        seeds = [int(seed) for seed in self.rng.integers(2**31, size=options.workers)]
        made = list(self.pool.map(self._gradients, [which] * len(seeds), seeds, [plain] * len(seeds)))
        set_gradients(self.parameters, [gradients for _, gradients in made])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.average.update(self.model)
        kind = f"{self.files[which].bucket.width}{'' if plain else '+'}"
        return kind, float(np.mean([float(loss) for loss, _ in made]))

    def run(self) -> None:
        options = self.options
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        began = time.monotonic()
        seen: dict[str, list[float]] = {}
        if self.step == 0:
            self.report()
        while self.step < options.steps and not self.stopping and time.monotonic() - began < 60 * options.minutes:
            if self.step % 50 == 0:
                self.sets = [files.read() for files in self.files]  # more may have been painted
            kind, loss = self._step()
            seen.setdefault(kind, []).append(loss)
            self.step += 1
            if self.step % 25 == 0:
                told = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in sorted(seen.items()))
                print(f"step {self.step:6d}  {told}  {time.monotonic() - began:.0f} s", flush=True)
                seen = {}
            if self.step % 100 == 0:
                self.save()
            if self.step % 300 == 0:
                self.report()
        self.report()
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "train"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the pairs and of the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of pictures")
    parser.add_argument("--processes", type=int, default=1, help="that paint pairs")
    tokens = "of latent, in one worker's batch of small pictures"
    add_step_options(parser, steps=1000, rate=6e-4, decay=0.45, horizon=100, tokens=tokens)
    options = parser.parse_args()
    if options.what == "pairs":
        make_pairs(options)
        return
    prepare_process(options)
    GrowthTraining(options).run()


if __name__ == "__main__":
    main()
