"""A small network that reads a scene's attributes from a picture: the measure of whether a picture obeys its prompt.

It learns from renders alone, never from generated pictures, and sees every picture at 256 rows: larger ones are
averaged down, and half of those it learns from are blurred or a little noisy, as an autoencoder would leave them. A
quarter are of scenes whose light or subject is painted several times, which no true scene has and generators make.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.claims import ATTRIBUTES, COUNTS, Attribute
from training.schedule import Average, learning_rate, load_checkpoint, pick_device, save_checkpoint
from training.world import Scene, multiplied, render, sample_scene

SIDE = 256
# (rows of the render, share of the pictures)
SIZES = ((256, 0.72), (512, 0.20), (1024, 0.08))
BATCH_OF_A_JOB = 16
HELD_OUT_SEED = 9
MULTIPLIED = 0.25  # of the pictures
READ = (*ATTRIBUTES, *COUNTS)


class Scorer(nn.Module):
    """[N, 3, 256, 256] in [-1, 1] to the logits of every attribute's labels, side by side."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (5, width, 2 * width, 3 * width, 4 * width, 6 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(after // 8, after), nn.ReLU()]
            if after > width:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(after // 8, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.squeeze = nn.Conv2d(widths[-1], 16, 1)
        self.head = nn.Sequential(
            nn.Linear(2 * widths[-1] + 16 * 64, 256), nn.ReLU(), nn.Linear(256, sum(len(a.labels) for a in READ))
        )

    def forward(self, pictures: Tensor) -> Tensor:
        n, _, h, w = pictures.shape
        # Where a pixel is: the sides of suns and trees are asked for.
        across = torch.linspace(-1, 1, w, device=pictures.device).view(1, 1, 1, w).expand(n, 1, h, w)
        down = torch.linspace(-1, 1, h, device=pictures.device).view(1, 1, h, 1).expand(n, 1, h, w)
        maps = self.trunk(torch.cat([pictures, across, down], dim=1))
        whole = [maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3)), self.squeeze(maps).flatten(1)]
        return self.head(torch.cat(whole, dim=1))


@dataclass(frozen=True)
class Reading:
    """One attribute as read from one picture."""

    attribute: Attribute
    label: str
    probability: float


def answers(scene: Scene, attributes: Sequence[Attribute] = ATTRIBUTES) -> list[int]:
    """The index of each attribute's answer, -1 where the picture shows none."""
    found = [(attribute, attribute.of(scene)) for attribute in attributes]
    return [-1 if answer is None else attribute.labels.index(answer) for attribute, answer in found]


def to_scorer(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] bytes of any size to [3, 256, 256]; a picture that is not square is squeezed."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    if picture.shape[:2] != (SIDE, SIDE):
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="area")
    return (pixels[0] + 0.5).to(torch.uint8).numpy()


def draw(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [16, 3, 256, 256] and answers [16, attributes] of one seed."""
    torch.set_num_threads(1)
    rng = np.random.default_rng((HELD_OUT_SEED, seed))
    pictures, truths = [], []
    for _ in range(BATCH_OF_A_JOB):
        scene = sample_scene(rng)
        if rng.random() < MULTIPLIED:
            scene = multiplied(scene, rng)
        size = int(rng.choice([s for s, _ in SIZES], p=[p for _, p in SIZES]))
        pictures.append(to_scorer(render(scene, size, size)))
        truths.append(answers(scene, READ))
    return np.stack(pictures), np.asarray(truths)


def endless(first: int, processes: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches of fresh renders, painted ahead by other processes."""
    # Spawned: a process forked from one that has used threads or a GPU may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque[Future[tuple[NDArray[np.uint8], NDArray[np.int64]]]] = deque()
        seed = first
        while True:
            while len(ahead) < 4 * processes:
                ahead.append(pool.submit(draw, seed))
                seed += 1
            pictures, truths = ahead.popleft().result()
            yield torch.from_numpy(pictures).float() / 127.5 - 1, torch.from_numpy(truths)


def worsen(pictures: Tensor) -> Tensor:
    """Half of the pictures lose detail and gain a little noise."""
    out = pictures.clone()
    for i in range(0, len(pictures), 2):
        if torch.rand(()) < 0.7:
            factor = float(torch.empty(()).uniform_(1.2, 3.0))
            small = F.interpolate(out[i : i + 1], scale_factor=1 / factor, mode="area")
            out[i : i + 1] = F.interpolate(small, (SIDE, SIDE), mode="bilinear")
        out[i] += torch.randn_like(out[i]) * 0.06 * torch.rand((), device=out.device)
    return out


def loss_of(logits: Tensor, truths: Tensor, attributes: Sequence[Attribute] = ATTRIBUTES, extra: int = 0) -> Tensor:
    """Mean cross entropy of all attributes. Each may have `extra` more answers than its labels."""
    parts, at = [], 0
    for i, attribute in enumerate(attributes):
        count = len(attribute.labels) + extra
        part = logits[:, at : at + count]
        if (truths[:, i] >= 0).any():
            parts.append(F.cross_entropy(part, truths[:, i], ignore_index=-1))
        at += count
    return torch.stack(parts).mean()


@torch.no_grad()
def read(scorer: Scorer, picture: NDArray[np.uint8]) -> dict[str, Reading]:
    """What the scorer sees in one picture of [H, W, 3] bytes."""
    device = next(scorer.parameters()).device
    logits = scorer(torch.from_numpy(to_scorer(picture))[None].to(device).float() / 127.5 - 1)[0].cpu()
    readings, at = {}, 0
    for attribute in READ:
        shares = logits[at : at + len(attribute.labels)].softmax(dim=0)
        best = int(shares.argmax())
        readings[attribute.name] = Reading(attribute, attribute.labels[best], float(shares[best]))
        at += len(attribute.labels)
    return readings


def load_scorer(path: Path) -> Scorer:
    scorer = Scorer()
    scorer.load_state_dict(load_file(path))
    return scorer.eval()


def scorer_file(work: Path) -> Path:
    """The scorer that was trained in a work folder, else the one that is kept here, so that figures can be compared."""
    own = work / "scorer.safetensors"
    return own if own.exists() else Path(__file__).with_name("scorer.safetensors")


class ScorerTraining:
    """The network, its average and its optimiser, saved and resumed together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.checkpoint = options.work / "scorer.pt"
        torch.manual_seed(0)
        self.model = Scorer().to(self.device)
        self.average = Average(self.model, horizon=300)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.01)
        self.step = 0
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.device, self.model, self.average, self.optimiser)
        self.stopping = False

    def stop(self, *_: object) -> None:
        self.stopping = True

    def save(self) -> None:
        save_checkpoint(self.checkpoint, self.step, self.model, self.average, self.optimiser)
        save_file(self.average.model.state_dict(), self.checkpoint.with_suffix(".safetensors"))

    @torch.no_grad()
    def report(self) -> None:
        right, asked = np.zeros(len(READ)), np.zeros(len(READ))
        for seed in range(16):
            pictures, truths = draw(10_000_000 + seed)
            logits = self.average.model(torch.from_numpy(pictures).to(self.device).float() / 127.5 - 1).cpu().numpy()
            at = 0
            for i, attribute in enumerate(READ):
                best = logits[:, at : at + len(attribute.labels)].argmax(axis=1)
                shown = truths[:, i] >= 0
                right[i] += (best == truths[:, i])[shown].sum()
                asked[i] += shown.sum()
                at += len(attribute.labels)
        shares = ", ".join(f"{a.name} {r / n:.2f}" for a, r, n in zip(READ, right, asked, strict=True))
        print(
            f"step {self.step:6d}  held-out renders read rightly: {right.sum() / asked.sum():.3f}  ({shares})",
            flush=True,
        )

    def run(self) -> None:
        options = self.options
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        print(f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters", flush=True)
        started, spent = time.monotonic(), time.process_time()
        # Every job is drawn once: a picture is never seen again.
        batches = endless(self.step * options.jobs, options.processes)
        while self.step < options.steps and not self.stopping and time.monotonic() - started < 60 * options.minutes:
            drawn = [next(batches) for _ in range(options.jobs)]
            pictures = worsen(torch.cat([p for p, _ in drawn]).to(self.device))
            loss = loss_of(self.model(pictures), torch.cat([t for _, t in drawn]).to(self.device), READ)
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.step, options.steps, options.rate, warmup=100)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.average.update(self.model)
            self.step += 1
            if self.step % 50 == 0:
                seconds = time.process_time() - spent
                print(f"step {self.step:6d}  loss {float(loss.detach()):.4f}  {seconds:.0f} s of processor", flush=True)
            if self.step % 400 == 0:
                self.report()
                self.save()
        batches.close()
        self.report()
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2, help="of 16 pictures, in a step")
    parser.add_argument("--processes", type=int, default=1, help="that paint")
    parser.add_argument("--rate", type=float, default=1.0e-3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    torch.set_flush_denormal(True)
    ScorerTraining(parser.parse_args()).run()


if __name__ == "__main__":
    main()
