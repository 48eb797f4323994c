"""Figures by which one set of weights is better than another, and a sheet of pictures to look at.

fidelity     autoencoder against 32 principal components of the same renders, and at 1024 and 2048 rows
loss         flow-matching loss of the exported weights on renders they have not seen, by size
obedience    how often generated pictures do what cheap measurements can check: dark nights, the sun's side and colour
sheet        a few prompts at a few sizes, as PNG files
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips
import torch
from diffusers import AutoencoderDC, SanaPipeline
from numpy.typing import NDArray

from training.autoencoder import as_floats, fidelity, reconstruct
from training.latents import Bucket, encode, paint
from training.linear_start import PatchPCA
from training.transformer import sample_sigma

Picture = NDArray[np.uint8]
SHEET_PROMPTS = (
    "snowy mountains at dusk, a red sun",
    "a calm lake under the stars",
    "green forest hills at noon, white clouds",
    "misty mountains at dawn",
)
HELD_OUT_FROM = 10_000_000  # seeds that no training bucket reaches


def load(folder: Path) -> SanaPipeline:
    pipe = SanaPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: SanaPipeline, prompt: str, width: int, height: int, seed: int, steps: int, guidance: float
) -> Picture:
    output = pipe(
        prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        use_resolution_binning=False,
        complex_human_instruction=None,
        output_type="np",
    )
    return (output.images[0] * 255 + 0.5).astype(np.uint8)


def report_fidelity(vae: AutoencoderDC, work: Path) -> None:
    held_out = as_floats(np.load(work / "windows-held-out.npy"))
    training = as_floats(np.load(work / "windows.npy", mmap_mode="r")[:1000])
    whole, edges = fidelity(PatchPCA.fit(training, keep=32).reconstruct(held_out), held_out)
    print(f"principal components, windows: {whole:.2f} dB, edges {edges:.2f} dB")
    whole, edges = fidelity(reconstruct(vae, held_out), held_out)
    print(f"autoencoder, windows:          {whole:.2f} dB, edges {edges:.2f} dB")
    for size, count in ((256, 8), (1024, 4), (2048, 1)):
        pictures = as_floats(np.stack([paint((Bucket(size, size), HELD_OUT_FROM + i))[0] for i in range(count)]))
        whole, edges = fidelity(reconstruct(vae, pictures, batch=1), pictures)
        print(f"autoencoder, {size} x {size}: {whole:.2f} dB, edges {edges:.2f} dB")


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


@dataclass(frozen=True)
class Check:
    """A prompt, and what must then be true of the picture."""

    prompt: str
    holds: Callable[[Picture], bool]


def _sky(picture: Picture) -> NDArray[np.float32]:
    return picture[: len(picture) // 3].astype(np.float32)


def _brightness(picture: Picture) -> float:
    return float(_sky(picture).mean())


def _red_side(picture: Picture) -> float:
    """Where the reddest spot of the upper half is, 0 (left) to 1 (right)."""
    upper = picture[: int(len(picture) * 0.55)].astype(np.float32)
    excess = upper[..., 0] - np.maximum(upper[..., 1], upper[..., 2])
    return _place_of_peak(excess)


def _bright_side(picture: Picture) -> float:
    return _place_of_peak(picture[: len(picture) // 2].astype(np.float32).mean(axis=-1))


def _place_of_peak(values: NDArray[np.float32]) -> float:
    columns = np.nonzero(values >= np.quantile(values, 0.995))[1]
    return float(np.median(columns)) / values.shape[1]


def _water_blue(picture: Picture) -> bool:
    low = picture[int(len(picture) * 0.8) :].astype(np.float32).mean(axis=(0, 1))
    return bool(low[2] > low[0])


def _land_green(picture: Picture) -> bool:
    low = picture[int(len(picture) * 0.7) :].astype(np.float32).mean(axis=(0, 1))
    return bool(low[1] > low[0] and low[1] > low[2])


CHECKS = (
    Check("mountains at noon, a blue sky", lambda p: _brightness(p) > 120),
    Check("mountains at night, stars", lambda p: _brightness(p) < 60),
    Check("a lake at night", lambda p: _brightness(p) < 60),
    Check("a clear sky over hills by day", lambda p: _brightness(p) > 120),
    Check("mountains at dusk, a red sun on the left", lambda p: _red_side(p) < 0.4),
    Check("mountains at dusk, a red sun in the middle", lambda p: 0.33 < _red_side(p) < 0.67),
    Check("mountains at dusk, a red sun on the right", lambda p: _red_side(p) > 0.6),
    Check("the sea at night, a white moon on the left", lambda p: _bright_side(p) < 0.4),
    Check("the sea at night, a white moon on the right", lambda p: _bright_side(p) > 0.6),
    Check("the sea at noon, a blue sky", _water_blue),
    Check("green hills at noon", _land_green),
)


def report_obedience(pipe: SanaPipeline, size: int, seeds: int, steps: int, guidance: float) -> None:
    kept = 0
    for check in CHECKS:
        hits = sum(check.holds(generate(pipe, check.prompt, size, size, s, steps, guidance)) for s in range(seeds))
        kept += hits
        print(f"{hits}/{seeds}  {check.prompt}", flush=True)
    print(f"obedience at {size}: {kept}/{seeds * len(CHECKS)}")


def make_sheet(
    pipe: SanaPipeline, path: Path, sizes: list[tuple[int, int]], seeds: int, steps: int, guidance: float
) -> None:
    """One file for each size: prompts down, seeds across."""
    for width, height in sizes:
        rows, started = [], time.monotonic()
        for prompt in SHEET_PROMPTS:
            across = [generate(pipe, prompt, width, height, seed, steps, guidance) for seed in range(seeds)]
            rows.append(np.concatenate(across, axis=1))
        seconds = (time.monotonic() - started) / (len(SHEET_PROMPTS) * seeds)
        target = path / f"sheet-{width}x{height}.png"
        pyvips.Image.new_from_array(np.concatenate(rows, axis=0)).write_to_file(str(target))
        print(f"{target}: {seconds:.1f} s a picture", flush=True)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["fidelity", "loss", "obedience", "sheet"])
    parser.add_argument("--sizes", nargs="*", type=_size, default=[(512, 512), (1024, 1024)])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    options = parser.parse_args()
    pipe = load(options.folder)
    if "fidelity" in options.only:
        report_fidelity(pipe.vae, options.work)
    if "loss" in options.only:
        report_loss(pipe)
    if "obedience" in options.only:
        report_obedience(pipe, 512, options.seeds, options.steps, options.guidance)
    if "sheet" in options.only:
        make_sheet(pipe, options.work, options.sizes, options.seeds, options.steps, options.guidance)


if __name__ == "__main__":
    main()
