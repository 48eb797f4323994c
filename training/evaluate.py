"""Figures by which one set of weights is better than another, and a sheet of pictures to look at.

fidelity     autoencoder against 32 principal components of the same renders: windows, and whole pictures by size
loss         flow-matching loss of the exported weights on renders they have not seen, by size
attributes   what a scorer reads from generated pictures of held-out prompts, and from real renders of the same scenes;
             how many suns and subjects, and the energy of each octave of detail, generated over rendered
guidance     how much more of a sentence pictures show with guidance than without
negatives    how often what a picture shows unasked stays there when a negative prompt names it, or names another thing
sheet        a few prompts at a few sizes, as PNG files
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyvips
import torch
from diffusers import AutoencoderDC, SanaPipeline
from numpy.typing import NDArray

from handscroll import Handscroll
from training.autoencoder import as_floats, fidelity, reconstruct
from training.captions import caption
from training.claims import claims, is_held_out
from training.latents import Bucket, encode, paint
from training.linear_start import PatchPCA
from training.scorer import Scorer, load_scorer, read, scorer_file
from training.transformer import sample_sigma
from training.world import Scene, render, sample_scene

Picture = NDArray[np.uint8]
SHEET_PROMPTS = (
    "snowy mountains at dusk, a red sun",
    "a calm lake under the stars",
    "green forest hills at noon, white clouds",
    "misty mountains at dawn",
    "cherry blossoms and a volcano in spring, a pagoda",
    "a sailing boat on the sea at sunset, an orange sun on the left",
    "karst mountains and a river, ink painting, a red sun",
    "a cabin in a winter forest at night, falling snow",
)
HELD_OUT_FROM = 10_000_000  # seeds that no training bucket reaches


class Made(Protocol):
    """A picture as `Handscroll` gives it."""

    def numpy(self) -> Picture: ...


class Painter(Protocol):
    """A `Handscroll`, or what a test puts in its place."""

    def __call__(
        self, prompt: str, *, negative: str, width: int, height: int, seed: int, steps: int, guidance: float
    ) -> Made: ...


def generate(
    scroll: Painter,
    prompt: str,
    width: int,
    height: int,
    seed: int,
    steps: int,
    guidance: float,
    negative: str = "",
) -> Picture:
    """The picture that `handscroll generate` makes of the same arguments."""
    made = scroll(prompt, negative=negative, width=width, height=height, seed=seed, steps=steps, guidance=guidance)
    return made.numpy()


def report_fidelity(vae: AutoencoderDC, work: Path, sizes: list[tuple[int, int]]) -> None:
    """PSNR over all pixels and over the steepest 5 %, for the autoencoder and for as many principal components."""
    held_out = as_floats(np.load(work / "windows-held-out.npy"))
    pca = PatchPCA.fit(as_floats(np.load(work / "windows.npy", mmap_mode="r")[:1000]), keep=32)

    def line(name: str, pictures: NDArray[np.float32]) -> None:
        linear = fidelity(pca.reconstruct(pictures), pictures)
        trained = fidelity(reconstruct(vae, pictures, batch=1), pictures)
        print(
            f"{name}: {trained[0]:.2f} dB, edges {trained[1]:.2f} dB;"
            f" components {linear[0]:.2f} dB, edges {linear[1]:.2f} dB;"
            f" gain {trained[0] - linear[0]:+.2f} dB, edges {trained[1] - linear[1]:+.2f} dB",
            flush=True,
        )

    line("windows", held_out)
    for width, height in sizes:
        count = max(1, min(16, 2**26 // (width * height)))
        bucket = Bucket(width, height)
        line(bucket.name, as_floats(np.stack([paint((bucket, HELD_OUT_FROM + i))[0] for i in range(count)])))


@torch.no_grad()
def report_loss(pipe: SanaPipeline) -> None:
    for size, count in ((256, 48), (512, 16), (1024, 6)):
        painted = [paint((Bucket(size, size), HELD_OUT_FROM + i)) for i in range(count)]
        latents = torch.from_numpy(encode(pipe.vae, [p for p, _ in painted], torch.device("cpu")).astype(np.float32))
        generator = torch.Generator().manual_seed(0)
        sigma, noise = (
            sample_sigma(count, latents[0, 0].numel(), generator),
            torch.randn(latents.shape, generator=generator),
        )
        text = pipe.tokenizer([c.split("\t")[0] for _, c in painted], padding=True, return_tensors="pt")
        embeddings = pipe.text_encoder(text.input_ids, attention_mask=text.attention_mask)[0]
        share = sigma.view(-1, 1, 1, 1)
        output = pipe.transformer(
            latents + share * (noise - latents),
            encoder_hidden_states=embeddings,
            encoder_attention_mask=text.attention_mask,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        print(f"held-out loss at {size}: {float((output - (noise - latents)).square().mean()):.4f}")


def held_out_prompts(count: int) -> Iterator[tuple[int, Scene, str]]:
    """(number, scene, sentence) of sentences that no training has seen and that claim at least two things."""
    rng = np.random.default_rng(HELD_OUT_FROM)
    number = 0
    while number < count:
        scene = sample_scene(rng)
        for _ in range(80):
            text = caption(scene, rng)
            if is_held_out(text) and len(claims(text)) >= 2:
                yield number, scene, text
                number += 1
                break


def kept_claims(text: str, labels: dict[str, str]) -> dict[str, bool]:
    """For each attribute that a sentence claims, whether the picture was read so."""
    return {name: labels[name] in allowed for name, allowed in claims(text).items()}


def checksum(files: list[Path]) -> str:
    """Names what figures were made by, so that those of other weights are never taken for theirs."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def model_files(folder: Path) -> list[Path]:
    """What the pictures of a checkpoint folder depend on: its weights, and how it says that they are used."""
    return [*sorted(folder.rglob("*.safetensors")), folder / "handscroll.json"]


@dataclass(frozen=True)
class Shot:
    """One picture to be made and read, and the scene that it should show where there is one."""

    prompt: str
    size: int
    seed: int
    steps: int
    guidance: float
    negative: str = ""
    scene: Scene | None = None


Row = dict[str, Any]  # what was seen of one shot, as it stands in a file of JSON lines
AShot = TypeVar("AShot")


class Onlooker:
    """Makes pictures and has them read. One for each process."""

    def __init__(self, scroll: Painter, scorer: Scorer) -> None:
        self.scroll = scroll
        self.scorer = scorer

    def _seen(self, picture: Picture) -> Row:
        labels = {name: reading.label for name, reading in read(self.scorer, picture).items()}
        return {"labels": labels, "octaves": octaves(picture).tolist()}

    def __call__(self, shot: Shot) -> Row:
        picture = generate(
            self.scroll, shot.prompt, shot.size, shot.size, shot.seed, shot.steps, shot.guidance, shot.negative
        )
        row = {"prompt": shot.prompt, "generated": self._seen(picture)}
        if shot.scene is not None:
            row["rendered"] = self._seen(render(shot.scene, shot.size, shot.size))
        return row


_onlooker: Onlooker


def _take_seat(folder: Path, scorer: Path, threads: int) -> None:
    global _onlooker
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    _onlooker = Onlooker(Handscroll.from_pretrained(folder), load_scorer(scorer))


def _look(shot: Shot) -> Row:
    return _onlooker(shot)


def look_at_all(path: Path, shots: Sequence[AShot], looks: Callable[[Sequence[AShot]], Iterable[Row]]) -> list[Row]:
    """A row for each shot, appended to the file `path` as it comes; goes on where an earlier run was cut off."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as out:
        for row in looks(shots[len(rows) :]):
            out.write(json.dumps(row) + "\n")
            out.flush()
            rows.append(row)
    return rows[: len(shots)]


def report_attributes(rows: Sequence[Row], size: int) -> None:
    shares: dict[str, dict[str, list[bool]]] = {kind: defaultdict(list) for kind in ("rendered", "generated")}
    for row in rows:
        for kind, by_name in shares.items():
            for name, kept in kept_claims(row["prompt"], row[kind]["labels"]).items():
                by_name[name].append(kept)
    for name, outcomes in sorted(shares["generated"].items()):
        real = np.mean(shares["rendered"][name])
        print(f"{name:16s} generated {np.mean(outcomes):.2f}, rendered {real:.2f}, of {len(outcomes)} claims")
    for thing, count in (("light", "lights"), ("subject", "subjects")):
        ones = {
            kind: [row[kind]["labels"][count] == "one" for row in rows if row[kind]["labels"][thing] != "none"]
            for kind in shares
        }
        told = ", ".join(f"{kind} {np.mean(kept):.3f} of {len(kept)}" for kind, kept in ones.items() if kept)
        if told:
            print(f"{count} at {size}: one alone where there are any: {told}")
    means = {
        kind: np.mean([kept for values in by_name.values() for kept in values]) for kind, by_name in shares.items()
    }
    generated, rendered = means["generated"], means["rendered"]
    print(
        f"attributes at {size}, {len(rows)} prompts: generated {generated:.3f}, rendered {rendered:.3f},"
        f" ratio {generated / rendered:.3f}"
    )
    energies = [np.mean([row[kind]["octaves"] for row in rows], axis=0) for kind in ("generated", "rendered")]
    ratios = " ".join(f"{ratio:.2f}" for ratio in energies[0] / energies[1])
    print(f"octaves at {size}, finest first, generated over rendered: {ratios}", flush=True)


def guidance_shots(size: int, seeds: int, steps: int, guidance: float) -> list[Shot]:
    """Held-out sentences without and with guidance."""
    return [
        Shot(text, size, number, steps, strength)
        for number, _, text in held_out_prompts(8 * seeds)
        for strength in (1.0, guidance)
    ]


def report_guidance(shots: Sequence[Shot], rows: Sequence[Row]) -> None:
    kept: dict[float, list[bool]] = defaultdict(list)
    for shot, row in zip(shots, rows, strict=True):
        kept[shot.guidance] += kept_claims(shot.prompt, row["generated"]["labels"]).values()
    shares = ", ".join(f"guidance {strength:g}: {np.mean(values):.3f} of claims" for strength, values in kept.items())
    print(shares, flush=True)


Thing = tuple[str, str]  # an attribute and its answer

# What a picture may show unasked, and the negative prompt that names it.
NAMES: dict[Thing, str] = {
    ("light", "sun"): "a sun",
    ("clouds", "yes"): "clouds",
    ("forest", "pines"): "pine trees",
    ("water", "lake"): "a lake",
    ("subject", "boat"): "a boat",
    ("light", "moon"): "a moon",
    ("snow", "yes"): "snow",
    ("forest", "leafy"): "leafy trees",
    ("water", "river"): "a river",
    ("subject", "pagoda"): "a pagoda",
    ("stars", "yes"): "stars",
    ("mist", "yes"): "mist",
    ("near tree", "pines"): "a pine tree",
    ("island", "yes"): "an island",
    ("subject", "cabin"): "a cabin",
    ("near tree", "leafy"): "a large tree",
}


def negative_shots(shots: Sequence[Shot], rows: Sequence[Row]) -> list[tuple[Thing, Shot, Shot]]:
    """For each thing that a picture shows unasked: the same shot against its name, and against another thing's.

    That other thing is neither asked for nor seen, and what it does is what any negative prompt does: a picture that is
    disturbed loses some of its things.
    """
    found: list[tuple[Thing, Shot, Shot]] = []
    things = list(NAMES)
    for shot, row in zip(shots, rows, strict=True):
        labels, asked = row["generated"]["labels"], claims(shot.prompt)
        for place, (name, label) in enumerate(things):
            if name in asked or labels[name] != label:
                continue
            others = (*things[place + 1 :], *things[:place])
            other = next(thing for thing in others if thing[0] not in asked and labels[thing[0]] != thing[1])
            against_own, against_other = (
                replace(shot, negative=NAMES[thing], scene=None) for thing in ((name, label), other)
            )
            found.append(((name, label), against_own, against_other))
    return found


def report_negatives(things: Sequence[Thing], rows: Sequence[Row]) -> None:
    """`rows` are two for each thing: against its name, and against another's."""
    stayed: dict[Thing, list[tuple[bool, bool]]] = defaultdict(list)
    for thing, own, other in zip(things, rows[::2], rows[1::2], strict=True):
        seen = [row["generated"]["labels"][thing[0]] == thing[1] for row in (own, other)]
        stayed[thing].append((seen[0], seen[1]))

    def line(name: str, pairs: list[tuple[bool, bool]]) -> None:
        own, other = np.mean(pairs, axis=0)
        print(f"{name}: seen unasked in {len(pairs)}; against its name {own:.2f} stay, against another's {other:.2f}")

    for thing, pairs in stayed.items():
        line(NAMES[thing], pairs)
    if stayed:
        line("all", [pair for pairs in stayed.values() for pair in pairs])


def octaves(picture: Picture) -> NDArray[np.float64]:
    """Mean square of each octave of detail of a square picture, the finest first: [log2(H) - 2]."""
    grey = picture.astype(np.float64).mean(axis=-1)
    energies = []
    while len(grey) > 4:
        half = grey.reshape(len(grey) // 2, 2, -1, 2).mean(axis=(1, 3))
        energies.append(np.square(grey - np.kron(half, np.ones((2, 2)))).mean())
        grey = half
    return np.asarray(energies)


def make_sheet(
    scroll: Handscroll, path: Path, sizes: list[tuple[int, int]], seeds: int, steps: int, guidance: float
) -> None:
    """One file for each size: prompts down, seeds across."""
    for width, height in sizes:
        rows, started = [], time.monotonic()
        for prompt in SHEET_PROMPTS:
            across = [generate(scroll, prompt, width, height, seed, steps, guidance) for seed in range(seeds)]
            rows.append(np.concatenate(across, axis=1))
        seconds = (time.monotonic() - started) / (len(SHEET_PROMPTS) * seeds)
        target = path / f"sheet-{width}x{height}.png"
        pyvips.Image.new_from_array(np.concatenate(rows, axis=0)).write_to_file(str(target))
        print(f"{target}: {seconds:.1f} s a picture", flush=True)


def report_readings(options: argparse.Namespace, sizes: Sequence[int], guidance: float) -> None:
    """What the scorer reads, by several processes; the files of rows are named after the weights that made them."""
    scorer = scorer_file(options.work)
    made_by = checksum([*model_files(options.folder), scorer])
    seat = (options.folder, scorer, max(1, torch.get_num_threads() // options.processes))

    def rows(name: str, shots: Sequence[Shot]) -> list[Row]:
        path = options.work / f"{name}-{made_by}-{options.steps}-{guidance:g}.jsonl"
        context = get_context("spawn")
        with ProcessPoolExecutor(options.processes, context, initializer=_take_seat, initargs=seat) as pool:
            return look_at_all(path, shots, lambda left: pool.map(_look, left))

    for size in sizes:
        if {"attributes", "negatives"} & set(options.only):
            shots = [
                Shot(text, size, number, options.steps, guidance, scene=scene)
                for number, scene, text in held_out_prompts(options.prompts)
            ]
            seen = rows(f"attributes-{size}", shots)
            if "attributes" in options.only:
                report_attributes(seen, size)
            if "negatives" in options.only:
                cases = negative_shots(shots, seen)
                against = [shot for _, *pair in cases for shot in pair]
                report_negatives([thing for thing, *_ in cases], rows(f"negatives-{size}", against))
        if "guidance" in options.only:
            shots = guidance_shots(size, options.seeds, options.steps, guidance)
            report_guidance(shots, rows(f"guidance-{size}", shots))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["fidelity", "loss", "attributes", "sheet"])
    parser.add_argument("--sizes", nargs="*", type=_size, default=[(512, 512), (1024, 1024)])
    parser.add_argument("--prompts", type=int, default=300, help="held-out sentences at each size")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="the model's own unless given")
    parser.add_argument("--processes", type=int, default=2, help="that make the pictures which the scorer reads")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    scroll = Handscroll.from_pretrained(options.folder)
    guidance = scroll.spec.default_guidance if options.guidance is None else options.guidance
    if {"fidelity", "loss"} & set(options.only):
        pipe = SanaPipeline.from_pretrained(options.folder, dtype=torch.float32)
        if "fidelity" in options.only:
            report_fidelity(pipe.vae, options.work, options.sizes)
        if "loss" in options.only:
            report_loss(pipe)
    squares = [width for width, height in options.sizes if width == height]
    if {"attributes", "guidance", "negatives"} & set(options.only):
        report_readings(options, squares, guidance)
    if "sheet" in options.only:
        make_sheet(scroll, options.work, options.sizes, options.seeds, options.steps, guidance)


if __name__ == "__main__":
    main()
